// cross_entropy, forward and backward; linear_cross_entropy calls the same kernels on each chunk of its logits.
//
//   m = max(x), s = sum(exp(x - m)), lse = m + log(s), q = (1 - e) onehot(target) + e / C
//   loss = (1 - e) (log(s) - (x[target] - m)) + e (log(s) - mean(x - m)) + z lse^2
//   dx = g (exp(x - m) / s (1 + 2 z lse) - q)
//
// Bytes: forward reads x once; backward reads x and writes dx. A forward that also wants dx reads x once and writes dx
// once: it keeps the row's exponentials in a buffer that stays in the second-level cache, and multiplies them when the
// row's sum is known. Flops: one exponential for each element and pass, which costs about as much as the memory traffic
// of the pass, so the two have to overlap.
// m and s are kept, not lse: near 1e4 its rounding would be an error of 5e-4 in every exp(x - lse), and even near 10
// one of 5e-7. What a row computes once is computed in double.
#include "core/aligned.h"
#include "core/math.h"
#include "core/parallel.h"

namespace fastgpt::FASTGPT_ISA {
namespace {

// Elements that the online softmax takes at once; as many are fetched ahead, and both must fit the first-level cache.
constexpr int64_t kBlock = 2048;
// How far a logit may lie above the number that is subtracted from its block: see statistics().
constexpr float kHeadroom = 1.0f;

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

// e^x for x <= kHeadroom. Base 2 without a second part of ln 2: the product's rounding is a relative error of |x| 2^-24
// in e^x, at most 2^-25 of the row's largest weight. The polynomials are those of core/math.h's exp_bounded.
template <Target kFor>
inline Vec exp_below(Vec x) {
  const Vec t = max(splat(-150.0f), x * 1.44269504f);  // NaN stays
#if defined(__AVX512F__)
  const Vec n = (Vec)_mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const float round_to_int = 12582912.0f;  // 1.5 * 2^23
  const Vec n = (t + round_to_int) - round_to_int;
#endif
  const Vec f = t - n;
  Vec p;
  if constexpr (kFor == Target::single) {
    p = splat(0.000153533620f);
    p = p * f + 0.00133988750f;
    p = p * f + 0.00961843692f;
    p = p * f + 0.0555033237f;
    p = p * f + 0.240226477f;
    p = p * f + 0.693147182f;
  } else {
    p = splat(0.00952831530f);
    p = p * f + 0.0557934610f;
    p = p * f + 0.240251105f;
    p = p * f + 0.693147182f;
  }
  return scale_by_power(p * f + 1.0f, n);
}

struct BlockSums {
  float highest;
  double exp, below;  // of e^(x - shift), and with label smoothing of x - shift
};

// Writes e^(x - shift) to `exps` unless that is null.
template <class T, bool kSmooth>
inline BlockSums sum_block(const T* x, const T* bias, int64_t count, float shift, float* exps) {
  Vec highest = splat(-__builtin_inff()), sum = {}, below = {};
  for_each_vector(count, [&](int64_t c, int64_t n) {
    __builtin_prefetch(x + c + kBlock);
    const Vec v = logits(x, bias, c, n);
    highest = max(v, highest);
    const Vec e = exp_below<kTarget<T>>(v - shift);
    sum += e;
    if (kSmooth) below += keep_lanes(v - shift, n);
    if (exps) store(exps + c, e);
  });
  return {max_lane(highest), sum_exactly(sum), kSmooth ? sum_exactly(below) : 0};
}

// One pass, block by block. What is subtracted from a block's logits is the largest logit of some block before it,
// unless one of its own is larger by more than kHeadroom: the block then is done again with that one, so a logit that
// outweighs all others is subtracted from itself exactly. A pass for each block's maximum first would cost a third
// more. With `exps` (the row's length, padded), they are kept there, and what was subtracted from each block in
// `shifts`.
template <class T, bool kSmooth>
RowStatistics statistics(const T* x, const T* bias, int64_t cols, float* exps, float* shifts) {
  const float infinity = __builtin_inff();
  float shift = -infinity, maximum = -infinity;
  double sum_exp = 0, sum_x = 0;
  for (int64_t start = 0; start < cols; start += kBlock) {
    const int64_t count = cols - start < kBlock ? cols - start : kBlock;
    const T* block = x + start;
    const T* block_bias = bias ? bias + start : nullptr;
    float* block_exps = exps ? exps + start : nullptr;
    if (shift == -infinity) {  // nothing but -inf so far
      Vec highest = splat(-infinity);
      for_each_vector(count, [&](int64_t c, int64_t n) { highest = max(logits(block, block_bias, c, n), highest); });
      shift = max_lane(highest);
    }
    // Where all are -inf: exp(-inf - 0) = 0, where -inf - -inf would be NaN. NaN itself stays NaN.
    float subtracted = shift == -infinity ? 0.0f : shift;
    BlockSums sums = sum_block<T, kSmooth>(block, block_bias, count, subtracted, block_exps);
    if (sums.highest > subtracted + kHeadroom) {
      sum_exp *= __builtin_exp(static_cast<double>(shift) - sums.highest);
      shift = subtracted = sums.highest;
      sums = sum_block<T, kSmooth>(block, block_bias, count, subtracted, block_exps);
    }
    if (sums.highest > maximum) maximum = sums.highest;
    sum_exp += sums.exp;
    if (kSmooth) sum_x += sums.below + static_cast<double>(count) * subtracted;
    if (exps) shifts[start / kBlock] = subtracted;
  }
  if (maximum > shift) sum_exp *= __builtin_exp(static_cast<double>(shift) - maximum);
  return {maximum, sum_exp, sum_x / static_cast<double>(cols) - maximum};
}

// What the elements of a row's gradient have in common: dx = of_exp exp(x - m) - of_class, and of_target less at the
// target.
struct RowScales {
  double of_exp, of_class, of_target;
};
template <class Params>
RowScales scales_of(const Params& p, float maximum, double sum_exp, double g) {
  const double lse = maximum + __builtin_log(sum_exp);
  return {g * (1.0 + 2.0 * p.z_loss * lse) / sum_exp, g * p.label_smoothing / static_cast<double>(p.cols),
          g * (1.0 - p.label_smoothing)};
}
template <class T>
inline T gradient_at_target(float x, float maximum, RowScales s) {
  const double exp = __builtin_exp(static_cast<double>(x - maximum));
  return cast<T>(static_cast<float>(exp * s.of_exp - s.of_class - s.of_target));
}

// dx may be x: each vector is read before it is written, and the target's logit before all.
template <class T, class Params>
void gradient_row(const Params& p, T* dx, const T* x, int64_t target, float maximum, double sum_exp, double g) {
  const T* bias = static_cast<const T*>(p.bias);
  const RowScales s = scales_of(p, maximum, sum_exp, g);
  const float at_target = logit(x, bias, target);
  const float scale = static_cast<float>(s.of_exp), offset = static_cast<float>(s.of_class);
  for_each_vector(p.cols, [&](int64_t c, int64_t n) {
    store(dx + c, exp_below<kTarget<T>>(logits(x, bias, c, n) - maximum) * scale - offset, n);
  });
  dx[target] = gradient_at_target<T>(at_target, maximum, s);
}

// The same from the exponentials that statistics() kept.
template <class T>
void gradient_row(const CrossEntropyForward& p, T* dx, const T* x, int64_t target, RowStatistics row, const float* exps,
                  const float* shifts) {
  const RowScales s = scales_of(p, row.maximum, row.sum_exp, *p.scale);
  const float at_target = logit(x, static_cast<const T*>(p.bias), target);
  const float offset = static_cast<float>(s.of_class);
  for (int64_t start = 0; start < p.cols; start += kBlock) {
    const int64_t count = p.cols - start < kBlock ? p.cols - start : kBlock;
    const double from_shift = __builtin_exp(static_cast<double>(shifts[start / kBlock]) - row.maximum);
    const float scale = static_cast<float>(s.of_exp * from_shift);
    for_each_vector(count,
                    [&](int64_t c, int64_t n) { store(dx + start + c, load(exps + start + c) * scale - offset, n); });
  }
  dx[target] = gradient_at_target<T>(at_target, row.maximum, s);
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
  const int64_t blocks = (p.cols + kBlock - 1) / kBlock, kept = p.dx ? blocks * kBlock + blocks : 0;
  bool out_of_memory = false;
  parallel_for(0, p.rows, kGrainElements / p.cols + 1, [&](int64_t begin, int64_t end) {
    AlignedBuffer<float> buffer(kept);
    if (!buffer) return __atomic_store_n(&out_of_memory, true, __ATOMIC_RELAXED);
    float* exps = p.dx ? buffer.data() : nullptr;
    float* shifts = p.dx ? exps + blocks * kBlock : nullptr;
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
      T* dx = p.dx ? static_cast<T*>(p.dx) + row * p.dx_stride : nullptr;
      const int64_t target = p.target[row];
      if (target == p.ignore_index) {
        p.loss[row] = p.maximum[row] = p.sum_exp[row] = 0.0f;
        if (dx) zero_row(dx, p.cols);
        continue;
      }
      const RowStatistics s = statistics<T, kSmooth>(x, bias, p.cols, exps, shifts);
      const double log_sum = __builtin_log(s.sum_exp), lse = s.maximum + log_sum;
      double loss = (1.0 - p.label_smoothing) * (log_sum - (logit(x, bias, target) - s.maximum)) + p.z_loss * lse * lse;
      if (kSmooth) loss += p.label_smoothing * (log_sum - s.mean_below);
      p.loss[row] = static_cast<float>(loss);
      p.maximum[row] = s.maximum;
      p.sum_exp[row] = static_cast<float>(s.sum_exp);
      if (dx) gradient_row(p, dx, x, target, s, exps, shifts);
    }
  });
  if (out_of_memory) return {Status::out_of_memory, 0, kept * 4};
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
