// adamw: one step over many tensors in place, and the gradients' global norm.
//
//   g = grad / grad_scale * clip,  clip = min(1, max_norm / (norm + 1e-6)),  norm = sqrt(sum of (grad / grad_scale)^2)
//   m += (1 - beta1) (g - m),  v = beta2 v + (1 - beta2) g^2
//   p = p (1 - lr weight_decay) - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
//
// Bytes (float32): reads p, grad, m, v and writes p, m, v: 28 an element. About 15 flops: memory decides. Without
// clipping the norm rides along in that pass; with it, the gradients are read once more first (4 bytes), never written.
//
// All tensors are cut into chunks of one size and the chunks shared out, so hundreds of small tensors cost one parallel
// loop. Squares are summed in double, by chunk, and the chunks' sums in order: the norm does not depend on threads, and
// cannot overflow for finite float gradients before its own rounding.
#include "core/aligned.h"
#include "core/parallel.h"
#include "core/simd.h"

namespace fastgpt::FASTGPT_ISA {
namespace {

// 16k elements: about 30 us of work, and a partial sum that 8 bytes hold for 64 kB of gradient.
constexpr int64_t kChunk = 16384;

inline int64_t chunks_of(int64_t size) { return (size + kChunk - 1) / kChunk; }

// Calls f(chunk, tensor, offset, elements) for every chunk of every tensor.
template <class F>
void for_each_chunk(const int64_t* sizes, int64_t chunks, F&& f) {
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    int64_t tensor = 0, first = 0;  // of the tensor's chunks
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      for (; chunk >= first + chunks_of(sizes[tensor]); ++tensor) first += chunks_of(sizes[tensor]);
      const int64_t offset = (chunk - first) * kChunk, left = sizes[tensor] - offset;
      f(chunk, tensor, offset, left < kChunk ? left : kChunk);
    }
  });
}

int64_t count_chunks(const int64_t* sizes, int64_t count) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) chunks += chunks_of(sizes[i]);
  return chunks;
}

// A sum of squares in double, two halves of a vector side by side.
struct SquareSum {
  typedef float Half __attribute__((vector_size(kLanes * 2)));
  typedef double Doubles __attribute__((vector_size(kLanes * 4)));
  Doubles low = {}, high = {};

  void add(Vec v) {
    Half halves[2];
    std::memcpy(halves, &v, sizeof v);
    const Doubles a = __builtin_convertvector(halves[0], Doubles), b = __builtin_convertvector(halves[1], Doubles);
    low += a * a;
    high += b * b;
  }
  double total() const {
    const Doubles both = low + high;
    double sum = 0;
    for (int i = 0; i < kLanes / 2; ++i) sum += both[i];
    return sum;
  }
};

// The norm from the chunks' sums.
float norm_of(const double* squares, int64_t chunks, double grad_scale) {
  double sum = 0;
  for (int64_t i = 0; i < chunks; ++i) sum += squares[i];
  return static_cast<float>(__builtin_sqrt(sum) / grad_scale);
}

template <class P>
void sum_squares(const P& p, int64_t chunks, double* squares) {
  for_each_chunk(p.sizes, chunks, [&](int64_t chunk, int64_t tensor, int64_t offset, int64_t elements) {
    dispatch_dtype(p.grad_dtypes[tensor], [&](auto g) -> Status {
      const auto* grad = static_cast<const typename decltype(g)::type*>(p.grads[tensor]) + offset;
      SquareSum sum;
      for_each_vector(elements, [&](int64_t i, int64_t n) { sum.add(load(grad + i, n)); });
      squares[chunk] = sum.total();
      return {};
    });
  });
}

// The step's constants, as the inner loop uses them.
struct Scalars {
  float grad_factor, one_minus_beta1, beta2, one_minus_beta2, decay, step_size, inverse_root_correction, eps;
};

Scalars scalars_of(const AdamW& p, double clip) {
  const double step = static_cast<double>(p.step);
  const double correction1 = 1 - __builtin_pow(p.beta1, step), correction2 = 1 - __builtin_pow(p.beta2, step);
  return {static_cast<float>((p.maximize ? -clip : clip) / p.grad_scale),
          static_cast<float>(1 - p.beta1),
          static_cast<float>(p.beta2),
          static_cast<float>(1 - p.beta2),
          static_cast<float>(1 - p.lr * p.weight_decay),
          static_cast<float>(p.lr / correction1),
          static_cast<float>(1 / __builtin_sqrt(correction2)),
          static_cast<float>(p.eps)};
}

// Updates a chunk and returns the sum of the squares of its gradients.
template <class P, class G>
double update(P* param, const G* grad, float* exp_avg, float* exp_avg_sq, float* master, int64_t elements, Scalars s) {
  SquareSum squares;
  for_each_vector(elements, [&](int64_t i, int64_t n) {
    const Vec raw = load(grad + i, n);
    squares.add(raw);
    const Vec g = raw * s.grad_factor;
    Vec m = load(exp_avg + i, n), v = load(exp_avg_sq + i, n);
    m += (g - m) * s.one_minus_beta1;
    v = v * s.beta2 + g * g * s.one_minus_beta2;
    const Vec denominator = sqrt(v) * s.inverse_root_correction + s.eps;
    Vec p = master ? load(master + i, n) : load(param + i, n);
    p = p * s.decay - m * s.step_size / denominator;
    store(exp_avg + i, m, n);
    store(exp_avg_sq + i, v, n);
    if (master) store(master + i, p, n);
    store(param + i, p, n);
  });
  return squares.total();
}

}  // namespace

Status grad_norm(const GradNorm& p) {
  const int64_t chunks = count_chunks(p.sizes, p.count);
  AlignedBuffer<double> squares(chunks);
  if (!squares) return {Status::out_of_memory, 0, chunks * 8};
  sum_squares(p, chunks, squares.data());
  *p.norm = norm_of(squares.data(), chunks, p.grad_scale);
  return {};
}

Status adamw(const AdamW& p) {
  const int64_t chunks = count_chunks(p.sizes, p.count);
  AlignedBuffer<double> squares(chunks);
  if (!squares) return {Status::out_of_memory, 0, chunks * 8};

  double clip = 1;
  if (p.max_norm > 0) {
    if (!p.total_norm) sum_squares(p, chunks, squares.data());
    const float norm = p.total_norm ? *p.total_norm : norm_of(squares.data(), chunks, p.grad_scale);
    *p.norm = norm;
    if (!(norm <= 3.402823466e38f)) return {};  // NaN or infinite: no update
    clip = p.max_norm / (static_cast<double>(norm) + 1e-6);
    if (clip > 1) clip = 1;
  }
  const Scalars scalars = scalars_of(p, clip);
  for_each_chunk(p.sizes, chunks, [&](int64_t chunk, int64_t tensor, int64_t offset, int64_t elements) {
    dispatch_dtype(p.param_dtypes[tensor], [&](auto t) {
      return dispatch_dtype(p.grad_dtypes[tensor], [&](auto g) -> Status {
        float* master = p.masters[tensor];
        squares.data()[chunk] = update(static_cast<typename decltype(t)::type*>(p.params[tensor]) + offset,
                                       static_cast<const typename decltype(g)::type*>(p.grads[tensor]) + offset,
                                       p.exp_avgs[tensor] + offset, p.exp_avg_sqs[tensor] + offset,
                                       master ? master + offset : nullptr, elements, scalars);
        return {};
      });
    });
  });
  if (!(p.max_norm > 0)) *p.norm = norm_of(squares.data(), chunks, p.grad_scale);
  return {};
}

}  // namespace fastgpt::FASTGPT_ISA
