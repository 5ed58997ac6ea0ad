// Elementary functions of one float in a thread; core/math.h has the same for the CPU's vectors.
//
// For 16-bit results they take the hardware's approximate exponential and reciprocal (2 ulp each), whose arguments are
// not corrected: relative errors up to 1e-5, far below the rounding of the result.
#pragma once

#include "core/normal.h"
#include "cuda/core/ptx.cuh"

namespace fastgpt::FASTGPT_ISA {

// Bounds that NaN passes, where fmaxf and fminf would drop it.
__device__ inline float at_least(float x, float low) { return x < low ? low : x; }
__device__ inline float at_most(float x, float high) { return x > high ? high : x; }

// e^x for x <= 0. Not for results that need their last bit: see above.
template <Target kFor>
__device__ inline float exp_negative(float x) {
  if constexpr (kFor == Target::single)
    return expf(x);
  else
    return ptx::exp2(x * 1.44269504088896341f);
}

// 1 / x for x between 1 and 1e30.
template <Target kFor>
__device__ inline float reciprocal(float x) {
  const float r = __fdividef(1.0f, x);
  if constexpr (kFor == Target::single)
    return fmaf(r, fmaf(-x, r, 1.0f), r);  // Newton: the approximation's 2 ulp to less than one
  else
    return r;
}

// sigmoid(x) = 1 / (1 + e^-x) and 1 - sigmoid(x), neither with cancellation or overflow: e^-|x| is at most 1.
struct Sigmoid {
  float value, complement;
};
template <Target kFor>
__device__ inline Sigmoid sigmoid(float x) {
  const float e = exp_negative<kFor>(-fabsf(x));
  const float near_one = reciprocal<kFor>(1.0f + e), near_zero = e * near_one;
  return {x < 0.0f ? near_zero : near_one, x < 0.0f ? near_one : near_zero};
}

// The normal distribution Phi(x) = (1 + erf(x / sqrt 2)) / 2 and its density phi(x) = e^(-x^2/2) / sqrt(2 pi), by the
// formula of core/normal.h: one exponential for both, no branch, and the negative tail keeps its relative accuracy,
// which 1 + erf loses.
struct Normal {
  float cdf, density;
};
template <Target kFor>
__device__ inline Normal normal(float x) {
  const float t = at_most(fabsf(x), 14.4f);  // e^(-t^2/2) R(t) is below float's range from 14.2 on
  const float square = __fmul_rn(t, t);
  float gauss = exp_negative<kFor>(square * -0.5f);
  if constexpr (kFor == Target::single) {
    const float missing = fmaf(t, t, -square);  // what rounding the square lost; the exponential would magnify it
    gauss = fmaf(gauss, missing * -0.5f, gauss);
  }
  const float inverse = reciprocal<kFor>(t + kNormalCentre<kFor>);
  const float p = normal_tail<kFor>(1.0f - 2.0f * kNormalCentre<kFor> * inverse);
  const float tail = gauss * (p * inverse);
  return {x < 0.0f ? tail : 1.0f - tail, gauss * 0.398942280401432678f};
}

}  // namespace fastgpt::FASTGPT_ISA
