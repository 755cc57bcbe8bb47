// Centred targets of a chunk of problems, side by side in memory: what the products and |y|^2 are made of.
//
// float32: y - mean over the problem's targets. bfloat16 and float16: y - m with a pivot m of that type for each feature where
// this is exact, which it is when every member x has m/2 <= x <= 2m (Sterbenz); else m = 0. So the products are those of the
// given numbers, and a common offset that is large beside the spread is gone.
#pragma once

#include "calls.h"
#include "elements.h"

namespace drift_accel::cuda {

constexpr int kPackRows = kPackThreads / kPackedFeatures;  // rows that are read at the same time
constexpr int kSquareRows = 64;                            // rows whose squares are summed at the same time

template <class Cell>
struct PackShared {
  Cell sum[kPackRows][kPackedFeatures], smallest[kPackRows][kPackedFeatures], largest[kPackRows][kPackedFeatures];
  Cell pivot[kPackedFeatures];
  Cell squares[kSquareRows][kPackedFeatures + 1];
  Cell square_parts[kPackThreads / kSquareRows][kSquareRows];
};

// One member's features of one problem.
struct MemberRow {
  const void* data;
  int64_t offset, step;
};

DRIFT_FUNCTION MemberRow member_row(const Features& features, int64_t problem, int j) {
  const Members& members =
      j < features.G ? features.generated : (j < features.repelling ? features.negatives : features.positives);
  const int first = j < features.G ? 0 : (j < features.repelling ? features.G : features.repelling);
  return {members.data, problem * members.stride[0] + (j - first) * members.stride[1], members.stride[2]};
}

template <class Element>
DRIFT_FUNCTION float member_value(const MemberRow& row, int64_t feature) {
  return to_float(static_cast<const Element*>(row.data)[row.offset + feature * row.step]);
}

template <class Element>
DRIFT_FUNCTION float choose_pivot(float mean, float smallest, float largest) {
  if constexpr (sizeof(Element) == sizeof(float)) return mean;
  // Of negative numbers the conditions are those of their opposites.
  const bool negative = mean < 0;
  const float low = negative ? -largest : smallest, high = negative ? -smallest : largest;
  float pivot = negative ? -mean : mean;
  pivot = pivot < 0.5f * high ? 0.5f * high : pivot;
  pivot = pivot > 2.0f * low ? 2.0f * low : pivot;
  pivot = to_float(from_float<Element>(pivot));
  const bool exact = pivot > 0 && 0.5f * pivot <= low && high <= 2.0f * pivot;  // false for NaN
  return exact ? (negative ? -pivot : pivot) : 0.0f;
}

// Features [tile * kPackedFeatures, ...) of one problem's targets.
template <class Element, class Block>
DRIFT_FUNCTION void pack_tile(Block& block, PackShared<typename Block::Cell>& shared, const PackCall& call, int64_t problem,
                              int tile) {
  const Features& features = call.features;
  const int M = features.M, targets = static_cast<int>(call.targets);
  const int64_t tile_begin = static_cast<int64_t>(tile) * kPackedFeatures;
  Element* packed = static_cast<Element*>(call.packed) + problem * call.targets * call.padded_features;
  float* square_sums = call.square_sums + (problem * call.total_tiles + call.first_tile + tile) * call.targets;

  block.phase([&](int thread) {
    const int column = thread % kPackedFeatures, part = thread / kPackedFeatures;
    float sum = 0, smallest = kInfinity, largest = -kInfinity;
    if (tile_begin + column < call.num_features) {
      for (int j = part; j < M; j += kPackRows) {
        const MemberRow row = member_row(features, call.first + problem, j);
        const float value = member_value<Element>(row, call.first_feature + tile_begin + column);
        sum += value;
        smallest = value < smallest ? value : smallest;
        largest = value > largest ? value : largest;
      }
    }
    shared.sum[part][column] = sum;
    shared.smallest[part][column] = smallest;
    shared.largest[part][column] = largest;
  });
  block.phase([&](int thread) {
    if (thread >= kPackedFeatures) return;
    float sum = 0, smallest = kInfinity, largest = -kInfinity;
    for (int part = 0; part < kPackRows; ++part) {
      const float low = shared.smallest[part][thread], high = shared.largest[part][thread];
      sum += shared.sum[part][thread];
      smallest = low < smallest ? low : smallest;
      largest = high > largest ? high : largest;
    }
    shared.pivot[thread] = choose_pivot<Element>(sum / static_cast<float>(M), smallest, largest);
  });
  for (int first_row = 0; first_row < targets; first_row += kSquareRows) {
    block.phase([&](int thread) {
      const int column = thread % kPackedFeatures, part = thread / kPackedFeatures;
      const int64_t feature = tile_begin + column;
      const float pivot = shared.pivot[column];
      for (int row = part; row < kSquareRows; row += kPackRows) {
        const int j = first_row + row;
        Element y = from_float<Element>(0.0f);
        if (j < M && feature < call.num_features) {
          const MemberRow member = member_row(features, call.first + problem, j);
          y = from_float<Element>(member_value<Element>(member, call.first_feature + feature) - pivot);
        }
        if (j < targets && feature < call.padded_features) packed[j * call.padded_features + feature] = y;
        shared.squares[row][column] = to_float(y) * to_float(y);
      }
    });
    block.phase([&](int thread) {
      const int row = thread % kSquareRows, part = thread / kSquareRows;
      constexpr int kParts = kPackThreads / kSquareRows, kWidth = kPackedFeatures / kParts;
      float sum = 0;
      for (int column = part * kWidth; column < (part + 1) * kWidth; ++column) sum += shared.squares[row][column];
      shared.square_parts[part][row] = sum;
    });
    block.phase([&](int thread) {
      if (thread >= kSquareRows || first_row + thread >= targets) return;
      float sum = 0;
      for (int part = 0; part < kPackThreads / kSquareRows; ++part) sum += shared.square_parts[part][thread];
      square_sums[first_row + thread] = sum;
    });
  }
}

}  // namespace drift_accel::cuda
