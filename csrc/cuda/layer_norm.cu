// layer_norm, forward and backward, with the residual addition fused.
//
//   s = x + residual,  mean = sum(s) / C,  var = sum((s - mean)^2) / C,  y = (s - mean) * rstd * w + b
//   with xhat = (s - mean) * rstd and g = dy * w:
//   ds = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum,  dw = sum_rows(dy * xhat),  db = sum_rows(dy)
//
// Bytes, and how rows are shared out: see norm.cuh.
#include "cuda/norm.cuh"

namespace fastgpt::FASTGPT_ISA {

Status layer_norm_forward(const LayerNormForward& p, Launch& launch) {
  return dispatch_dtypes(p.dtype, p.weight_dtype,
                         [&](auto t, auto) { return norm_forward<true, typename decltype(t)::type>(p, launch); });
}

Status layer_norm_backward(const LayerNormBackward& p, Launch& launch) {
  return dispatch_dtypes(p.dtype, p.weight_dtype,
                         [&](auto t, auto) { return norm_backward<true, typename decltype(t)::type>(p, launch); });
}

}  // namespace fastgpt::FASTGPT_ISA
