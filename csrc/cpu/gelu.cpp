// gelu of s = x + bias, exact or by the tanh approximation, forward and backward.
//
//   exact: y = s Phi(s),     y' = Phi(s) + s phi(s)                 (normal distribution and density: core/math.h)
//   tanh:  y = s sigmoid(z), y' = p + s p (1 - p) z',  p = sigmoid(z), z = 2 sqrt(2/pi) (s + 0.044715 s^3)
//
// (1 + tanh u) / 2 = sigmoid(2u), so the tanh form needs one exponential and no tanh, and does not cancel for negative
// s. Bytes: forward reads x and writes y, backward reads x and dy and writes dx; everything is recomputed from x. About
// 45 operations an element (exact) or 30 (tanh): close to the balance point of one core, so every operation counts.
#include "core/math.h"
#include "core/parallel.h"
#include "cpu/column_sums.h"

namespace fastgpt::FASTGPT_ISA {
namespace {

// Beyond +-limit the derivative is 0 or 1 to the last bit, and so is y / s; the clamps keep inf * 0 out. NaN passes.
inline Vec clamp_below(Vec s, float limit) { return max(splat(-limit), s); }
inline Vec clamp_both(Vec s, float limit) { return min(splat(limit), clamp_below(s, limit)); }

template <Target kFor>
struct Exact {
  static Vec value(Vec s) { return clamp_below(s, 15.0f) * normal<kFor>(s).cdf; }
  static Vec derivative(Vec s) {
    const Vec bounded = clamp_both(s, 15.0f);
    const Normal n = normal<kFor>(bounded);
    return n.cdf + bounded * n.density;
  }
};

template <Target kFor>
struct Tanh {
  static constexpr float kSlope = 2.0f * 0.797884560802865356f;  // 2 sqrt(2 / pi)
  static constexpr float kCubic = 0.044715f;
  static Vec value(Vec s) {
    const Vec bounded = clamp_below(s, 100.0f);
    return bounded * sigmoid<kFor>(bounded * (kSlope + kSlope * kCubic * (bounded * bounded))).value;
  }
  static Vec derivative(Vec s) {
    const Vec bounded = clamp_both(s, 100.0f), square = bounded * bounded;
    const Sigmoid p = sigmoid<kFor>(bounded * (kSlope + kSlope * kCubic * square));
    const Vec slope = bounded * (kSlope + 3.0f * kSlope * kCubic * square);
    return p.value + p.value * p.complement * slope;
  }
};

template <class Phi, class T, class W>
Status forward(const GeluForward& p) {
  const T* x = static_cast<const T*>(p.x);
  const W* bias = static_cast<const W*>(p.bias);
  T* y = static_cast<T*>(p.y);
  parallel_for_runs(p.rows, p.cols, [&](int64_t row, int64_t col, int64_t count) {
    const int64_t at = row * p.cols + col;
    for_each_vector(count, [&](int64_t i, int64_t n) {
      Vec s = load(x + at + i, n);
      if (bias) s = s + load(bias + col + i, n);
      store(y + at + i, Phi::value(s), n);
    });
  });
  return {};
}

// kRows rows from `row` on: dx, and the rows' sum into dbias. Several rows at once, for dbias is then loaded and stored
// less often, and summing them as a tree first is more accurate.
template <int kRows, class Phi, class T, class W>
void backward_rows(const GeluBackward& p, int64_t row, float* dbias) {
  const W* bias = static_cast<const W*>(p.bias);
  for_each_vector(p.cols, [&](int64_t c, int64_t n) {
    const Vec b = load(bias + c, n);
    Vec v[kRows];
    for (int r = 0; r < kRows; ++r) {
      const int64_t at = (row + r) * p.cols + c;
      v[r] = load(static_cast<const T*>(p.dy) + at, n) * Phi::derivative(load(static_cast<const T*>(p.x) + at, n) + b);
      store(static_cast<T*>(p.dx) + at, v[r], n);
    }
    for (int step = 1; step < kRows; step *= 2)
      for (int r = 0; r + step < kRows; r += 2 * step) v[r] += v[r + step];
    store(dbias + c, load(dbias + c, n) + v[0], n);
  });
}

template <class Phi, class T, class W>
Status backward(const GeluBackward& p) {
  const T* x = static_cast<const T*>(p.x);
  const T* dy = static_cast<const T*>(p.dy);
  T* dx = static_cast<T*>(p.dx);
  if (!p.bias) {
    parallel_for_runs(p.rows, p.cols, [&](int64_t row, int64_t col, int64_t count) {
      const int64_t at = row * p.cols + col;
      for_each_vector(count, [&](int64_t i, int64_t n) {
        store(dx + at + i, load(dy + at + i, n) * Phi::derivative(load(x + at + i, n)), n);
      });
    });
    return {};
  }
  ColumnSums sums(p.rows, p.cols, 1);
  if (const Status status = sums.status(); status.code != Status::ok) return status;
  sums.for_each_piece([&](int64_t first, int64_t last, float* dbias) {
    int64_t row = first;
    for (; row + 4 <= last; row += 4) backward_rows<4, Phi, T, W>(p, row, dbias);
    for (; row < last; ++row) backward_rows<1, Phi, T, W>(p, row, dbias);
  });
  sums.write(0, static_cast<W*>(p.dbias));
  return {};
}

}  // namespace

Status gelu_forward(const GeluForward& p) {
  return dispatch_dtypes(p.dtype, p.bias_dtype, [&](auto t, auto w) {
    using T = typename decltype(t)::type;
    using W = typename decltype(w)::type;
    constexpr Target kFor = kTarget<T>;
    return p.tanh ? forward<Tanh<kFor>, T, W>(p) : forward<Exact<kFor>, T, W>(p);
  });
}

Status gelu_backward(const GeluBackward& p) {
  return dispatch_dtypes(p.dtype, p.bias_dtype, [&](auto t, auto w) {
    using T = typename decltype(t)::type;
    using W = typename decltype(w)::type;
    constexpr Target kFor = kTarget<W>;  // the gradient of a float bias is a float result
    return p.tanh ? backward<Tanh<kFor>, T, W>(p) : backward<Exact<kFor>, T, W>(p);
  });
}

}  // namespace fastgpt::FASTGPT_ISA
