// Sums over problems, in a fixed order: each thread adds every n-th partial, then the threads' sums are added.
#pragma once

#include "calls.h"
#include "block.h"

namespace drift_accel::cuda {

// result[output]; sums holds one float64 a thread.
template <class Block, class Double>
DRIFT_FUNCTION void reduce_output(Block& block, Double* sums, const ReduceCall& call, int output) {
  block.phase([&](int thread) {
    double total = 0;
    for (int64_t n = thread; n < call.num_partials; n += block.num_threads()) {
      total += call.partials[n * call.outputs + output];
    }
    sums[thread] = total;
  });
  block.phase([&](int thread) {
    if (thread >= kWarp) return;
    double total = 0;
    for (int other = thread; other < block.num_threads(); other += kWarp) total += sums[other];
    sums[thread] = total;
  });
  block.phase([&](int thread) {
    if (thread != 0) return;
    double total = 0;
    for (int other = 0; other < kWarp; ++other) total += sums[other];
    if (call.kind == Total::kNorms && output == 0) {
      call.result[call.outputs] = static_cast<float>(static_cast<double>(call.num_rows) * static_cast<double>(call.S));
    }
    if (call.kind == Total::kDiagnostics) {
      const int which = output % kNumDiagnostics;
      const bool of_rows = which == kPositiveSampleSize || which == kNegativeSampleSize;
      total /= static_cast<double>(call.num_rows) * (of_rows ? 1.0 : static_cast<double>(call.num_targets));
    }
    call.result[output] = static_cast<float>(total);
  });
}

DRIFT_FUNCTION float loss_of_problem(const LossCall& call, int64_t problem) {
  double total = 0;
  for (int tile = 0; tile < call.tiles; ++tile) total += call.partials[problem * call.tiles + tile];
  return static_cast<float>(total / (static_cast<double>(call.G) * static_cast<double>(call.S)));
}

}  // namespace drift_accel::cuda
