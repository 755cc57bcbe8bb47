// Runs the kernels' programs on a host, chained as drift_cuda.cpp chains them: proves the arithmetic where there is no device.
//
//   host_harness INPUT OUTPUT
//   host_harness demonstrate race|unwritten      shows that checked memory stops at a mistake
//
// INPUT: lines of a name and numbers, an empty line, then the arrays: generated, positives, negatives (their storage, elements
// of the type), weights (float32). OUTPUT: float32 values: sums [3], norms [T + 1], loss [B], gradient [B][G][S],
// diagnostics [T][4]; then some numbers of the last two stages' plans.
// tests/test_cuda_arithmetic.py writes the one and reads the other.
#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "chain.h"
#include "field.h"
#include "field_tile.h"
#include "finish.h"
#include "host_block.h"
#include "pack.h"
#include "reduce.h"

namespace drift_accel::cuda {
namespace {

template <class Cell>
class HostMachine {
 public:
  explicit HostMachine(bool backwards) : backwards_(backwards) {}

  void* allocate(int64_t bytes) {
    memory_.emplace_back(new char[bytes]);
    std::memset(memory_.back().get(), 0xff, bytes);  // NaN: nothing may rely on fresh memory
    return memory_.back().get();
  }

  void pack(const PackCall& call) {
    for (int64_t index = 0; index < call.count * call.tiles; ++index) {
      const auto run = [&](auto element) {
        HostBlock<Cell> block(kPackThreads, backwards_);
        auto shared = std::make_unique<PackShared<Cell>>();
        pack_tile<decltype(element)>(block, *shared, call, index / call.tiles, static_cast<int>(index % call.tiles));
      };
      with_element(call.features.type, run);
    }
  }

  void product(const ProductCall& call) {
    with_element(call.type, [&](auto element) {
      using Element = decltype(element);
      std::vector<float> right(call.inner * call.columns);
      for (int64_t b = 0; b < call.count; ++b) {
        const Element* left_values = static_cast<const Element*>(call.left) + b * call.left_stride;
        const Element* right_values = static_cast<const Element*>(call.right) + b * call.right_stride;
        for (int64_t k = 0; k < call.inner; ++k) {
          for (int64_t j = 0; j < call.columns; ++j) {
            const int64_t place = call.transposed ? j * call.inner + k : k * call.columns + j;
            right[k * call.columns + j] = to_float(right_values[place]);
          }
        }
        for (int64_t i = 0; i < call.rows; ++i) {
          float* out = call.out + b * call.out_stride + i * call.columns;
          std::fill(out, out + call.columns, 0.0f);
          for (int64_t k = 0; k < call.inner; ++k) {
            const float value = to_float(left_values[i * call.inner + k]);
            for (int64_t j = 0; j < call.columns; ++j) out[j] += value * right[k * call.columns + j];
          }
        }
      }
    });
  }

  void couple(const Plan& plan, const CouplingCall& call) {
    for (int64_t problem = 0; problem < call.count; ++problem) {
      // Shared memory holds anything when a block starts: a fresh piece for each, of exactly the planned size.
      HostBlock<Cell> block(plan.threads, backwards_);
      std::unique_ptr<Cell[]> memory(new Cell[plan.arena_floats]);
      if (plan.stage == Stage::kDistances) {
        distances_of_problem(block, memory.get(), call, problem);
      } else if (plan.stage == Stage::kNorms) {
        plan.shared ? norms_of_problem<true>(block, memory.get(), call, problem)
                    : norms_of_problem<false>(block, memory.get(), call, problem);
      } else {
        plan.shared ? coefficients_of_problem<true>(block, memory.get(), call, problem)
                    : coefficients_of_problem<false>(block, memory.get(), call, problem);
      }
    }
    if (!plan.shared && call.arena == nullptr) std::abort();
    last_plan = plan;
  }

  void multiply_fields(const FieldCall& call) {
    if (call.features.type == ElementType::kFloat32) std::abort();
    for (int64_t index = 0; index < call.count * call.tiles; ++index) {
      const auto run = [&](auto element) {
        using Element = decltype(element);
        HostBlock<Cell> block(kFieldThreads, backwards_);
        std::unique_ptr<Cell[]> staged(new Cell[kStagedCells + kFieldThreads]);
        std::vector<Element> targets(call.targets * kFieldLeading);
        std::memset(targets.data(), 0xff, targets.size() * sizeof(Element));
        multiply_field_tile<Element>(block, staged.get(), targets.data(), call, index / call.tiles,
                                     static_cast<int>(index % call.tiles));
      };
      call.features.type == ElementType::kBFloat16 ? run(BFloat16{}) : run(Float16{});
    }
  }

  void finish(const FinishCall& call) {
    for (int64_t index = 0; index < call.count * call.tiles; ++index) {
      with_element(call.type, [&](auto element) {
        HostBlock<Cell> block(kFinishThreads, backwards_);
        std::unique_ptr<Cell[]> scratch(new Cell[kFinishThreads]);
        finish_tile<decltype(element)>(block, scratch.get(), call, index / call.tiles, static_cast<int>(index % call.tiles));
      });
    }
  }

  void reduce(const ReduceCall& call) {
    for (int output = 0; output < call.outputs; ++output) {
      HostBlock<Cell> block(kReduceThreads, backwards_);
      std::vector<double> sums(kReduceThreads);
      reduce_output(block, sums.data(), call, output);
    }
  }

  void write_losses(const LossCall& call) {
    for (int64_t problem = 0; problem < call.num_problems; ++problem) call.loss[problem] = loss_of_problem(call, problem);
  }

  Plan last_plan{};

 private:
  template <class Run>
  static void with_element(ElementType type, Run run) {
    switch (type) {
      case ElementType::kFloat32:
        return run(float{});
      case ElementType::kBFloat16:
        return run(BFloat16{});
      case ElementType::kFloat16:
        return run(Float16{});
    }
  }

  std::vector<std::unique_ptr<char[]>> memory_;
  bool backwards_;
};

// The input file.
struct Case {
  std::map<std::string, std::vector<double>> numbers;
  std::vector<char> members[3];
  std::vector<float> weights;

  double number(const std::string& name) const { return numbers.at(name).at(0); }
  bool given(const std::string& name) const { return numbers.count(name) > 0; }
};

template <class Value>
void read_array(std::ifstream& file, std::vector<Value>& values, int64_t count) {
  values.resize(count);
  file.read(reinterpret_cast<char*>(values.data()), count * static_cast<int64_t>(sizeof(Value)));
  if (!file) throw std::runtime_error("the input ends early");
}

Case read_case(const char* path) {
  std::ifstream file(path, std::ios::binary);
  Case read;
  for (std::string line; std::getline(file, line) && !line.empty();) {
    std::istringstream words(line);
    std::string name;
    words >> name;
    for (double value; words >> value;) read.numbers[name].push_back(value);
  }
  const int64_t size = read.number("type") == 0 ? 4 : 2;
  const char* names[] = {"generated", "positives", "negatives"};
  for (int k = 0; k < 3; ++k) {
    read_array(file, read.members[k], size * static_cast<int64_t>(read.numbers.at(std::string(names[k]) + "_storage").at(0)));
  }
  if (read.given("weights_strides")) read_array(file, read.weights, static_cast<int64_t>(read.number("weights_storage")));
  return read;
}

Options read_options(const Case& from) {
  Options options{};
  const auto& temperatures = from.numbers.at("temperatures");
  options.num_temperatures = static_cast<int32_t>(temperatures.size());
  for (size_t t = 0; t < temperatures.size(); ++t) options.temperatures[t] = static_cast<float>(temperatures[t]);
  options.coupling = static_cast<Coupling>(static_cast<int>(from.number("coupling")));
  options.log_bias = from.number("log_bias") != 0;
  options.split = from.number("split") != 0;
  options.squared = from.number("squared") != 0;
  options.mask_self = from.number("mask_self") != 0;
  options.weighted_columns = from.number("weighted_columns") != 0;
  options.separate_losses = from.number("separate_losses") != 0;
  options.affinity_floor = static_cast<float>(from.number("affinity_floor"));
  options.sinkhorn_iterations = static_cast<int32_t>(from.number("sinkhorn_iterations"));
  options.attraction = static_cast<float>(from.number("attraction"));
  options.repulsion = static_cast<float>(from.number("repulsion"));
  return options;
}

Members read_members(const Case& from, int which, const std::string& name) {
  const auto& strides = from.numbers.at(name + "_strides");
  return {from.members[which].data(),
          {static_cast<int64_t>(strides[0]), static_cast<int64_t>(strides[1]), static_cast<int64_t>(strides[2])}};
}

template <class Cell>
std::vector<float> run_case(const Case& from) {
  const auto size = [&](const char* name) { return static_cast<int64_t>(from.number(name)); };
  const Sizes sizes{size("B"), size("G"), size("N"), size("P"), size("S")};
  const auto type = static_cast<ElementType>(size("type"));
  const Options options = read_options(from);
  const Limits limits{size("shared_bytes"), size("workspace_bytes"), size("segment_features"),
                      static_cast<int32_t>(size("norms")), from.number("library_fields") != 0};
  Weights weights{};
  if (from.given("weights_strides")) {
    const auto& strides = from.numbers.at("weights_strides");
    weights = {from.weights.data(), {static_cast<int64_t>(strides[0]), static_cast<int64_t>(strides[1])}};
  }
  const Features features = make_features(sizes, type, read_members(from, 0, "generated"), read_members(from, 2, "negatives"),
                                          read_members(from, 1, "positives"), weights);
  const int T = options.num_temperatures;
  const int64_t num_gradients = sizes.B * sizes.G * sizes.S;
  const bool diagnosed = from.number("diagnostics") != 0;
  std::vector<float> sums(3, NAN), norms(T + 1, NAN), loss(sizes.B, NAN), diagnostics(T * kNumDiagnostics, NAN);
  std::vector<float> distances(from.number("keep") != 0 ? sizes.B * sizes.G * sizes.M() : 0, NAN);
  std::vector<char> gradient(num_gradients * 4, '\xff');

  HostMachine<Cell> machine(from.number("backwards") != 0);
  compute_distances(machine, limits, sizes, features, distances.empty() ? nullptr : distances.data(), sums.data());
  const float weight = std::max(sums[2], 1.0f);
  float scales[] = {sums[0] / weight, sums[1] / weight};
  if (from.given("scale")) scales[0] = static_cast<float>(from.number("scale"));
  if (from.given("mean_square")) scales[1] = static_cast<float>(from.number("mean_square"));
  const float* kept = distances.empty() ? nullptr : distances.data();
  compute_norms(machine, limits, sizes, features, kept, scales, options, norms.data());
  const Plan norms_plan = machine.last_plan;
  std::vector<float> sqnorms(T);
  for (int t = 0; t < T; ++t) {
    sqnorms[t] = norms[t] / std::max(norms[T], 1.0f);
    if (from.given("sqnorms")) sqnorms[t] = static_cast<float>(from.numbers.at("sqnorms").at(t));
  }
  compute_loss(machine, limits, sizes, features, kept, scales, sqnorms.data(), options, loss.data(), gradient.data(),
               diagnosed ? diagnostics.data() : nullptr);

  std::vector<float> output;
  for (const auto* part : {&sums, &norms, &loss}) output.insert(output.end(), part->begin(), part->end());
  for (int64_t k = 0; k < num_gradients; ++k) output.push_back(load_element(gradient.data(), type, k));
  output.insert(output.end(), diagnostics.begin(), diagnostics.end());
  for (const Plan& plan : {norms_plan, machine.last_plan}) {
    const int64_t numbers[] = {plan.chunk, plan.threads, plan.shared, plan.gram, plan.segments, plan.field_kernel};
    output.insert(output.end(), std::begin(numbers), std::end(numbers));
  }
  return output;
}

// A program with a mistake, to show that checked memory stops at it.
void demonstrate(const std::string& mistake) {
  HostBlock<CheckedCell> block(kWarp, false);
  std::unique_ptr<CheckedCell[]> memory(new CheckedCell[kWarp + 1]);
  block.phase([&](int thread) {
    memory[thread] = 1.0f;
    if (mistake == "race") memory[thread] = memory[thread == 0 ? 0 : thread - 1] + 1.0f;
    if (mistake == "unwritten") memory[thread] = static_cast<float>(memory[kWarp]);
  });
}

}  // namespace
}  // namespace drift_accel::cuda

int main(int count, char** arguments) {
  using namespace drift_accel::cuda;
  if (count != 3) {
    std::fprintf(stderr, "usage: %s INPUT OUTPUT\n", arguments[0]);
    return 2;
  }
  try {
    if (std::string(arguments[1]) == "demonstrate") {
      demonstrate(arguments[2]);
      return 0;
    }
    const Case from = read_case(arguments[1]);
#ifdef DRIFT_CHECKED_CELLS
    const std::vector<float> output = from.number("checked") != 0 ? run_case<CheckedCell>(from) : run_case<float>(from);
#else
    if (from.number("checked") != 0) throw std::runtime_error("built without DRIFT_CHECKED_CELLS");
    const std::vector<float> output = run_case<float>(from);
#endif
    std::ofstream file(arguments[2], std::ios::binary);
    file.write(reinterpret_cast<const char*>(output.data()), static_cast<std::streamsize>(output.size() * sizeof(float)));
    return file ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
