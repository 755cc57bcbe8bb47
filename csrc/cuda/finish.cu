#include "finish.h"

#include "launch.h"
#include "reduce.h"

namespace drift_accel::cuda {
namespace {

template <class Element>
__global__ void __launch_bounds__(kFinishThreads, 4) finish_kernel(const __grid_constant__ FinishCall call) {
  __shared__ float scratch[kFinishThreads];
  DeviceBlock block;
  finish_tile<Element>(block, scratch, call, blockIdx.x / call.tiles, static_cast<int>(blockIdx.x % call.tiles));
}

__global__ void __launch_bounds__(kReduceThreads) reduce_kernel(const __grid_constant__ ReduceCall call) {
  __shared__ double sums[kReduceThreads];
  DeviceBlock block;
  reduce_output(block, sums, call, static_cast<int>(blockIdx.x));
}

__global__ void __launch_bounds__(kReduceThreads) losses_kernel(const __grid_constant__ LossCall call) {
  const int64_t problem = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x;
  if (problem < call.num_problems) call.loss[problem] = loss_of_problem(call, problem);
}

}  // namespace

cudaError_t launch_finish(const FinishCall& call, cudaStream_t stream) {
  const auto num_blocks = static_cast<unsigned>(call.count * call.tiles);
  if (num_blocks == 0) return cudaSuccess;
  switch (call.type) {
    case ElementType::kFloat32:
      finish_kernel<float><<<num_blocks, kFinishThreads, 0, stream>>>(call);
      break;
    case ElementType::kBFloat16:
      finish_kernel<BFloat16><<<num_blocks, kFinishThreads, 0, stream>>>(call);
      break;
    case ElementType::kFloat16:
      finish_kernel<Float16><<<num_blocks, kFinishThreads, 0, stream>>>(call);
      break;
  }
  return cudaGetLastError();
}

cudaError_t launch_reduce(const ReduceCall& call, cudaStream_t stream) {
  if (call.outputs == 0) return cudaSuccess;
  reduce_kernel<<<static_cast<unsigned>(call.outputs), kReduceThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

cudaError_t launch_losses(const LossCall& call, cudaStream_t stream) {
  if (call.num_problems == 0) return cudaSuccess;
  const auto num_blocks = static_cast<unsigned>((call.num_problems + kReduceThreads - 1) / kReduceThreads);
  losses_kernel<<<num_blocks, kReduceThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace drift_accel::cuda
