#include "problems.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

namespace drift_accel::cpu {
namespace {

constexpr int64_t kCacheLine = 64;
constexpr int64_t kSegmentFeatures = 8192;                 // a segment is at least this long
constexpr int64_t kSegmentTasks = 32;                      // problems times segments
constexpr int64_t kSegmentFloats = int64_t{16} << 20;      // of all segments' products together
constexpr float kFarPair = 1e30f;

std::atomic<int64_t> scratch_bytes{0}, scratch_peak{0};

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

const Kernels& detect_kernels() {
  const char* forced = std::getenv("DRIFT_ACCEL_CPU_INSTRUCTIONS");
  const std::string wanted = forced == nullptr ? "" : forced;
#ifdef DRIFT_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  if (wanted == "baseline") return kBaselineKernels;
  if (avx512 && wanted != "avx2") return kAvx512Kernels;
  if (avx2) return kAvx2Kernels;
#endif
  return kBaselineKernels;
}

}  // namespace

// A little more than asked for, so that every take() can be aligned.
Scratch::Scratch(int64_t floats) : bytes_(floats * static_cast<int64_t>(sizeof(float)) + 64 * kCacheLine) {
  memory_.reset(static_cast<float*>(::operator new(static_cast<size_t>(bytes_), std::align_val_t(kCacheLine))));
  next_ = memory_.get();
  const int64_t now = scratch_bytes.fetch_add(bytes_) + bytes_;
  int64_t peak = scratch_peak.load();
  while (peak < now && !scratch_peak.compare_exchange_weak(peak, now)) {
  }
}

Scratch::~Scratch() { scratch_bytes.fetch_sub(bytes_); }

int64_t peak_scratch_bytes(bool reset) {
  return reset ? scratch_peak.exchange(scratch_bytes.load()) : scratch_peak.load();
}

void Scratch::Free::operator()(float* memory) const { ::operator delete(memory, std::align_val_t(kCacheLine)); }

float* Scratch::take(int64_t floats) {
  float* taken = next_;
  next_ += round_up(floats, kCacheLine / static_cast<int64_t>(sizeof(float)));
  return taken;
}

const Kernels& choose_kernels() {
  static const Kernels& chosen = detect_kernels();
  return chosen;
}

Layout make_layout(const Sizes& sizes, const Kernels& kernels) {
  const int64_t width = kernels.vector_width;
  Layout layout{};
  layout.G = sizes.G;
  layout.N = sizes.N;
  layout.P = sizes.P;
  layout.repelling = sizes.G + sizes.N;
  layout.first_positive = round_up(layout.repelling, width);
  layout.slots = layout.first_positive + round_up(sizes.P, width);
  layout.rows = round_up(sizes.G, kernels.row_block);
  layout.first_gram = sizes.G / width * width;
  return layout;
}

int64_t count_segments(const Sizes& sizes, const Layout& layout) {
  if (sizes.B == 0) return 1;
  const int64_t by_length = sizes.S / kSegmentFeatures;
  const int64_t by_tasks = kSegmentTasks / sizes.B;
  const int64_t by_memory = kSegmentFloats / (sizes.B * layout.slots * layout.slots);
  return std::max<int64_t>(1, std::min({by_length, by_tasks, by_memory}));
}

Call::Call(const Features& given, const Kernels& chosen)
    : features(given), kernels(chosen), layout(make_layout(given.sizes, chosen)), pairs(layout.rows * layout.slots) {
  segments = count_segments(features.sizes, layout);
}

int64_t Call::segment_begin(int64_t segment) const {
  // On whole blocks of the field, so that no block is cut in two.
  const int64_t S = features.sizes.S;
  const int64_t length = round_up((S + segments - 1) / segments, kernels.column_block);
  return std::min(S, segment * length);
}

Products::Products(const Call& call, int64_t first_row, int64_t last_row, int64_t first_slot)
    : call_(call),
      first_row_(first_row),
      last_row_(last_row),
      first_slot_(first_slot),
      num_rows_(round_up(last_row - first_row, call.kernels.row_block)) {
  if (call.segments == 1) return;
  const int64_t part = floats() + call.layout.slots, tasks = call.features.sizes.B * call.segments;
  memory_ = std::make_unique<Scratch>(tasks * part);
  parts_ = memory_->take(tasks * part);
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    Scratch memory(this->scratch());
    float* scratch = memory.take(this->scratch());
    for (int64_t task = begin; task < end; ++task) {
      float* to = parts_ + task * part;
      accumulate(task / call_.segments, task % call_.segments, to, to + floats(), scratch);
    }
  });
}

void Products::accumulate(int64_t b, int64_t segment, float* products, float* norms, float* scratch) const {
  std::memset(products, 0, static_cast<size_t>(floats()) * sizeof(float));
  std::memset(norms, 0, static_cast<size_t>(call_.layout.slots) * sizeof(float));
  call_.kernels.products(call_.features, call_.layout, b, call_.segment_begin(segment), call_.segment_begin(segment + 1),
                         first_row_, last_row_, first_slot_, products, norms, scratch);
}

void Products::compute(int64_t b, float* products, float* norms, float* scratch) const {
  if (call_.segments == 1) return accumulate(b, 0, products, norms, scratch);
  const int64_t part = floats() + call_.layout.slots;
  const float* from = parts_ + b * call_.segments * part;
  std::memcpy(products, from, static_cast<size_t>(floats()) * sizeof(float));
  std::memcpy(norms, from + floats(), static_cast<size_t>(call_.layout.slots) * sizeof(float));
  for (int64_t segment = 1; segment < call_.segments; ++segment) {
    from += part;
    for (int64_t k = 0; k < floats(); ++k) products[k] += from[k];
    for (int64_t k = 0; k < call_.layout.slots; ++k) norms[k] += from[floats() + k];
  }
}

Distances::Distances(const Call& call, const float* kept) : call_(call), kept_(kept) {
  if (kept == nullptr) products_ = std::make_unique<Products>(call, 0, call.layout.G, 0);
}

int64_t Distances::scratch() const { return kept_ != nullptr ? 0 : products_->scratch() + call_.layout.slots; }

void Distances::compute(int64_t b, float* distances, float* scratch) const {
  const Layout& layout = call_.layout;
  if (kept_ == nullptr) {
    float* norms = scratch;
    products_->compute(b, distances, norms, scratch + layout.slots);
    call_.kernels.distances(layout, distances, norms);
    return;
  }
  const int64_t targets = layout.num_targets();
  const float* from = kept_ + b * layout.G * targets;
  for (int64_t i = 0; i < layout.G; ++i, from += targets) {
    float* to = distances + i * layout.slots;
    std::memcpy(to, from, static_cast<size_t>(layout.repelling) * sizeof(float));
    std::fill(to + layout.repelling, to + layout.first_positive, 0.0f);
    std::memcpy(to + layout.first_positive, from + layout.repelling, static_cast<size_t>(layout.P) * sizeof(float));
    std::fill(to + layout.first_positive + layout.P, to + layout.slots, 0.0f);
  }
}

int64_t target_floats(const Layout& layout) { return 6 * round_up(layout.slots, kCacheLine); }

Targets make_targets(const Call& call, const Options& options, float* memory) {
  const Layout& layout = call.layout;
  const int64_t stride = round_up(layout.slots, kCacheLine);
  Targets targets{memory,         memory + stride,     memory + 2 * stride, memory + 3 * stride, memory + 4 * stride,
                  memory + 5 * stride, 1.0f, 1.0f};
  for (int64_t slot = 0; slot < layout.slots; ++slot) {
    const bool member = layout.holds_member(slot);
    targets.member[slot] = targets.weight[slot] = targets.factor[slot] = member ? 1.0f : 0.0f;
    targets.padding[slot] = member ? 0.0f : kFarPair;
    targets.root_weight[slot] = 1.0f;
    targets.log_weight[slot] = 0.0f;
  }
  return targets;
}

void weigh_targets(const Call& call, const Options& options, int64_t b, Targets& targets) {
  const Layout& layout = call.layout;
  const Weights& weights = call.features.weights;
  if (weights.data == nullptr) return;
  const bool transport = options.coupling == Coupling::kSinkhorn;
  const bool biased = options.log_bias && !transport;
  targets.lightest = targets.heaviest = 1.0f;
  for (int64_t n = 0; n < layout.N; ++n) {
    const int64_t slot = layout.G + n;
    const float w = weights.data[b * weights.stride[0] + n * weights.stride[1]];
    targets.weight[slot] = targets.factor[slot] = w;
    if (transport) targets.log_weight[slot] = std::log(w);
    if (!biased) continue;
    // A NaN may not turn into an absent target.
    const bool absent = w == 0.0f;
    targets.factor[slot] = absent ? 0.0f : (w > 0 ? 1.0f : NAN);
    targets.padding[slot] = absent ? kFarPair : 0.0f;
    targets.root_weight[slot] = std::sqrt(w);
    targets.log_weight[slot] = absent ? 0.0f : std::log(w);
    if (w > 0) {
      targets.lightest = std::min(targets.lightest, w);
      targets.heaviest = std::max(targets.heaviest, w);
    }
  }
}

}  // namespace drift_accel::cpu
