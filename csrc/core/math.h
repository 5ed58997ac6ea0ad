// Elementary functions on vectors, within about 1 ulp over the range that a GPT uses.
#pragma once

#include "core/simd.h"

namespace fastgpt::FASTGPT_ISA {

// What a result will be stored in: functions with this parameter spend fewer terms on the 16-bit types. They are then
// within 1.2e-5, a twentieth of float16's rounding and a hundred and fiftieth of bfloat16's.
enum class Target { single, half };
template <class T>
constexpr Target kTarget = sizeof(T) == 2 ? Target::half : Target::single;

// x 2^n for integer-valued n.
inline Vec scale_by_power(Vec x, Vec n) {
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
  // n in [-252, 254]: two factors, neither of which overflows.
  const VecI power = __builtin_convertvector(n, VecI), half = power >> 1;
  return x * as_float((half + 127) << 23) * as_float((power - half + 127) << 23);
#endif
}

// e^x for x in [-104, 89] (or NaN, which stays).
// x = n ln 2 + r with |r| <= ln 2 / 2 (ln 2 in two parts, Cody and Waite), then e^r by the degree-6 polynomial of least
// relative error that starts with 1 + r (3e-9; Taylor's has 1.2e-7); for half by the one of degree 4 (5e-6).
template <Target kFor = Target::single>
inline Vec exp_bounded(Vec x) {
  const float log2e = 1.44269504088896341f, ln2_low = 1.42860682030941723e-6f;
  const float ln2_high = kFor == Target::single ? 0.693145751953125f : 0.693147180559945309f;
  const float round_to_int = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bits behind the point
  const Vec n = (x * log2e + round_to_int) - round_to_int;
  Vec r = x - n * ln2_high, p;
  if constexpr (kFor == Target::single) {
    r = r - n * ln2_low;
    p = splat(0.00138145813f);
    p = p * r + 0.00836872496f;
    p = p * r + 0.041668389f;
    p = p * r + 0.166665211f;
    p = p * r + 0.49999994f;
  } else {
    p = splat(0.04127758f);
    p = p * r + 0.167535529f;
    p = p * r + 0.5000512f;
  }
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return scale_by_power(p, n);
}

// e^x. exp(-inf) = 0, exp(x > 88.73) = inf, NaN stays NaN.
inline Vec exp(Vec x) { return exp_bounded(min(splat(89.0f), max(splat(-104.0f), x))); }

// Natural logarithm. log(0) = -inf, log(x < 0) = NaN.
// x = m 2^e with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh(s), s = (m - 1) / (m + 1), by its odd series.
inline Vec log(Vec x) {
  const Vec tiny = splat(1.17549435e-38f);
  const auto subnormal = x < tiny;
  const Vec scaled = subnormal ? x * 8388608.0f : x;
  const VecU bits = as_uint(scaled) - 0x3f3504f3u;  // sqrt(1/2)
  const VecI e = ((VecI)bits >> 23) - (subnormal ? VecI{} + 23 : VecI{});
  const Vec m = as_float((bits & 0x007fffffu) + 0x3f3504f3u);
  const Vec s = (m - 1.0f) / (m + 1.0f);
  const Vec z = s * s;
  Vec p = splat(2.0f / 11);
  p = p * z + 2.0f / 9;
  p = p * z + 2.0f / 7;
  p = p * z + 2.0f / 5;
  p = p * z + 2.0f / 3;
  const Vec ef = __builtin_convertvector(e, Vec);
  const Vec result = ef * 0.693145751953125f + (ef * 1.42860682030941723e-6f + (p * z * s + 2.0f * s));
  const Vec infinity = splat(__builtin_inff());
  const Vec special = x == 0.0f ? -infinity : (x == infinity ? infinity : splat(__builtin_nanf("")));
  const auto ordinary = (x > 0.0f) & (x < infinity);
  return ordinary ? result : special;
}

// sigmoid(x) = 1 / (1 + e^-x) and 1 - sigmoid(x), neither with cancellation or overflow: e^-|x| is at most 1.
struct Sigmoid {
  Vec value, complement;
};
template <Target kFor = Target::single>
inline Sigmoid sigmoid(Vec x) {
  const Vec e = exp_bounded<kFor>(max(splat(-104.0f), -abs(x)));
  const Vec near_one = 1.0f / (1.0f + e);
  const Vec near_zero = e * near_one;
  const auto negative = x < 0.0f;
  return {negative ? near_zero : near_one, negative ? near_one : near_zero};
}

// The normal distribution Phi(x) = (1 + erf(x / sqrt 2)) / 2 and its density phi(x) = e^(-x^2/2) / sqrt(2 pi).
// With t = |x|, Phi(-t) = e^(-t^2/2) R(t); R(t) (t + 3.4) is a polynomial of degree 9 in (t - 3.4) / (t + 3.4), the
// mapping of Shepherd and Laframboise (Math. Comp. 36, 1981) with our own fit on [0, 15] (4e-9). One exponential gives
// both results, and the negative tail keeps its relative accuracy, which 1 + erf loses. For half the degree is 5,
// with 3.2 for 3.4 (6e-6).
struct Normal {
  Vec cdf, density;
};
template <Target kFor = Target::single>
inline Normal normal(Vec x) {
  const Vec t = min(splat(14.4f), abs(x));  // e^(-t^2/2) R(t) is below float's range from 14.2 on; NaN stays
  const Vec square = t * t;
  Vec gauss = exp_bounded<kFor>(square * -0.5f), p, inverse;
  if constexpr (kFor == Target::single) {
    const Vec missing = fma(t, t, -square);  // what rounding the square lost, which the exponential would magnify
    gauss = gauss - gauss * (missing * 0.5f);
    inverse = 1.0f / (t + 3.4f);
    const Vec u = 1.0f - 6.8f * inverse;
    p = splat(0.000129213833f);
    p = p * u + 0.000331833289f;
    p = p * u - 0.00078861753f;
    p = p * u - 0.00244819f;
    p = p * u + 0.00762810139f;
    p = p * u + 0.010374181f;
    p = p * u - 0.101905957f;
    p = p * u + 0.299455613f;
    p = p * u - 0.55557847f;
    p = p * u + 0.741770804f;
  } else {
    inverse = 1.0f / (t + 3.2f);
    const Vec u = 1.0f - 6.4f * inverse;
    p = splat(0.00720118545f);
    p = p * u - 0.00215018983f;
    p = p * u - 0.0736861452f;
    p = p * u + 0.265934944f;
    p = p * u - 0.533835113f;
    p = p * u + 0.735885799f;
  }
  const Vec tail = gauss * (p * inverse);
  return {x < 0.0f ? tail : 1.0f - tail, gauss * 0.398942280401432678f};
}

}  // namespace fastgpt::FASTGPT_ISA
