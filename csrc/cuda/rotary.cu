// rotary: each pair (x1, x2) of a head's first R dims is turned by the angle of its position.
//
//   y1 = x1 cos - x2 sin,  y2 = x2 cos + x1 sin;  inverse (the gradient): sin -> -sin
//   pairs are (i, i + R/2), or (2i, 2i + 1) when interleaved; dims from R on are copied
//
// Bytes: reads x and writes y once; a row of the tables serves all heads from the caches. 6 flops a pair: memory
// decides.
//
// A row is one head of one token: D elements, 128 bytes for 64 of 16 bits. A few neighbouring lanes take it, each a
// step: 16 bytes of x1 and of x2 (of pairs, when interleaved), or 16 bytes to copy. So a block has 256 / lanes rows,
// and the strides of x and y are free: a row is whole sectors wherever it lies. Where an address, a stride or R / 2 is
// not a multiple of 16 bytes, a step is one pair or one element.
//
// A position outside the tables cannot be an exception without waiting for the device: its rows of y are NaN.
#include "cuda/core/launch.h"
#include "cuda/core/vector.cuh"

namespace fastgpt::FASTGPT_ISA {
namespace {

constexpr int kThreads = 256;

// How a row is cut into steps.
struct Steps {
  int lanes;      // of a row: a power of two
  int turning;    // steps that turn pairs; the rest copies
  int all;
  bool by_packs;
};

// n elements at once: 16 bytes, 8, or a single one.
template <int n, class W>
__device__ inline void load_columns(float (&out)[n], const W* p) {
  if constexpr (n * sizeof(W) >= 16) {
#pragma unroll
    for (int i = 0; i < n; i += kPack<W>) {
      const Pack<W> pack = load_pack(p + i);
#pragma unroll
      for (int j = 0; j < kPack<W>; ++j) out[i + j] = pack.get(j);
    }
  } else if constexpr (n * sizeof(W) == 8) {
    const uint2 words = load8(p);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if constexpr (sizeof(W) == 4)
        out[i] = __uint_as_float(i == 0 ? words.x : words.y);
      else
        out[i] = to_float(W{static_cast<uint16_t>((i < 2 ? words.x : words.y) >> i % 2 * 16)});
    }
  } else {
    static_assert(n == 1);
    out[0] = to_float(*p);
  }
}

struct Pair {
  float first, second;
};
// Spelt out, so that the bits do not depend on what the compiler contracts where.
__device__ inline Pair turn(float x1, float x2, float cos, float sin) {
  return {fmaf(x1, cos, -__fmul_rn(x2, sin)), fmaf(x2, cos, __fmul_rn(x1, sin))};
}

// Pairs i .. i + n - 1 of a row; 16 bytes of x1 and of x2 for n = kPack<T>.
template <int n, class T, class W>
__device__ inline void turn_halves(T* y, const T* x, const W* cos, const W* sin, int i, int half, float sign) {
  float c[n], s[n], x1[n], x2[n];
  load_columns(x1, x + i);
  load_columns(x2, x + half + i);
  load_columns(c, cos + i);
  load_columns(s, sin + i);
#pragma unroll
  for (int j = 0; j < n; ++j) {
    const Pair turned = turn(x1[j], x2[j], c[j], s[j] * sign);
    x1[j] = turned.first;
    x2[j] = turned.second;
  }
  if constexpr (n == 1) {
    y[i] = cast<T>(x1[0]);
    y[half + i] = cast<T>(x2[0]);
  } else {
    Pack<T> pack;
    pack.from_floats(x1);
    store_pack(y + i, pack);
    pack.from_floats(x2);
    store_pack(y + half + i, pack);
  }
}

// Pairs i .. i + n - 1 of an interleaved row; 16 bytes of x for n = kPack<T> / 2.
template <int n, class T, class W>
__device__ inline void turn_neighbours(T* y, const T* x, const W* cos, const W* sin, int i, float sign) {
  float c[n], s[n], v[2 * n];
  if constexpr (n == 1) {
    v[0] = to_float(x[2 * i]);
    v[1] = to_float(x[2 * i + 1]);
  } else {
    load_columns(v, x + 2 * i);
  }
  load_columns(c, cos + i);
  load_columns(s, sin + i);
#pragma unroll
  for (int j = 0; j < n; ++j) {
    const Pair turned = turn(v[2 * j], v[2 * j + 1], c[j], s[j] * sign);
    v[2 * j] = turned.first;
    v[2 * j + 1] = turned.second;
  }
  if constexpr (n == 1) {
    y[2 * i] = cast<T>(v[0]);
    y[2 * i + 1] = cast<T>(v[1]);
  } else {
    Pack<T> pack;
    pack.from_floats(v);
    store_pack(y + 2 * i, pack);
  }
}

template <class T, class W>
__global__ void __launch_bounds__(kThreads) rotary_kernel(const Rotary p, const Steps steps) {
  const int rows_here = kThreads / steps.lanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * rows_here + static_cast<int>(threadIdx.x) / steps.lanes;
  if (row >= p.batch * p.heads * p.length) return;
  const auto flat = static_cast<uint32_t>(row), length = static_cast<uint32_t>(p.length);
  const uint32_t head_row = flat / length, t = flat - head_row * length;
  const uint32_t b = head_row / static_cast<uint32_t>(p.heads), h = head_row - b * static_cast<uint32_t>(p.heads);
  const T* x = static_cast<const T*>(p.x) + b * p.x_strides[0] + h * p.x_strides[1] + t * p.x_strides[2];
  T* y = static_cast<T*>(p.y) + b * p.y_strides[0] + h * p.y_strides[1] + t * p.y_strides[2];
  const int dim = static_cast<int>(p.dim), rotated = static_cast<int>(p.rotated), half = rotated / 2;
  const int first_step = static_cast<int>(threadIdx.x) % steps.lanes;

  const int64_t start = p.starts ? p.starts[b] : p.start;
  if (start < 0 || start >= p.max_len || start + t >= p.max_len) {
    for (int c = first_step; c < dim; c += steps.lanes) y[c] = cast<T>(__builtin_nanf(""));
    return;
  }
  const W* cos = static_cast<const W*>(p.cos) + (start + t) * half;
  const W* sin = static_cast<const W*>(p.sin) + (start + t) * half;
  const float sign = p.inverse ? -1.0f : 1.0f;
  for (int step = first_step; step < steps.all; step += steps.lanes) {
    if (step >= steps.turning) {
      const int c = rotated + (step - steps.turning) * (steps.by_packs ? kPack<T> : 1);
      if (steps.by_packs)
        store_pack(y + c, load_pack(x + c));
      else
        y[c] = x[c];
    } else if (p.interleaved) {
      constexpr int n = kPack<T> / 2;
      if (steps.by_packs)
        turn_neighbours<n>(y, x, cos, sin, step * n, sign);
      else
        turn_neighbours<1>(y, x, cos, sin, step, sign);
    } else {
      if (steps.by_packs)
        turn_halves<kPack<T>>(y, x, cos, sin, step * kPack<T>, half, sign);
      else
        turn_halves<1>(y, x, cos, sin, step, half, sign);
    }
  }
}

template <class T, class W>
Steps steps_of(const Rotary& p) {
  const int64_t half = p.rotated / 2, pack = kPack<T>, pairs = p.interleaved ? pack / 2 : pack;
  bool by_packs = aligned16(p.x) && aligned16(p.y) && aligned16(p.cos) && aligned16(p.sin) && half % pairs == 0 &&
                  p.dim % pack == 0 && p.rotated % pack == 0;
  for (int i = 0; i < 3; ++i) by_packs = by_packs && p.x_strides[i] % pack == 0 && p.y_strides[i] % pack == 0;
  Steps steps{};
  steps.by_packs = by_packs;
  steps.turning = static_cast<int>(by_packs ? half / pairs : half);
  steps.all = steps.turning + static_cast<int>((p.dim - p.rotated) / (by_packs ? pack : 1));
  steps.lanes = 1;
  while (steps.lanes < steps.all && steps.lanes < kWarp) steps.lanes *= 2;
  return steps;
}

}  // namespace

Status rotary(const Rotary& p, Launch& launch) {
  const int64_t rows = p.batch * p.heads * p.length;
  if (rows == 0 || p.dim == 0) return {};
  if (rows > 0x7fffffff) return {Status::unsupported_shape, 0, rows};
  if (p.dim > 0x7fffffff) return {Status::unsupported_shape, 0, p.dim};
  return dispatch_dtypes(p.dtype, p.table_dtype, [&](auto t, auto w) -> Status {
    using T = typename decltype(t)::type;
    using W = typename decltype(w)::type;
    const Steps steps = steps_of<T, W>(p);
    const int64_t blocks = ceil_div(rows, kThreads / steps.lanes);
    return launch.run<rotary_kernel<T, W>>(static_cast<unsigned>(blocks), kThreads, 0, p, steps);
  });
}

}  // namespace fastgpt::FASTGPT_ISA
