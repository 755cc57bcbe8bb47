// The matrices and vectors of one problem, one after the other in shared memory or, where they do not fit, in global memory.
#pragma once

#include "block.h"

namespace drift_accel::cuda {

// Rows of the matrices start an odd number of floats apart: threads that walk down a column then meet every memory bank.
DRIFT_CONSTEXPR int64_t leading_dimension(int64_t M) { return M | 1; }

template <class Cell>
struct Arena {
  Cell *distance;  // [G][leading], scaled: logit = -distance / tau
  Cell *affinity;  // [G][leading]: A, then c
  Cell *weight, *bias, *factor, *marginal, *column;  // [M]: w, what is added to logits, what multiplies A, see coupling.h
  Cell *row;                                         // [2][G]: one for each side of the split form
  Cell *negative_factor, *positive_factor, *remainder, *row_value;  // [G]
  Cell *scratch, *other_scratch;

  static constexpr int64_t vectors(int64_t G, int64_t M, int64_t num_threads) {
    return 5 * M + 6 * G + 2 * scratch_size(G, M, num_threads);
  }
  static constexpr int64_t matrices(int64_t G, int64_t M) { return 2 * G * leading_dimension(M); }

  // With `matrices` false the arena holds the vectors alone.
  DRIFT_FUNCTION Arena(Cell* memory, int G, int M, int leading, int num_threads, bool matrices) {
    const auto take = [&memory](int64_t count) {
      Cell* taken = memory;
      memory += count;
      return taken;
    };
    weight = take(M);
    bias = take(M);
    factor = take(M);
    marginal = take(M);
    column = take(M);
    row = take(2 * G);
    negative_factor = take(G);
    positive_factor = take(G);
    remainder = take(G);
    row_value = take(G);
    const int64_t size = scratch_size(G, M, num_threads);
    scratch = take(size);
    other_scratch = take(size);
    distance = matrices ? take(static_cast<int64_t>(G) * leading) : nullptr;
    affinity = matrices ? take(static_cast<int64_t>(G) * leading) : nullptr;
  }
};

}  // namespace drift_accel::cuda
