// What layer_norm and rms_norm share on a GPU: kCentred subtracts the mean.
//
// A row belongs to blockDim.x threads: a power of two within a warp for narrow rows, one warp, or several; blockDim.y
// rows are worked on at once. A thread moves 16 bytes at a time where all addresses allow it (a cell of 4 or 8
// elements), else one element; neighbours move neighbouring cells. The row comes from memory once and stays in
// registers; what is left of rows too wide for that is read again.
//
// Forward: N C elements read and written (twice that with a residual). The mean is known before the squares are summed,
// from registers, so the variance does not cancel.
// Backward: a block takes a chunk of rows and keeps its part of dweight and dbias in registers meanwhile, so x and dy
// are read once: 3 N C elements, and 8 C bytes for each sum and chunk of at least 16 rows (column_sums.cuh).
//
// How a row is shared out depends on its width and alignment, never on the other rows or the device: neither do the
// bits.
#pragma once

#include <cstdint>

#include "cuda/column_sums.cuh"
#include "cuda/core/launch.h"
#include "cuda/core/reduce.cuh"
#include "cuda/core/vector.cuh"

namespace fastgpt::FASTGPT_ISA {

constexpr int kMostThreads = 512;  // a block; leaves a thread 128 registers
constexpr int kMostWarps = kMostThreads / kWarp;
// Elements of a row in a thread's registers: of x; backward of x, dy, dweight and dbias.
template <bool kVector>
constexpr int kForwardElements = kVector ? 32 : 16;
constexpr int kBackwardElements = 8;
constexpr int kForwardThreads = 128, kBackwardThreads = 256;  // of a block, where rows are narrower than that

// Threads for rows of `cells`, `held` of them in a thread: as many as cells up to a warp, then as many warps as hold
// the row. Several rows in a block if that is fewer than `threads`; a power of two of them.
inline dim3 row_block(int64_t cells, int64_t held, int64_t threads) {
  int64_t group = 1;
  while (group < kWarp && group < cells) group *= 2;
  if (group == kWarp) group *= ceil_div(cells, kWarp * held);
  if (group > kMostThreads) group = kMostThreads;
  int64_t rows = 1;
  while (2 * rows * group <= threads) rows *= 2;
  return {static_cast<unsigned>(group), static_cast<unsigned>(rows)};
}

// A thread holds this cell of its row and kHeld - 1 others, each a warp further: constant distances, so that one
// address register serves them all.
template <int kHeld>
__device__ inline int first_cell() {
  const int thread = static_cast<int>(threadIdx.x);
  return thread / kWarp * kWarp * kHeld + thread % kWarp;
}

// Sums over the threads of a row; each of them gets the results. `partial` has kSums * kMostWarps elements, which no
// thread may be reading still.
template <int kSums>
__device__ inline void sum_over_row(float (&sums)[kSums], float* partial) {
  const int group = static_cast<int>(blockDim.x);
#pragma unroll
  for (int bits = kWarp / 2; bits > 0; bits /= 2) {
    if (bits >= group) continue;
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] += __shfl_xor_sync(kAllLanes, sums[i], bits);
  }
  if (group <= kWarp) return;
  const int thread = static_cast<int>(threadIdx.y) * group + static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp, lane = thread % kWarp, warps = group / kWarp, first = warp - warp % warps;
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) partial[kSums * warp + i] = sums[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] = warp_sum(lane < warps ? partial[kSums * (first + lane) + i] : 0.0f);
}

// --- forward ---

namespace {  // kernels are told apart by the file that they are compiled in

template <bool kCentred, class T, bool kVector, class P>
__global__ void __launch_bounds__(kMostThreads) norm_forward_kernel(const P p) {
  constexpr int kN = kCell<T, kVector>, kHeld = kForwardElements<kVector> / kN;
  FASTGPT_SHARED(float, partial, 2 * kMostWarps);
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y, start = row * p.cols;
  // A row that is not there has no cells; its threads are needed all the same, where they meet the others.
  const int cells = row < p.rows ? static_cast<int>(p.cols / kN) : 0;
  const int group = static_cast<int>(blockDim.x), mine = first_cell<kHeld>();
  const int rest = kHeld * group + static_cast<int>(threadIdx.x);  // from here on in steps of the group
  const T* x = static_cast<const T*>(p.x) + start;
  const T* residual = p.residual ? static_cast<const T*>(p.residual) + start : nullptr;

  // What is normalised: with a residual the sum as rounded to its dtype, as the caller sees it.
  const auto add_residual = [&](float (&s)[kN], int c) {
    float r[kN];
    load_floats(residual + c * kN, r);
#pragma unroll
    for (int j = 0; j < kN; ++j) s[j] = to_float(cast<T>(s[j] + r[j]));
  };
  const auto load_again = [&](float (&s)[kN], int c) {
    load_floats(x + c * kN, s);
    if (residual) add_residual(s, c);
  };

  float held[kHeld][kN];
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    if (const int c = mine + i * kWarp; c < cells) load_floats(x + c * kN, held[i]);
  if (residual) {
    T* sum = static_cast<T*>(p.sum) + start;
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (const int c = mine + i * kWarp; c < cells) {
        add_residual(held[i], c);
        store_floats(sum + c * kN, held[i]);
      }
#pragma unroll 1
    for (int c = rest; c < cells; c += group) {
      float s[kN];
      load_again(s, c);
      store_floats(sum + c * kN, s);
    }
  }

  const auto sum_of = [&](auto&& term, float* shared) {
    float sum[1] = {0.0f};
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (mine + i * kWarp < cells)
#pragma unroll
        for (int j = 0; j < kN; ++j) sum[0] += term(held[i][j]);
#pragma unroll 1
    for (int c = rest; c < cells; c += group) {
      float s[kN];
      load_again(s, c);
#pragma unroll
      for (int j = 0; j < kN; ++j) sum[0] += term(s[j]);
    }
    sum_over_row(sum, shared);
    return sum[0];
  };
  const float cols = static_cast<float>(p.cols);
  float mean = 0.0f;
  if constexpr (kCentred) mean = sum_of([](float s) { return s; }, partial) / cols;
  const float variance = sum_of([&](float s) { return (s - mean) * (s - mean); }, partial + kMostWarps) / cols;
  const float rstd = 1.0f / sqrtf(variance + static_cast<float>(p.eps));  // not rsqrtf: it is 2 ulp off

  T* y = static_cast<T*>(p.y) + start;
  const void* bias = nullptr;
  if constexpr (kCentred) bias = p.bias;
  const auto write = [&](const float (&s)[kN], int c) {
    float v[kN], parameters[kN];
#pragma unroll
    for (int j = 0; j < kN; ++j) v[j] = (s[j] - mean) * rstd;
    if (p.weight) {
      load_parameters<T>(p.weight, p.weight_dtype, c * kN, parameters);
#pragma unroll
      for (int j = 0; j < kN; ++j) v[j] *= parameters[j];
    }
    if (bias) {
      load_parameters<T>(bias, p.weight_dtype, c * kN, parameters);
#pragma unroll
      for (int j = 0; j < kN; ++j) v[j] += parameters[j];
    }
    store_floats(y + c * kN, v);
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    if (const int c = mine + i * kWarp; c < cells) write(held[i], c);
#pragma unroll 1
  for (int c = rest; c < cells; c += group) {
    float s[kN];
    load_again(s, c);
    write(s, c);
  }
  if (threadIdx.x == 0 && row < p.rows) {
    if constexpr (kCentred) p.mean[row] = mean;
    p.rstd[row] = rstd;
  }
}

}  // namespace

template <bool kCentred, class T, class P>
Status norm_forward(const P& p, Launch& launch) {
  if (p.cols > INT32_MAX) return {Status::unsupported_shape, 0, p.cols};
  const auto run = [&](auto vector) {
    constexpr bool kVector = decltype(vector)::value;
    constexpr int kN = kCell<T, kVector>, kHeld = kForwardElements<kVector> / kN;
    const dim3 block = row_block(p.cols / kN, kHeld, kForwardThreads);
    const auto blocks = static_cast<unsigned>(ceil_div(p.rows, block.y));
    return launch.run<norm_forward_kernel<kCentred, T, kVector, P>>(blocks, block, 0, p);
  };
  bool vector = p.cols % kPack<T> == 0 && all_aligned16(p.x, p.residual, p.sum, p.y, p.weight);
  if constexpr (kCentred) vector = vector && aligned16(p.bias);
  return vector ? run(std::true_type{}) : run(std::false_type{});
}

// --- backward ---

// sums += parts, or = where it is the first time.
template <int kN>
__device__ inline void add_to(float* sums, bool first, const float (&parts)[kN]) {
  float out[kN];
#pragma unroll
  for (int i = 0; i < kN; ++i) out[i] = parts[i];
  if (!first) {
#pragma unroll
    for (int i = 0; i < kN; i += kCell<float, kN != 1>) {
      Cell<float, kN> cell;
      float old[kCell<float, kN != 1>];
      if constexpr (kN == 1)
        cell.value = *sums;
      else
        cell = load_pack(sums + i);
      cell.to_floats(old);
#pragma unroll
      for (int j = 0; j < kCell<float, kN != 1>; ++j) out[i + j] += old[j];
    }
  }
  store_floats(sums, out);
}

namespace {

// kinds: dweight, dbias or both, in this order; partial[chunk][kinds][cols].
template <bool kCentred, class T, bool kVector, class P>
__global__ void __launch_bounds__(kMostThreads, 1)
    norm_backward_kernel(const P p, float* partial, int64_t rows_of_chunk, int kinds) {
  constexpr int kN = kCell<T, kVector>, kElements = kBackwardElements, kHeld = kElements / kN,
                kKinds = kCentred ? 2 : 1;
  FASTGPT_SHARED(float, row_sums, 2 * 2 * kMostWarps);
  FASTGPT_SHARED(float, shared_sums, kKinds * kElements * kBackwardThreads / 2);
  const int group = static_cast<int>(blockDim.x), mine = first_cell<kHeld>();
  const int rest = kHeld * group + static_cast<int>(threadIdx.x);  // from here on in steps of the group
  const int row_cells = static_cast<int>(p.cols / kN);
  const int64_t first = blockIdx.x * rows_of_chunk;
  const int rows = static_cast<int>(first + rows_of_chunk < p.rows ? rows_of_chunk : p.rows - first);
  const float per_column = 1.0f / static_cast<float>(p.cols);
  bool want_bias = false;
  if constexpr (kCentred) want_bias = p.dbias != nullptr;

  float column_sums[kKinds * kElements];  // [kind][held cell][element]
#pragma unroll
  for (int i = 0; i < kKinds * kElements; ++i) column_sums[i] = 0.0f;
  // In the workspace: of the first kind, of the last.
  const auto weight_sums = [&] { return partial + blockIdx.x * kinds * p.cols; };
  const auto bias_sums = [&] { return weight_sums() + (kinds - 1) * p.cols; };

  // The next row is on its way while this one is summed up and written.
  Cell<T, kN> next_x[kHeld], next_dy[kHeld];
  float next_mean = 0.0f, next_rstd = 0.0f;
  const auto fetch = [&](int row_of_chunk) {
    if (row_of_chunk >= rows) return;
    const int64_t row = first + row_of_chunk, start = row * p.cols;
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (const int c = mine + i * kWarp; c < row_cells) {
        load_cell(static_cast<const T*>(p.x) + start + c * kN, next_x[i]);
        load_cell(static_cast<const T*>(p.dy) + start + c * kN, next_dy[i]);
      }
    next_rstd = __ldg(p.rstd + row);
    if constexpr (kCentred) next_mean = __ldg(p.mean + row);
  };
  fetch(static_cast<int>(threadIdx.y));

  int turn = 0;  // of the two buffers for row sums: while one is still read the other is written
  for (int row_of_block = 0; row_of_block < rows; row_of_block += static_cast<int>(blockDim.y), turn ^= 1) {
    const int row_of_chunk = row_of_block + static_cast<int>(threadIdx.y);
    const int cells = row_of_chunk < rows ? row_cells : 0;
    const int64_t start = (first + row_of_chunk) * p.cols;
    const float mean = next_mean, rstd = next_rstd;

    const auto read = [&](const Cell<T, kN>& x, const Cell<T, kN>& dy, float (&xhat)[kN], float (&d)[kN]) {
      x.to_floats(xhat);
      dy.to_floats(d);
#pragma unroll
      for (int j = 0; j < kN; ++j) xhat[j] = (xhat[j] - mean) * rstd;
    };
    const auto times_weight = [&](const float (&d)[kN], int c, float (&g)[kN]) {
      float w[kN];
      if (p.weight) load_parameters<T>(p.weight, p.weight_dtype, c * kN, w);
#pragma unroll
      for (int j = 0; j < kN; ++j) g[j] = p.weight ? d[j] * w[j] : d[j];
    };

    float xhat[kHeld][kN], d[kHeld][kN], wide_xhat[kN], wide_d[kN];
    const auto read_wide = [&](int c) {
      Cell<T, kN> x, dy;
      load_cell(static_cast<const T*>(p.x) + start + c * kN, x);
      load_cell(static_cast<const T*>(p.dy) + start + c * kN, dy);
      read(x, dy, wide_xhat, wide_d);
    };
    float sums[2] = {0.0f, 0.0f};  // of g xhat and of g
    const auto add = [&](const float (&xhat)[kN], const float (&d)[kN], int c) {
      float g[kN];
      times_weight(d, c, g);
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        sums[0] += g[j] * xhat[j];
        if (kCentred) sums[1] += g[j];
      }
    };
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (const int c = mine + i * kWarp; c < cells) {
        read(next_x[i], next_dy[i], xhat[i], d[i]);
        add(xhat[i], d[i], c);
      }
#pragma unroll 1
    for (int c = rest; c < cells; c += group) {
      read_wide(c);
      add(wide_xhat, wide_d, c);
    }
    fetch(row_of_chunk + static_cast<int>(blockDim.y));
    sum_over_row(sums, row_sums + turn * 2 * kMostWarps);
    const float mean_gx = sums[0] * per_column, mean_g = sums[1] * per_column;

    const auto write = [&](const float (&xhat)[kN], const float (&d)[kN], int c) {
      float out[kN];
      times_weight(d, c, out);
#pragma unroll
      for (int j = 0; j < kN; ++j) out[j] = (out[j] - xhat[j] * mean_gx - (kCentred ? mean_g : 0.0f)) * rstd;
      if (p.dsum) {
        float dsum[kN];
        load_floats(static_cast<const T*>(p.dsum) + start + c * kN, dsum);
#pragma unroll
        for (int j = 0; j < kN; ++j) out[j] += dsum[j];
      }
      store_floats(static_cast<T*>(p.dx) + start + c * kN, out);
    };
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (const int c = mine + i * kWarp; c < cells) {
        write(xhat[i], d[i], c);
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          column_sums[i * kN + j] += d[i][j] * xhat[i][j];
          if constexpr (kCentred) column_sums[kElements + i * kN + j] += d[i][j];
        }
      }
    // Columns beyond the registers have their sums in the workspace; such rows have all the block's threads.
#pragma unroll 1
    for (int c = rest; c < cells; c += group) {
      read_wide(c);
      write(wide_xhat, wide_d, c);
      if (want_bias) add_to(bias_sums() + c * kN, row_of_chunk == 0, wide_d);
#pragma unroll
      for (int j = 0; j < kN; ++j) wide_xhat[j] *= wide_d[j];
      if (p.dweight) add_to(weight_sums() + c * kN, row_of_chunk == 0, wide_xhat);
    }
  }

  if (kinds == 0) return;
  add_over_y(column_sums, shared_sums);
  if (threadIdx.y != 0) return;
  const auto store = [&](int from, float* to) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (const int c = mine + i * kWarp; c < row_cells) {
        float out[kN];
#pragma unroll
        for (int j = 0; j < kN; ++j) out[j] = column_sums[from + i * kN + j];
        store_floats(to + c * kN, out);
      }
  };
  if (p.dweight) store(0, weight_sums());
  if (want_bias) store(kCentred ? kElements : 0, bias_sums());
}

}  // namespace

template <bool kCentred, class T, class P>
Status norm_backward(const P& p, Launch& launch) {
  if (p.cols > INT32_MAX) return {Status::unsupported_shape, 0, p.cols};
  void* dbias = nullptr;
  if constexpr (kCentred) dbias = p.dbias;
  const int kinds = (p.dweight ? 1 : 0) + (dbias ? 1 : 0);
  const auto run = [&](auto vector) -> Status {
    constexpr bool kVector = decltype(vector)::value;
    constexpr int kN = kCell<T, kVector>, kHeld = kBackwardElements / kN;
    const dim3 block = row_block(p.cols / kN, kHeld, kBackwardThreads);
    const int64_t rows_of_chunk = chunk_rows(p.rows, block.y), chunks = ceil_div(p.rows, rows_of_chunk);
    float* const partial = launch.scratch<float>(chunks * kinds * p.cols);
    const Status status = launch.run<norm_backward_kernel<kCentred, T, kVector, P>>(
        static_cast<unsigned>(chunks), block, 0, p, partial, rows_of_chunk, kinds);
    if (status.code != Status::ok) return status;
    return write_column_sums(launch, partial, chunks, kinds, p.cols, p.dweight ? p.dweight : dbias, dbias,
                             p.weight_dtype);
  };
  const bool vector = p.cols % kPack<T> == 0 && all_aligned16(p.x, p.dy, p.dsum, p.dx, p.weight);
  return vector ? run(std::true_type{}) : run(std::false_type{});
}

}  // namespace fastgpt::FASTGPT_ISA
