// One float vector type, as wide as the instruction-set level allows, on GCC/Clang vector extensions.
//
// Arithmetic and comparisons are the language's own operators (a * b + c becomes an FMA where there is one);
// this header adds what the language lacks: loads and stores with conversion, tails, reductions, min and max.
// A comparison gives a mask vector; `mask ? a : b` selects by lane.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/dtype.h"
#include "core/isa.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastgpt::FASTGPT_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecH __attribute__((vector_size(kLanes * 2)));
typedef double VecD __attribute__((vector_size(kLanes * 4)));   // half as many lanes
typedef int64_t VecL __attribute__((vector_size(kLanes * 4)));  // half as many lanes

inline Vec splat(float x) { return x - Vec{}; }
inline VecI as_int(Vec v) { return (VecI)v; }
inline VecU as_uint(Vec v) { return (VecU)v; }
inline Vec as_float(VecI v) { return (Vec)v; }
inline Vec as_float(VecU v) { return (Vec)v; }

// The second operand wins when either is NaN, as in SSE: max(splat(low), x) clamps and leaves NaN as it is. Intrinsics,
// for GCC makes two instructions of the comparison.
#if defined(__AVX512F__)
inline Vec max(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
inline Vec min(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
inline Vec max(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
inline Vec min(Vec a, Vec b) { return (Vec)_mm256_min_ps((__m256)a, (__m256)b); }
#else
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
#endif
inline Vec abs(Vec a) { return as_float(as_uint(a) & 0x7fffffffu); }
inline Vec sqrt(Vec a) {
#if defined(__AVX512F__)
  return (Vec)_mm512_sqrt_ps((__m512)a);
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)a);
#else
  for (int i = 0; i < kLanes; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
#endif
}

// a * b + c rounded once, where the level has FMA: for error terms, which a contraction by chance would not give.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

template <class V, class T>
inline V load_bits(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec load(const float* p) { return load_bits<Vec>(p); }
inline Vec load(const bf16* p) {
  // Intrinsics, for GCC widens a whole vector in two halves.
#if defined(__AVX512F__)
  const VecU wide = (VecU)_mm512_cvtepu16_epi32(load_bits<__m256i>(p));
#elif defined(__AVX2__)
  const VecU wide = (VecU)_mm256_cvtepu16_epi32(load_bits<__m128i>(p));
#else
  const VecU wide = __builtin_convertvector(load_bits<VecH>(p), VecU);
#endif
  return as_float(wide << 16);
}
inline Vec load(const f16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(load_bits<__m256i>(p));
#elif defined(__AVX2__) && defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(load_bits<__m128i>(p));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
// Round to nearest even; NaN stays NaN.
inline void store(bf16* p, Vec v) {
#if defined(__AVX512BF16__)
  // vcvtneps2bf16 flushes subnormals to zero, so they take the long way.
  if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)v, 0x20) == 0, 1)) {
    const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &h, sizeof h);
    return;
  }
#endif
  const VecU u = as_uint(v);
  const VecU bits = (v != v ? u | 0x400000u : u + 0x7fffu + (u >> 16 & 1u)) >> 16;
#if defined(__AVX512F__)
  const __m256i h = _mm512_cvtepi32_epi16((__m512i)bits);
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);
  const __m128i h = _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  const VecH h = __builtin_convertvector(bits, VecH);
#endif
  std::memcpy(p, &h, sizeof h);
}
inline void store(f16* p, Vec v) {
#if defined(__AVX512F__)
  const __m256i h = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &h, sizeof h);
#elif defined(__AVX2__) && defined(__F16C__)
  const __m128i h = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &h, sizeof h);
#else
  for (int i = 0; i < kLanes; ++i) from_float(v[i], p[i]);
#endif
}

// Tails: the first n lanes (0 < n <= kLanes). Lanes beyond n load as `fill`; nothing beyond p + n is touched.
template <class T>
inline Vec load(const T* p, int64_t n, float fill = 0.0f) {
  if (n >= kLanes) return load(p);
  T lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = cast<T>(fill);
  std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  return load(lanes);
}
template <class T>
inline void store(T* p, Vec v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  T lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
}
#if defined(__AVX512F__) && !defined(FASTGPT_SANITIZE_ADDRESS)  // which does not see masked accesses
inline Vec load(const float* p, int64_t n, float fill = 0.0f) {
  if (n >= kLanes) return load(p);
  return (Vec)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), static_cast<__mmask16>((1u << n) - 1u), p);
}
inline void store(float* p, Vec v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), (__m512)v);
}
#endif

// The lower and the upper lanes as doubles.
struct Doubles {
  VecD low, high;
};
inline Doubles to_double(Vec v) {
#if defined(__AVX512DQ__)
  return {(VecD)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v)),
          (VecD)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1))};
#elif defined(__AVX2__)
  return {(VecD)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v)),
          (VecD)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1))};
#else
  Doubles d;
  for (int i = 0; i < kLanes / 2; ++i) {
    d.low[i] = v[i];
    d.high[i] = v[i + kLanes / 2];
  }
  return d;
#endif
}

// Bit i is set where lane i of a comparison holds.
inline uint32_t lane_mask(VecI comparison) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)comparison);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)comparison));
#elif defined(__SSE__)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)comparison));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= (static_cast<uint32_t>(comparison[i]) & 1u) << i;
  return mask;
#endif
}

// Reductions in a fixed order (halving), the same for every call.
template <class F>
inline float reduce(Vec v, F&& combine) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = combine(lanes[i], lanes[i + width]);
  return lanes[0];
}
#if defined(__AVX512F__)
inline float sum(Vec v) { return _mm512_reduce_add_ps((__m512)v); }
inline float max_lane(Vec v) { return _mm512_reduce_max_ps((__m512)v); }
#else
inline float sum(Vec v) {
  return reduce(v, [](float a, float b) { return a + b; });
}
inline float max_lane(Vec v) {
  return reduce(v, [](float a, float b) { return a > b ? a : b; });
}
#endif

// Calls f(offset, n) for every vector of [0, count): n = kLanes, and what is left for the last one. After inlining, n
// is a constant in the main loop, so `load(p + offset, n)` is a plain load there.
template <class F>
inline void for_each_vector(int64_t count, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) f(i, static_cast<int64_t>(kLanes));
  if (i < count) f(i, count - i);
}

// Zero in the lanes from n on: dead lanes of a tail must not count.
inline Vec keep_lanes(Vec v, int64_t n) {
  VecI lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(n) ? v : Vec{};
}

// The sum over all lanes of f(offset, n), a vector, for every vector of [0, count). Four accumulators hide the latency
// of the additions; they are added in a fixed order.
template <class F>
inline float sum_vectors(int64_t count, F&& f) {
  constexpr int64_t step = kLanes;
  Vec a = {}, b = {}, c = {}, d = {};
  int64_t i = 0;
  for (; i + 4 * step <= count; i += 4 * step) {
    a += f(i, step);
    b += f(i + step, step);
    c += f(i + 2 * step, step);
    d += f(i + 3 * step, step);
  }
  for (; i + step <= count; i += step) a += f(i, step);
  if (i < count) b += keep_lanes(f(i, count - i), count - i);
  return sum((a + b) + (c + d));
}

}  // namespace fastgpt::FASTGPT_ISA
