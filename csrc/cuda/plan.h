// How a stage is cut into launches: plain arithmetic on sizes, the same on every machine with the same limits.
#pragma once

#include <algorithm>
#include <cstdint>

#include "arena.h"
#include "calls.h"
#include "field_tile.h"

namespace drift_accel::cuda {

// Bytes that one call may take for its chunk of problems. Small enough for most of it to stay in the second-level cache (50 MB on
// an H100) between the kernels of a chunk, large enough for a chunk to fill the device. One problem is always taken whole.
constexpr int64_t kWorkspaceBytes = int64_t{64} << 20;
constexpr int64_t kMaxChunk = 32768;             // problems; library products count them in 16 bits in places
constexpr int64_t kMaxSegmentFeatures = 16384;   // features of one product: bounds the workspace and the error of its sums
constexpr int64_t kPairsPerThread = 16;
constexpr int64_t kSharedBytesWithoutAsking = 48 << 10;  // more has to be allowed for a kernel first

enum class Stage : int32_t { kDistances, kNorms, kLoss };

// What the machine allows, and what the caller forces.
struct Limits {
  int64_t shared_bytes;  // of one block
  int64_t workspace_bytes = kWorkspaceBytes;
  int64_t segment_features = kMaxSegmentFeatures;
  int32_t norms = 0;           // 0: whichever of Gram matrix and fields is cheaper; 1: Gram matrix; 2: fields
  bool library_fields = false;  // fields through library products also where the field kernel could form them
};

struct Plan {
  Stage stage;
  int64_t B, G, M, S;
  bool half;              // features of half precision
  bool given_distances;
  bool gram;              // norms from the Gram matrix
  int num_temperatures;
  int groups, outputs;    // coefficient matrices of a problem; sums of V^2 of a problem
  bool field_kernel;      // fields by field_tile.h, not by library products
  int64_t targets;        // rows of packed targets
  int segments;
  int64_t segment_features;
  int tiles, finish_tiles;  // of one segment
  int field_tiles;          // of all features: partial sums of V^2 of a problem
  int64_t product_rows;     // 0: no products of targets are needed
  int threads;              // of a coupling block
  bool shared;              // its matrices lie in shared memory
  int64_t shared_bytes, arena_floats;
  int64_t chunk;

  bool packs() const { return product_rows > 0 || (groups > 0 && !field_kernel); }
  int parts() const { return half ? 2 : 1; }
  int64_t element_size() const { return half ? 2 : 4; }
};

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
constexpr int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// Buffers of one chunk of problems.
struct Buffers {
  void *packed, *halves;
  float *square_sums, *products, *coefficients, *row_scales, *fields, *arena;
};

// Each buffer for `count` problems from take(bytes).
template <class Take>
Buffers take_buffers(const Plan& plan, int64_t count, Take take) {
  const auto take_floats = [&](int64_t floats) { return static_cast<float*>(take(floats * int64_t{sizeof(float)})); };
  const int64_t rows = plan.groups * plan.G;
  Buffers buffers{};
  buffers.packed = take(plan.packs() ? count * plan.targets * plan.segment_features * plan.element_size() : 0);
  buffers.halves = take(plan.half ? (count * 2 * rows + kHalvesSlack) * plan.targets * plan.element_size() : 0);
  buffers.square_sums = take_floats(plan.packs() ? count * plan.segments * plan.tiles * plan.targets : 0);
  const int64_t slack = plan.gram ? kGramSlack : 0;
  buffers.products = take_floats(plan.segments * count * plan.product_rows * plan.targets + slack);
  buffers.coefficients = take_floats(count * rows * plan.targets);
  buffers.row_scales = take_floats(plan.half ? count * rows : 0);
  buffers.fields = take_floats(plan.field_kernel ? 0 : count * plan.parts() * rows * plan.segment_features);
  buffers.arena = take_floats(plan.shared ? 0 : count * plan.arena_floats);
  return buffers;
}

inline int64_t bytes_of(const Plan& plan, int64_t count) {
  int64_t total = 0;
  take_buffers(plan, count, [&](int64_t bytes) -> void* {
    total += bytes;
    return nullptr;
  });
  return total;
}

// Multiply-adds of the norms, a row of targets each: through the Gram matrix M S + T G M, the latter without tensor cores;
// through the fields T G S, twice as much for their two halves or for writing and reading them, and four times for both.
inline bool gram_is_cheaper(const Plan& plan) {
  constexpr double kWithoutTensorCores = 12;
  const double rows = static_cast<double>(plan.num_temperatures) * static_cast<double>(plan.G);
  const double M = static_cast<double>(plan.M), S = static_cast<double>(plan.S);
  const double gram = M * S + rows * M * (plan.half ? kWithoutTensorCores : 1);
  return gram < rows * S * (plan.half && !plan.field_kernel ? 4 : 2);
}

inline Plan make_plan(Stage stage, const Sizes& sizes, ElementType type, const Options* options, bool given_distances,
                      const Limits& limits) {
  Plan plan{};
  plan.stage = stage;
  plan.B = sizes.B;
  plan.G = sizes.G;
  plan.M = sizes.M();
  plan.S = sizes.S;
  plan.half = type != ElementType::kFloat32;
  plan.given_distances = given_distances;
  plan.num_temperatures = options == nullptr ? 0 : options->num_temperatures;
  plan.targets = round_up(plan.M, kRowPadding);
  plan.segments = static_cast<int>(divide_up(plan.S, limits.segment_features));
  plan.segment_features = round_up(divide_up(plan.S, plan.segments), kFeaturePadding);
  plan.segments = static_cast<int>(divide_up(plan.S, plan.segment_features));
  plan.tiles = static_cast<int>(divide_up(plan.segment_features, kPackedFeatures));
  plan.finish_tiles = static_cast<int>(divide_up(plan.segment_features, kFinishedFeatures));

  // The field kernel adds up no gradients of several groups.
  plan.field_kernel = plan.half && !limits.library_fields && field_shared_bytes(plan.targets) <= limits.shared_bytes &&
                      stage != Stage::kDistances && !(stage == Stage::kLoss && options->separate_losses);
  if (stage == Stage::kNorms) {
    plan.gram = limits.norms == 0 ? gram_is_cheaper(plan) : limits.norms == 1;
    plan.groups = plan.gram ? 0 : plan.num_temperatures;
    plan.outputs = plan.num_temperatures;
  } else if (stage == Stage::kLoss) {
    plan.groups = options->separate_losses ? plan.num_temperatures : 1;
    plan.outputs = 1;
  }
  plan.field_tiles = static_cast<int>(plan.field_kernel ? divide_up(plan.S, kFieldFeatures) : plan.segments * plan.finish_tiles);
  plan.product_rows = plan.gram ? plan.targets : (given_distances ? 0 : plan.G);

  const int64_t pairs = plan.G * plan.M;
  plan.threads = static_cast<int>(
      std::clamp<int64_t>(round_up(divide_up(pairs, kPairsPerThread), kWarp), 2 * kWarp, kMaxCouplingThreads));
  const int64_t vectors = Arena<float>::vectors(plan.G, plan.M, plan.threads);
  plan.arena_floats = vectors + (stage == Stage::kDistances ? 0 : Arena<float>::matrices(plan.G, plan.M));
  plan.shared = plan.arena_floats * int64_t{sizeof(float)} <= limits.shared_bytes;
  plan.shared_bytes = plan.shared ? plan.arena_floats * int64_t{sizeof(float)} : 0;

  const int64_t of_one = std::max<int64_t>(bytes_of(plan, 1), 1);
  plan.chunk = std::clamp<int64_t>(limits.workspace_bytes / of_one, 1, std::min(kMaxChunk, std::max<int64_t>(plan.B, 1)));
  return plan;
}

}  // namespace drift_accel::cuda
