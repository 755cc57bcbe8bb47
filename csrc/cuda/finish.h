// From products of coefficients and targets to the fields V, the sums of their squares and the gradient (steps 6 and 7).
//
// V is in units of u. loss_b = mean over G and S of V^2, gradient = -2 V / (G S u); coefficients hold the normalisation.
#pragma once

#include "calls.h"
#include "elements.h"
#include "scales.h"

namespace drift_accel::cuda {

// Features [tile * kFinishedFeatures, ...) of one problem's segment; scratch holds one value a thread.
template <class Element, class Block>
DRIFT_FUNCTION void finish_tile(Block& block, typename Block::Cell* scratch, const FinishCall& call, int64_t problem, int tile) {
  const int64_t begin = static_cast<int64_t>(tile) * kFinishedFeatures, G = call.G;
  const int64_t left = call.num_features - begin;
  const int width = static_cast<int>(left < kFinishedFeatures ? left : kFinishedFeatures);
  const int parts = call.row_scales != nullptr ? 2 : 1;
  const float inverse_u = 1.0f / feature_scale(call.scales, call.S);
  const float factor = -2.0f / (static_cast<float>(G) * static_cast<float>(call.S)) * inverse_u;
  for (int output = 0; output < call.outputs; ++output) {
    const int first_group = call.outputs > 1 ? output : 0, end_group = call.outputs > 1 ? output + 1 : call.groups;
    block.phase([&](int thread) {
      float squares = 0;
      for (int64_t i = thread / kWarp; i < G; i += block.num_threads() / kWarp) {
        for (int k = thread % kWarp; k < width; k += kWarp) {
          float sum = 0;
          for (int group = first_group; group < end_group; ++group) {
            const int64_t place = problem * call.groups + group;
            const float* field = call.fields + (place * parts * G + i) * call.padded_features + begin + k;
            float V = *field;
            if (parts == 2) V = (V + field[G * call.padded_features]) * call.row_scales[place * G + i];
            V *= inverse_u;
            sum += V;
            squares += V * V;
          }
          if (call.gradient != nullptr) {
            const int64_t feature = call.first_feature + begin + k;
            static_cast<Element*>(call.gradient)[((call.first + problem) * G + i) * call.S + feature] =
                from_float<Element>(sum * factor);
          }
        }
      }
      scratch[thread] = squares;
    });
    add_threads(block, scratch, [&](float total) {
      const int64_t place = (call.first + problem) * call.total_tiles + call.first_tile + tile;
      call.partials[place * call.outputs + output] = total;
    });
  }
}

}  // namespace drift_accel::cuda
