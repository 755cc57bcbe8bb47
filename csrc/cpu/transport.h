// The coupling by entropic transport, as drift_accel/drift/couplings.py does it. Included inside of an instruction set's
// namespace.

constexpr float kFar = 1e30f;  // z of a pair that has no share

// A range of slots that is coupled by itself: all targets in the joint form, either side of the split form.
struct Side {
  int64_t begin, end;  // slots
  const float* row_min;
};

// G times the entropic transport plan, in logarithms to the base 2: rows are updated first, then columns.
static void couple_by_transport(const Layout& l, const Options& options, const Side& side, const Targets& targets,
                                const Pairs& pairs, float tau, float* affinities, float* scratch) {
  float* row_dual = scratch;
  float* column_dual = row_dual + round_up(l.rows, kWidth);
  float* column_log = column_dual + l.slots;  // log2 of the columns' mass
  float* highest = column_log + l.slots;
  float* sum = highest + l.slots;
  const float steepness = kLog2e / tau;
  double mass = 0;
  int64_t count = 0;
  for (int64_t j = side.begin; j < side.end; ++j) {
    if (!l.holds_member(j)) continue;
    mass += at_least(targets.weight[j], kSmallestMarginalWeight);
    ++count;
  }
  for (int64_t j = side.begin; j < side.end; ++j) {
    column_dual[j] = 0;
    column_log[j] = options.weighted_columns ? at_least(targets.weight[j], kSmallestMarginalWeight) / static_cast<float>(mass)
                                             : 1.0f / static_cast<float>(count);
  }
  for (int64_t j = side.begin; j < side.end; j += kWidth) store(column_log + j, log2(load(column_log + j)));
  const float row_log = log2(splat(1.0f / static_cast<float>(l.G)))[0];
  for (int64_t i = 0; i < l.G; ++i) {  // logits
    for (int64_t j = side.begin; j < side.end; j += kWidth) {
      Vec logit = load(pairs.z + i * l.slots + j) * -steepness;
      if (!options.weighted_columns) logit += load(targets.log_weight + j) * kLog2e;
      store(affinities + i * l.slots + j, logit);
    }
  }
  for (int32_t n = 0; n < options.sinkhorn_iterations; ++n) {
    for (int64_t j = side.begin; j < side.end; j += kWidth) {
      store(highest + j, splat(-kFar * kFar));
      store(sum + j, splat(0.0f));
    }
    for (int64_t i = 0; i < l.G; ++i) {
      const float* logits = affinities + i * l.slots;
      Vec top = splat(-__builtin_inff());
      for (int64_t j = side.begin; j < side.end; j += kWidth) {
        const Vec value = load(logits + j) + load(column_dual + j);
        top = top < value ? value : top;
      }
      const float high = -min_lanes(-top);
      Vec total = splat(0.0f);
      for (int64_t j = side.begin; j < side.end; j += kWidth) {
        total += exp2(load(logits + j) + load(column_dual + j) - high);
      }
      row_dual[i] = row_log - (high + log2(splat(sum_lanes(total)))[0]);
      for (int64_t j = side.begin; j < side.end; j += kWidth) {
        const Vec value = load(logits + j) + row_dual[i], known = load(highest + j);
        store(highest + j, known < value ? value : known);
      }
    }
    for (int64_t i = 0; i < l.G; ++i) {
      for (int64_t j = side.begin; j < side.end; j += kWidth) {
        const Vec value = load(affinities + i * l.slots + j) + row_dual[i] - load(highest + j);
        store(sum + j, load(sum + j) + exp2(value));
      }
    }
    for (int64_t j = side.begin; j < side.end; j += kWidth) {
      const Vec dual = load(column_log + j) - (load(highest + j) + log2(load(sum + j)));
      store(column_dual + j, load(targets.padding + j) > 0.0f ? splat(0.0f) : dual);
    }
  }
  for (int64_t i = 0; i < l.G; ++i) {
    float* row = affinities + i * l.slots;
    for (int64_t j = side.begin; j < side.end; j += kWidth) {
      store(row + j, exp2(load(row + j) + row_dual[i] + load(column_dual + j)) * static_cast<float>(l.G));
    }
  }
}
