// The three stages as chains of kernels and products over chunks of problems. The machine that carries them out is a parameter:
// a device with its library's products (drift_cuda.cpp), or a host that runs every block serially (host_harness.cpp).
//
// A Machine has allocate(bytes), which lasts as long as the machine, and pack, product, couple, multiply_fields, finish, reduce,
// write_losses.
#pragma once

#include "plan.h"

namespace drift_accel::cuda {

inline Features make_features(const Sizes& sizes, ElementType type, const Members& generated, const Members& negatives,
                              const Members& positives, const Weights& weights) {
  return {generated, negatives, positives, weights, type, static_cast<int>(sizes.G), static_cast<int>(sizes.repelling()),
          static_cast<int>(sizes.M()), sizes.S};
}

// One stage at work: what its chunks share.
template <class Machine>
class Chain {
 public:
  Chain(Machine& machine, const Plan& plan, const Features& features) : machine_(machine), plan_(plan), features_(features) {
    buffers_ = take_buffers(plan, plan.chunk, [&](int64_t bytes) { return bytes > 0 ? machine.allocate(bytes) : nullptr; });
  }

  // run(first, count) for each chunk of problems.
  template <class Run>
  void for_each_chunk(Run run) {
    for (int64_t first = 0; first < plan_.B; first += plan_.chunk) run(first, std::min(plan_.chunk, plan_.B - first));
  }

  // Products of the targets, segment after segment; the last one stays packed.
  void multiply_targets(int64_t first, int64_t count) {
    if (plan_.product_rows == 0) return;
    const int64_t rows = plan_.product_rows, targets = plan_.targets, width = plan_.segment_features;
    for (int segment = 0; segment < plan_.segments; ++segment) {
      pack(first, count, segment);
      float* out = buffers_.products + segment * count * rows * targets;
      machine_.product({buffers_.packed, buffers_.packed, out, features_.type, true, count, rows, width, targets,
                        targets * width, targets * width, rows * targets});
    }
    packed_ = plan_.segments - 1;
  }

  CouplingCall coupling_call(int64_t first, int64_t count) const {
    CouplingCall call{};
    call.features = features_;
    call.first = first;
    call.count = count;
    call.targets = plan_.targets;
    call.products = buffers_.products;
    call.square_sums = buffers_.square_sums;
    call.product_rows = plan_.product_rows;
    call.segments = plan_.segments;
    call.tiles = plan_.segments * plan_.tiles;
    call.groups = plan_.groups;
    call.coefficients = buffers_.coefficients;
    call.halves = buffers_.halves;
    call.row_scales = plan_.half ? buffers_.row_scales : nullptr;
    call.leading = static_cast<int>(leading_dimension(plan_.M));
    call.arena = buffers_.arena;
    call.arena_floats = plan_.arena_floats;
    call.gram = plan_.gram;
    return call;
  }

  // Fields of the chunk's coefficients: sums of V^2 and the gradient.
  void finish_fields(int64_t first, int64_t count, const float* scales, float* partials, void* gradient) {
    if (plan_.field_kernel) {
      machine_.multiply_fields({features_, first, count, plan_.targets, buffers_.halves, buffers_.row_scales, plan_.groups,
                                scales, gradient, partials, plan_.field_tiles});
    } else {
      finish_products(first, count, scales, partials, gradient);
    }
  }

 private:
  // The same through library products, segment after segment.
  void finish_products(int64_t first, int64_t count, const float* scales, float* partials, void* gradient) {
    const int64_t rows = plan_.parts() * plan_.groups * plan_.G, targets = plan_.targets, width = plan_.segment_features;
    const void* coefficients = plan_.half ? static_cast<const void*>(buffers_.halves) : buffers_.coefficients;
    for (int step = 0; step < plan_.segments; ++step) {
      const int segment = plan_.segments - 1 - step;  // the last one may be packed already
      if (packed_ != segment) pack(first, count, segment);
      machine_.product({coefficients, buffers_.packed, buffers_.fields, features_.type, false, count, rows, targets, width,
                        rows * targets, targets * width, rows * width});
      FinishCall call{};
      call.G = features_.G;
      call.groups = plan_.groups;
      call.S = features_.S;
      call.first = first;
      call.count = count;
      call.first_feature = segment * width;
      call.num_features = std::min(width, features_.S - call.first_feature);
      call.padded_features = width;
      call.fields = buffers_.fields;
      call.row_scales = plan_.half ? buffers_.row_scales : nullptr;
      call.type = features_.type;
      call.gradient = gradient;
      call.scales = scales;
      call.partials = partials;
      call.outputs = plan_.outputs;
      call.first_tile = segment * plan_.finish_tiles;
      call.tiles = plan_.finish_tiles;
      call.total_tiles = plan_.field_tiles;
      machine_.finish(call);
      packed_ = segment;
    }
    packed_ = -1;
  }

  void pack(int64_t first, int64_t count, int segment) {
    PackCall call{};
    call.features = features_;
    call.first = first;
    call.count = count;
    call.first_feature = segment * plan_.segment_features;
    call.num_features = std::min(plan_.segment_features, features_.S - call.first_feature);
    call.targets = plan_.targets;
    call.padded_features = plan_.segment_features;
    call.packed = buffers_.packed;
    call.square_sums = buffers_.square_sums;
    call.first_tile = segment * plan_.tiles;
    call.tiles = plan_.tiles;
    call.total_tiles = plan_.segments * plan_.tiles;
    machine_.pack(call);
    packed_ = segment;
  }

  Machine& machine_;
  const Plan& plan_;
  const Features& features_;
  Buffers buffers_{};
  int packed_ = -1;  // the segment whose targets of the current chunk lie in the workspace
};

// sums [3]; kept_distances [B][G][M] or nullptr.
template <class Machine>
void compute_distances(Machine& machine, const Limits& limits, const Sizes& sizes, const Features& features,
                       float* kept_distances, float* sums) {
  const Plan plan = make_plan(Stage::kDistances, sizes, features.type, nullptr, false, limits);
  Chain<Machine> chain(machine, plan, features);
  float* partials = static_cast<float*>(machine.allocate(plan.B * 3 * int64_t{sizeof(float)}));
  chain.for_each_chunk([&](int64_t first, int64_t count) {
    chain.multiply_targets(first, count);
    CouplingCall call = chain.coupling_call(first, count);
    call.kept_distances = kept_distances;
    call.partials = partials;
    machine.couple(plan, call);
  });
  machine.reduce({Total::kDistances, partials, plan.B, 3, plan.S, plan.B * plan.G, plan.M, sums});
}

// norms [T + 1]; distances [B][G][M] or nullptr.
template <class Machine>
void compute_norms(Machine& machine, const Limits& limits, const Sizes& sizes, const Features& features, const float* distances,
                   const float* scales, const Options& options, float* norms) {
  const Plan plan = make_plan(Stage::kNorms, sizes, features.type, &options, distances != nullptr, limits);
  Chain<Machine> chain(machine, plan, features);
  const int tiles = plan.gram ? 1 : plan.field_tiles;
  float* partials = static_cast<float*>(machine.allocate(plan.B * tiles * plan.outputs * int64_t{sizeof(float)}));
  chain.for_each_chunk([&](int64_t first, int64_t count) {
    chain.multiply_targets(first, count);
    CouplingCall call = chain.coupling_call(first, count);
    call.options = options;
    call.distances = distances;
    call.scales = scales;
    call.partials = partials;
    machine.couple(plan, call);
    if (!plan.gram) chain.finish_fields(first, count, scales, partials, nullptr);
  });
  machine.reduce({Total::kNorms, partials, plan.B * tiles, plan.outputs, plan.S, plan.B * plan.G, plan.M, norms});
}

// loss [B], gradient [B][G][S] of the features' type, diagnostics [T][4] or nullptr.
template <class Machine>
void compute_loss(Machine& machine, const Limits& limits, const Sizes& sizes, const Features& features, const float* distances,
                  const float* scales, const float* sqnorms, const Options& options, float* loss, void* gradient,
                  float* diagnostics) {
  const Plan plan = make_plan(Stage::kLoss, sizes, features.type, &options, distances != nullptr, limits);
  Chain<Machine> chain(machine, plan, features);
  const int tiles = plan.field_tiles, numbers = plan.num_temperatures * kNumDiagnostics;
  float* partials = static_cast<float*>(machine.allocate(plan.B * tiles * int64_t{sizeof(float)}));
  float* diagnosed = nullptr;
  if (diagnostics != nullptr) {
    diagnosed = static_cast<float*>(machine.allocate(plan.B * numbers * int64_t{sizeof(float)}));
  }
  chain.for_each_chunk([&](int64_t first, int64_t count) {
    chain.multiply_targets(first, count);
    CouplingCall call = chain.coupling_call(first, count);
    call.options = options;
    call.distances = distances;
    call.scales = scales;
    call.sqnorms = sqnorms;
    call.diagnostics = diagnosed;
    machine.couple(plan, call);
    chain.finish_fields(first, count, scales, partials, gradient);
  });
  machine.write_losses({partials, plan.B, tiles, plan.G, plan.S, loss});
  if (diagnostics != nullptr) {
    machine.reduce({Total::kDiagnostics, diagnosed, plan.B, numbers, plan.S, plan.B * plan.G, plan.M, diagnostics});
  }
}

}  // namespace drift_accel::cuda
