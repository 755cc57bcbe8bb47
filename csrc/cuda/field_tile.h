// Fields of half-precision features without a library: V = c y for a range of features, its squares and the gradient in one go.
//
// A block takes kFieldFeatures features of one problem, reads them once as they were given (the coefficients of a row sum to
// zero, so nothing has to be centred), multiplies them by the coefficients' high and low halves into the same float sums, and
// writes only the gradient. Used where the features of all targets fit into shared memory; else chain.h goes through the library.
#pragma once

#include "calls.h"
#include "pack.h"
#include "scales.h"
#include "warp_tiles.h"

namespace drift_accel::cuda {

constexpr int kFieldLeading = kFieldFeatures + kTilePadding;       // of the targets in shared memory
constexpr int kFieldColumns = 4 * kTile;                           // features that a warp multiplies at a time
constexpr int kStagedLeading = kFieldColumns + 4;                  // of a warp's results in shared memory
constexpr int kFieldWarps = kFieldThreads / kWarp;
constexpr int kFieldParts = kFieldFeatures / kFieldColumns;

// Shared memory of a block: results of the warps, one value a thread, then the targets.
constexpr int64_t kStagedCells = int64_t{kFieldWarps} * kTile * kStagedLeading;
constexpr int64_t field_shared_bytes(int64_t targets) {
  return (kStagedCells + kFieldThreads) * int64_t{sizeof(float)} + targets * kFieldLeading * 2;
}

// Eight neighbouring features of a member; zeros from `left` on.
template <class Element>
DRIFT_FUNCTION void load_eight(const MemberRow& row, int64_t feature, int64_t left, Element* values) {
  const Element* source = static_cast<const Element*>(row.data) + row.offset + feature * row.step;
#ifdef __CUDA_ARCH__
  if (row.step == 1 && left >= 8 && reinterpret_cast<uintptr_t>(source) % sizeof(uint4) == 0) {
    *reinterpret_cast<uint4*>(values) = *reinterpret_cast<const uint4*>(source);
    return;
  }
#endif
  for (int k = 0; k < 8; ++k) values[k] = k < left ? source[k * row.step] : from_float<Element>(0.0f);
}

template <class Element, class Block>
DRIFT_FUNCTION void multiply_field_tile(Block& block, typename Block::Cell* staged, Element* y, const FieldCall& call,
                                        int64_t problem, int tile) {
  using Tiles = WarpTiles<Element>;
  const int G = call.features.G, M = call.features.M, targets = static_cast<int>(call.targets);
  const int64_t begin = static_cast<int64_t>(tile) * kFieldFeatures;
  typename Block::Cell* scratch = staged + kStagedCells;
  const float inverse_u = 1.0f / feature_scale(call.scales, call.features.S);
  const float factor = -2.0f / (static_cast<float>(G) * static_cast<float>(call.features.S)) * inverse_u;
  const int num_items = (G + kTile - 1) / kTile * kFieldParts;  // a tile of rows, a part of the features

  block.phase([&](int thread) {
    constexpr int kEights = kFieldFeatures / 8;
    for (int index = thread; index < targets * kEights; index += kFieldThreads) {
      const int j = index / kEights, k = index % kEights * 8;
      Element* values = y + j * kFieldLeading + k;
      if (j < M) {
        const int64_t left = call.features.S - begin - k;
        load_eight<Element>(member_row(call.features, call.first + problem, j), begin + k, left, values);
      } else {
        for (int n = 0; n < 8; ++n) values[n] = from_float<Element>(0.0f);
      }
    }
  });
  for (int group = 0; group < call.groups; ++group) {
    const int64_t place = problem * call.groups + group;
    const Element* high = static_cast<const Element*>(call.halves) + place * 2 * G * call.targets;
    const Element* low = high + G * call.targets;
    const float* row_scales = call.row_scales + place * G;
    for (int first_item = 0; first_item < num_items; first_item += kFieldWarps) {
      block.warp_phase([&](int warp) {
        const int item = first_item + warp;
        if (item >= num_items) return;
        const int first_row = item / kFieldParts * kTile, first_column = item % kFieldParts * kFieldColumns;
        typename Tiles::Sums sums[4];
        DRIFT_UNROLL
        for (int q = 0; q < 4; ++q) Tiles::clear(sums[q]);
        // Rows beyond G belong to what lies behind (see kHalvesSlack): they give sums that nobody reads.
        for (int j = 0; j < targets; j += kTile) {
          typename Tiles::Left high_tile, low_tile;
          Tiles::load(high_tile, high + first_row * call.targets + j, targets);
          Tiles::load(low_tile, low + first_row * call.targets + j, targets);
          DRIFT_UNROLL
          for (int q = 0; q < 4; ++q) {
            typename Tiles::Right y_tile;
            Tiles::load(y_tile, y + j * kFieldLeading + first_column + q * kTile, kFieldLeading);
            Tiles::multiply(sums[q], high_tile, y_tile);
            Tiles::multiply(sums[q], low_tile, y_tile);
          }
        }
        typename Block::Cell* results = staged + warp * kTile * kStagedLeading;
        DRIFT_UNROLL
        for (int q = 0; q < 4; ++q) Tiles::store(results + q * kTile, sums[q], kStagedLeading);
      });
      block.phase([&](int thread) {
        const bool first = first_item == 0;
        float squares = 0;
        for (int index = thread; index < kFieldWarps * kTile * kFieldColumns; index += kFieldThreads) {
          const int row = index / kFieldColumns, column = index % kFieldColumns, item = first_item + row / kTile;
          const int i = item / kFieldParts * kTile + row % kTile;
          const int64_t feature = begin + item % kFieldParts * kFieldColumns + column;
          if (item >= num_items || i >= G || feature >= call.features.S) continue;
          const float V = staged[row * kStagedLeading + column] * row_scales[i] * inverse_u;
          squares += V * V;
          if (call.gradient != nullptr) {
            static_cast<Element*>(call.gradient)[((call.first + problem) * G + i) * call.features.S + feature] =
                from_float<Element>(V * factor);
          }
        }
        scratch[thread] = first ? squares : scratch[thread] + squares;
      });
    }
    add_threads(block, scratch, [&](float total) {
      call.partials[((call.first + problem) * call.tiles + tile) * call.groups + group] = total;
    });
  }
}

}  // namespace drift_accel::cuda
