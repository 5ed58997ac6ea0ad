// layer_norm, forward and backward, with the residual addition fused.
//
//   s = x + residual,  mean = sum(s) / C,  var = sum((s - mean)^2) / C,  y = (s - mean) * rstd * w + b
//   with xhat = (s - mean) * rstd and g = dy * w:
//   ds = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum,  dw = sum_rows(dy * xhat),  db = sum_rows(dy)
//
// Bytes: forward reads x (and residual) and writes y (and the sum); the row is read again from cache.
// The variance takes its own pass over the cached row: the one-pass E[x^2] - E[x]^2 cancels for large means.
#include "core/aligned.h"
#include "core/math.h"
#include "core/parallel.h"

namespace fastgpt::FASTGPT_ISA {
namespace {

// A range worth a thread: 16k elements take about 10 us.
constexpr int64_t kGrainElements = 16384;
// Rows whose weight gradient is summed by one thread before the partial sums are added in order. It does not depend
// on the number of threads, so neither do the bits of dweight.
constexpr int64_t kRowsPerPartial = 64;

template <class T, class F>
inline void for_each_vector(int64_t cols, F&& f) {
  int64_t c = 0;
  for (; c + kLanes <= cols; c += kLanes) f(c, static_cast<int64_t>(kLanes));
  if (c < cols) f(c, cols - c);
}

// sum over lanes [0, n) only: dead lanes of a tail must not count.
inline Vec keep_lanes(Vec v, int64_t n) {
  if (n >= kLanes) return v;
  for (int64_t i = n; i < kLanes; ++i) v[i] = 0.0f;
  return v;
}

template <class T, class W>
void forward_row(const LayerNormForward& p, int64_t row, float* s) {
  const int64_t cols = p.cols;
  const T* x = static_cast<const T*>(p.x) + row * cols;
  const T* residual = p.residual ? static_cast<const T*>(p.residual) + row * cols : nullptr;
  T* sum_out = p.sum ? static_cast<T*>(p.sum) + row * cols : nullptr;
  T* y = static_cast<T*>(p.y) + row * cols;
  const W* weight = static_cast<const W*>(p.weight);
  const W* bias = static_cast<const W*>(p.bias);

  Vec total = {};
  for_each_vector<T>(cols, [&](int64_t c, int64_t n) {
    Vec v = load(x + c, n);
    if (residual) {
      v = v + load(residual + c, n);
      store(sum_out + c, v, n);
      v = load(sum_out + c, n);  // normalise what the caller sees: the sum as rounded to its dtype
    }
    store(s + c, v, n);
    total += v;
  });
  const float mean = sum(total) / static_cast<float>(cols);

  Vec squares = {};
  for_each_vector<T>(cols, [&](int64_t c, int64_t n) {
    const Vec d = keep_lanes(load(s + c, n) - mean, n);
    squares += d * d;
  });
  const float variance = sum(squares) / static_cast<float>(cols);
  const float rstd = 1.0f / __builtin_sqrtf(variance + static_cast<float>(p.eps));

  for_each_vector<T>(cols, [&](int64_t c, int64_t n) {
    Vec v = (load(s + c, n) - mean) * rstd;
    if (weight) v = v * load(weight + c, n);
    if (bias) v = v + load(bias + c, n);
    store(y + c, v, n);
  });
  p.mean[row] = mean;
  p.rstd[row] = rstd;
}

// Writes one row of dx and adds the row's part of dweight and dbias.
template <class T, class W>
void backward_row(const LayerNormBackward& p, int64_t row, float* dweight, float* dbias) {
  const int64_t cols = p.cols;
  const T* x = static_cast<const T*>(p.x) + row * cols;
  const T* dy = static_cast<const T*>(p.dy) + row * cols;
  const T* dsum = p.dsum ? static_cast<const T*>(p.dsum) + row * cols : nullptr;
  T* dx = static_cast<T*>(p.dx) + row * cols;
  const W* weight = static_cast<const W*>(p.weight);
  const float mean = p.mean[row], rstd = p.rstd[row];

  Vec sum_g = {}, sum_gx = {};
  for_each_vector<T>(cols, [&](int64_t c, int64_t n) {
    const Vec d = load(dy + c, n);  // zero in dead lanes, and so is every product below
    const Vec xhat = (load(x + c, n) - mean) * rstd;
    const Vec g = weight ? d * load(weight + c, n) : d;
    sum_g += g;
    sum_gx += g * xhat;
    if (dweight) store(dweight + c, load(dweight + c, n) + d * xhat, n);
    if (dbias) store(dbias + c, load(dbias + c, n) + d, n);
  });
  const float mean_g = sum(sum_g) / static_cast<float>(cols);
  const float mean_gx = sum(sum_gx) / static_cast<float>(cols);

  for_each_vector<T>(cols, [&](int64_t c, int64_t n) {
    const Vec d = load(dy + c, n);
    const Vec xhat = (load(x + c, n) - mean) * rstd;
    const Vec g = weight ? d * load(weight + c, n) : d;
    Vec v = (g - mean_g - xhat * mean_gx) * rstd;
    if (dsum) v = v + load(dsum + c, n);
    store(dx + c, v, n);
  });
}

template <class W>
void add_partials(W* out, const float* partials, int64_t count, int64_t cols) {
  for_each_vector<W>(cols, [&](int64_t c, int64_t n) {
    Vec total = {};
    for (int64_t i = 0; i < count; ++i) total += load(partials + i * cols + c, n);
    store(out + c, total, n);
  });
}

template <class T, class W>
Status forward(const LayerNormForward& p) {
  const int64_t grain = kGrainElements / p.cols + 1;
  const int64_t pieces = (p.rows + grain - 1) / grain;
  AlignedBuffer<float> scratch(pieces * p.cols);
  if (!scratch) return {Status::out_of_memory, 0, pieces * p.cols * 4};
  parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece)
      for (int64_t row = piece * grain; row < (piece + 1) * grain && row < p.rows; ++row)
        forward_row<T, W>(p, row, scratch.data() + piece * p.cols);
  });
  return {};
}

template <class T, class W>
Status backward(const LayerNormBackward& p) {
  const int64_t count = (p.rows + kRowsPerPartial - 1) / kRowsPerPartial;
  const int64_t kinds = (p.dweight ? 1 : 0) + (p.dbias ? 1 : 0);
  AlignedBuffer<float> partials(kinds * count * p.cols);
  if (!partials) return {Status::out_of_memory, 0, kinds * count * p.cols * 4};
  float* dweight = p.dweight ? partials.data() : nullptr;
  float* dbias = p.dbias ? partials.data() + (kinds - 1) * count * p.cols : nullptr;
  parallel_for(0, count, kGrainElements / (kRowsPerPartial * p.cols) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* dw = dweight ? dweight + i * p.cols : nullptr;
      float* db = dbias ? dbias + i * p.cols : nullptr;
      if (dw) std::memset(dw, 0, static_cast<size_t>(p.cols) * 4);
      if (db) std::memset(db, 0, static_cast<size_t>(p.cols) * 4);
      for (int64_t row = i * kRowsPerPartial; row < (i + 1) * kRowsPerPartial && row < p.rows; ++row)
        backward_row<T, W>(p, row, dw, db);
    }
  });
  if (dweight) add_partials(static_cast<W*>(p.dweight), dweight, count, p.cols);
  if (dbias) add_partials(static_cast<W*>(p.dbias), dbias, count, p.cols);
  return {};
}

}  // namespace

Status layer_norm_forward(const LayerNormForward& p) {
  return dispatch_dtype(p.dtype, [&](auto t) {
    return dispatch_dtype(p.weight_dtype,
                          [&](auto w) { return forward<typename decltype(t)::type, typename decltype(w)::type>(p); });
  });
}

Status layer_norm_backward(const LayerNormBackward& p) {
  return dispatch_dtype(p.dtype, [&](auto t) {
    return dispatch_dtype(p.weight_dtype,
                          [&](auto w) { return backward<typename decltype(t)::type, typename decltype(w)::type>(p); });
  });
}

}  // namespace fastgpt::FASTGPT_ISA
