#include "launch.h"
#include "pack.h"

namespace drift_accel::cuda {
namespace {

template <class Element>
__global__ void __launch_bounds__(kPackThreads) pack_kernel(const __grid_constant__ PackCall call) {
  __shared__ PackShared<float> shared;
  DeviceBlock block;
  pack_tile<Element>(block, shared, call, blockIdx.x / call.tiles, static_cast<int>(blockIdx.x % call.tiles));
}

}  // namespace

cudaError_t launch_pack(const PackCall& call, cudaStream_t stream) {
  const auto num_blocks = static_cast<unsigned>(call.count * call.tiles);
  if (num_blocks == 0) return cudaSuccess;
  switch (call.features.type) {
    case ElementType::kFloat32:
      pack_kernel<float><<<num_blocks, kPackThreads, 0, stream>>>(call);
      break;
    case ElementType::kBFloat16:
      pack_kernel<BFloat16><<<num_blocks, kPackThreads, 0, stream>>>(call);
      break;
    case ElementType::kFloat16:
      pack_kernel<Float16><<<num_blocks, kPackThreads, 0, stream>>>(call);
      break;
  }
  return cudaGetLastError();
}

}  // namespace drift_accel::cuda
