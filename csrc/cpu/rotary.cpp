// rotary: each pair (x1, x2) of a head's first R dims is turned by the angle of its position.
//
//   y1 = x1 cos - x2 sin,  y2 = x2 cos + x1 sin;  inverse (the gradient): sin -> -sin
//   pairs are (i, i + R/2), or (2i, 2i + 1) when interleaved; dims from R on are copied
//
// Bytes: reads x and writes y once; the rows of the tables stay in the first-level cache over the heads.
// 6 flops a pair: memory decides. The strides of x and y are free, so (B, T, H, D) is read and (B, H, T, D) written in
// the same pass: the transposition that attention wants costs nothing, either way.
#include "core/parallel.h"
#include "core/simd.h"

namespace fastgpt::FASTGPT_ISA {
namespace {

// A range worth a thread: 16k elements take about 10 us.
constexpr int64_t kGrainElements = 16384;
// Positions that one piece of work takes for all heads: x is read in long runs whichever of T and H is outer in memory.
constexpr int64_t kPositions = 16;

// The elements `index` of a followed by b.
inline Vec shuffle(Vec a, Vec b, VecI index) {
#if defined(__clang__)
  Vec out;
  for (int i = 0; i < kLanes; ++i) out[i] = index[i] < kLanes ? a[index[i]] : b[index[i] - kLanes];
  return out;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

struct Pair {
  Vec first, second;
};

inline Pair rotate(Pair x, Vec cos, Vec sin) {
  return {x.first * cos - x.second * sin, x.second * cos + x.first * sin};
}

// a b = (x0 x1 ... ) -> (x0 x2 ...), (x1 x3 ...)
inline Pair deinterleave(Vec a, Vec b) {
  VecI even;
  for (int i = 0; i < kLanes; ++i) even[i] = 2 * i;
  return {shuffle(a, b, even), shuffle(a, b, even + 1)};
}

inline Pair interleave(Pair p) {
  VecI low;
  for (int i = 0; i < kLanes; ++i) low[i] = i / 2 + i % 2 * kLanes;
  return {shuffle(p.first, p.second, low), shuffle(p.first, p.second, low + kLanes / 2)};
}

template <bool interleaved, class T, class W>
inline void rotate_row(const Rotary& p, const T* x, T* y, const W* cos, const W* sin, float sign) {
  const int64_t half = p.rotated / 2;
  for_each_vector(half, [&](int64_t i, int64_t n) {
    const Vec c = load(cos + i, n), s = load(sin + i, n) * sign;
    if constexpr (interleaved) {
      const int64_t in_second = 2 * n - kLanes;  // elements beyond the first vector
      const Vec second = in_second > 0 ? load(x + 2 * i + kLanes, in_second) : Vec{};
      const Pair turned = interleave(rotate(deinterleave(load(x + 2 * i, 2 * n), second), c, s));
      store(y + 2 * i, turned.first, 2 * n);
      if (in_second > 0) store(y + 2 * i + kLanes, turned.second, in_second);
    } else {
      const Pair turned = rotate({load(x + i, n), load(x + half + i, n)}, c, s);
      store(y + i, turned.first, n);
      store(y + half + i, turned.second, n);
    }
  });
  if (p.dim > p.rotated) std::memcpy(y + p.rotated, x + p.rotated, static_cast<size_t>(p.dim - p.rotated) * sizeof(T));
}

template <class T, class W>
Status run(const Rotary& p) {
  for (int64_t b = 0; p.starts && b < p.batch; ++b)
    if (p.starts[b] < 0 || p.starts[b] + p.length > p.max_len) return {Status::bad_index, b, p.starts[b]};
  const T* x = static_cast<const T*>(p.x);
  T* y = static_cast<T*>(p.y);
  const W* cos = static_cast<const W*>(p.cos);
  const W* sin = static_cast<const W*>(p.sin);
  const float sign = p.inverse ? -1.0f : 1.0f;
  const int64_t blocks = (p.length + kPositions - 1) / kPositions;
  const int64_t positions = p.length < kPositions ? p.length : kPositions;
  const int64_t grain = kGrainElements / (positions * p.heads * p.dim + 1) + 1;
  const bool heads_inner = p.x_strides[1] < p.x_strides[2];

  parallel_for(0, p.batch * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t b = block / blocks, first = block % blocks * kPositions;
      const int64_t last = first + kPositions < p.length ? first + kPositions : p.length;
      const int64_t start = p.starts ? p.starts[b] : p.start;
      auto row = [&](int64_t h, int64_t t) {
        const int64_t at = (start + t) * (p.rotated / 2);
        const T* in = x + b * p.x_strides[0] + h * p.x_strides[1] + t * p.x_strides[2];
        T* out = y + b * p.y_strides[0] + h * p.y_strides[1] + t * p.y_strides[2];
        if (p.interleaved)
          rotate_row<true>(p, in, out, cos + at, sin + at, sign);
        else
          rotate_row<false>(p, in, out, cos + at, sin + at, sign);
      };
      if (heads_inner) {
        for (int64_t t = first; t < last; ++t)
          for (int64_t h = 0; h < p.heads; ++h) row(h, t);
      } else {
        for (int64_t h = 0; h < p.heads; ++h)
          for (int64_t t = first; t < last; ++t) row(h, t);
      }
    }
  });
  return {};
}

}  // namespace

Status rotary(const Rotary& p) {
  return dispatch_dtype(p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return p.table_dtype == DType::f32 ? run<T, float>(p) : run<T, T>(p);
  });
}

}  // namespace fastgpt::FASTGPT_ISA
