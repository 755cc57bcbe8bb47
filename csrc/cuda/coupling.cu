#include "field.h"
#include "launch.h"

namespace drift_accel::cuda {
namespace {

extern __shared__ float block_memory[];

// Blocks that a multiprocessor should hold: two where both fit into its shared memory (64 registers a thread).
template <bool kShared>
constexpr int kBlocks = kShared ? 2 : 1;

// A problem's matrices and vectors: in shared memory, or in its part of the arena. Known at compile time, so that the compiler
// addresses shared memory as such.
template <bool kShared>
__device__ __forceinline__ float* problem_memory(const CouplingCall& call, int64_t problem) {
  if constexpr (kShared) return block_memory;
  return call.arena + problem * call.arena_floats;
}

template <bool kShared>
__global__ void __launch_bounds__(kMaxCouplingThreads, kBlocks<kShared>)
    distances_kernel(const __grid_constant__ CouplingCall call) {
  DeviceBlock block;
  distances_of_problem(block, problem_memory<kShared>(call, blockIdx.x), call, blockIdx.x);
}

template <bool kShared>
__global__ void __launch_bounds__(kMaxCouplingThreads, kBlocks<kShared>)
    norms_kernel(const __grid_constant__ CouplingCall call) {
  DeviceBlock block;
  norms_of_problem<kShared>(block, problem_memory<kShared>(call, blockIdx.x), call, blockIdx.x);
}

template <bool kShared>
__global__ void __launch_bounds__(kMaxCouplingThreads, kBlocks<kShared>)
    coefficients_kernel(const __grid_constant__ CouplingCall call) {
  DeviceBlock block;
  coefficients_of_problem<kShared>(block, problem_memory<kShared>(call, blockIdx.x), call, blockIdx.x);
}

using CouplingKernel = void (*)(CouplingCall);

template <bool kShared>
CouplingKernel kernel_of(Stage stage) {
  switch (stage) {
    case Stage::kDistances:
      return distances_kernel<kShared>;
    case Stage::kNorms:
      return norms_kernel<kShared>;
    default:
      return coefficients_kernel<kShared>;
  }
}

}  // namespace

cudaError_t launch_coupling(const Plan& plan, const CouplingCall& call, cudaStream_t stream) {
  if (call.count == 0) return cudaSuccess;
  const CouplingKernel kernel = plan.shared ? kernel_of<true>(plan.stage) : kernel_of<false>(plan.stage);
  if (plan.shared_bytes > kSharedBytesWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(plan.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(call.count), plan.threads, plan.shared_bytes, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace drift_accel::cuda
