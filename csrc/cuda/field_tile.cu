#include "field_tile.h"

#include "launch.h"

namespace drift_accel::cuda {
namespace {

extern __shared__ __align__(32) float field_memory[];  // tiles start at multiples of 32 bytes

template <class Element>
__global__ void __launch_bounds__(kFieldThreads, 2) field_kernel(const __grid_constant__ FieldCall call) {
  DeviceBlock block;
  float* staged = field_memory;
  Element* y = reinterpret_cast<Element*>(staged + kStagedCells + kFieldThreads);
  multiply_field_tile<Element>(block, staged, y, call, blockIdx.x / call.tiles, static_cast<int>(blockIdx.x % call.tiles));
}

}  // namespace

cudaError_t launch_field(const FieldCall& call, cudaStream_t stream) {
  const auto num_blocks = static_cast<unsigned>(call.count * call.tiles);
  if (num_blocks == 0) return cudaSuccess;
  const bool bfloat16 = call.features.type == ElementType::kBFloat16;
  const auto kernel = bfloat16 ? field_kernel<BFloat16> : field_kernel<Float16>;
  const auto shared_bytes = static_cast<int>(field_shared_bytes(call.targets));
  if (shared_bytes > kSharedBytesWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<num_blocks, kFieldThreads, shared_bytes, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace drift_accel::cuda
