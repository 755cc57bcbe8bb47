// Vectors of VECTOR_BYTES as the compiler's own types, and the elementary functions on them. Included by one file for each
// instruction set, inside of its namespace: nothing here may be shared between those files, nor call a function of std that the
// linker could take from the wrong one.
//
// VECTOR_BYTES, ROW_BLOCK, PANEL_VECTORS and LANES(f) are set by the including file.

constexpr int kWidth = VECTOR_BYTES / 4;

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

typedef float Vec __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef int32_t IntVec __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef float UnalignedVec __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));

template <int... I>
struct Lanes {};
template <int N, int... I>
struct MakeLanes : MakeLanes<N - 1, N - 1, I...> {};
template <int... I>
struct MakeLanes<0, I...> {
  using type = Lanes<I...>;
};
using AllLanes = MakeLanes<kWidth>::type;

INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }

template <int... I>
INLINE Vec splat_lanes(float x, Lanes<I...>) {
  return Vec{(static_cast<void>(I), x)...};
}
INLINE Vec splat(float x) { return splat_lanes(x, AllLanes{}); }

// Written so that a NaN on the left comes through: no floor may hide it.
INLINE Vec at_least(Vec x, Vec low) { return x < low ? low : x; }
INLINE Vec smaller(Vec x, Vec y) { return y < x ? y : x; }
INLINE float at_least(float x, float low) { return x < low ? low : x; }
INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
INLINE int64_t smaller(int64_t x, int64_t y) { return y < x ? y : x; }
INLINE int64_t larger(int64_t x, int64_t y) { return y < x ? x : y; }

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HAS_SHUFFLE 1
#endif
#endif

#ifdef HAS_SHUFFLE
template <int H, int... I>
INLINE Vec swap_halves(Vec x, Lanes<I...>) {
  return __builtin_shufflevector(x, x, (I ^ H)...);
}
template <int H, int... I>
INLINE void exchange(Vec& a, Vec& b, Lanes<I...>) {
  const Vec low = __builtin_shufflevector(a, b, ((I & H) ? kWidth + I - H : I)...);
  b = __builtin_shufflevector(a, b, ((I & H) ? kWidth + I : I + H)...);
  a = low;
}
template <int H>
INLINE void transpose_steps(Vec* rows) {
  UNROLL for (int r = 0; r < kWidth; ++r) {
    if ((r & H) == 0) exchange<H>(rows[r], rows[r + H], AllLanes{});
  }
  if constexpr (H > 1) transpose_steps<H / 2>(rows);
}
template <int H>
INLINE Vec sum_steps(Vec x) {
  x += swap_halves<H>(x, AllLanes{});
  if constexpr (H > 1) return sum_steps<H / 2>(x);
  return x;
}
template <int H>
INLINE Vec min_steps(Vec x) {
  x = smaller(x, swap_halves<H>(x, AllLanes{}));
  if constexpr (H > 1) return min_steps<H / 2>(x);
  return x;
}
INLINE void transpose(Vec* rows) { transpose_steps<kWidth / 2>(rows); }
INLINE float sum_lanes(Vec x) { return sum_steps<kWidth / 2>(x)[0]; }
INLINE float min_lanes(Vec x) { return min_steps<kWidth / 2>(x)[0]; }
#else
INLINE void transpose(Vec* rows) {
  Vec result[kWidth];
  for (int r = 0; r < kWidth; ++r)
    for (int k = 0; k < kWidth; ++k) result[k][r] = rows[r][k];
  for (int r = 0; r < kWidth; ++r) rows[r] = result[r];
}
INLINE float sum_lanes(Vec x) {
  float sum = 0;
  for (int k = 0; k < kWidth; ++k) sum += x[k];
  return sum;
}
INLINE float min_lanes(Vec x) {
  float low = x[0];
  for (int k = 1; k < kWidth; ++k) low = x[k] < low ? x[k] : low;
  return low;
}
#endif

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// 2^x for x < 128, within 1.5 ulp; 0 below 2^-126. Cephes' polynomial on [-1/2, 1/2].
INLINE Vec exp2(Vec x) {
  constexpr float kRound = 12582912.0f + 127.0f;  // 1.5 * 2^23: adding it leaves the nearest integer, plus the exponent's bias,
  const Vec rounded = x + kRound;                 // in the low bits
  const Vec f = x - (rounded - kRound);
  Vec p = splat(1.535336188319500e-4f);
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  const Vec power = reinterpret_cast<Vec>(reinterpret_cast<IntVec>(rounded) << 23);
  return x < -126.0f ? splat(0.0f) : p * power;
}

// log2 x for normal x > 0 within 2 ulp; -inf for 0, NaN for NaN. Cephes' logf.
INLINE Vec log2(Vec x) {
  IntVec bits = reinterpret_cast<IntVec>(x);
  const IntVec shifted = bits - 0x3f3504f3;  // sqrt(1/2): the mantissa falls into [sqrt(1/2), sqrt(2))
  const Vec exponent = __builtin_convertvector(shifted >> 23, Vec);
  const Vec f = reinterpret_cast<Vec>((shifted & 0x007fffff) + 0x3f3504f3) - 1.0f;
  const Vec square = f * f;
  Vec p = splat(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Vec log = f + (p * f * square - 0.5f * square);
  const Vec result = log * kLog2e + exponent;
  return x > 0.0f ? result : (x == 0.0f ? splat(-__builtin_inff()) : splat(__builtin_nanf("")));
}
