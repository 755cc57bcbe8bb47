// Couplings of one problem and one temperature: affinities A and coefficients c of the field V_i = sum_j c_ij y_j (steps 4, 5).
//
// Letters as in drift_accel/drift/couplings.py: l logits, w weights, A affinities, c coefficients, G rows i, M targets j. A side
// is a range of targets that is coupled by itself: all of them, or, in the split form, those that repel and those that attract.
#pragma once

#include "arena.h"
#include "calls.h"
#include "distances.h"
#include "scales.h"

namespace drift_accel::cuda {

constexpr int kMaxSides = 2;

template <class Block, bool kShared>
struct Coupler {
  using Cell = typename Block::Cell;

  Block& block;
  const CouplingCall& call;
  const Arena<Cell>& arena;
  const int G, M, repelling, leading, num_sides;
  const Lanes rows, columns;
  const float log_floor;

  DRIFT_FUNCTION Coupler(Block& block, const CouplingCall& call, const Arena<Cell>& arena)
      : block(block),
        call(call),
        arena(arena),
        G(call.features.G),
        M(call.features.M),
        repelling(call.features.repelling),
        leading(call.leading),
        num_sides(call.options.split ? 2 : 1),
        rows(share_lines(G, block.num_threads(), !kShared)),
        columns(share_lines(M, block.num_threads(), false)),
        log_floor(call.options.affinity_floor > 0 ? 0.5f * logf(call.options.affinity_floor) : -kInfinity) {}

  DRIFT_FUNCTION int side_begin(int side) const { return side == 0 ? 0 : repelling; }
  DRIFT_FUNCTION int side_end(int side) const { return num_sides == 2 && side == 0 ? repelling : M; }
  DRIFT_FUNCTION int side_of(int j) const { return num_sides == 2 && j >= repelling ? 1 : 0; }
  DRIFT_FUNCTION int place(int i, int j) const { return i * leading + j; }

  // What does not depend on the temperature: weights, and distances in units of their mean.
  DRIFT_FUNCTION void load(int64_t problem) {
    const Options& options = call.options;
    const bool sinkhorn = options.coupling == Coupling::kSinkhorn;
    const bool biased = sinkhorn ? !options.weighted_columns : options.log_bias;
    load_squares(block, call, problem, arena.column);
    block.phase([&](int thread) {
      for (int j = thread; j < M; j += block.num_threads()) {
        const float w = target_weight(call.features, call.first + problem, j);
        arena.weight[j] = w;
        arena.bias[j] = biased ? logf(w) : 0.0f;
        // log_bias: an absent target (w = 0) has A = 0 whatever the floor. The plan of sinkhorn has mass 1, A has G.
        arena.factor[j] = sinkhorn ? static_cast<float>(G) : (biased ? (w > 0 ? 1.0f : 0.0f) : w);
      }
    });
    if (sinkhorn) load_marginals();
    const float self_penalty = options.mask_self ? kSelfPairPenalty : 0.0f;
    const float inverse_scale = 1.0f / distance_scale(call.scales, options.squared);
    const Distances<Cell> distance{call, problem, arena.column};
    block.phase([&](int thread) {
      for (int i = thread / kWarp; i < G; i += block.num_threads() / kWarp) {
        for (int j = thread % kWarp; j < M; j += kWarp) {
          const float d = options.squared ? distance.squared(i, j) : distance(i, j);
          arena.distance[place(i, j)] = d * inverse_scale + (i == j ? self_penalty : 0.0f);
        }
      }
    });
  }

  // Affinities of one temperature and, for each row, what makes coefficients of them.
  DRIFT_FUNCTION void couple(float temperature) {
    const float inverse = -1.0f / temperature;
    switch (call.options.coupling) {
      case Coupling::kTwoSided:
        log_sum_exp(
            block, columns, 0, G, arena.scratch, arena.other_scratch,
            [&](int j, int i) { return logit(i, j, inverse); }, [&](int j, float value) { arena.column[j] = value; });
        normalise_rows(inverse);
        break;
      case Coupling::kRow:
        normalise_rows(inverse);
        break;
      case Coupling::kSinkhorn:
        for (int side = 0; side < num_sides; ++side) transport(side, inverse);
        break;
    }
    measure_rows(inverse);
  }

  // c_ij after couple(), from the A_ij in its place.
  DRIFT_FUNCTION float coefficient(int i, int j) const {
    const float c = arena.affinity[place(i, j)] * (j < repelling ? arena.negative_factor[i] : arena.positive_factor[i]);
    return i == j ? c + arena.remainder[i] : c;
  }

  // Of the temperature coupled last: the sums over rows or pairs of this problem, in the order of Diagnostic.
  DRIFT_FUNCTION void diagnose(float temperature, float* sums) {
    const float inverse = -1.0f / temperature;
    const bool floored = call.options.coupling == Coupling::kTwoSided && call.options.affinity_floor > 0;
    sum_rows([&](int i, int j) { return floored && log_affinity(i, j, inverse) <= log_floor ? 1.0f : 0.0f; },
             [](float value) { return value; }, sums + kFloorShare);
    for (int attracting = 0; attracting < 2; ++attracting) {
      const int begin = attracting ? repelling : 0, end = attracting ? M : repelling;
      const auto is_in = [=](int j) { return j >= begin && j < end; };
      add_lines(
          block, rows, M, arena.scratch, [&](int i, int j) { return is_in(j) ? arena.affinity[place(i, j)] : 0.0f; },
          [&](int i, float mass) { arena.row_value[i] = mass; });
      // (sum A)^2 / sum A^2 = 1 / sum (A / sum A)^2, whose squares do not underflow.
      sum_rows(
          [&](int i, int j) {
            const float share = is_in(j) && arena.row_value[i] != 0 ? arena.affinity[place(i, j)] / arena.row_value[i] : 0.0f;
            return share * share;
          },
          [](float squares) { return squares == 0 ? 0.0f : 1.0f / squares; },
          sums + (attracting ? kPositiveSampleSize : kNegativeSampleSize));
    }
    sum_rows([&](int i, int j) { return fabsf(coefficient(i, j)); }, [](float value) { return value; },
             sums + kMeanCoefficient);
  }

 private:
  DRIFT_FUNCTION float logit(int i, int j, float inverse) const { return arena.distance[place(i, j)] * inverse; }

  // Column mass proportional to max(w, 1e-6) within a side, or uniform; its logarithm.
  DRIFT_FUNCTION void load_marginals() {
    block.phase([&](int thread) {
      if (thread >= num_sides) return;
      double mass = 0;
      for (int j = side_begin(thread); j < side_end(thread); ++j) mass += at_least(arena.weight[j], kSmallestMarginalWeight);
      arena.scratch[thread] = static_cast<float>(mass);
    });
    block.phase([&](int thread) {
      for (int j = thread; j < M; j += block.num_threads()) {
        const int side = side_of(j);
        const float uniform = -logf(static_cast<float>(side_end(side) - side_begin(side)));
        const float mass = at_least(arena.weight[j], kSmallestMarginalWeight) / arena.scratch[side];
        arena.marginal[j] = call.options.weighted_columns ? logf(mass) : uniform;
      }
    });
  }

  DRIFT_FUNCTION void normalise_rows(float inverse) {
    for (int side = 0; side < num_sides; ++side) {
      log_sum_exp(
          block, rows, side_begin(side), side_end(side), arena.scratch, arena.other_scratch,
          [&](int i, int j) { return logit(i, j, inverse) + arena.bias[j]; },
          [&](int i, float value) { arena.row[side * G + i] = value; });
    }
  }

  // Entropic transport with uniform rows: potentials into `row` and `column`.
  DRIFT_FUNCTION void transport(int side, float inverse) {
    const int begin = side_begin(side), end = side_end(side);
    const Lanes side_columns = share_lines(end - begin, block.num_threads(), false);
    const float log_row = -logf(static_cast<float>(G));
    block.phase([&](int thread) {
      for (int j = begin + thread; j < end; j += block.num_threads()) arena.column[j] = 0.0f;
    });
    for (int iteration = 0; iteration < call.options.sinkhorn_iterations; ++iteration) {
      log_sum_exp(
          block, rows, begin, end, arena.scratch, arena.other_scratch,
          [&](int i, int j) { return logit(i, j, inverse) + arena.bias[j] + arena.column[j]; },
          [&](int i, float value) { arena.row[side * G + i] = log_row - value; });
      log_sum_exp(
          block, side_columns, 0, G, arena.scratch, arena.other_scratch,
          [&](int k, int i) { return logit(i, begin + k, inverse) + arena.bias[begin + k] + arena.row[side * G + i]; },
          [&](int k, float value) { arena.column[begin + k] = arena.marginal[begin + k] - value; });
    }
  }

  // log A before the floor and before the factor.
  DRIFT_FUNCTION float log_affinity(int i, int j, float inverse) const {
    const float l = logit(i, j, inverse), row = arena.row[side_of(j) * G + i];
    switch (call.options.coupling) {
      case Coupling::kTwoSided:
        return l - 0.5f * (row + arena.column[j]) + 0.5f * arena.bias[j];
      case Coupling::kRow:
        return l + arena.bias[j] - row;
      default:
        return l + arena.bias[j] + row + arena.column[j];
    }
  }

  // A into its matrix; each row's mass on either side gives the factors of its coefficients (step 5, and the split form).
  DRIFT_FUNCTION void measure_rows(float inverse) {
    const float lowest = call.options.coupling == Coupling::kTwoSided ? log_floor : -kInfinity;
    const float attraction = call.options.attraction, repulsion = call.options.repulsion;
    block.phase([&](int thread) {
      for (int index = thread; index < rows.count(); index += block.num_threads()) {
        const int i = rows.line(index), lane = rows.lane(index);
        float negative = 0, positive = 0;
        for (int j = lane; j < M; j += rows.lanes) {
          const float A = expf(at_least(log_affinity(i, j, inverse), lowest)) * arena.factor[j];
          arena.affinity[place(i, j)] = A;
          if (j < repelling) {
            negative += A;
          } else {
            positive += A;
          }
        }
        arena.scratch[rows.slot(i, lane)] = negative;
        arena.other_scratch[rows.slot(i, lane)] = positive;
      }
    });
    block.phase([&](int thread) {
      for (int i = thread; i < G; i += block.num_threads()) {
        float negative = 0, positive = 0;
        for (int lane = 0; lane < rows.lanes; ++lane) {
          negative += arena.scratch[rows.slot(i, lane)];
          positive += arena.other_scratch[rows.slot(i, lane)];
        }
        // The coefficients of a row sum to zero: what is left goes to x_i itself, so that the origin does not matter.
        float remainder = 0;
        if (call.options.split) {
          arena.negative_factor[i] = -repulsion / at_least(negative, kSmallestRowSum);
          arena.positive_factor[i] = attraction / at_least(positive, kSmallestRowSum);
          remainder = -(arena.negative_factor[i] * negative + arena.positive_factor[i] * positive);
        } else {
          arena.negative_factor[i] = -repulsion * positive;
          arena.positive_factor[i] = attraction * negative;
          if (attraction != repulsion) remainder = (repulsion - attraction) * negative * positive;
        }
        arena.remainder[i] = remainder;
      }
    });
  }

  // *sum = sum over rows i of of_row(sum over j of value(i, j)).
  template <class Value, class OfRow>
  DRIFT_FUNCTION void sum_rows(Value value, OfRow of_row, float* sum) {
    add_lines(block, rows, M, arena.other_scratch, value, [&](int i, float total) { arena.scratch[i] = of_row(total); });
    block.phase([&](int thread) {
      if (thread != 0) return;
      double total = 0;
      for (int i = 0; i < G; ++i) total += arena.scratch[i];
      *sum = static_cast<float>(total);
    });
  }
};

}  // namespace drift_accel::cuda
