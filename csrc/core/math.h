// Elementary functions on vectors, within about 1 ulp over the range that a GPT uses.
#pragma once

#include "core/normal.h"
#include "core/simd.h"

namespace fastgpt::FASTGPT_ISA {

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

// The normal distribution Phi(x) = (1 + erf(x / sqrt 2)) / 2 and its density phi(x) = e^(-x^2/2) / sqrt(2 pi), by the
// formula of core/normal.h. One exponential gives both, and the negative tail keeps its relative accuracy, which 1 +
// erf loses.
struct Normal {
  Vec cdf, density;
};
template <Target kFor = Target::single>
inline Normal normal(Vec x) {
  const Vec t = min(splat(14.4f), abs(x));  // e^(-t^2/2) R(t) is below float's range from 14.2 on; NaN stays
  const Vec square = t * t;
  Vec gauss = exp_bounded<kFor>(square * -0.5f);
  if constexpr (kFor == Target::single) {
    const Vec missing = fma(t, t, -square);  // what rounding the square lost, which the exponential would magnify
    gauss = gauss - gauss * (missing * 0.5f);
  }
  const Vec inverse = 1.0f / (t + kNormalCentre<kFor>);
  const Vec p = normal_tail<kFor>(1.0f - 2.0f * kNormalCentre<kFor> * inverse);
  const Vec tail = gauss * (p * inverse);
  return {x < 0.0f ? tail : 1.0f - tail, gauss * 0.398942280401432678f};
}

}  // namespace fastgpt::FASTGPT_ISA
