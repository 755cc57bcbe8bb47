// The schema of the fused drift op, once for all devices, and the facts of this build for Python.
#include <pybind11/pybind11.h>
#include <torch/library.h>

#ifndef DRIFT_ACCEL_VERSION
#error "build with setup.py: it passes DRIFT_ACCEL_VERSION, DRIFT_ACCEL_SOURCE_HASH and DRIFT_ACCEL_CUDA_ARCHITECTURES"
#endif

#define DRIFT_OPTIONS                                                                                                     \
  "float[] temperatures, str coupling, str drift_form, str weight_placement, str metric, str field, float affinity_floor, " \
  "bool mask_self, str sinkhorn_marginal, int sinkhorn_iterations, float attraction, float repulsion"

TORCH_LIBRARY(drift_accel, library) {
  library.def(
      "distances(Tensor generated, Tensor positives, Tensor? negatives, Tensor? negative_weight, bool keep) "
      "-> (Tensor distances, Tensor sums)");
  library.def(
      "field_norms(Tensor generated, Tensor positives, Tensor? negatives, Tensor? negative_weight, Tensor? distances, "
      "Tensor scales, " DRIFT_OPTIONS ") -> Tensor");
  library.def(
      "loss_and_gradient(Tensor generated, Tensor positives, Tensor? negatives, Tensor? negative_weight, Tensor? distances, "
      "Tensor scales, Tensor sqnorms, " DRIFT_OPTIONS
      ", bool diagnostics) -> (Tensor loss, Tensor gradient, Tensor diagnostics)");
}

namespace drift_accel {
const char* cpu_instructions();  // cpu/drift_cpu.cpp
namespace cpu {
int64_t peak_scratch_bytes(bool reset);  // cpu/problems.cpp
}
}  // namespace drift_accel

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "The fused drift op of drift_accel: importing this registers torch.ops.drift_accel.";
  module.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["version"] = DRIFT_ACCEL_VERSION;
        info["source_hash"] = DRIFT_ACCEL_SOURCE_HASH;
#ifdef DRIFT_ACCEL_WITH_CUDA
        info["cuda"] = true;
#else
        info["cuda"] = false;
#endif
        info["cuda_architectures"] = DRIFT_ACCEL_CUDA_ARCHITECTURES;
        info["torch"] = DRIFT_ACCEL_TORCH_VERSION;
#if defined(__clang__)
        info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
        info["compiler"] = "gcc " __VERSION__;
#else
        info["compiler"] = "unknown";
#endif
#ifdef _OPENMP
        info["openmp"] = true;
#else
        info["openmp"] = false;
#endif
        info["cpu_instructions"] = drift_accel::cpu_instructions();
        return info;
      },
      "What this library was built of and with: a dict.");
  module.def("peak_scratch_bytes", &drift_accel::cpu::peak_scratch_bytes, pybind11::arg("reset") = false,
             "The most memory that the processor's kernels held at one time since the last reset, beside the tensors.");
}
