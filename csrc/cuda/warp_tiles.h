// Products of 16 x 16 tiles by a warp: on a device by its tensor cores, on a host by loops. Half precision, float sums.
#pragma once

#ifdef __CUDACC__
#include <mma.h>
#endif

#include "elements.h"

namespace drift_accel::cuda {

constexpr int kTile = 16;
constexpr int kTilePadding = 8;  // elements added to a row in shared memory, so that a tile's rows meet different banks

#ifdef __CUDACC__

template <class Element>
struct NativeElement;
template <>
struct NativeElement<BFloat16> {
  using Type = __nv_bfloat16;
};
template <>
struct NativeElement<Float16> {
  using Type = __half;
};

template <class Element>
struct WarpTiles {
  using Native = typename NativeElement<Element>::Type;
  using Left = nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, kTile, kTile, kTile, Native, nvcuda::wmma::row_major>;
  using Right = nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, kTile, kTile, kTile, Native, nvcuda::wmma::row_major>;
  using Sums = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, kTile, kTile, kTile, float>;

  static DRIFT_FUNCTION void clear(Sums& sums) { nvcuda::wmma::fill_fragment(sums, 0.0f); }
  static DRIFT_FUNCTION void load(Left& tile, const Element* values, int leading) {
    nvcuda::wmma::load_matrix_sync(tile, reinterpret_cast<const Native*>(values), leading);
  }
  static DRIFT_FUNCTION void load(Right& tile, const Element* values, int leading) {
    nvcuda::wmma::load_matrix_sync(tile, reinterpret_cast<const Native*>(values), leading);
  }
  static DRIFT_FUNCTION void multiply(Sums& sums, const Left& left, const Right& right) {
    nvcuda::wmma::mma_sync(sums, left, right, sums);
  }
  static DRIFT_FUNCTION void store(float* values, const Sums& sums, int leading) {
    nvcuda::wmma::store_matrix_sync(values, sums, leading, nvcuda::wmma::mem_row_major);
  }
};

#else

template <class Element>
struct WarpTiles {
  struct Left {
    float value[kTile][kTile];
  };
  struct Right {
    float value[kTile][kTile];
  };
  struct Sums {
    float value[kTile][kTile];
  };

  static void clear(Sums& sums) { sums = {}; }
  template <class Operand>
  static void load(Operand& tile, const Element* values, int leading) {
    for (int i = 0; i < kTile; ++i) {
      for (int j = 0; j < kTile; ++j) tile.value[i][j] = to_float(values[i * leading + j]);
    }
  }
  static void multiply(Sums& sums, const Left& left, const Right& right) {
    for (int i = 0; i < kTile; ++i) {
      for (int k = 0; k < kTile; ++k) {
        for (int j = 0; j < kTile; ++j) sums.value[i][j] += left.value[i][k] * right.value[k][j];
      }
    }
  }
  template <class Cell>
  static void store(Cell* values, const Sums& sums, int leading) {
    for (int i = 0; i < kTile; ++i) {
      for (int j = 0; j < kTile; ++j) values[i * leading + j] = sums.value[i][j];
    }
  }
};

#endif

}  // namespace drift_accel::cuda
