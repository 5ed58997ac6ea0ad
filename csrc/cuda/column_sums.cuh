// Sums down the columns of a matrix (gradients of weights and biases) in two stages, deterministic.
//
// A block sums a chunk of rows, each thread its own columns; partial[chunk][kind][column] goes to the workspace, and
// column_sums_kernel adds the chunks. How rows are cut into chunks depends on their number alone, never on the device.
#pragma once

#include "cuda/core/launch.h"
#include "cuda/core/vector.cuh"

namespace fastgpt::FASTGPT_ISA {

// Enough chunks that every multiprocessor of a large device has a few, and rows enough in each that the partial sums
// (written once and read once, mostly in L2) are few beside the rows.
constexpr int64_t kMostChunks = 512, kLeastChunkRows = 16;

// Rows in a chunk, where a block takes `rows_at_once`.
inline int64_t chunk_rows(int64_t rows, int64_t rows_at_once) {
  const int64_t wanted = ceil_div(rows, kMostChunks);
  return round_up(wanted > kLeastChunkRows ? wanted : kLeastChunkRows, rows_at_once);
}

// Adds the threads of a block that differ in threadIdx.y alone: those with threadIdx.y = 0 get the sums. blockDim.y is
// a power of two; `shared` has kCount * (threads / 2) elements.
template <int kCount>
__device__ inline void add_over_y(float (&sums)[kCount], float* shared) {
  for (int half = static_cast<int>(blockDim.y) / 2; half > 0; half /= 2) {
    const int y = static_cast<int>(threadIdx.y), stride = half * static_cast<int>(blockDim.x);
    const int at = (y % half) * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    __syncthreads();  // the last round's readers are done
    if (y >= half && y < 2 * half) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) shared[i * stride + at] = sums[i];
    }
    __syncthreads();
    if (y < half) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums[i] += shared[i * stride + at];
    }
  }
}

struct ColumnSumsOut {
  void *first, *second;  // of kind 0 and kind 1
  DType dtype;
};

namespace {  // kernels are told apart by the file that they are compiled in

// One block for 32 columns; thread (x, y) adds chunks y, y + kChunkLanes, ...
constexpr int kColumnLanes = 32;
template <int kChunkLanes>
__global__ void __launch_bounds__(kColumnLanes* kChunkLanes)
    column_sums_kernel(const float* partial, int64_t chunks, int64_t cols, const ColumnSumsOut out) {
  const int64_t col = int64_t{blockIdx.x} * kColumnLanes + threadIdx.x, kind = blockIdx.y;
  float sum[1] = {0.0f};
  if (col < cols) {
    const int64_t stride = gridDim.y * cols;
    const float* at = partial + kind * cols + col;
#pragma unroll 8
    for (int64_t i = threadIdx.y; i < chunks; i += kChunkLanes) sum[0] += at[i * stride];
  }
  FASTGPT_SHARED(float, shared, kColumnLanes* kChunkLanes / 2);
  add_over_y(sum, shared);
  if (threadIdx.y != 0 || col >= cols) return;
  void* const to = kind == 0 ? out.first : out.second;
  switch (out.dtype) {
    case DType::f32: static_cast<float*>(to)[col] = sum[0]; break;
    case DType::bf16: static_cast<bf16*>(to)[col] = cast<bf16>(sum[0]); break;
    case DType::f16: static_cast<f16*>(to)[col] = cast<f16>(sum[0]); break;
  }
}

}  // namespace

// Writes the sums over all chunks of partial[chunks][kinds][cols]: kind 0 to `first`, kind 1 to `second`.
inline Status write_column_sums(Launch& launch, const float* partial, int64_t chunks, int kinds, int64_t cols,
                                void* first, void* second, DType dtype) {
  if (kinds == 0) return {};
  const dim3 grid(static_cast<unsigned>(ceil_div(cols, kColumnLanes)), static_cast<unsigned>(kinds));
  constexpr int kChunkLanes = 16;
  return launch.run<column_sums_kernel<kChunkLanes>>(grid, dim3(kColumnLanes, kChunkLanes), 0, partial, chunks, cols,
                                                     ColumnSumsOut{first, second, dtype});
}

}  // namespace fastgpt::FASTGPT_ISA
