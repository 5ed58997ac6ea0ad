// rms_norm, forward and backward, with the residual addition fused.
//
//   s = x + residual,  rstd = 1 / sqrt(sum(s^2) / C + eps),  y = s * rstd * w
//   with xhat = s * rstd and g = dy * w:  ds = rstd * (g - xhat * mean(g * xhat)) + dsum,  dw = sum_rows(dy * xhat)
//
// Bytes, and how rows are shared out: see norm.cuh.
#include "cuda/norm.cuh"

namespace fastgpt::FASTGPT_ISA {

Status rms_norm_forward(const RmsNormForward& p, Launch& launch) {
  return dispatch_dtypes(p.dtype, p.weight_dtype,
                         [&](auto t, auto) { return norm_forward<false, typename decltype(t)::type>(p, launch); });
}

Status rms_norm_backward(const RmsNormBackward& p, Launch& launch) {
  return dispatch_dtypes(p.dtype, p.weight_dtype,
                         [&](auto t, auto) { return norm_backward<false, typename decltype(t)::type>(p, launch); });
}

}  // namespace fastgpt::FASTGPT_ISA
