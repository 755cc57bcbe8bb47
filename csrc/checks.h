// From the arguments of the ops to what the arithmetic reads: shapes, types and option names checked once, for every device.
// Every message names the argument, what is wanted and what was given.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "problem.h"

namespace drift_accel {

// The members of one call. It points into the tensors that it was made of, which must outlive it.
struct Problem {
  Sizes sizes;
  ElementType type;
  at::ScalarType scalar_type;
  Members generated, negatives, positives;
  Weights weights;
};

// generated [B,G,S], positives [B,P,S], negatives [B,N,S] or none, negative_weight float32 [B,N] or none; any strides.
Problem check_problem(const at::Tensor& generated, const at::Tensor& positives, const std::optional<at::Tensor>& negatives,
                      const std::optional<at::Tensor>& negative_weight);

// float32 [B,G,M], contiguous, beside the features; nullptr where none were kept.
const float* check_distances(const std::optional<at::Tensor>& distances, const Problem& problem, const at::Tensor& generated);

// float32 [count], contiguous, beside the features.
const float* check_statistics(const char* name, const at::Tensor& values, int64_t count, const at::Tensor& generated);

// The option arguments of the schema, in its order.
Options parse_options(at::ArrayRef<double> temperatures, std::string_view coupling, std::string_view drift_form,
                      std::string_view weight_placement, std::string_view metric, std::string_view field,
                      double affinity_floor, bool mask_self, std::string_view sinkhorn_marginal, int64_t sinkhorn_iterations,
                      double attraction, double repulsion);

}  // namespace drift_accel
