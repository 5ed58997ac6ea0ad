// How gelu and swiglu share out a matrix: a thread takes 16 bytes of a row (a cell of 4 or 8 elements) where addresses
// and strides allow it, else one element; neighbours in x take neighbouring cells, neighbours in y the next row.
#pragma once

#include "cuda/core/launch.h"
#include "cuda/core/vector.cuh"

namespace fastgpt::FASTGPT_ISA {

constexpr int kElementwiseThreads = 256;

// Threads of a block: at least a warp's worth of a row, so that its accesses are whole lines; more where rows are few,
// fewer where they are short.
inline dim3 elementwise_block(int64_t rows, int64_t cells) {
  unsigned x = kElementwiseThreads;
  while (x > kWarp && kElementwiseThreads / x < rows) x /= 2;
  while (x > 1 && x / 2 >= cells) x /= 2;
  return {x, kElementwiseThreads / x};
}

// The grid of such blocks: strips of columns in x; in y enough to fill any device, and a thread takes every so many
// rows.
inline dim3 elementwise_grid(int64_t rows, int64_t cells, dim3 block) {
  constexpr int64_t most = 2048;
  const int64_t y = ceil_div(rows, block.y);
  return {static_cast<unsigned>(ceil_div(cells, block.x)), static_cast<unsigned>(y < most ? y : most)};
}

// The first `n` of kN elements at p, fewer than kN at the end of a row; the others are 0.
template <class T, int kN>
__device__ inline void load_part(const T* p, int64_t n, float (&out)[kN] SIMT_CALLER) {
  if (n >= kN) return load_floats(p, out FASTGPT_SITE);
#pragma unroll
  for (int i = 0; i < kN; ++i) out[i] = i < n ? to_float(p[i]) : 0.0f;
}
template <class T, int kN>
__device__ inline void store_part(T* p, int64_t n, const float (&in)[kN] SIMT_CALLER) {
  if (n >= kN) return store_floats(p, in FASTGPT_SITE);
#pragma unroll
  for (int i = 0; i < kN; ++i)
    if (i < n) p[i] = cast<T>(in[i]);
}

}  // namespace fastgpt::FASTGPT_ISA
