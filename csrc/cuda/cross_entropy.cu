// cross_entropy, forward and backward, on rows of C logits; linear_cross_entropy calls both on chunks of its logits.
//
//   m = max(x), s = sum(exp(x - m)), lse = m + log(s), q = (1 - e) onehot(target) + e / C
//   loss = (1 - e) (log(s) - (x[target] - m)) + e (log(s) - mean(x - m)) + z lse^2
//   dx = g (exp(x - m) / s (1 + 2 z lse) - q)
//
// Bytes: forward reads x once; backward reads x and writes dx. A forward that also wants dx reads the row again, from
// L2 when the rows in flight fit there (264 rows of 50257 bfloat16 on an H100 are 27 MB). About 6 instructions an
// element and pass, one of them an exponential: memory decides.
//
// One block a row, so that it stays together in L2 between the two passes; 512 threads, or 128 for a row that 512 would
// finish in a step. Each thread keeps a maximum of its own and its sum relative to that: no barrier until the row's
// end. Rows start anywhere (C = 50257 is odd): what lies before the first and after the last 16-byte boundary goes one
// element a thread.
//
// Sums of a thread are in float (some 200 terms), across threads in double, and what a row computes once is double in
// one thread: as on the CPU, where one class has nearly all the weight, the loss is what is left beside 1. m and s are
// kept, not lse, see csrc/cpu/cross_entropy.cpp.
//
// A target outside [0, C) cannot be an exception without waiting for the device: its row's loss and gradient are NaN.
#include "cuda/core/launch.h"
#include "cuda/core/ptx.cuh"
#include "cuda/core/reduce.cuh"
#include "cuda/core/vector.cuh"

namespace fastgpt::FASTGPT_ISA {
namespace {

constexpr int kWide = 512, kNarrow = 128;
constexpr int64_t kNarrowBytes = 16384;  // rows up to here go to narrow blocks: 8 steps of 16 bytes a thread
constexpr int kTotalThreads = 1024;
constexpr int kResident = 1536;  // threads of an SM that must find room: all that an sm_89 or sm_120 has

// e^x for x <= 0. For the 16-bit types one multiplication before ex2 is enough: its error, |x| 2^-24 of the result, is
// far below the rounding of what is stored.
template <class T>
__device__ inline float exp_below(float x) {
  if constexpr (sizeof(T) == 2)
    return ptx::exp2(x * 1.44269504088896341f);
  else
    return expf(x);
}

// 1 / x to 2^-46 by Newton's step from float's; a division of doubles is a subroutine that would cost registers.
__device__ inline double inverse(double x) {
  const double rough = 1.0f / static_cast<float>(x);
  return rough * (2.0 - x * rough);
}

template <class T>
__device__ inline float logit(const T* x, const T* bias, int c) {
  return to_float(x[c]) + (bias ? to_float(bias[c]) : 0.0f);
}

// v are the logits of classes c and following without their bias.
template <class T>
__device__ inline void add_bias(float (&v)[kPack<T>], const T* bias, bool by_packs, int c) {
  if (!bias) return;
  if (by_packs) {
    const Pack<T> b = load_pack(bias + c);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) v[i] += b.get(i);
  } else {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) v[i] += to_float(bias[c + i]);
  }
}

// Bytes of p's distance from the last 16-byte boundary.
__device__ inline int past_boundary(const void* p) { return static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16); }

// Bytes `from` to `from` + 15 of a followed by b. `from` is the same for all threads, and known only at run time:
// selections keep the words in registers.
__device__ inline uint4 straddling(uint4 a, uint4 b, int from) {
  const bool two = from & 8, one = from & 4;
  const uint32_t w0 = two ? a.z : a.x, w1 = two ? a.w : a.y, w2 = two ? b.x : a.z, w3 = two ? b.y : a.w;
  const uint32_t w4 = two ? b.z : b.x, w5 = two ? b.w : b.y;
  const uint32_t v0 = one ? w1 : w0, v1 = one ? w2 : w1, v2 = one ? w3 : w2, v3 = one ? w4 : w3, v4 = one ? w5 : w4;
  const int bits = from % 4 * 8;
  const auto join = [bits](uint32_t low, uint32_t high) {
    return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> bits);
  };
  return {join(v0, v1), join(v1, v2), join(v2, v3), join(v3, v4)};
}

// Elements c .. c + kPack<T> - 1 of a row of `cols`, wherever it lies; reads nothing outside the row.
template <class T>
__device__ inline Pack<T> load_anywhere(const T* x, int c, int cols) {
  const int past = past_boundary(x), back = past / static_cast<int>(sizeof(T));
  if (past == 0) return load_pack(x + c);
  if (c >= back && c - back + 2 * kPack<T> <= cols)
    return {straddling(load16(x + c - back), load16(x + c - back + kPack<T>), past)};
  float v[kPack<T>];
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) v[i] = to_float(x[c + i]);
  Pack<T> pack;
  pack.from_floats(v);
  return pack;
}

// Calls f(v) with the logits of this thread: 16 bytes of them, or a single one. The same ones wherever the row lies.
template <int kThreads, class T, class F>
__device__ inline void for_each_logits(const T* x, const T* bias, int cols, F&& f) {
  const int thread = threadIdx.x, packs = cols / kPack<T>;
  const bool bias_packs = aligned16(bias);
  for (int i = thread; i < packs; i += 2 * kThreads) {  // two on their way at a time
    const bool two = i + kThreads < packs;
    const int first = i * kPack<T>, second = two ? first + kThreads * kPack<T> : first;
    const Pack<T> a = load_anywhere(x, first, cols), b = load_anywhere(x, second, cols);
    float v[kPack<T>];
    a.to_floats(v);
    add_bias(v, bias, bias_packs, first);
    f(v);
    if (!two) continue;
    b.to_floats(v);
    add_bias(v, bias, bias_packs, second);
    f(v);
  }
  if (const int c = packs * kPack<T> + thread; c < cols) {
    float v[1] = {logit(x, bias, c)};
    f(v);
  }
}

// A part of a row: `sum` is relative to `maximum`.
struct Part {
  float maximum = -__builtin_inff(), sum = 0;
  double sum_x = 0;  // of the logits; only with label smoothing
};

template <class T, int n>
__device__ inline void add(Part& part, const float (&v)[n], bool smooth) {
  float highest = v[0];
#pragma unroll
  for (int i = 1; i < n; ++i) highest = fmaxf(highest, v[i]);
  if (highest > part.maximum) {
    part.sum *= exp_below<T>(part.maximum - highest);
    part.maximum = highest;
  }
  // Logits that are all -inf so far: exp(-inf - 0) = 0, where -inf - -inf would be NaN. NaN itself stays NaN.
  const float shift = part.maximum == -__builtin_inff() ? 0.0f : part.maximum;
  float exps = 0, below = 0;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    exps += exp_below<T>(v[i] - shift);
    below += v[i] - shift;
  }
  part.sum += exps;
  if (smooth) part.sum_x += static_cast<double>(below) + static_cast<double>(n) * shift;
}

// What thread 0 tells the others of a row's gradient: dx = exp(x - maximum) * scale - offset, but at the target.
struct Gradient {
  float maximum, scale, offset;
};

template <int kThreads, class T>
__device__ inline void fill_row(T* dx, int cols, float value) {
  const T filler = cast<T>(value);
  for (int c = threadIdx.x; c < cols; c += kThreads) dx[c] = filler;
}

// dx may be x: a thread reads its elements before it writes them, and thread 0 reads the target's logit before all.
template <int kThreads, class T, class Params>
__device__ inline void gradient_row(const Params& p, T* dx, const T* x, int target, float maximum, double sum_exp,
                                    double g) {
  FASTGPT_SHARED(Gradient, shared, 1);
  const T* bias = static_cast<const T*>(p.bias);
  const int cols = static_cast<int>(p.cols);
  T at_target{};
  if (threadIdx.x == 0) {
    const double lse = p.z_loss > 0 ? maximum + log(sum_exp) : 0.0;
    const double of_exp = g * (1.0 + 2.0 * p.z_loss * lse) * inverse(sum_exp);
    const double of_class = g * p.label_smoothing * inverse(static_cast<double>(p.cols));
    const double exp_target = expf(logit(x, bias, target) - maximum);
    at_target = cast<T>(static_cast<float>(exp_target * of_exp - of_class - g * (1.0 - p.label_smoothing)));
    shared[0] = {maximum, static_cast<float>(of_exp), static_cast<float>(of_class)};
  }
  __syncthreads();
  const Gradient gradient = shared[0];
  const auto at = [&](float v) { return fmaf(exp_below<T>(v - gradient.maximum), gradient.scale, -gradient.offset); };
  const int past = past_boundary(x) / static_cast<int>(sizeof(T));
  const int head = min(cols, past ? kPack<T> - past : 0);
  const int packs = (cols - head) / kPack<T>, tail = head + packs * kPack<T>;
  const bool dx_packs = aligned16(dx + head), bias_packs = aligned16(bias + head);
  const auto turn = [&](const Pack<T>& logits, int c) {
    float v[kPack<T>];
    logits.to_floats(v);
    add_bias(v, bias, bias_packs, c);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) v[i] = at(v[i]);
    if (dx_packs) {
      Pack<T> pack;
      pack.from_floats(v);
      store_pack(dx + c, pack);
    } else {
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) dx[c + i] = cast<T>(v[i]);
    }
  };
  for (int i = threadIdx.x; i < packs; i += 2 * kThreads) {  // two on their way at a time
    const bool two = i + kThreads < packs;
    const int first = head + i * kPack<T>, second = two ? first + kThreads * kPack<T> : first;
    const Pack<T> a = load_pack(x + first), b = load_pack(x + second);
    turn(a, first);
    if (two) turn(b, second);
  }
  const int thread = threadIdx.x;
  if (const int edge = thread < head ? thread : tail + thread - head; edge < cols)
    dx[edge] = cast<T>(at(logit(x, bias, edge)));
  __syncthreads();  // another thread has written the target's place
  if (threadIdx.x == 0) dx[target] = at_target;
}

// Whether the row has no gradient to compute: it is ignored (zeros), or its target is out of range (NaN).
template <int kThreads, class T, class Params>
__device__ inline bool without_gradient(const Params& p, int64_t target, T* dx) {
  const bool ignored = target == p.ignore_index, bad = target < 0 || target >= p.cols;
  if (!ignored && !bad) return false;
  if (dx) fill_row<kThreads>(dx, static_cast<int>(p.cols), ignored ? 0.0f : __builtin_nanf(""));
  return true;
}

template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads, kResident / kThreads)
    cross_entropy_forward_kernel(const CrossEntropyForward p) {
  const int64_t row = blockIdx.x, target = p.target[row];
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  T* dx = p.dx ? static_cast<T*>(p.dx) + row * p.dx_stride : nullptr;
  if (without_gradient<kThreads>(p, target, dx)) {
    if (threadIdx.x == 0)
      p.loss[row] = p.maximum[row] = p.sum_exp[row] = target == p.ignore_index ? 0.0f : __builtin_nanf("");
    return;
  }
  const T* bias = static_cast<const T*>(p.bias);
  const bool smooth = p.label_smoothing > 0;
  Part part;
  for_each_logits<kThreads>(x, bias, static_cast<int>(p.cols), [&](const auto& v) { add<T>(part, v, smooth); });

  constexpr int kWarps = kThreads / kWarp;
  const float maximum = block_max<kWarps>(part.maximum);
  const float shift = maximum == -__builtin_inff() ? 0.0f : maximum;
  const double sum_exp = block_sum<kWarps>(static_cast<double>(part.sum) * expf(part.maximum - shift));
  const double sum_x = smooth ? block_sum<kWarps>(part.sum_x) : 0.0;
  if (threadIdx.x == 0) {
    const double log_sum = log(sum_exp), lse = maximum + log_sum, e = p.label_smoothing;
    const float at_target = logit(x, bias, static_cast<int>(target));
    double loss = (1.0 - e) * (log_sum - (at_target - maximum)) + p.z_loss * lse * lse;
    if (smooth) loss += e * (log_sum - (sum_x * inverse(static_cast<double>(p.cols)) - maximum));
    p.loss[row] = static_cast<float>(loss);
    p.maximum[row] = maximum;
    p.sum_exp[row] = static_cast<float>(sum_exp);
  }
  if (dx) gradient_row<kThreads>(p, dx, x, static_cast<int>(target), maximum, sum_exp, *p.scale);
}

template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads, kResident / kThreads)
    cross_entropy_backward_kernel(const CrossEntropyBackward p) {
  const int64_t row = blockIdx.x, target = p.target[row];
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  T* dx = static_cast<T*>(p.dx) + row * p.dx_stride;
  if (without_gradient<kThreads>(p, target, dx)) return;
  gradient_row<kThreads>(p, dx, x, static_cast<int>(target), p.maximum[row], p.sum_exp[row],
                         p.scale[row * p.scale_stride]);
}

// Adds to p.totals. One block, each thread the same rows whatever the device: the bits are always the same.
__global__ void __launch_bounds__(kTotalThreads) cross_entropy_totals_kernel(const CrossEntropyForward p) {
  double loss = 0, rows = 0;
  for (int64_t row = threadIdx.x; row < p.rows; row += kTotalThreads) {
    if (p.target[row] == p.ignore_index) continue;
    loss += p.loss[row];
    rows += 1;
  }
  loss = block_sum<kTotalThreads / kWarp>(loss);
  rows = block_sum<kTotalThreads / kWarp>(rows);
  if (threadIdx.x == 0) {
    p.totals[0] += loss;
    p.totals[1] += rows;
  }
}

constexpr int64_t kMost = 0x7fffffff;  // blocks in a grid, and classes that an int counts

// f(a type tag of the logits, the number of threads) for the shape of p.
template <class Params, class F>
Status dispatch(const Params& p, F&& f) {
  if (p.rows > kMost) return {Status::unsupported_shape, 0, p.rows};
  if (p.cols > kMost - 4 * kWide * 8) return {Status::unsupported_shape, 0, p.cols};
  return dispatch_dtype(p.dtype, [&](auto t) -> Status {
    using T = typename decltype(t)::type;
    if (p.cols * static_cast<int64_t>(sizeof(T)) <= kNarrowBytes) return f(t, std::integral_constant<int, kNarrow>{});
    return f(t, std::integral_constant<int, kWide>{});
  });
}

}  // namespace

Status cross_entropy_forward(const CrossEntropyForward& p, Launch& launch) {
  if (p.rows == 0) return {};
  const Status status = dispatch(p, [&](auto t, auto threads) -> Status {
    using T = typename decltype(t)::type;
    return launch.run<cross_entropy_forward_kernel<T, threads()>>(static_cast<unsigned>(p.rows), threads(), 0, p);
  });
  if (status.code != Status::ok) return status;
  return launch.run<cross_entropy_totals_kernel>(1, kTotalThreads, 0, p);
}

Status cross_entropy_backward(const CrossEntropyBackward& p, Launch& launch) {
  if (p.rows == 0) return {};
  return dispatch(p, [&](auto t, auto threads) -> Status {
    using T = typename decltype(t)::type;
    return launch.run<cross_entropy_backward_kernel<T, threads()>>(static_cast<unsigned>(p.rows), threads(), 0, p);
  });
}

}  // namespace fastgpt::FASTGPT_ISA
