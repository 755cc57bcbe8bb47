// Features of three types, read as float and written with rounding to nearest even; the same bits on device and host.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "../problem.h"
#include "block.h"

namespace drift_accel::cuda {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

#ifdef __CUDA_ARCH__

DRIFT_FUNCTION float to_float(float value) { return value; }
DRIFT_FUNCTION float to_float(BFloat16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }
DRIFT_FUNCTION float to_float(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }

template <class Element>
DRIFT_FUNCTION Element from_float(float value);
template <>
DRIFT_FUNCTION float from_float<float>(float value) {
  return value;
}
template <>
DRIFT_FUNCTION BFloat16 from_float<BFloat16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}
template <>
DRIFT_FUNCTION Float16 from_float<Float16>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}

#else

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }
inline float to_float(Float16 value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // A float with the same fields is 2^112 too small, subnormal numbers included.
  const float scaled = from_bits(magnitude << 13) * 0x1p112f;
  return from_bits(sign | to_bits(scaled));
}

template <class Element>
Element from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = to_bits(value);
  if (value != value) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
inline Float16 from_float<Float16>(float value) {
  const uint32_t bits = to_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t rounded;
  if (value != value) {
    rounded = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520: rounds to infinity
    rounded = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    rounded = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
  } else {
    rounded = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | rounded)};
}

#endif

DRIFT_FUNCTION float load_element(const void* data, ElementType type, int64_t offset) {
  switch (type) {
    case ElementType::kFloat32:
      return static_cast<const float*>(data)[offset];
    case ElementType::kBFloat16:
      return to_float(static_cast<const BFloat16*>(data)[offset]);
    default:
      return to_float(static_cast<const Float16*>(data)[offset]);
  }
}

}  // namespace drift_accel::cuda
