// layer_norm: y = (s - mean(s)) * rstd * weight + bias over rows of C, with s = x + residual.
#include "cuda/core/launch.h"
#include "cuda/core/reduce.cuh"
#include "cuda/core/vector.cuh"

namespace fastgpt::FASTGPT_ISA {
namespace {

constexpr int kThreads = 256;

// One block a row; the row is read twice.
template <class T, class W>
__global__ void __launch_bounds__(kThreads) layer_norm_forward_kernel(const LayerNormForward p) {
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.cols;
  const T* residual = p.residual ? static_cast<const T*>(p.residual) + row * p.cols : nullptr;
  const auto at = [&](int64_t c) {
    const float v = to_float(x[c]);
    return residual ? to_float(cast<T>(v + to_float(residual[c]))) : v;
  };
  float sum = 0;
  for (int64_t c = threadIdx.x; c < p.cols; c += kThreads) sum += at(c);
  const float mean = block_sum<kThreads / kWarp>(sum) / p.cols;
  float squares = 0;
  for (int64_t c = threadIdx.x; c < p.cols; c += kThreads) squares += (at(c) - mean) * (at(c) - mean);
  const float rstd = rsqrtf(block_sum<kThreads / kWarp>(squares) / p.cols + static_cast<float>(p.eps));
  const W* weight = static_cast<const W*>(p.weight);
  const W* bias = static_cast<const W*>(p.bias);
  for (int64_t c = threadIdx.x; c < p.cols; c += kThreads) {
    const float s = at(c);
    if (residual) static_cast<T*>(p.sum)[row * p.cols + c] = cast<T>(s);
    const float y = (s - mean) * rstd * (weight ? to_float(weight[c]) : 1.0f) + (bias ? to_float(bias[c]) : 0.0f);
    static_cast<T*>(p.y)[row * p.cols + c] = cast<T>(y);
  }
  if (threadIdx.x == 0) {
    p.mean[row] = mean;
    p.rstd[row] = rstd;
  }
}

}  // namespace

Status layer_norm_forward(const LayerNormForward& p, Launch& launch) {
  return dispatch_dtypes(p.dtype, p.weight_dtype, [&](auto t, auto w) -> Status {
    using T = typename decltype(t)::type;
    using W = typename decltype(w)::type;
    return launch.run<layer_norm_forward_kernel<T, W>>(static_cast<unsigned>(p.rows), kThreads, 0, p);
  });
}

}  // namespace fastgpt::FASTGPT_ISA
