// The second and third stage of one problem: from distances to the norms of its fields, or to the coefficients of their sum.
//
// Letters as in coupling.h; K is the Gram matrix of the centred targets [M][M], V_i = sum_j c_ij y_j.
#pragma once

#include "coupling.h"
#include "scales.h"

namespace drift_accel::cuda {

constexpr int kGramRows = 8;               // rows of c that a thread holds against
constexpr int kGramColumns = 2 * kWarp;   // these columns of K a warp

// One thread's share of sum_jk c_ij K_jk c_ik of kRows rows i and its two columns k of a tile. Only j < k is visited, twice as
// heavy, and j = k.
template <int kRows, class Cell>
DRIFT_FUNCTION float gram_tile(const Cell* c, int leading, int M, const float* gram, int stride, int first_column, int lane) {
  const int column = first_column + lane, other = column + kWarp;
  const int end = first_column + kGramColumns < M ? first_column + kGramColumns : M;
  const float* K = gram + column;  // beyond the last column lie numbers that are not used: see kGramSlack
  float product[kRows] = {}, other_product[kRows] = {};
  for (int j = 0; j < first_column; ++j, K += stride) {
    const float k = K[0], other_k = K[kWarp];
    DRIFT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const float c_j = c[r * leading + j];
      product[r] += c_j * k;
      other_product[r] += c_j * other_k;
    }
  }
  for (int j = first_column; j < end; ++j, K += stride) {
    const float k = K[0] * (j == column ? 0.5f : 1.0f), other_k = K[kWarp] * (j == other ? 0.5f : 1.0f);
    DRIFT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const float c_j = c[r * leading + j];
      if (j <= column) product[r] += c_j * k;
      if (j <= other) other_product[r] += c_j * other_k;
    }
  }
  float share = 0;
  DRIFT_UNROLL
  for (int r = 0; r < kRows; ++r) {
    if (column < M) share += c[r * leading + column] * product[r];
    if (other < M) share += c[r * leading + other] * other_product[r];
  }
  return 2 * share;
}

// Sum over rows of |V_i|^2 = sum_jk c_ij K_jk c_ik: one thread's share of the tiles of eight rows, then of the rows left over.
template <class Cell>
DRIFT_FUNCTION float gram_share(const Cell* c, int leading, int G, int M, const float* gram, int stride, int thread,
                                int num_threads) {
  const int lane = thread % kWarp, warp = thread / kWarp, num_warps = num_threads / kWarp;
  const int num_row_tiles = G / kGramRows, rest = G % kGramRows;
  const int num_column_tiles = (M + kGramColumns - 1) / kGramColumns;
  float share = 0;
  for (int tile = warp; tile < num_row_tiles * num_column_tiles; tile += num_warps) {
    const int first_row = tile % num_row_tiles * kGramRows, first_column = tile / num_row_tiles * kGramColumns;
    share += gram_tile<kGramRows>(c + first_row * leading, leading, M, gram, stride, first_column, lane);
  }
  for (int tile = warp; tile < rest * num_column_tiles; tile += num_warps) {
    const int row = num_row_tiles * kGramRows + tile % rest, first_column = tile / rest * kGramColumns;
    share += gram_tile<1>(c + row * leading, leading, M, gram, stride, first_column, lane);
  }
  return share;
}

// A power of two: the largest |value| of a row divided by it lies in [1, 2), the same headroom in every type.
DRIFT_FUNCTION float row_scale_of(float largest) {
  if (!(largest > 0) || largest == kInfinity) return 1.0f;
  int exponent = 0;
  frexpf(largest, &exponent);
  constexpr int kSmallest = -100;  // its inverse is finite too
  return ldexpf(1.0f, exponent - 1 < kSmallest ? kSmallest : exponent - 1);
}

// Coefficients in half precision: c / row scale = high + low, each rounded. The row's sum, zero but for rounding, is taken from
// the low part of the sample itself: so what is left of the targets' common offset cannot enter the field.
template <class Element, class Block>
DRIFT_FUNCTION void split_halves(Block& block, const CouplingCall& call, int64_t problem, typename Block::Cell* scratch) {
  const int G = call.features.G, targets = static_cast<int>(call.targets);
  const Lanes rows = share_lines(G, block.num_threads(), true);
  for (int group = 0; group < call.groups; ++group) {
    const int64_t place = problem * call.groups + group;
    const float* coefficients = call.coefficients + place * G * call.targets;
    float* row_scales = call.row_scales + place * G;
    Element* high = static_cast<Element*>(call.halves) + place * 2 * G * call.targets;
    Element* low = high + G * call.targets;
    block.phase([&](int thread) {
      for (int index = thread; index < rows.count(); index += block.num_threads()) {
        const int i = rows.line(index), lane = rows.lane(index);
        float largest = 0;
        for (int j = lane; j < targets; j += rows.lanes) {
          const float size = fabsf(coefficients[i * call.targets + j]);
          largest = size > largest ? size : largest;
        }
        scratch[rows.slot(i, lane)] = largest;
      }
    });
    block.phase([&](int thread) {
      for (int i = thread; i < G; i += block.num_threads()) {
        float largest = 0;
        for (int lane = 0; lane < rows.lanes; ++lane) {
          const float size = scratch[rows.slot(i, lane)];
          largest = size > largest ? size : largest;
        }
        row_scales[i] = row_scale_of(largest);
      }
    });
    block.phase([&](int thread) {
      for (int index = thread; index < rows.count(); index += block.num_threads()) {
        const int i = rows.line(index), lane = rows.lane(index);
        const float inverse_scale = 1.0f / row_scales[i];  // exact
        float sum = 0;
        for (int j = lane; j < targets; j += rows.lanes) {
          const float c = coefficients[i * call.targets + j] * inverse_scale;
          const Element rounded = from_float<Element>(c), rest = from_float<Element>(c - to_float(rounded));
          high[i * call.targets + j] = rounded;
          low[i * call.targets + j] = rest;
          sum += to_float(rounded) + to_float(rest);
        }
        scratch[rows.slot(i, lane)] = sum;
      }
    });
    add_lanes(block, rows, scratch, [&](int i, float sum) {
      Element& own = low[i * call.targets + i];
      own = from_float<Element>(to_float(own) - sum);
    });
  }
}

template <class Block>
DRIFT_FUNCTION void split_coefficients(Block& block, const CouplingCall& call, int64_t problem, typename Block::Cell* scratch) {
  if (call.features.type == ElementType::kBFloat16) {
    split_halves<BFloat16>(block, call, problem, scratch);
  } else if (call.features.type == ElementType::kFloat16) {
    split_halves<Float16>(block, call, problem, scratch);
  }
}

// Writes (or adds to) one group's coefficients times `factor`, zeros where rows are padded.
template <class Block, class AnyCoupler>
DRIFT_FUNCTION void write_coefficients(Block& block, const AnyCoupler& coupler, const CouplingCall& call, int64_t problem,
                                       int group, float factor, bool add) {
  const int G = call.features.G, M = call.features.M, targets = static_cast<int>(call.targets);
  float* coefficients = call.coefficients + (problem * call.groups + group) * G * call.targets;
  block.phase([&](int thread) {
    for (int i = thread / kWarp; i < G; i += block.num_threads() / kWarp) {
      for (int j = thread % kWarp; j < targets; j += kWarp) {
        const float c = j < M ? coupler.coefficient(i, j) * factor : 0.0f;
        float& sum = coefficients[i * call.targets + j];
        sum = add ? sum + c : c;
      }
    }
  });
}

// Second stage: sum over rows of |V_tau,i / u|^2 for each temperature, or the coefficients of each where V itself is formed.
template <bool kShared, class Block>
DRIFT_FUNCTION void norms_of_problem(Block& block, typename Block::Cell* memory, const CouplingCall& call, int64_t problem) {
  const int G = call.features.G, M = call.features.M, num_temperatures = call.options.num_temperatures;
  const Arena<typename Block::Cell> arena(memory, G, M, call.leading, block.num_threads(), true);
  Coupler<Block, kShared> coupler(block, call, arena);
  coupler.load(problem);
  const float u = feature_scale(call.scales, call.features.S);
  const float* gram = call.products + problem * call.product_rows * call.targets;
  float* whole_gram = const_cast<float*>(gram);
  if (call.gram && call.segments > 1) {
    const int64_t size = call.product_rows * call.targets;
    block.phase([&](int thread) {
      for (int64_t k = thread; k < size; k += block.num_threads()) {
        float total = 0;
        for (int segment = 0; segment < call.segments; ++segment) total += gram[segment * call.count * size + k];
        whole_gram[k] = total;
      }
    });
  }
  for (int t = 0; t < num_temperatures; ++t) {
    coupler.couple(call.options.temperatures[t]);
    if (!call.gram) {
      write_coefficients(block, coupler, call, problem, t, 1.0f, false);
      continue;
    }
    block.phase([&](int thread) {
      for (int i = thread / kWarp; i < G; i += block.num_threads() / kWarp) {
        for (int j = thread % kWarp; j < M; j += kWarp) {
          arena.affinity[coupler.place(i, j)] = coupler.coefficient(i, j);
        }
      }
    });
    block.phase([&](int thread) {
      arena.scratch[thread] =
          gram_share(arena.affinity, call.leading, G, M, gram, static_cast<int>(call.targets), thread, block.num_threads());
    });
    add_threads(block, arena.scratch, [&](float total) {
      call.partials[(call.first + problem) * num_temperatures + t] = total / u / u;
    });
  }
  if (!call.gram) split_coefficients(block, call, problem, arena.scratch);
}

// Third stage: coefficients of the normalised fields, added up where one loss is made of them, and diagnostics.
template <bool kShared, class Block>
DRIFT_FUNCTION void coefficients_of_problem(Block& block, typename Block::Cell* memory, const CouplingCall& call,
                                            int64_t problem) {
  const int num_temperatures = call.options.num_temperatures;
  const Arena<typename Block::Cell> arena(memory, call.features.G, call.features.M, call.leading, block.num_threads(), true);
  Coupler<Block, kShared> coupler(block, call, arena);
  coupler.load(problem);
  for (int t = 0; t < num_temperatures; ++t) {
    coupler.couple(call.options.temperatures[t]);
    if (call.diagnostics != nullptr) {
      float* sums = call.diagnostics + ((call.first + problem) * num_temperatures + t) * kNumDiagnostics;
      coupler.diagnose(call.options.temperatures[t], sums);
    }
    const float factor = 1.0f / sqrtf(at_least(call.sqnorms[t], kSmallestSqnorm));
    const bool apart = call.groups > 1;
    write_coefficients(block, coupler, call, problem, apart ? t : 0, factor, !apart && t > 0);
  }
  split_coefficients(block, call, problem, arena.scratch);
}

}  // namespace drift_accel::cuda
