// swiglu, forward and backward: y = g s u with s = sigmoid(g), g the gate and u the upward projection.
//
//   dup = dy g s,  dgate = dy u s (1 + g (1 - s))
//
// Rows may lie apart (slices of one fused projection), so nothing is copied first. Bytes: forward reads g and u and
// writes y (3 N C elements); backward reads dy, g and u and writes dgate and dup (5 N C); s is recomputed. About 20
// operations an element, two of them on the special function unit: bound by memory on every GPU with these kernels.
#include "cuda/core/math.cuh"
#include "cuda/elementwise.cuh"

namespace fastgpt::FASTGPT_ISA {
namespace {

template <class T, bool kVector>
__global__ void __launch_bounds__(kElementwiseThreads) swiglu_forward_kernel(const SwigluForward p) {
  constexpr int kN = kCell<T, kVector>;
  const int64_t col = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kN, n = p.cols - col;
  if (n <= 0) return;
  const int64_t step = int64_t{gridDim.y} * blockDim.y;
  for (int64_t row = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; row < p.rows; row += step) {
    float g[kN], u[kN];
    load_part(static_cast<const T*>(p.gate) + row * p.gate_stride + col, n, g);
    load_part(static_cast<const T*>(p.up) + row * p.up_stride + col, n, u);
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const float s = sigmoid<kTarget<T>>(g[i]).value;
      u[i] *= at_least(g[i], -200.0f) * s;  // s is 0 there: no inf * 0
    }
    store_part(static_cast<T*>(p.y) + row * p.cols + col, n, u);
  }
}

template <class T, bool kVector>
__global__ void __launch_bounds__(kElementwiseThreads) swiglu_backward_kernel(const SwigluBackward p) {
  constexpr int kN = kCell<T, kVector>;
  const int64_t col = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kN, n = p.cols - col;
  if (n <= 0) return;
  const int64_t step = int64_t{gridDim.y} * blockDim.y;
  for (int64_t row = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; row < p.rows; row += step) {
    float g[kN], u[kN], d[kN];
    load_part(static_cast<const T*>(p.gate) + row * p.gate_stride + col, n, g);
    load_part(static_cast<const T*>(p.up) + row * p.up_stride + col, n, u);
    load_part(static_cast<const T*>(p.dy) + row * p.cols + col, n, d);
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const Sigmoid s = sigmoid<kTarget<T>>(g[i]);
      const float silu = at_least(g[i], -200.0f) * s.value;
      // silu (1 - s) = g s (1 - s) vanishes for large g, where silu may be infinite.
      const float bend = g[i] > 200.0f ? 0.0f : silu * s.complement;
      u[i] = d[i] * u[i] * (s.value + bend);
      d[i] *= silu;
    }
    store_part(static_cast<T*>(p.dgate) + row * p.gradient_stride + col, n, u);
    store_part(static_cast<T*>(p.dup) + row * p.gradient_stride + col, n, d);
  }
}

// Whether every row of a matrix starts at a multiple of 16 bytes.
template <class T>
bool rows_aligned(int64_t rows, const void* first, int64_t stride) {
  return aligned16(first) && (rows == 1 || stride % kPack<T> == 0);
}

}  // namespace

Status swiglu_forward(const SwigluForward& p, Launch& launch) {
  return dispatch_dtype(p.dtype, [&](auto t) -> Status {
    using T = typename decltype(t)::type;
    const bool vector = rows_aligned<T>(p.rows, p.gate, p.gate_stride) && rows_aligned<T>(p.rows, p.up, p.up_stride) &&
                        rows_aligned<T>(p.rows, p.y, p.cols);
    const int64_t cells = vector ? ceil_div(p.cols, kPack<T>) : p.cols;
    const dim3 block = elementwise_block(p.rows, cells), grid = elementwise_grid(p.rows, cells, block);
    if (vector) return launch.run<swiglu_forward_kernel<T, true>>(grid, block, 0, p);
    return launch.run<swiglu_forward_kernel<T, false>>(grid, block, 0, p);
  });
}

Status swiglu_backward(const SwigluBackward& p, Launch& launch) {
  return dispatch_dtype(p.dtype, [&](auto t) -> Status {
    using T = typename decltype(t)::type;
    const bool vector = rows_aligned<T>(p.rows, p.gate, p.gate_stride) && rows_aligned<T>(p.rows, p.up, p.up_stride) &&
                        rows_aligned<T>(p.rows, p.dy, p.cols) && rows_aligned<T>(p.rows, p.dgate, p.gradient_stride) &&
                        rows_aligned<T>(p.rows, p.dup, p.gradient_stride);
    const int64_t cells = vector ? ceil_div(p.cols, kPack<T>) : p.cols;
    const dim3 block = elementwise_block(p.rows, cells), grid = elementwise_grid(p.rows, cells, block);
    if (vector) return launch.run<swiglu_backward_kernel<T, true>>(grid, block, 0, p);
    return launch.run<swiglu_backward_kernel<T, false>>(grid, block, 0, p);
  });
}

}  // namespace fastgpt::FASTGPT_ISA
