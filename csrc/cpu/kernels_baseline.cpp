// The kernels for the instruction set that the compiler targets by itself: 128-bit vectors on x86-64 and ARM.
#include "kernels.h"

#define VECTOR_BYTES 16
#define ROW_BLOCK 4
#define PANEL_VECTORS 3

namespace drift_accel::cpu {
namespace baseline {
#include "kernels_inside.h"
}  // namespace baseline

extern const Kernels kBaselineKernels = {
    "baseline",
    baseline::kWidth,
    baseline::kRows,
    baseline::kFieldBlock,
    baseline::packing_scratch,
    baseline::coupling_scratch,
    baseline::products,
    baseline::distances,
    baseline::distance_sums,
    baseline::normalise,
    baseline::couple,
    baseline::gram,
    baseline::gram_norm,
    baseline::field,
};

}  // namespace drift_accel::cpu
