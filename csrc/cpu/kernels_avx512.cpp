// The kernels for x86 processors with AVX-512, whatever the rest of the library is compiled for.
#include "kernels.h"

#ifdef DRIFT_X86

#define VECTOR_BYTES 64
#define ROW_BLOCK 8
#define PANEL_VECTORS 3

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")
#endif

namespace drift_accel::cpu {
namespace avx512 {
#include "kernels_inside.h"
}  // namespace avx512
}  // namespace drift_accel::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace drift_accel::cpu {

extern const Kernels kAvx512Kernels = {
    "avx512",
    avx512::kWidth,
    avx512::kRows,
    avx512::kFieldBlock,
    avx512::packing_scratch,
    avx512::coupling_scratch,
    avx512::products,
    avx512::distances,
    avx512::distance_sums,
    avx512::normalise,
    avx512::couple,
    avx512::gram,
    avx512::gram_norm,
    avx512::field,
};

}  // namespace drift_accel::cpu

#endif
