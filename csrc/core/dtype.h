// Storage types of tensors. Arithmetic is always done in float; these only load and store.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/isa.h"
#include "fastgpt.h"

namespace fastgpt::FASTGPT_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct TypeTag {
  using type = T;
};

// Calls f(TypeTag<T>) for the storage type that `dtype` names.
template <class F>
inline Status dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(TypeTag<float>{});
    case DType::bf16: return f(TypeTag<bf16>{});
    case DType::f16: return f(TypeTag<f16>{});
  }
  return {Status::unsupported_dtype, 0, static_cast<int64_t>(dtype)};
}

// The same for a tensor and its parameters (a weight, a bias), which share the tensor's dtype or are float:
// f(TypeTag<T>, TypeTag<W>).
template <class F>
inline Status dispatch_dtypes(DType dtype, DType parameter_dtype, F&& f) {
  return dispatch_dtype(dtype, [&](auto t) -> Status {
    if (parameter_dtype == dtype) return f(t, t);
    if (parameter_dtype == DType::f32) return f(t, TypeTag<float>{});
    return {Status::unsupported_dtype, 0, static_cast<int64_t>(parameter_dtype)};
  });
}

FASTGPT_HOST_DEVICE inline uint32_t bits_of(float x) {
  uint32_t u = 0;
  std::memcpy(&u, &x, 4);
  return u;
}
FASTGPT_HOST_DEVICE inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

FASTGPT_HOST_DEVICE inline float to_float(float x) { return x; }
FASTGPT_HOST_DEVICE inline float to_float(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
FASTGPT_HOST_DEVICE inline float to_float(f16 x) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
  return out;
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // inf, NaN
  // Placing the 15 bits at the top of a float's mantissa leaves an exponent that is 112 too small; the product mends
  // it, subnormal halves included.
  return float_of(sign | bits_of(float_of(magnitude << 13) * float_of(0x77800000u)));
#endif
}

// Round to nearest even; NaN stays NaN.
FASTGPT_HOST_DEVICE inline void from_float(float x, float& out) { out = x; }
FASTGPT_HOST_DEVICE inline void from_float(float x, bf16& out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u)
    out.bits = static_cast<uint16_t>(u >> 16 | 0x40u);
  else
    out.bits = static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
#endif
}
FASTGPT_HOST_DEVICE inline void from_float(float x, f16& out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
  const uint32_t u = bits_of(x);
  const uint32_t sign = u >> 16 & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u)
    out.bits = static_cast<uint16_t>(sign | 0x7e00u);
  else if (magnitude >= 0x477ff000u)  // 65520 and above round to infinity
    out.bits = static_cast<uint16_t>(sign | 0x7c00u);
  else if (magnitude < 0x38800000u)  // below 2^-14: adding 0.5 rounds to a multiple of 2^-24, the subnormal step
    out.bits = static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u));
  else
    out.bits = static_cast<uint16_t>(sign | ((magnitude + 0xfffu + (magnitude >> 13 & 1u)) - 0x38000000u) >> 13);
#endif
}

template <class T>
FASTGPT_HOST_DEVICE inline T cast(float x) {
  T out;
  from_float(x, out);
  return out;
}

}  // namespace fastgpt::FASTGPT_ISA
