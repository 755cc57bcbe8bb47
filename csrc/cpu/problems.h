// One problem after another on the cores of this machine: scratch, distances kept or computed again, the cut of long features.
#pragma once

#include <memory>
#include <vector>

#include "kernels.h"

namespace drift_accel::cpu {

// Uninitialised floats, aligned to a cache line.
class Scratch {
 public:
  explicit Scratch(int64_t floats);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* take(int64_t floats);  // the next ones, aligned to a cache line

 private:
  struct Free {
    void operator()(float* memory) const;
  };
  std::unique_ptr<float, Free> memory_;
  float* next_;
  int64_t bytes_;
};

// The most that all scratch took at one time since the last reset, for the tests.
int64_t peak_scratch_bytes(bool reset);

// The fastest kernels that this processor runs; DRIFT_ACCEL_CPU_INSTRUCTIONS=baseline|avx2|avx512 takes others, for tests.
const Kernels& choose_kernels();

Layout make_layout(const Sizes& sizes, const Kernels& kernels);

// Into how many segments the features of one problem are cut, so that few long problems keep many cores busy. Of the sizes
// alone: the sums must not depend on the number of threads.
int64_t count_segments(const Sizes& sizes, const Layout& layout);

// What every task of a call reads.
struct Call {
  Call(const Features& features, const Kernels& kernels);

  Features features;
  const Kernels& kernels;
  Layout layout;
  int64_t segments;
  int64_t pairs;  // floats of a [rows, slots] matrix

  int64_t segment_begin(int64_t segment) const;
};

// y y^T of a range of rows and slots, per problem: computed when asked for or, with several segments, beforehand by all cores.
class Products {
 public:
  Products(const Call& call, int64_t first_row, int64_t last_row, int64_t first_slot);

  int64_t floats() const { return num_rows_ * call_.layout.slots; }
  int64_t scratch() const { return call_.kernels.packing_scratch(call_.layout); }
  // products [num_rows, slots] and norms [slots] of problem b.
  void compute(int64_t b, float* products, float* norms, float* scratch) const;

 private:
  void accumulate(int64_t b, int64_t segment, float* products, float* norms, float* scratch) const;

  const Call& call_;
  int64_t first_row_, last_row_, first_slot_, num_rows_;
  std::unique_ptr<Scratch> memory_;
  float* parts_ = nullptr;  // [B, segments, products and norms], with several segments
};

// The distances of a problem as a pair matrix: from the kept ones, or computed again.
class Distances {
 public:
  Distances(const Call& call, const float* kept);

  int64_t scratch() const;
  void compute(int64_t b, float* distances, float* scratch) const;

 private:
  const Call& call_;
  const float* kept_;
  std::unique_ptr<Products> products_;
};

// Per-slot weights in `memory` of target_floats(), with every negative at weight 1; weigh_targets() sets those of problem b.
int64_t target_floats(const Layout& layout);
Targets make_targets(const Call& call, const Options& options, float* memory);
void weigh_targets(const Call& call, const Options& options, int64_t b, Targets& targets);

}  // namespace drift_accel::cpu
