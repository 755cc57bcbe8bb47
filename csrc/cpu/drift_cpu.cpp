// The fused drift op on processors: one problem a task, partial sums added in the order of the problems.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../checks.h"
#include "problems.h"

namespace drift_accel {

const char* cpu_instructions() { return cpu::choose_kernels().name; }

namespace cpu {
namespace {

// Coefficients of several temperatures are held at once while the features pass, up to this many floats.
constexpr int64_t kCoefficientFloats = int64_t{1} << 18;
// What packing a feature costs, in multiplications of the products.
constexpr int64_t kPackingCost = 12;

using OptionalTensor = std::optional<at::Tensor>;

Features features_of(const Problem& problem) {
  return {problem.sizes, problem.type, problem.generated, problem.negatives, problem.positives, problem.weights};
}

Scales make_scales(const float* values, const Options& options, int64_t S) {
  const float s = values[0], mean_square = values[1];
  const float logit_scale = s < kSmallestScale ? kSmallestScale : s;  // a NaN comes through
  const double u = s / std::sqrt(static_cast<double>(S));
  return {1.0f / (options.squared ? mean_square : logit_scale), 1.0 / (u < kSmallestScale ? kSmallestScale : u)};
}

// What one task works in: the pairs of one problem, ready to be coupled.
class Coupler {
 public:
  static int64_t floats(const Call& call, const Distances& distances) {
    return 2 * call.pairs + 2 * call.layout.rows + call.layout.slots + target_floats(call.layout) +
           std::max(distances.scratch(), call.kernels.coupling_scratch(call.layout)) + 6 * 16;
  }

  Coupler(const Call& call, const Distances& distances, const Options& options, const Scales& scales, Scratch& memory)
      : call_(call), distances_(distances), options_(options), scales_(scales) {
    const int64_t rows = call.layout.rows;
    pairs_.z = memory.take(call.pairs);
    affinities_ = memory.take(call.pairs);
    pairs_.row_min[0] = memory.take(rows);
    pairs_.row_min[1] = memory.take(rows);
    pairs_.column_min = memory.take(call.layout.slots);
    targets_ = make_targets(call, options, memory.take(target_floats(call.layout)));
    scratch_ = memory.take(std::max(distances.scratch(), call.kernels.coupling_scratch(call.layout)));
    std::memset(pairs_.row_min[0], 0, static_cast<size_t>(rows) * sizeof(float));
    std::memset(pairs_.row_min[1], 0, static_cast<size_t>(rows) * sizeof(float));
  }

  // The distances of problem b; they become normalised distances at the next call.
  const float* measure(int64_t b) {
    distances_.compute(b, pairs_.z, scratch_);
    weigh_targets(call_, options_, b, targets_);
    return pairs_.z;
  }
  const Targets& targets() const { return targets_; }
  void normalise() { call_.kernels.normalise(call_.layout, options_, scales_, targets_, pairs_); }

  void couple(int64_t t, float scale, bool accumulate, float* output, DiagnosticSums* sums = nullptr) {
    call_.kernels.couple(call_.layout, options_, targets_, pairs_, options_.temperatures[t], scale, accumulate, affinities_,
                         output, scratch_, sums);
  }

 private:
  const Call& call_;
  const Distances& distances_;
  const Options& options_;
  const Scales& scales_;
  Pairs pairs_{};
  Targets targets_{};
  float *affinities_, *scratch_;
};

// Coefficients of as many temperatures as fit, one matrix each; rows past G stay 0.
class CoefficientSet {
 public:
  CoefficientSet(const Call& call, int64_t wanted, Scratch& memory) : matrices(static_cast<size_t>(capacity(call, wanted))) {
    for (const float*& matrix : matrices) {
      float* taken = memory.take(call.pairs);
      std::memset(taken, 0, static_cast<size_t>(call.pairs) * sizeof(float));
      matrix = taken;
    }
  }
  static int64_t capacity(const Call& call, int64_t wanted) {
    return std::max<int64_t>(1, std::min(wanted, kCoefficientFloats / call.pairs));
  }
  static int64_t floats(const Call& call, int64_t wanted) { return capacity(call, wanted) * (call.pairs + 16); }
  float* at(int64_t t) { return const_cast<float*>(matrices[static_cast<size_t>(t)]); }

  std::vector<const float*> matrices;
};

// squares[t] of temperature t's field over features begin to end; scale[t] multiplies the coefficients.
void add_field_squares(const Call& call, Coupler& coupler, CoefficientSet& set, int64_t b, int64_t begin, int64_t end,
                       const float* scale, int64_t num_temperatures, double* squares, float* scratch) {
  const auto capacity = static_cast<int64_t>(set.matrices.size());
  for (int64_t t = 0; t < num_temperatures; t += capacity) {
    const int64_t count = std::min(capacity, num_temperatures - t);
    for (int64_t n = 0; n < count; ++n) coupler.couple(t + n, scale == nullptr ? 1.0f : scale[t + n], false, set.at(n));
    call.kernels.field(call.features, call.layout, b, begin, end, set.matrices.data(), count, 1.0f, nullptr, squares + t,
                       scratch);
  }
}

std::tuple<at::Tensor, at::Tensor> distances(const at::Tensor& generated, const at::Tensor& positives,
                                             const OptionalTensor& negatives, const OptionalTensor& negative_weight, bool keep) {
  const Problem problem = check_problem(generated, positives, negatives, negative_weight);
  const Sizes& sizes = problem.sizes;
  const auto float_options = generated.options().dtype(at::kFloat);
  at::Tensor kept = keep ? at::empty({sizes.B, sizes.G, sizes.M()}, float_options) : at::empty({0}, float_options);
  float* const kept_data = keep ? kept.mutable_data_ptr<float>() : nullptr;

  const Call call(features_of(problem), choose_kernels());
  const Layout& layout = call.layout;
  const Distances computed(call, nullptr);
  std::vector<double> parts(static_cast<size_t>(sizes.B) * 3);
  at::parallel_for(0, sizes.B, 1, [&](int64_t begin, int64_t end) {
    const Options options{};
    Scratch memory(call.pairs + target_floats(layout) + computed.scratch() + 64);
    float* pairs = memory.take(call.pairs);
    Targets targets = make_targets(call, options, memory.take(target_floats(layout)));
    float* scratch = memory.take(computed.scratch());
    for (int64_t b = begin; b < end; ++b) {
      computed.compute(b, pairs, scratch);
      weigh_targets(call, options, b, targets);
      double* part = parts.data() + b * 3;
      call.kernels.distance_sums(layout, pairs, targets.weight, part);
      part[2] = 0;
      for (int64_t slot = 0; slot < layout.slots; ++slot) part[2] += targets.weight[slot];
      part[2] *= static_cast<double>(sizes.G);
      if (!keep) continue;
      float* to = kept_data + b * sizes.G * sizes.M();
      for (int64_t i = 0; i < sizes.G; ++i, to += sizes.M()) {
        const float* from = pairs + i * layout.slots;
        std::memcpy(to, from, static_cast<size_t>(layout.repelling) * sizeof(float));
        std::memcpy(to + layout.repelling, from + layout.first_positive, static_cast<size_t>(layout.P) * sizeof(float));
      }
    }
  });
  at::Tensor sums = at::empty({3}, float_options);
  for (int64_t n = 0; n < 3; ++n) {
    double sum = 0;
    for (int64_t b = 0; b < sizes.B; ++b) sum += parts[static_cast<size_t>(b * 3 + n)];
    sums.mutable_data_ptr<float>()[n] = static_cast<float>(sum);
  }
  return {kept, sums};
}

// Whether n_tau is cheaper from the targets' Gram matrix than from the fields themselves, by counting multiplications.
bool prefer_gram(const Call& call, int64_t num_temperatures) {
  const Layout& l = call.layout;
  const int64_t S = call.features.sizes.S, own = l.slots - l.first_gram, width = call.kernels.vector_width;
  const int64_t by_gram = S * (own * (own + width) / 2 + kPackingCost * own) +
                          num_temperatures * l.G * (l.slots * (l.slots + width) / 2) + 2 * l.slots * l.slots;
  const int64_t by_field = S * (num_temperatures * l.rows * l.num_targets() + kPackingCost * l.num_targets());
  return by_gram < by_field;
}

// Sum of V_tau^2 over rows and features of every problem (or segment of one), [tasks, T], before the division by u^2.
std::vector<double> norms_by_gram(const Call& call, const Distances& distances, const Options& options, const Scales& scales) {
  const int64_t T = options.num_temperatures, B = call.features.sizes.B;
  const Layout& l = call.layout;
  const Products products(call, l.first_gram, l.slots, l.first_gram);
  std::vector<double> parts(static_cast<size_t>(B * T));
  at::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    const int64_t packing = products.scratch();
    Scratch memory(Coupler::floats(call, distances) + CoefficientSet::floats(call, T) + products.floats() + l.slots * l.slots +
                   2 * l.slots + packing + 64);
    Coupler coupler(call, distances, options, scales, memory);
    CoefficientSet set(call, T, memory);
    float* own = memory.take(products.floats());
    float* norms = memory.take(l.slots);
    float* square = memory.take(l.slots);
    float* gram = memory.take(l.slots * l.slots);
    float* scratch = memory.take(packing);
    for (int64_t b = begin; b < end; ++b) {
      double* squares = parts.data() + b * T;
      const float* d = coupler.measure(b);
      products.compute(b, own, norms, scratch);
      const bool determined = call.kernels.gram(l, coupler.targets().member, d, own, norms, gram, square, scratch);
      coupler.normalise();
      if (!determined) {
        add_field_squares(call, coupler, set, b, 0, call.features.sizes.S, nullptr, T, squares, scratch);
        continue;
      }
      for (int64_t t = 0; t < T; ++t) {
        coupler.couple(t, 1.0f, false, set.at(0));
        squares[t] = call.kernels.gram_norm(l, set.at(0), gram, square);
        if (std::isnan(squares[t])) {
          call.kernels.field(call.features, l, b, 0, call.features.sizes.S, set.matrices.data(), 1, 1.0f, nullptr, squares + t,
                             scratch);
        }
      }
    }
  });
  return parts;
}

std::vector<double> norms_by_field(const Call& call, const Distances& distances, const Options& options, const Scales& scales) {
  const int64_t T = options.num_temperatures, tasks = call.features.sizes.B * call.segments;
  std::vector<double> parts(static_cast<size_t>(tasks * T));
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const int64_t packing = call.kernels.packing_scratch(call.layout);
    Scratch memory(Coupler::floats(call, distances) + CoefficientSet::floats(call, T) + packing + 64);
    Coupler coupler(call, distances, options, scales, memory);
    CoefficientSet set(call, T, memory);
    float* scratch = memory.take(packing);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / call.segments, segment = task % call.segments;
      coupler.measure(b);
      coupler.normalise();
      add_field_squares(call, coupler, set, b, call.segment_begin(segment), call.segment_begin(segment + 1), nullptr, T,
                        parts.data() + task * T, scratch);
    }
  });
  return parts;
}

at::Tensor field_norms(const at::Tensor& generated, const at::Tensor& positives, const OptionalTensor& negatives,
                       const OptionalTensor& negative_weight, const OptionalTensor& kept, const at::Tensor& scale_values,
                       at::ArrayRef<double> temperatures, c10::string_view coupling, c10::string_view drift_form,
                       c10::string_view weight_placement, c10::string_view metric, c10::string_view field,
                       double affinity_floor, bool mask_self, c10::string_view sinkhorn_marginal, int64_t sinkhorn_iterations,
                       double attraction, double repulsion) {
  const Problem problem = check_problem(generated, positives, negatives, negative_weight);
  const Options options = parse_options(temperatures, coupling, drift_form, weight_placement, metric, field, affinity_floor,
                                        mask_self, sinkhorn_marginal, sinkhorn_iterations, attraction, repulsion);
  const Sizes& sizes = problem.sizes;
  const Scales scales = make_scales(check_statistics("scales", scale_values, 2, generated), options, sizes.S);
  const Call call(features_of(problem), choose_kernels());
  const Distances distances(call, check_distances(kept, problem, generated));
  const int64_t T = options.num_temperatures;
  const std::vector<double> parts =
      prefer_gram(call, T) ? norms_by_gram(call, distances, options, scales) : norms_by_field(call, distances, options, scales);
  at::Tensor result = at::empty({T + 1}, generated.options().dtype(at::kFloat));
  float* values = result.mutable_data_ptr<float>();
  for (int64_t t = 0; t < T; ++t) {
    double sum = 0;
    for (size_t n = static_cast<size_t>(t); n < parts.size(); n += static_cast<size_t>(T)) sum += parts[n];
    sum *= scales.feature_factor * scales.feature_factor;
    values[t] = static_cast<float>(sum < 0 ? 0 : sum);  // rounding of a field that is zero
  }
  values[T] = static_cast<float>(static_cast<double>(sizes.B) * sizes.G * sizes.S);
  return result;
}

// Means of the diagnostics over all problems, [T, 4].
at::Tensor mean_diagnostics(const std::vector<DiagnosticSums>& parts, int64_t T, const Sizes& sizes, const at::Tensor& like) {
  at::Tensor result = at::empty({T, kNumDiagnostics}, like.options().dtype(at::kFloat));
  float* values = result.mutable_data_ptr<float>();
  const double rows = static_cast<double>(sizes.B) * sizes.G;
  for (int64_t t = 0; t < T; ++t) {
    for (int n = 0; n < kNumDiagnostics; ++n) {
      double sum = 0;
      for (int64_t b = 0; b < sizes.B; ++b) sum += parts[static_cast<size_t>(b * T + t)].value[n];
      const bool over_pairs = n == kFloorShare || n == kMeanCoefficient;
      values[t * kNumDiagnostics + n] = static_cast<float>(sum / (over_pairs ? rows * static_cast<double>(sizes.M()) : rows));
    }
  }
  return result;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> loss_and_gradient(
    const at::Tensor& generated, const at::Tensor& positives, const OptionalTensor& negatives,
    const OptionalTensor& negative_weight, const OptionalTensor& kept, const at::Tensor& scale_values,
    const at::Tensor& sqnorm_values, at::ArrayRef<double> temperatures, c10::string_view coupling, c10::string_view drift_form,
    c10::string_view weight_placement, c10::string_view metric, c10::string_view field, double affinity_floor, bool mask_self,
    c10::string_view sinkhorn_marginal, int64_t sinkhorn_iterations, double attraction, double repulsion, bool diagnostics) {
  const Problem problem = check_problem(generated, positives, negatives, negative_weight);
  const Options options = parse_options(temperatures, coupling, drift_form, weight_placement, metric, field, affinity_floor,
                                        mask_self, sinkhorn_marginal, sinkhorn_iterations, attraction, repulsion);
  const Sizes& sizes = problem.sizes;
  const int64_t T = options.num_temperatures;
  const Scales scales = make_scales(check_statistics("scales", scale_values, 2, generated), options, sizes.S);
  const float* sqnorms = check_statistics("sqnorms", sqnorm_values, T, generated);
  float inverse_norm[kMaxTemperatures];
  for (int64_t t = 0; t < T; ++t) {
    inverse_norm[t] = 1.0f / std::sqrt(sqnorms[t] < kSmallestSqnorm ? kSmallestSqnorm : sqnorms[t]);
  }

  at::Tensor loss = at::empty({sizes.B}, generated.options().dtype(at::kFloat));
  at::Tensor gradient = at::empty({sizes.B, sizes.G, sizes.S}, generated.options(), at::MemoryFormat::Contiguous);
  auto* const gradient_data = static_cast<char*>(gradient.mutable_data_ptr());
  const int64_t gradient_bytes = sizes.G * sizes.S * static_cast<int64_t>(gradient.element_size());
  const double count = static_cast<double>(sizes.G) * sizes.S;
  const auto factor = static_cast<float>(-2.0 / count * scales.feature_factor * scales.feature_factor);

  const Call call(features_of(problem), choose_kernels());
  const Distances distances(call, check_distances(kept, problem, generated));
  const int64_t tasks = sizes.B * call.segments;
  std::vector<double> squares(static_cast<size_t>(tasks));
  std::vector<DiagnosticSums> sums(diagnostics ? static_cast<size_t>(sizes.B * T) : 0);
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const int64_t packing = call.kernels.packing_scratch(call.layout);
    const int64_t separate = options.separate_losses ? T : 0;
    Scratch memory(Coupler::floats(call, distances) + CoefficientSet::floats(call, std::max<int64_t>(separate, 1)) + call.pairs +
                   packing + 64);
    Coupler coupler(call, distances, options, scales, memory);
    CoefficientSet set(call, std::max<int64_t>(separate, 1), memory);
    float* summed = memory.take(call.pairs);
    float* scratch = memory.take(packing);
    std::memset(summed, 0, static_cast<size_t>(call.pairs) * sizeof(float));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / call.segments, segment = task % call.segments;
      const int64_t first = call.segment_begin(segment), last = call.segment_begin(segment + 1);
      coupler.measure(b);
      coupler.normalise();
      for (int64_t t = 0; t < T; ++t) {
        DiagnosticSums* const own = diagnostics && segment == 0 ? &sums[static_cast<size_t>(b * T + t)] : nullptr;
        coupler.couple(t, inverse_norm[t], t > 0, summed, own);
      }
      double of_task[kMaxTemperatures];
      call.kernels.field(call.features, call.layout, b, first, last, &summed, 1, factor, gradient_data + b * gradient_bytes,
                         of_task, scratch);
      if (options.separate_losses) {
        add_field_squares(call, coupler, set, b, first, last, inverse_norm, T, of_task, scratch);
        for (int64_t t = 1; t < T; ++t) of_task[0] += of_task[t];
      }
      squares[static_cast<size_t>(task)] = of_task[0];
    }
  });
  float* losses = loss.mutable_data_ptr<float>();
  for (int64_t b = 0; b < sizes.B; ++b) {
    double sum = 0;
    for (int64_t n = 0; n < call.segments; ++n) sum += squares[static_cast<size_t>(b * call.segments + n)];
    losses[b] = static_cast<float>(sum * scales.feature_factor * scales.feature_factor / count);
  }
  at::Tensor means = diagnostics ? mean_diagnostics(sums, T, sizes, generated)
                                 : at::empty({0}, generated.options().dtype(at::kFloat));
  return {loss, gradient, means};
}

}  // namespace
}  // namespace cpu

TORCH_LIBRARY_IMPL(drift_accel, CPU, library) {
  library.impl("distances", &cpu::distances);
  library.impl("field_norms", &cpu::field_norms);
  library.impl("loss_and_gradient", &cpu::loss_and_gradient);
}

}  // namespace drift_accel
