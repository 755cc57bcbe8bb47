// Launchers of the kernels: plain C++ for a caller that knows nothing of device code. Each returns the launch's error.
#pragma once

#include <cuda_runtime_api.h>

#include "plan.h"

namespace drift_accel::cuda {

cudaError_t launch_pack(const PackCall& call, cudaStream_t stream);
cudaError_t launch_coupling(const Plan& plan, const CouplingCall& call, cudaStream_t stream);
cudaError_t launch_field(const FieldCall& call, cudaStream_t stream);
cudaError_t launch_finish(const FinishCall& call, cudaStream_t stream);
cudaError_t launch_reduce(const ReduceCall& call, cudaStream_t stream);
cudaError_t launch_losses(const LossCall& call, cudaStream_t stream);

}  // namespace drift_accel::cuda
