// From normalised distances to coefficients, one temperature at a time (steps 3 to 5), as drift_accel/drift/couplings.py does it.
// Included inside of an instruction set's namespace.

template <bool kValue>
struct Constant {
  static constexpr bool value = kValue;
};

// Sums of A over the rows of both sides, [rows] each.
struct Masses {
  float *negative, *positive;
};

static void normalise(const Layout& l, const Options& options, const Scales& scales, const Targets& targets, Pairs& pairs) {
  const float factor = scales.logit_factor;
  const int64_t middle = l.first_positive;
  for (int64_t j = 0; j < l.slots; ++j) pairs.column_min[j] = kFar;
  for (int64_t i = 0; i < l.G; ++i) {
    float* row = pairs.z + i * l.slots;
    if (options.mask_self) {  // as a distance, so that one loop serves all pairs
      const float penalty = kSelfPairPenalty / factor;
      row[i] = options.squared ? __builtin_sqrtf(row[i] * row[i] + penalty) : row[i] + penalty;
    }
    Vec least[2] = {splat(kFar), splat(kFar)};
    const auto run = [&](int64_t begin, int64_t end, Vec& low, auto squared) {
      for (int64_t j = begin; j < end; j += kWidth) {
        const Vec d = load(row + j);
        const Vec z = (squared.value ? d * d : d) * factor + load(targets.padding + j);
        store(row + j, z);
        low = smaller(low, z);
        store(pairs.column_min + j, smaller(load(pairs.column_min + j), z));
      }
    };
    const auto both = [&](auto squared) {
      run(0, middle, least[0], squared);
      run(middle, l.slots, least[1], squared);
    };
    options.squared ? both(Constant<true>{}) : both(Constant<false>{});
    const float low[2] = {min_lanes(least[0]), min_lanes(least[1])};
    pairs.row_min[0][i] = options.split || low[0] < low[1] ? low[0] : low[1];
    pairs.row_min[1][i] = low[1];
  }
}

// Rows' and columns' smallest z, of the pairs that have a share, differ by so little that exp((row_min - z) / tau) of every
// pair that matters is a normal number; then one exponential a pair serves both softmaxes.
static bool exponents_fit(const Layout& l, const Side& side, const Targets& targets, const float* column_min, float tau,
                          float range, float* lowest) {
  float low = side.row_min[0], high = side.row_min[0];
  for (int64_t i = 1; i < l.G; ++i) {
    low = side.row_min[i] < low ? side.row_min[i] : low;
    high = side.row_min[i] > high ? side.row_min[i] : high;
  }
  for (int64_t j = side.begin; j < side.end; ++j) {
    const bool counts = column_min[j] < 0.1f * kFar;
    high = counts && column_min[j] > high ? column_min[j] : high;
  }
  *lowest = low;
  return !(high - low > range * tau) && targets.heaviest <= 1e8f * targets.lightest;
}

struct RowSums {
  float negative, positive;
};

// Scale a row of A into coefficients: c = A times the other side's mass, or A over its own (step 5), times the multipliers.
// What they do not leave at a sum of zero goes to x_i itself, so that the origin does not matter.
static void write_row(const Layout& l, const Options& options, int64_t i, const float* A, RowSums mass, float scale,
                      bool accumulate, float* output) {
  float negative, positive, rest = 0;
  if (options.split) {
    negative = -options.repulsion / at_least(mass.negative, kSmallestRowSum);
    positive = options.attraction / at_least(mass.positive, kSmallestRowSum);
  } else {
    negative = -options.repulsion * mass.positive;
    positive = options.attraction * mass.negative;
  }
  negative *= scale;
  positive *= scale;
  if (options.split || options.attraction != 1.0f || options.repulsion != 1.0f) {
    rest = negative * mass.negative + positive * mass.positive;
  }
  const auto write = [&](int64_t begin, int64_t end, float factor) {
    for (int64_t j = begin; j < end; j += kWidth) {
      const Vec c = load(A + j) * factor;
      store(output + j, accumulate ? load(output + j) + c : c);
    }
  };
  write(0, l.first_positive, negative);
  write(l.first_positive, l.slots, positive);
  output[i] -= rest;
}

static void add_diagnostics(const Layout& l, const Options& options, int64_t i, const float* A, RowSums mass,
                            DiagnosticSums* sums) {
  constexpr double kTiny = 1e-300;
  double squares[2] = {0, 0}, coefficients = 0;
  const float masses[2] = {mass.negative, mass.positive};
  float factors[2] = {-options.repulsion * mass.positive, options.attraction * mass.negative};
  if (options.split) {
    factors[0] = -options.repulsion / at_least(mass.negative, kSmallestRowSum);
    factors[1] = options.attraction / at_least(mass.positive, kSmallestRowSum);
  }
  const bool plain = !options.split && options.attraction == 1.0f && options.repulsion == 1.0f;
  const float rest = plain ? 0.0f : factors[0] * masses[0] + factors[1] * masses[1];
  for (int64_t j = 0; j < l.slots; ++j) {
    const int side = j < l.first_positive ? 0 : 1;
    squares[side] += static_cast<double>(A[j]) * A[j];
    coefficients += __builtin_fabsf(A[j] * factors[side] - (j == i ? rest : 0.0f));
  }
  for (int side = 0; side < 2; ++side) {
    const double least = squares[side] < kTiny ? kTiny : squares[side];
    sums->value[side == 0 ? kNegativeSampleSize : kPositiveSampleSize] +=
        static_cast<double>(masses[side]) * masses[side] / least;
  }
  sums->value[kMeanCoefficient] += coefficients;
}

// One exponential a pair: E = exp((row_min_i - z) / tau), row = E / sum_j w_j E, col = E r_i / sum_i E r_i with
// r_i = exp((lowest - row_min_i) / tau), so sqrt(row col) = E a_i b_j. `row` alone: A = E / sum_j.
template <bool kTwoSided, bool kBiased>
static void couple_by_products(const Layout& l, const Options& options, const Side& side, const Targets& targets,
                               const Pairs& pairs, float tau, float lowest, float* affinities, Masses masses, float* scratch,
                               DiagnosticSums* sums) {
  float* row_factor = scratch;                // a_i [rows]
  float* column = row_factor + round_up(l.rows, kWidth);  // sum_i E r_i, then b_j [slots]
  float* own_weight = column + l.slots;       // r_i [rows]
  const float steepness = kLog2e / tau;
  const float root_floor = __builtin_sqrtf(options.affinity_floor);
  if (kTwoSided) {
    for (int64_t j = side.begin; j < side.end; j += kWidth) store(column + j, splat(0.0f));
    for (int64_t i = 0; i < l.G; i += kWidth) {
      store(own_weight + i, exp2((lowest - load(side.row_min + i)) * steepness));
    }
  }
  for (int64_t i = 0; i < l.G; ++i) {
    const float* z = pairs.z + i * l.slots;
    float* E = affinities + i * l.slots;
    const float least = side.row_min[i], own = kTwoSided ? own_weight[i] : 0.0f;
    Vec sum = splat(0.0f);
    for (int64_t j = side.begin; j < side.end; j += kWidth) {
      const Vec e = exp2((least - load(z + j)) * steepness);
      store(E + j, e);
      sum += kBiased ? e * load(targets.weight + j) : e;
      if (kTwoSided) store(column + j, load(column + j) + e * own);
    }
    row_factor[i] = sum_lanes(sum);
  }
  if (kTwoSided) {
    for (int64_t i = 0; i < l.G; ++i) row_factor[i] = __builtin_sqrtf(own_weight[i] / row_factor[i]);
    for (int64_t j = side.begin; j < side.end; ++j) {
      const float b = 1.0f / __builtin_sqrtf(column[j]);
      column[j] = column[j] == 0.0f ? 0.0f : (kBiased ? b * targets.root_weight[j] : b);
    }
  } else {
    for (int64_t i = 0; i < l.G; ++i) row_factor[i] = 1.0f / row_factor[i];
  }
  const bool has_floor = kTwoSided && options.affinity_floor > 0;
  for (int64_t i = 0; i < l.G; ++i) {
    float* row = affinities + i * l.slots;
    const float a = row_factor[i];
    if (sums != nullptr && has_floor) {
      for (int64_t j = side.begin; j < side.end; ++j) {
        sums->value[kFloorShare] += l.holds_member(j) && row[j] * column[j] * a <= root_floor ? 1 : 0;
      }
    }
    const auto finish = [&](int64_t begin, int64_t end) {
      Vec mass = splat(0.0f);
      for (int64_t j = begin; j < end; j += kWidth) {
        Vec A = load(row + j);
        if (kTwoSided) {
          A = at_least(A * load(column + j) * a, splat(root_floor)) * load(targets.factor + j);
        } else {
          A = A * a * load(targets.weight + j);
        }
        store(row + j, A);
        mass += A;
      }
      return sum_lanes(mass);
    };
    if (side.begin < l.first_positive) masses.negative[i] = finish(side.begin, l.first_positive);
    if (side.end > l.first_positive) masses.positive[i] = finish(l.first_positive, side.end);
  }
}

static void sum_rows(const Layout& l, const Side& side, const float* affinities, Masses masses) {
  for (int64_t i = 0; i < l.G; ++i) {
    const auto sum = [&](int64_t begin, int64_t end) {
      Vec mass = splat(0.0f);
      for (int64_t j = begin; j < end; j += kWidth) mass += load(affinities + i * l.slots + j);
      return sum_lanes(mass);
    };
    if (side.begin < l.first_positive) masses.negative[i] = sum(side.begin, l.first_positive);
    if (side.end > l.first_positive) masses.positive[i] = sum(l.first_positive, side.end);
  }
}

INLINE float exp_of(float x) { return exp2(splat(x * kLog2e))[0]; }
INLINE float log_of(float x) { return log2(splat(x))[0] * kLn2; }

// The same in logarithms, three exponentials a pair: for distances so uneven that the products above would lose pairs.
template <bool kTwoSided, bool kBiased>
static void couple_by_logarithms(const Layout& l, const Options& options, const Side& side, const Targets& targets,
                                 const Pairs& pairs, float tau, float* affinities, float* scratch, DiagnosticSums* sums) {
  float* column_log = scratch;                  // log2 of sum_i exp((column_min - z) / tau)
  float* bias = column_log + l.slots;           // tau log w: z - bias is what the row softmax sees
  const float steepness = kLog2e / tau;
  for (int64_t j = side.begin; j < side.end; ++j) {
    column_log[j] = 0;
    bias[j] = kBiased ? tau * targets.log_weight[j] : 0.0f;
  }
  if (kTwoSided) {
    for (int64_t i = 0; i < l.G; ++i) {
      for (int64_t j = side.begin; j < side.end; j += kWidth) {
        const Vec e = exp2((load(pairs.column_min + j) - load(pairs.z + i * l.slots + j)) * steepness);
        store(column_log + j, load(column_log + j) + e);
      }
    }
    for (int64_t j = side.begin; j < side.end; j += kWidth) store(column_log + j, log2(load(column_log + j)));
  }
  const bool has_floor = kTwoSided && options.affinity_floor > 0;
  const float log_floor = has_floor ? log_of(options.affinity_floor) * 0.5f * kLog2e : 0.0f;
  for (int64_t i = 0; i < l.G; ++i) {
    const float* z = pairs.z + i * l.slots;
    float* A = affinities + i * l.slots;
    Vec least = splat(kFar);
    for (int64_t j = side.begin; j < side.end; j += kWidth) least = smaller(least, load(z + j) - load(bias + j));
    const float low = min_lanes(least);
    Vec sum = splat(0.0f);
    for (int64_t j = side.begin; j < side.end; j += kWidth) {
      sum += exp2((low - (load(z + j) - load(bias + j))) * steepness);
    }
    const float row_log = log2(splat(sum_lanes(sum)))[0];
    for (int64_t j = side.begin; j < side.end; j += kWidth) {
      const Vec row = (low - (load(z + j) - load(bias + j))) * steepness - row_log;
      Vec log_A = row;
      if (kTwoSided) {
        const Vec col = (load(pairs.column_min + j) - load(z + j)) * steepness - load(column_log + j);
        log_A = 0.5f * (row + col);
        if (has_floor) {
          if (sums != nullptr) {
            for (int k = 0; k < kWidth; ++k) {
              const bool absent = kBiased && targets.weight[j + k] == 0.0f;
              sums->value[kFloorShare] += l.holds_member(j + k) && (absent || log_A[k] <= log_floor) ? 1 : 0;
            }
          }
          log_A = at_least(log_A, splat(log_floor));
        }
      }
      store(A + j, exp2(log_A) * load((kTwoSided || kBiased ? targets.factor : targets.weight) + j));
    }
  }
}

static int64_t coupling_scratch(const Layout& l) { return 4 * round_up(l.rows, kWidth) + 5 * l.slots; }

static void couple(const Layout& l, const Options& options, const Targets& targets, const Pairs& pairs, float tau, float scale,
                   bool accumulate, float* affinities, float* output, float* scratch, DiagnosticSums* sums) {
  Side sides[2] = {{0, l.slots, pairs.row_min[0]}, {l.first_positive, l.slots, pairs.row_min[1]}};
  if (options.split) sides[0].end = l.first_positive;
  const int64_t rows = round_up(l.rows, kWidth);
  const Masses masses{scratch, scratch + rows};
  scratch += 2 * rows;
  const bool two_sided = options.coupling == Coupling::kTwoSided;
  // What is lost lies under exp(-range / 2): far under any usual floor, and without one far under the pairs that count.
  const float range = two_sided && !(options.affinity_floor >= 1e-12f) ? 40.0f : 80.0f;
  for (int n = 0; n < (options.split ? 2 : 1); ++n) {
    const Side& side = sides[n];
    if (options.coupling == Coupling::kSinkhorn) {
      couple_by_transport(l, options, side, targets, pairs, tau, affinities, scratch);
      sum_rows(l, side, affinities, masses);
      continue;
    }
    float lowest;
    const bool fit = exponents_fit(l, side, targets, pairs.column_min, tau, range, &lowest);
    const auto run = [&](auto by_products, auto by_logarithms) {
      if (fit || (!two_sided && !options.log_bias)) {
        by_products(l, options, side, targets, pairs, tau, lowest, affinities, masses, scratch, sums);
      } else {
        by_logarithms(l, options, side, targets, pairs, tau, affinities, scratch, sums);
        sum_rows(l, side, affinities, masses);
      }
    };
    if (two_sided) {
      options.log_bias ? run(couple_by_products<true, true>, couple_by_logarithms<true, true>)
                       : run(couple_by_products<true, false>, couple_by_logarithms<true, false>);
    } else {
      options.log_bias ? run(couple_by_products<false, true>, couple_by_logarithms<false, true>)
                       : run(couple_by_products<false, false>, couple_by_logarithms<false, false>);
    }
  }
  for (int64_t i = 0; i < l.G; ++i) {
    const float* A = affinities + i * l.slots;
    const RowSums mass{masses.negative[i], masses.positive[i]};
    if (sums != nullptr) add_diagnostics(l, options, i, A, mass, sums);
    write_row(l, options, i, A, mass, scale, accumulate, output + i * l.slots);
  }
}
