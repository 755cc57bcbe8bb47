// The scales of step 3, read where they lie on the device.
#pragma once

#include "../problem.h"
#include "block.h"

namespace drift_accel::cuda {

// u = max(s / sqrt(S), 1e-3): what features are divided by.
DRIFT_FUNCTION float feature_scale(const float* scales, int64_t S) {
  return at_least(scales[0] / sqrtf(static_cast<float>(S)), kSmallestScale);
}

// What distances are divided by: max(s, 1e-3), or the weighted mean of d^2 where distances are squared.
DRIFT_FUNCTION float distance_scale(const float* scales, bool squared) {
  return squared ? scales[1] : at_least(scales[0], kSmallestScale);
}

}  // namespace drift_accel::cuda
