// The CUDA implementation of the drift op: carries out the chains of chain.h with the kernels of this folder and the batched
// products of the library, on the current stream, without a word from the device to the host.
#include <ATen/Context.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <vector>

#include "../checks.h"
#include "chain.h"
#include "launch.h"

namespace drift_accel::cuda {
namespace {

at::ScalarType scalar_type(ElementType type) {
  switch (type) {
    case ElementType::kBFloat16:
      return at::kBFloat16;
    case ElementType::kFloat16:
      return at::kHalf;
    default:
      return at::kFloat;
  }
}

// Kernels on the current stream of the features' device; memory from the caching allocator, so that a graph can capture it.
class DeviceMachine {
 public:
  explicit DeviceMachine(const at::Tensor& features)
      : guard_(features.device()),
        without_autocast_(c10::autocast_dispatch_keyset),
        stream_(c10::cuda::getCurrentCUDAStream()),
        options_(features.options().dtype(at::kByte)) {}

  Limits limits() const {
    int shared_bytes = 0;
    const int device = guard_.current_device().index();
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return {shared_bytes};
  }

  void* allocate(int64_t bytes) {
    memory_.push_back(at::empty({bytes}, options_));
    return memory_.back().mutable_data_ptr();
  }

  void pack(const PackCall& call) { C10_CUDA_CHECK(launch_pack(call, stream_)); }
  void couple(const Plan& plan, const CouplingCall& call) { C10_CUDA_CHECK(launch_coupling(plan, call, stream_)); }
  void multiply_fields(const FieldCall& call) { C10_CUDA_CHECK(launch_field(call, stream_)); }
  void finish(const FinishCall& call) { C10_CUDA_CHECK(launch_finish(call, stream_)); }
  void reduce(const ReduceCall& call) { C10_CUDA_CHECK(launch_reduce(call, stream_)); }
  void write_losses(const LossCall& call) { C10_CUDA_CHECK(launch_losses(call, stream_)); }

  // Half precision on tensor cores with float sums; float32 without TF32, whatever the caller allows elsewhere.
  void product(const ProductCall& call) {
    const at::NoTF32Guard exact;
    const at::ScalarType type = scalar_type(call.type);
    const at::Tensor left = matrices(call.left, type, {call.count, call.rows, call.inner}, {call.left_stride, call.inner, 1});
    const int64_t row = call.transposed ? 1 : call.columns, column = call.transposed ? call.inner : 1;
    const at::Tensor right =
        matrices(call.right, type, {call.count, call.inner, call.columns}, {call.right_stride, row, column});
    at::Tensor out =
        matrices(call.out, at::kFloat, {call.count, call.rows, call.columns}, {call.out_stride, call.columns, 1});
    if (type == at::kFloat) {
      at::bmm_out(out, left, right);
    } else {
      at::bmm_out(out, left, right, at::kFloat);
    }
  }

 private:
  at::Tensor matrices(const void* data, at::ScalarType type, at::IntArrayRef sizes, at::IntArrayRef strides) const {
    return at::for_blob(const_cast<void*>(data), sizes)
        .strides(strides)
        .options(options_.dtype(type))
        .target_device(options_.device())
        .make_tensor();
  }

  c10::cuda::CUDAGuard guard_;
  c10::impl::ExcludeDispatchKeyGuard without_autocast_;
  c10::cuda::CUDAStream stream_;
  at::TensorOptions options_;
  std::vector<at::Tensor> memory_;
};

Features features_of(const Problem& problem) {
  return make_features(problem.sizes, problem.type, problem.generated, problem.negatives, problem.positives, problem.weights);
}

at::Tensor empty_floats(const at::Tensor& beside, at::IntArrayRef sizes) {
  return at::empty(sizes, beside.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous));
}

at::Tensor zero_floats(const at::Tensor& beside, at::IntArrayRef sizes) {
  return at::zeros(sizes, beside.options().dtype(at::kFloat));
}

std::tuple<at::Tensor, at::Tensor> distances(const at::Tensor& generated, const at::Tensor& positives,
                                             const std::optional<at::Tensor>& negatives,
                                             const std::optional<at::Tensor>& negative_weight, bool keep) {
  const Problem problem = check_problem(generated, positives, negatives, negative_weight);
  const Sizes& sizes = problem.sizes;
  DeviceMachine machine(generated);
  at::Tensor kept = keep ? empty_floats(generated, {sizes.B, sizes.G, sizes.M()}) : empty_floats(generated, {0});
  if (sizes.B == 0) return {kept, zero_floats(generated, {3})};
  at::Tensor sums = empty_floats(generated, {3});
  compute_distances(machine, machine.limits(), sizes, features_of(problem), keep ? kept.mutable_data_ptr<float>() : nullptr,
                    sums.mutable_data_ptr<float>());
  return {kept, sums};
}

at::Tensor field_norms(const at::Tensor& generated, const at::Tensor& positives, const std::optional<at::Tensor>& negatives,
                       const std::optional<at::Tensor>& negative_weight, const std::optional<at::Tensor>& kept,
                       const at::Tensor& scales, at::ArrayRef<double> temperatures, std::string_view coupling,
                       std::string_view drift_form, std::string_view weight_placement, std::string_view metric,
                       std::string_view field, double affinity_floor, bool mask_self, std::string_view sinkhorn_marginal,
                       int64_t sinkhorn_iterations, double attraction, double repulsion) {
  const Problem problem = check_problem(generated, positives, negatives, negative_weight);
  const Options options =
      parse_options(temperatures, coupling, drift_form, weight_placement, metric, field, affinity_floor, mask_self,
                    sinkhorn_marginal, sinkhorn_iterations, attraction, repulsion);
  const float* given = check_distances(kept, problem, generated);
  const float* scale_values = check_statistics("scales", scales, 2, generated);
  DeviceMachine machine(generated);
  if (problem.sizes.B == 0) return zero_floats(generated, {options.num_temperatures + 1});
  at::Tensor norms = empty_floats(generated, {options.num_temperatures + 1});
  compute_norms(machine, machine.limits(), problem.sizes, features_of(problem), given, scale_values, options,
                norms.mutable_data_ptr<float>());
  return norms;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> loss_and_gradient(
    const at::Tensor& generated, const at::Tensor& positives, const std::optional<at::Tensor>& negatives,
    const std::optional<at::Tensor>& negative_weight, const std::optional<at::Tensor>& kept, const at::Tensor& scales,
    const at::Tensor& sqnorms, at::ArrayRef<double> temperatures, std::string_view coupling, std::string_view drift_form,
    std::string_view weight_placement, std::string_view metric, std::string_view field, double affinity_floor, bool mask_self,
    std::string_view sinkhorn_marginal, int64_t sinkhorn_iterations, double attraction, double repulsion, bool diagnose) {
  const Problem problem = check_problem(generated, positives, negatives, negative_weight);
  const Sizes& sizes = problem.sizes;
  const Options options =
      parse_options(temperatures, coupling, drift_form, weight_placement, metric, field, affinity_floor, mask_self,
                    sinkhorn_marginal, sinkhorn_iterations, attraction, repulsion);
  const float* given = check_distances(kept, problem, generated);
  const float* scale_values = check_statistics("scales", scales, 2, generated);
  const float* sqnorm_values = check_statistics("sqnorms", sqnorms, options.num_temperatures, generated);
  DeviceMachine machine(generated);
  at::Tensor loss = empty_floats(generated, {sizes.B});
  at::Tensor gradient = at::empty({sizes.B, sizes.G, sizes.S}, generated.options());
  if (sizes.B == 0) {
    return {loss, gradient,
            diagnose ? zero_floats(generated, {options.num_temperatures, kNumDiagnostics}) : empty_floats(generated, {0})};
  }
  at::Tensor diagnostics =
      diagnose ? empty_floats(generated, {options.num_temperatures, kNumDiagnostics}) : empty_floats(generated, {0});
  compute_loss(machine, machine.limits(), sizes, features_of(problem), given, scale_values, sqnorm_values, options,
               loss.mutable_data_ptr<float>(), gradient.mutable_data_ptr(),
               diagnose ? diagnostics.mutable_data_ptr<float>() : nullptr);
  return {loss, gradient, diagnostics};
}

}  // namespace
}  // namespace drift_accel::cuda

TORCH_LIBRARY_IMPL(drift_accel, CUDA, library) {
  library.impl("distances", &drift_accel::cuda::distances);
  library.impl("field_norms", &drift_accel::cuda::field_norms);
  library.impl("loss_and_gradient", &drift_accel::cuda::loss_and_gradient);
}
