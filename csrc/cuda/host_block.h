// A block of threads on a host: each phase runs for one thread after another, forwards or backwards.
//
// With CheckedCell every access to the block's memory is also checked: no value is read before it is written, and no thread
// touches in a phase what another one writes in it.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "block.h"

namespace drift_accel::cuda {

struct HostThread {
  static inline long phase = 0;
  static inline int number = -1;  // -1: outside all phases
};

class CheckedCell {
 public:
  CheckedCell() = default;
  CheckedCell(const CheckedCell&) = delete;

  CheckedCell& operator=(float value) {
    require(HostThread::number >= 0, "written outside the phases");
    require(written_in_ != HostThread::phase || writer_ == HostThread::number, "written by two threads in one phase");
    require(read_in_ != HostThread::phase || reader_ == HostThread::number, "written where another thread reads in the phase");
    written_in_ = HostThread::phase;
    writer_ = HostThread::number;
    value_ = value;
    return *this;
  }
  CheckedCell& operator=(const CheckedCell& other) { return *this = static_cast<float>(other); }

  operator float() const {
    require(HostThread::number >= 0, "read outside the phases");
    require(written_in_ >= 0, "read before it was written");
    require(written_in_ != HostThread::phase || writer_ == HostThread::number, "read where another thread writes in the phase");
    reader_ = read_in_ == HostThread::phase && reader_ != HostThread::number ? kSeveral : HostThread::number;
    read_in_ = HostThread::phase;
    return value_;
  }

 private:
  static constexpr int kSeveral = -2;

  static void require(bool holds, const char* complaint) {
    if (holds) return;
    std::fprintf(stderr, "a value of the block's memory is %s (thread %d)\n", complaint, HostThread::number);
    std::abort();
  }

  float value_ = NAN;
  long written_in_ = -1;
  mutable long read_in_ = -1;
  int writer_ = -1;
  mutable int reader_ = -1;
};

template <class CellType>
class HostBlock {
 public:
  using Cell = CellType;

  HostBlock(int num_threads, bool backwards) : num_threads_(num_threads), backwards_(backwards) {}

  int num_threads() const { return num_threads_; }

  template <class Body>
  void phase(Body body) {
    ++HostThread::phase;
    for (int k = 0; k < num_threads_; ++k) {
      HostThread::number = backwards_ ? num_threads_ - 1 - k : k;
      body(HostThread::number);
    }
    HostThread::number = -1;
  }

  template <class Body>
  void warp_phase(Body body) {
    phase([&](int thread) {
      if (thread % kWarp == 0) body(thread / kWarp);
    });
  }

 private:
  int num_threads_;
  bool backwards_;
};

}  // namespace drift_accel::cuda
