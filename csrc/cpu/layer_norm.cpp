// layer_norm, forward and backward, with the residual addition fused.
//
//   s = x + residual,  mean = sum(s) / C,  var = sum((s - mean)^2) / C,  y = (s - mean) * rstd * w + b
//   with xhat = (s - mean) * rstd and g = dy * w:
//   ds = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum,  dw = sum_rows(dy * xhat),  db = sum_rows(dy)
//
// Bytes and passes: see norm.h.
#include "cpu/norm.h"

namespace fastgpt::FASTGPT_ISA {

Status layer_norm_forward(const LayerNormForward& p) {
  return dispatch_dtypes(p.dtype, p.weight_dtype, [&](auto t, auto w) {
    return norm_forward<true, typename decltype(t)::type, typename decltype(w)::type>(p);
  });
}

Status layer_norm_backward(const LayerNormBackward& p) {
  return dispatch_dtypes(p.dtype, p.weight_dtype, [&](auto t, auto w) {
    return norm_backward<true, typename decltype(t)::type, typename decltype(w)::type>(p);
  });
}

}  // namespace fastgpt::FASTGPT_ISA
