// What layer_norm and rms_norm share: layer_norm is rms_norm of centred rows (kCentred), plus a bias.
//
// Bytes: forward reads x (and residual) and writes y (and the sum); backward reads dy, x (and dsum) and writes dx. Each
// row comes from memory once: the later passes find it in the caches, even the widest (64k floats are 256 KB).
#pragma once

#include "core/parallel.h"
#include "core/simd.h"
#include "cpu/column_sums.h"

namespace fastgpt::FASTGPT_ISA {

template <bool kCentred, class T, class W, class P>
void norm_forward_row(const P& p, int64_t row) {
  const int64_t cols = p.cols;
  const float per_column = 1.0f / static_cast<float>(cols);
  const T* x = static_cast<const T*>(p.x) + row * cols;
  const T* residual = p.residual ? static_cast<const T*>(p.residual) + row * cols : nullptr;
  T* sum_out = p.sum ? static_cast<T*>(p.sum) + row * cols : nullptr;
  T* y = static_cast<T*>(p.y) + row * cols;
  const T* s = residual ? sum_out : x;  // what is normalised: the sum as rounded to its dtype, as the caller sees it
  const W* weight = static_cast<const W*>(p.weight);

  // The first pass also adds the residual: f(s) is summed.
  const auto first_pass = [&](auto&& f) {
    if (!residual) return sum_vectors(cols, [&](int64_t c, int64_t n) { return f(load(x + c, n)); });
    return sum_vectors(cols, [&](int64_t c, int64_t n) {
      store(sum_out + c, load(x + c, n) + load(residual + c, n), n);
      return f(load(sum_out + c, n));
    });
  };

  if constexpr (kCentred) {
    const float mean = first_pass([](Vec v) { return v; }) * per_column;
    // The variance takes a pass of its own: E[s^2] - E[s]^2 in one pass cancels when the mean is large.
    const float variance = per_column * sum_vectors(cols, [&](int64_t c, int64_t n) {
                             const Vec d = load(s + c, n) - mean;
                             return d * d;
                           });
    const float rstd = 1.0f / __builtin_sqrtf(variance + static_cast<float>(p.eps));
    const W* bias = static_cast<const W*>(p.bias);
    for_each_vector(cols, [&](int64_t c, int64_t n) {
      Vec v = (load(s + c, n) - mean) * rstd;
      if (weight) v = v * load(weight + c, n);
      if (bias) v = v + load(bias + c, n);
      store(y + c, v, n);
    });
    p.mean[row] = mean;
    p.rstd[row] = rstd;
  } else {
    const float square = first_pass([](Vec v) { return v * v; }) * per_column;
    const float rstd = 1.0f / __builtin_sqrtf(square + static_cast<float>(p.eps));
    for_each_vector(cols, [&](int64_t c, int64_t n) {
      Vec v = load(s + c, n) * rstd;
      if (weight) v = v * load(weight + c, n);
      store(y + c, v, n);
    });
    p.rstd[row] = rstd;
  }
}

template <bool kCentred, class T, class W, class P>
Status norm_forward(const P& p) {
  parallel_for(0, p.rows, kGrainElements / p.cols + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) norm_forward_row<kCentred, T, W>(p, row);
  });
  return {};
}

// Writes one row of dx and adds the row's part of dweight and dbias (either may be null).
template <bool kCentred, class T, class W, class P>
void norm_backward_row(const P& p, int64_t row, float* dweight, float* dbias) {
  const int64_t cols = p.cols;
  const float per_column = 1.0f / static_cast<float>(cols);
  const T* x = static_cast<const T*>(p.x) + row * cols;
  const T* dy = static_cast<const T*>(p.dy) + row * cols;
  const T* dsum = p.dsum ? static_cast<const T*>(p.dsum) + row * cols : nullptr;
  T* dx = static_cast<T*>(p.dx) + row * cols;
  const W* weight = static_cast<const W*>(p.weight);
  const float rstd = p.rstd[row];
  float mean = 0.0f;
  if constexpr (kCentred) mean = p.mean[row];

  const auto gradient = [&](Vec d, int64_t c, int64_t n) { return weight ? d * load(weight + c, n) : d; };
  const auto normalised = [&](int64_t c, int64_t n) { return (load(x + c, n) - mean) * rstd; };

  Vec sum_g = {};  // dead lanes of dy load as zero, and so are the products
  const float mean_gx = per_column * sum_vectors(cols, [&](int64_t c, int64_t n) {
                          const Vec g = gradient(load(dy + c, n), c, n);
                          if constexpr (kCentred) sum_g += g;
                          return g * normalised(c, n);
                        });
  const float mean_g = per_column * sum(sum_g);

  for_each_vector(cols, [&](int64_t c, int64_t n) {
    const Vec d = load(dy + c, n), xhat = normalised(c, n);
    if (dweight) store(dweight + c, load(dweight + c, n) + d * xhat, n);
    if constexpr (kCentred)
      if (dbias) store(dbias + c, load(dbias + c, n) + d, n);
    Vec v = gradient(d, c, n) - xhat * mean_gx;
    if constexpr (kCentred) v = v - mean_g;
    v = v * rstd;
    if (dsum) v = v + load(dsum + c, n);
    store(dx + c, v, n);
  });
}

template <bool kCentred, class T, class W, class P>
Status norm_backward(const P& p) {
  W* dweight = static_cast<W*>(p.dweight);
  W* dbias = nullptr;
  if constexpr (kCentred) dbias = static_cast<W*>(p.dbias);
  ColumnSums sums(p.rows, p.cols, (dweight ? 1 : 0) + (dbias ? 1 : 0));
  if (const Status status = sums.status(); status.code != Status::ok) return status;
  sums.for_each_piece([&](int64_t first, int64_t last, float* partial) {
    float* dw = dweight ? partial : nullptr;
    float* db = dbias ? partial + (dweight ? p.cols : 0) : nullptr;
    for (int64_t row = first; row < last; ++row) norm_backward_row<kCentred, T, W>(p, row, dw, db);
  });
  if (dweight) sums.write(0, dweight);
  if (dbias) sums.write(dweight ? 1 : 0, dbias);
  return {};
}

}  // namespace fastgpt::FASTGPT_ISA
