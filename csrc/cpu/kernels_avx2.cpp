// The kernels for x86 processors with AVX2 and FMA, whatever the rest of the library is compiled for.
#include "kernels.h"

#ifdef DRIFT_X86

#define VECTOR_BYTES 32
#define ROW_BLOCK 4
#define PANEL_VECTORS 3

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace drift_accel::cpu {
namespace avx2 {
#include "kernels_inside.h"
}  // namespace avx2
}  // namespace drift_accel::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace drift_accel::cpu {

extern const Kernels kAvx2Kernels = {
    "avx2",
    avx2::kWidth,
    avx2::kRows,
    avx2::kFieldBlock,
    avx2::packing_scratch,
    avx2::coupling_scratch,
    avx2::products,
    avx2::distances,
    avx2::distance_sums,
    avx2::normalise,
    avx2::couple,
    avx2::gram,
    avx2::gram_norm,
    avx2::field,
};

}  // namespace drift_accel::cpu

#endif
