#include "checks.h"

#include <c10/util/Exception.h>

#include <initializer_list>

namespace drift_accel {
namespace {

ElementType element_type(const char* name, at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return ElementType::kFloat32;
    case at::kBFloat16:
      return ElementType::kBFloat16;
    case at::kHalf:
      return ElementType::kFloat16;
    default:
      TORCH_CHECK_VALUE(false, name, " is ", type, ": the fused drift takes float32, bfloat16 or float16");
  }
}

Members check_members(const char* name, const at::Tensor& members, const at::Tensor& generated) {
  TORCH_CHECK_VALUE(members.dim() == 3, name, " has shape ", members.sizes(), ": wanted [problems, members, features]");
  TORCH_CHECK_VALUE(members.scalar_type() == generated.scalar_type() && members.device() == generated.device(), name, " is ",
                    members.scalar_type(), " on ", members.device(), ": wanted ", generated.scalar_type(), " on ",
                    generated.device(), " as generated");
  TORCH_CHECK_VALUE(members.size(0) == generated.size(0) && members.size(2) == generated.size(2), name, " has shape ",
                    members.sizes(), " but generated has ", generated.sizes(),
                    ": problems (axis 0) and features (axis 2) must agree");
  return {members.const_data_ptr(), {members.stride(0), members.stride(1), members.stride(2)}};
}

// The place of `value` among the names that an option may have.
int choose(const char* option, std::string_view value, std::initializer_list<std::string_view> names) {
  int index = 0;
  for (std::string_view name : names) {
    if (name == value) return index;
    ++index;
  }
  std::string listed;
  for (std::string_view name : names) listed.append(listed.empty() ? "" : ", ").append(name);
  TORCH_CHECK_VALUE(false, option, " is '", value, "': wanted one of ", listed);
}

}  // namespace

Problem check_problem(const at::Tensor& generated, const at::Tensor& positives, const std::optional<at::Tensor>& negatives,
                      const std::optional<at::Tensor>& negative_weight) {
  Problem problem{};
  problem.scalar_type = generated.scalar_type();
  problem.type = element_type("generated", generated.scalar_type());
  problem.generated = check_members("generated", generated, generated);
  problem.positives = check_members("positives", positives, generated);
  problem.sizes = {generated.size(0), generated.size(1), 0, positives.size(1), generated.size(2)};
  if (negatives.has_value()) {
    problem.negatives = check_members("negatives", *negatives, generated);
    problem.sizes.N = negatives->size(1);
  }
  const Sizes& sizes = problem.sizes;
  TORCH_CHECK_VALUE(sizes.G > 0 && sizes.P > 0 && sizes.S > 0, "generated has shape ", generated.sizes(), " and positives ",
                    positives.sizes(), ": wanted at least one generated sample, one positive and one feature");
  if (negative_weight.has_value()) {
    TORCH_CHECK_VALUE(negative_weight->dim() == 2 && negative_weight->size(0) == sizes.B && negative_weight->size(1) == sizes.N,
                      "negative_weight has shape ", negative_weight->sizes(), ": wanted [", sizes.B, ", ", sizes.N, "]");
    TORCH_CHECK_VALUE(negative_weight->scalar_type() == at::kFloat && negative_weight->device() == generated.device(),
                      "negative_weight is ", negative_weight->scalar_type(), " on ", negative_weight->device(),
                      ": wanted float32 on ", generated.device());
    problem.weights = {negative_weight->const_data_ptr<float>(), {negative_weight->stride(0), negative_weight->stride(1)}};
  }
  return problem;
}

const float* check_distances(const std::optional<at::Tensor>& distances, const Problem& problem, const at::Tensor& generated) {
  if (!distances.has_value()) return nullptr;
  const Sizes& sizes = problem.sizes;
  TORCH_CHECK_VALUE(distances->dim() == 3 && distances->size(0) == sizes.B && distances->size(1) == sizes.G &&
                        distances->size(2) == sizes.M() && distances->is_contiguous(),
                    "distances has shape ", distances->sizes(), ": wanted [", sizes.B, ", ", sizes.G, ", ", sizes.M(),
                    "], contiguous");
  TORCH_CHECK_VALUE(distances->scalar_type() == at::kFloat && distances->device() == generated.device(), "distances is ",
                    distances->scalar_type(), " on ", distances->device(), ": wanted float32 on ", generated.device());
  return distances->const_data_ptr<float>();
}

const float* check_statistics(const char* name, const at::Tensor& values, int64_t count, const at::Tensor& generated) {
  TORCH_CHECK_VALUE(values.dim() == 1 && values.size(0) == count && values.is_contiguous(), name, " has shape ", values.sizes(),
                    ": wanted [", count, "], contiguous");
  TORCH_CHECK_VALUE(values.scalar_type() == at::kFloat && values.device() == generated.device(), name, " is ",
                    values.scalar_type(), " on ", values.device(), ": wanted float32 on ", generated.device());
  return values.const_data_ptr<float>();
}

Options parse_options(at::ArrayRef<double> temperatures, std::string_view coupling, std::string_view drift_form,
                      std::string_view weight_placement, std::string_view metric, std::string_view field,
                      double affinity_floor, bool mask_self, std::string_view sinkhorn_marginal, int64_t sinkhorn_iterations,
                      double attraction, double repulsion) {
  Options options{};
  const int64_t count = static_cast<int64_t>(temperatures.size());
  TORCH_CHECK_VALUE(count >= 1 && count <= kMaxTemperatures, "temperatures has ", count, " values: wanted 1 to ",
                    kMaxTemperatures);
  for (int64_t t = 0; t < count; ++t) {
    TORCH_CHECK_VALUE(temperatures[t] > 0, "temperatures holds ", temperatures[t], ": wanted positive numbers");
    options.temperatures[t] = static_cast<float>(temperatures[t]);
  }
  options.num_temperatures = static_cast<int32_t>(count);
  options.coupling = static_cast<Coupling>(choose("coupling", coupling, {"two_sided", "row", "sinkhorn"}));
  options.split = choose("drift_form", drift_form, {"joint", "split"}) == 1;
  options.log_bias = choose("weight_placement", weight_placement, {"after", "log_bias"}) == 1;
  options.squared = choose("metric", metric, {"l2", "l2_sq"}) == 1;
  options.separate_losses = choose("field", field, {"summed", "per_temperature"}) == 1;
  options.weighted_columns = choose("sinkhorn_marginal", sinkhorn_marginal, {"weighted_cols", "none"}) == 0;
  options.mask_self = mask_self;
  TORCH_CHECK_VALUE(affinity_floor >= 0, "affinity_floor is ", affinity_floor, ": wanted at least 0");
  TORCH_CHECK_VALUE(sinkhorn_iterations >= 1, "sinkhorn_iterations is ", sinkhorn_iterations, ": wanted at least 1");
  TORCH_CHECK_VALUE(attraction >= 0, "attraction is ", attraction, ": wanted at least 0");
  TORCH_CHECK_VALUE(repulsion >= 0, "repulsion is ", repulsion, ": wanted at least 0");
  options.affinity_floor = static_cast<float>(affinity_floor);
  options.sinkhorn_iterations = static_cast<int32_t>(sinkhorn_iterations);
  options.attraction = static_cast<float>(attraction);
  options.repulsion = static_cast<float>(repulsion);
  return options;
}

}  // namespace drift_accel
