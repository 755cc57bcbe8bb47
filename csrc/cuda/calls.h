// What each kernel is told: plain values and device addresses, copied with the launch. Sizes are those of one chunk of
// problems; a problem's place within its chunk is `problem`, in the batch `first + problem`.
//
// Letters: G generated rows i, M targets j, S features, T temperatures; M padded to kRowPadding is `targets`.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace drift_accel::cuda {

// Rows and features of packed targets are padded with zeros to multiples of these, so that products find aligned rows and
// whole tiles.
constexpr int64_t kRowPadding = 16;
constexpr int64_t kFeaturePadding = 8;
constexpr int64_t kGramSlack = 2 * 32;   // floats after the Gram matrices that may be read, and are not used
constexpr int kPackedFeatures = 64;     // features of one block of the packing kernel
constexpr int kFinishedFeatures = 2048;  // features of one block of the finishing kernel
constexpr int kFieldFeatures = 128;      // features of one block of the field kernel
constexpr int64_t kHalvesSlack = 16;     // rows after the coefficients' halves that may be read, and are not used
constexpr int kPackThreads = 256;
constexpr int kFieldThreads = 256;
constexpr int kFinishThreads = 256;
constexpr int kReduceThreads = 512;
constexpr int kMaxCouplingThreads = 512;

// The members of all problems, as the caller holds them.
struct Features {
  Members generated, negatives, positives;
  Weights weights;
  ElementType type;
  int G, repelling, M;
  int64_t S;
};

// Centred targets of one segment of the features, contiguous, and their partial sums of squares.
struct PackCall {
  Features features;
  int64_t first, count;
  int64_t first_feature, num_features;  // of the segment
  int64_t targets, padded_features;
  void* packed;        // [count][targets][padded_features], elements of the features' type
  float* square_sums;  // [count][total_tiles][targets]
  int first_tile, tiles, total_tiles;
};

// out[b] = left[b] right[b] (or right[b] transposed) for `count` problems; row-major, inner dimension contiguous in left.
struct ProductCall {
  const void *left, *right;
  float* out;
  ElementType type;  // of left and right; sums in float
  bool transposed;   // right[b] is [columns][inner], else [inner][columns]
  int64_t count, rows, inner, columns;
  int64_t left_stride, right_stride, out_stride;  // from one problem to the next, in elements
};

// Everything between the distances and the coefficients.
struct CouplingCall {
  Features features;
  Options options;
  int64_t first, count;
  int64_t targets;

  // Distances are given (kept from the first stage), or made of products of the packed targets.
  const float* distances;      // [B][G][M] or nullptr
  const float* products;       // [segments][count][product_rows][targets]; the Gram matrix where product_rows = targets
  const float* square_sums;    // [count][tiles][targets]
  int64_t product_rows;
  int segments, tiles;

  const float* scales;   // s, weighted mean of d^2
  const float* sqnorms;  // [T], third stage

  float* kept_distances;  // [B][G][M] or nullptr, first stage
  float* partials;        // [B][3] first stage; [B][T] second stage through the Gram matrix
  float* diagnostics;     // [B][T][4] or nullptr, third stage

  int groups;            // coefficient matrices of a problem: one a temperature, or one for their sum
  float* coefficients;   // [count][groups][G][targets]
  void* halves;          // [count][groups][2][G][targets] of the features' type, for half precision: high and low parts
  float* row_scales;     // [count][groups][G]: the powers of two that the halves were divided by

  int leading;           // floats from one row of a problem's matrices to the next
  float* arena;          // global memory for the matrices of problems that do not fit into shared memory
  int64_t arena_floats;  // of one problem
  bool gram;             // second stage: norms from the Gram matrix of the targets
};

// From products of coefficients and targets to the sums of V^2 and the gradient.
struct FinishCall {
  int G, groups;
  int64_t S;
  int64_t first, count;
  int64_t first_feature, num_features, padded_features;  // of the segment
  const float* fields;      // [count][groups][parts][G][padded_features], parts = 2 where row_scales is given
  const float* row_scales;  // [count][groups][G] or nullptr
  ElementType type;
  void* gradient;  // [B][G][S] or nullptr
  const float* scales;
  float* partials;  // [B][total_tiles][outputs]; outputs: groups apart, or 1 for their sum
  int outputs;
  int first_tile, tiles, total_tiles;
};

// From coefficients in half precision and the features themselves to the sums of V^2 and the gradient.
struct FieldCall {
  Features features;
  int64_t first, count;
  int64_t targets;
  const void* halves;       // [count][groups][2][G][targets]
  const float* row_scales;  // [count][groups][G]
  int groups;
  const float* scales;
  void* gradient;   // [B][G][S] or nullptr; only with one group
  float* partials;  // [B][tiles][groups]
  int tiles;
};

enum class Total : int32_t { kDistances, kNorms, kDiagnostics };

// result[o] = sum over n of partials[n][o], in a fixed order and float64; norms are followed by the count of their addends,
// diagnostics are means.
struct ReduceCall {
  Total kind;
  const float* partials;
  int64_t num_partials;
  int outputs;
  int64_t S, num_rows, num_targets;  // num_rows: of all problems together
  float* result;
};

// loss[b] = sum over tiles of partials[b][tile] / (G S)
struct LossCall {
  const float* partials;
  int64_t num_problems;
  int tiles;
  int64_t G, S;
  float* loss;
};

}  // namespace drift_accel::cuda
