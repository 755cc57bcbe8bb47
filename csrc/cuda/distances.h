// One problem's distances: from the products of its centred targets, or as an earlier stage kept them (steps 1 to 3).
#pragma once

#include "arena.h"
#include "calls.h"
#include "pack.h"

namespace drift_accel::cuda {

// |x|^2 + |y|^2 - 2 x.y loses log10 of (|x|^2 + |y|^2) / d^2 digits of about seven; below this ratio the differences are summed.
constexpr float kCancelledShare = 1e-4f;

// Direct sum of (x_i - y_j)^2: for the few pairs that nearly coincide.
DRIFT_FUNCTION float summed_square(const Features& features, int64_t problem, int i, int j) {
  const MemberRow x = member_row(features, problem, i), y = member_row(features, problem, j);
  float total = 0;
  for (int64_t k = 0; k < features.S; ++k) {
    const float difference =
        load_element(x.data, features.type, x.offset + k * x.step) - load_element(y.data, features.type, y.offset + k * y.step);
    total += difference * difference;
  }
  return total;
}

// Distances d_ij of one problem. `squares` |y_j|^2 [M] lies in memory of the block.
template <class Cell>
struct Distances {
  const CouplingCall& call;
  int64_t problem;
  const Cell* squares;

  DRIFT_FUNCTION float squared(int i, int j) const {
    if (call.distances != nullptr) {
      const float d = kept(i, j);
      return d * d;
    }
    if (i == j) return kSmallestSquaredDistance;  // a generated sample and itself: no rounding to be seen
    const float* product = call.products + (problem * call.product_rows + i) * call.targets + j;
    float inner = 0;
    for (int segment = 0; segment < call.segments; ++segment) {
      inner += product[segment * call.count * call.product_rows * call.targets];
    }
    const float both = squares[i] + squares[j];
    float d_sq = both - 2 * inner;
    if (d_sq < kCancelledShare * both) d_sq = summed_square(call.features, call.first + problem, i, j);
    return at_least(d_sq, kSmallestSquaredDistance);
  }

  DRIFT_FUNCTION float operator()(int i, int j) const {
    return call.distances != nullptr ? kept(i, j) : sqrtf(squared(i, j));
  }

  DRIFT_FUNCTION float kept(int i, int j) const {
    return call.distances[((call.first + problem) * call.features.G + i) * call.features.M + j];
  }
};

// |y_j|^2 into `squares`: partial sums over the features, added in their order.
template <class Block>
DRIFT_FUNCTION void load_squares(Block& block, const CouplingCall& call, int64_t problem, typename Block::Cell* squares) {
  if (call.distances != nullptr) return;
  const float* sums = call.square_sums + problem * call.tiles * call.targets;
  block.phase([&](int thread) {
    for (int j = thread; j < call.features.M; j += block.num_threads()) {
      double total = 0;
      for (int tile = 0; tile < call.tiles; ++tile) total += sums[tile * call.targets + j];
      squares[j] = static_cast<float>(total);
    }
  });
}

DRIFT_FUNCTION float target_weight(const Features& features, int64_t problem, int j) {
  const Weights& w = features.weights;
  if (j < features.G || j >= features.repelling || w.data == nullptr) return 1.0f;
  return w.data[problem * w.stride[0] + (j - features.G) * w.stride[1]];
}

// First stage: keeps the distances where asked to, and the sums of w d, w d^2 and w over the pairs of one problem.
template <class Block>
DRIFT_FUNCTION void distances_of_problem(Block& block, typename Block::Cell* memory, const CouplingCall& call,
                                         int64_t problem) {
  const int G = call.features.G, M = call.features.M;
  Arena<typename Block::Cell> arena(memory, G, M, call.leading, block.num_threads(), false);
  load_squares(block, call, problem, arena.column);
  block.phase([&](int thread) {
    for (int j = thread; j < M; j += block.num_threads()) {
      arena.weight[j] = target_weight(call.features, call.first + problem, j);
    }
  });
  const Distances<typename Block::Cell> squared_distance{call, problem, arena.column};
  block.phase([&](int thread) {
    float sum = 0, sum_of_squares = 0;
    for (int i = thread / kWarp; i < G; i += block.num_threads() / kWarp) {
      for (int j = thread % kWarp; j < M; j += kWarp) {
        const float d_sq = squared_distance.squared(i, j), d = sqrtf(d_sq), w = arena.weight[j];
        sum += w * d;
        sum_of_squares += w * d_sq;
        if (call.kept_distances != nullptr) call.kept_distances[((call.first + problem) * G + i) * M + j] = d;
      }
    }
    arena.scratch[thread] = sum;
    arena.other_scratch[thread] = sum_of_squares;
  });
  float* partials = call.partials + (call.first + problem) * 3;
  add_threads(block, arena.scratch, [&](float total) { partials[0] = total; });
  add_threads(block, arena.other_scratch, [&](float total) { partials[1] = total; });
  block.phase([&](int thread) {
    float sum = 0;
    for (int j = thread; j < M; j += block.num_threads()) sum += arena.weight[j];
    arena.scratch[thread] = sum * static_cast<float>(G);
  });
  add_threads(block, arena.scratch, [&](float total) { partials[2] = total; });
}

}  // namespace drift_accel::cuda
