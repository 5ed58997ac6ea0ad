// cross_entropy, forward and backward; linear_cross_entropy calls the same kernels on each chunk of its logits.
//
//   m = max(x), s = sum(exp(x - m)), lse = m + log(s), q = (1 - e) onehot(target) + e / C
//   loss = (1 - e) (log(s) - (x[target] - m)) + e (log(s) - mean(x - m)) + z lse^2
//   dx = g (exp(x - m) / s (1 + 2 z lse) - q)
//
// Bytes: forward reads x once; backward reads x and writes dx. A forward that also wants dx (linear_cross_entropy)
// reads the row again while it is in cache. Flops: one exponential for each element and pass, which costs about as much
// as the memory traffic of the pass, so the two have to overlap.
// m and s are kept, not lse: near 1e4 its rounding would be an error of 5e-4 in every exp(x - lse), and even near 10
// one of 5e-7. What a row computes once is computed in double.
#include "core/aligned.h"
#include "core/math.h"
#include "core/parallel.h"

namespace fastgpt::FASTGPT_ISA {
namespace {

// Elements that the online softmax takes at once: they are read twice (maximum, exponentials), so they and what is
// fetched ahead must fit the first-level cache.
constexpr int64_t kBlock = 2048;

struct RowStatistics {
  float maximum;
  double sum_exp;
  double mean_below;  // mean(x - maximum); only with label smoothing
};

template <class T>
inline Vec logits(const T* x, const T* bias, int64_t c, int64_t n) {
  const Vec v = load(x + c, n, -__builtin_inff());
  return bias ? v + load(bias + c, n) : v;
}

template <class T>
inline float logit(const T* x, const T* bias, int64_t c) {
  return to_float(x[c]) + (bias ? to_float(bias[c]) : 0.0f);
}

// Adds the lanes without rounding again: where one class has nearly all the weight, the loss is what is left beside 1.
inline double sum_exactly(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  double parts[4] = {};
  for (int i = 0; i < kLanes; ++i) parts[i % 4] += lanes[i];
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

// One pass over memory, block by block: the block's maximum first, then its exponentials relative to the running
// maximum while the next block is on its way from memory.
template <class T, bool kSmooth>
RowStatistics statistics(const T* x, const T* bias, int64_t cols) {
  const float infinity = __builtin_inff();
  float maximum = -infinity;
  double sum_exp = 0, sum_x = 0;
  for (int64_t start = 0; start < cols; start += kBlock) {
    const int64_t count = cols - start < kBlock ? cols - start : kBlock;
    const T* block = x + start;
    const T* block_bias = bias ? bias + start : nullptr;

    Vec highest = splat(-infinity);
    for_each_vector(count, [&](int64_t c, int64_t n) { highest = max(logits(block, block_bias, c, n), highest); });
    const float block_maximum = max_lane(highest);
    if (block_maximum > maximum) {
      sum_exp *= __builtin_exp(static_cast<double>(maximum) - block_maximum);
      maximum = block_maximum;
    }
    // Logits that are all -inf so far: exp(-inf - 0) = 0, where -inf - -inf would be NaN. NaN itself stays NaN.
    const float shift = maximum == -infinity ? 0.0f : maximum;
    Vec exps = {}, below = {};
    for_each_vector(count, [&](int64_t c, int64_t n) {
      __builtin_prefetch(block + c + kBlock);
      const Vec v = logits(block, block_bias, c, n) - shift;
      exps += exp(v);
      if (kSmooth) below += keep_lanes(v, n);
    });
    sum_exp += sum_exactly(exps);
    if (kSmooth) sum_x += sum_exactly(below) + static_cast<double>(count) * shift;
  }
  return {maximum, sum_exp, sum_x / static_cast<double>(cols) - maximum};
}

// dx may be x: each vector is read before it is written, and the target's logit before all.
template <class T, class Params>
void gradient_row(const Params& p, T* dx, const T* x, int64_t target, float maximum, double sum_exp, double g) {
  const T* bias = static_cast<const T*>(p.bias);
  const double lse = maximum + __builtin_log(sum_exp);
  const double of_exp = g * (1.0 + 2.0 * p.z_loss * lse) / sum_exp;
  const double of_class = g * p.label_smoothing / static_cast<double>(p.cols);
  const double of_target = g * (1.0 - p.label_smoothing);
  const float at_target = logit(x, bias, target);

  const float scale = static_cast<float>(of_exp), offset = static_cast<float>(of_class);
  for_each_vector(
      p.cols, [&](int64_t c, int64_t n) { store(dx + c, exp(logits(x, bias, c, n) - maximum) * scale - offset, n); });
  const double exp_target = exp(splat(at_target - maximum))[0];
  dx[target] = cast<T>(static_cast<float>(exp_target * of_exp - of_class - of_target));
}

template <class T>
void zero_row(T* dx, int64_t cols) {
  std::memset(static_cast<void*>(dx), 0, static_cast<size_t>(cols) * sizeof(T));
}

template <class T, bool kSmooth>
Status forward(const CrossEntropyForward& p) {
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t target = p.target[row];
    if (target != p.ignore_index && (target < 0 || target >= p.cols)) return {Status::bad_index, row, target};
  }
  const T* bias = static_cast<const T*>(p.bias);
  parallel_for(0, p.rows, kGrainElements / p.cols + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
      T* dx = p.dx ? static_cast<T*>(p.dx) + row * p.dx_stride : nullptr;
      const int64_t target = p.target[row];
      if (target == p.ignore_index) {
        p.loss[row] = p.maximum[row] = p.sum_exp[row] = 0.0f;
        if (dx) zero_row(dx, p.cols);
        continue;
      }
      const RowStatistics s = statistics<T, kSmooth>(x, bias, p.cols);
      const double log_sum = __builtin_log(s.sum_exp), lse = s.maximum + log_sum;
      double loss = (1.0 - p.label_smoothing) * (log_sum - (logit(x, bias, target) - s.maximum)) + p.z_loss * lse * lse;
      if (kSmooth) loss += p.label_smoothing * (log_sum - s.mean_below);
      p.loss[row] = static_cast<float>(loss);
      p.maximum[row] = s.maximum;
      p.sum_exp[row] = static_cast<float>(s.sum_exp);
      if (dx) gradient_row(p, dx, x, target, s.maximum, s.sum_exp, *p.scale);
    }
  });
  for (int64_t row = 0; row < p.rows; ++row) {
    if (p.target[row] == p.ignore_index) continue;
    p.totals[0] += p.loss[row];
    p.totals[1] += 1;
  }
  return {};
}

template <class T>
Status backward(const CrossEntropyBackward& p) {
  parallel_for(0, p.rows, kGrainElements / p.cols + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
      T* dx = static_cast<T*>(p.dx) + row * p.dx_stride;
      const int64_t target = p.target[row];
      if (target == p.ignore_index)
        zero_row(dx, p.cols);
      else
        gradient_row(p, dx, x, target, p.maximum[row], p.sum_exp[row], p.scale[row * p.scale_stride]);
    }
  });
  return {};
}

}  // namespace

Status cross_entropy_forward(const CrossEntropyForward& p) {
  return dispatch_dtype(p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return p.label_smoothing > 0 ? forward<T, true>(p) : forward<T, false>(p);
  });
}

Status cross_entropy_backward(const CrossEntropyBackward& p) {
  return dispatch_dtype(p.dtype, [&](auto t) { return backward<typename decltype(t)::type>(p); });
}

}  // namespace fastgpt::FASTGPT_ISA
