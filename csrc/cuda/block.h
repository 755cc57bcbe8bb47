// How the arithmetic of a block of threads is written, so that it runs on a device and, one thread after another, on a host.
//
// A program is a sequence of phases with a barrier after each: `block.phase([&](int thread) {...})`. Within a phase no thread
// reads what another one writes, and nothing that a thread keeps to itself outlives a phase; what the phases share lies in
// memory. So the order of the threads within a phase cannot matter, and a host that runs them in any order gives the bits
// of that program. Reductions add in a fixed order: no atomics, no warp intrinsics.
// Products of tiles are a whole warp's work: `block.warp_phase([&](int warp) {...})`, see warp_tiles.h.
//
// A Block has: Cell, the type of one value in shared memory; num_threads(), a multiple of 32; phase(body); warp_phase(body).
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define DRIFT_FUNCTION __device__ __forceinline__
#define DRIFT_CONSTEXPR __host__ __device__ constexpr
#define DRIFT_UNROLL _Pragma("unroll")
#else
#define DRIFT_FUNCTION inline
#define DRIFT_CONSTEXPR constexpr
#define DRIFT_UNROLL
#endif

namespace drift_accel::cuda {

constexpr int kWarp = 32;
constexpr float kInfinity = __builtin_huge_valf();

#ifdef __CUDACC__
struct DeviceBlock {
  using Cell = float;

  __device__ int num_threads() const { return static_cast<int>(blockDim.x); }

  template <class Body>
  __device__ __forceinline__ void phase(Body body) {
    body(static_cast<int>(threadIdx.x));
    __syncthreads();
  }

  template <class Body>
  __device__ __forceinline__ void warp_phase(Body body) {
    body(static_cast<int>(threadIdx.x) / kWarp);
    __syncthreads();
  }
};
#endif

// value, or the bound where it is smaller; NaN stays NaN, which fmaxf would hide.
DRIFT_FUNCTION float at_least(float value, float bound) { return value < bound ? bound : value; }

// Several threads to a line (a row or a column of a matrix): lane k of `lanes` takes the elements k, k + lanes, ...
// Consecutive threads take consecutive lines, or consecutive lanes of one line where those are neighbours in memory.
struct Lanes {
  int lines, lanes;
  bool lane_first;

  DRIFT_FUNCTION int count() const { return lines * lanes; }
  DRIFT_FUNCTION int line(int index) const { return lane_first ? index / lanes : index % lines; }
  DRIFT_FUNCTION int lane(int index) const { return lane_first ? index % lanes : index / lines; }
  DRIFT_FUNCTION int slot(int line, int lane) const { return lane * lines + line; }
};

constexpr int kNeighbouringLanes = 8;  // eight floats are one 32-byte sector

DRIFT_FUNCTION Lanes share_lines(int lines, int num_threads, bool lane_first) {
  const int lanes = num_threads / (lines > 0 ? lines : 1);
  if (lane_first) return {lines, kNeighbouringLanes, true};
  return {lines, lanes < 1 ? 1 : (lanes > kWarp ? kWarp : lanes), false};
}

// Cells that `share_lines` of at most `lines` lines needs for one value a lane.
DRIFT_CONSTEXPR int64_t scratch_size(int64_t rows, int64_t columns, int64_t num_threads) {
  const int64_t neighbouring = rows * kNeighbouringLanes;
  const int64_t most = neighbouring > columns ? neighbouring : columns;
  return most > num_threads ? most : num_threads;
}

// store(line, sum over lanes of scratch) for each line; scratch holds one value a slot.
template <class Block, class Store>
DRIFT_FUNCTION void add_lanes(Block& block, Lanes shared, const typename Block::Cell* scratch, Store store) {
  block.phase([&](int thread) {
    for (int line = thread; line < shared.lines; line += block.num_threads()) {
      float total = 0;
      for (int lane = 0; lane < shared.lanes; ++lane) total += scratch[shared.slot(line, lane)];
      store(line, total);
    }
  });
}

// store(line, sum over k < length of value(line, k)).
template <class Block, class Value, class Store>
DRIFT_FUNCTION void add_lines(Block& block, Lanes shared, int length, typename Block::Cell* scratch, Value value, Store store) {
  block.phase([&](int thread) {
    for (int index = thread; index < shared.count(); index += block.num_threads()) {
      const int line = shared.line(index), lane = shared.lane(index);
      float total = 0;
      for (int k = lane; k < length; k += shared.lanes) total += value(line, k);
      scratch[shared.slot(line, lane)] = total;
    }
  });
  add_lanes(block, shared, scratch, store);
}

// store(line, log of the sum over begin <= k < end of exp(value(line, k))); -infinity where every value is.
template <class Block, class Value, class Store>
DRIFT_FUNCTION void log_sum_exp(Block& block, Lanes shared, int begin, int end, typename Block::Cell* largest,
                                typename Block::Cell* total, Value value, Store store) {
  const auto largest_of = [&](int line) {
    float most = -kInfinity;
    for (int lane = 0; lane < shared.lanes; ++lane) {
      const float other = largest[shared.slot(line, lane)];
      most = other > most ? other : most;
    }
    return most == -kInfinity ? 0.0f : most;
  };
  block.phase([&](int thread) {
    for (int index = thread; index < shared.count(); index += block.num_threads()) {
      const int line = shared.line(index), lane = shared.lane(index);
      float most = -kInfinity;
      for (int k = begin + lane; k < end; k += shared.lanes) {
        const float other = value(line, k);
        most = other > most ? other : most;
      }
      largest[shared.slot(line, lane)] = most;
    }
  });
  block.phase([&](int thread) {
    for (int index = thread; index < shared.count(); index += block.num_threads()) {
      const int line = shared.line(index), lane = shared.lane(index);
      const float most = largest_of(line);
      float sum = 0;
      for (int k = begin + lane; k < end; k += shared.lanes) sum += expf(value(line, k) - most);
      total[shared.slot(line, lane)] = sum;
    }
  });
  block.phase([&](int thread) {
    for (int line = thread; line < shared.lines; line += block.num_threads()) {
      float sum = 0;
      for (int lane = 0; lane < shared.lanes; ++lane) sum += total[shared.slot(line, lane)];
      store(line, largest_of(line) + logf(sum));
    }
  });
}

// store(sum of the threads' values) by one thread: scratch holds one value a thread and is overwritten.
template <class Block, class Store>
DRIFT_FUNCTION void add_threads(Block& block, typename Block::Cell* scratch, Store store) {
  block.phase([&](int thread) {
    if (thread >= kWarp) return;
    double total = 0;
    for (int other = thread; other < block.num_threads(); other += kWarp) total += scratch[other];
    scratch[thread] = static_cast<float>(total);
  });
  block.phase([&](int thread) {
    if (thread != 0) return;
    double total = 0;
    for (int other = 0; other < kWarp; ++other) total += scratch[other];
    store(static_cast<float>(total));
  });
}

}  // namespace drift_accel::cuda
