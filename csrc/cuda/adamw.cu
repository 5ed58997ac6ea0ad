// adamw: one step over many tensors in place, and the gradients' global norm. The formulas are csrc/cpu/adamw.cpp's.
//
// Bytes (float32): reads p, grad, m, v and writes p, m, v: 28 an element; about 25 instructions: memory decides.
// Without clipping the norm rides along in that pass; with it, the gradients are read once more first (4 bytes), never
// written.
//
// A launch takes the addresses of up to 64 tensors by value, as kernel arguments (3.4 kB of the 4 that sm_80 has), and
// as many blocks as those tensors have chunks; a block finds its tensor by bisection. So GPT-2's 148 tensors are three
// launches, no table is copied to the device, and a CUDA graph holds all it needs. Dtypes differ from tensor to tensor:
// the switch is taken by whole blocks, once for each access of 4 elements, which is little beside the access.
//
// Squares are summed in double, by chunk, and the chunks' sums by one block, each thread always the same ones: the norm
// depends on shapes alone, and does not overflow where a float's square would. The clipping coefficient stays on the
// device: the update reads it there.
#include "cuda/core/launch.h"
#include "cuda/core/reduce.cuh"
#include "cuda/core/vector.cuh"

namespace fastgpt::FASTGPT_ISA {
namespace {

constexpr int kThreads = 256, kNormThreads = 1024;
constexpr int kChunk = 8192;  // elements that a block takes: 8 accesses of 16 bytes a thread and tensor
constexpr int kTensors = 64;

inline int64_t chunks_of(int64_t size) { return ceil_div(size, kChunk); }

// What a launch works on: kernel arguments.
struct Tensors {
  void* params[kTensors];
  const void* grads[kTensors];
  float* exp_avgs[kTensors];
  float* exp_avg_sqs[kTensors];
  float* masters[kTensors];
  int64_t sizes[kTensors];
  int first_chunk[kTensors + 1];  // of this launch's blocks
  int8_t param_dtypes[kTensors], grad_dtypes[kTensors];
  int count;
  double* squares;  // of this launch's chunks, or null
};
static_assert(sizeof(Tensors) + 64 <= 4096, "kernel arguments");

struct Chunk {
  int tensor;
  int64_t offset;
  int elements;
};

__device__ inline Chunk find_chunk(const Tensors& t) {
  const int chunk = static_cast<int>(blockIdx.x);
  int low = 0, high = t.count;  // first_chunk[low] <= chunk < first_chunk[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (t.first_chunk[middle] <= chunk)
      low = middle;
    else
      high = middle;
  }
  const int64_t offset = static_cast<int64_t>(chunk - t.first_chunk[low]) * kChunk, left = t.sizes[low] - offset;
  return {low, offset, left < kChunk ? static_cast<int>(left) : kChunk};
}

__device__ inline const char* at(const void* tensor, DType dtype, int64_t offset) {
  return static_cast<const char*>(tensor) + offset * (dtype == DType::f32 ? 4 : 2);
}

// n elements of `dtype` from the i-th on, in floats: one access for n = 4.
template <int n>
__device__ inline void load_floats(float (&out)[n], const void* p, DType dtype, int i) {
  static_assert(n == 1 || n == 4);
  if constexpr (n == 1) {
    if (dtype == DType::f32)
      out[0] = static_cast<const float*>(p)[i];
    else if (dtype == DType::bf16)
      out[0] = to_float(static_cast<const bf16*>(p)[i]);
    else
      out[0] = to_float(static_cast<const f16*>(p)[i]);
  } else if (dtype == DType::f32) {
    Pack<float>{load16(static_cast<const float*>(p) + i)}.to_floats(out);
  } else {
    const uint2 words = load8(static_cast<const uint16_t*>(p) + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const auto bits = static_cast<uint16_t>((j < 2 ? words.x : words.y) >> j % 2 * 16);
      out[j] = dtype == DType::bf16 ? to_float(bf16{bits}) : to_float(f16{bits});
    }
  }
}

template <int n>
__device__ inline void store_floats(const float (&in)[n], void* p, DType dtype, int i) {
  if constexpr (n == 1) {
    if (dtype == DType::f32)
      static_cast<float*>(p)[i] = in[0];
    else if (dtype == DType::bf16)
      static_cast<bf16*>(p)[i] = cast<bf16>(in[0]);
    else
      static_cast<f16*>(p)[i] = cast<f16>(in[0]);
  } else if (dtype == DType::f32) {
    Pack<float> pack;
    pack.from_floats(in);
    store_pack(static_cast<float*>(p) + i, pack);
  } else {
    uint2 words;
    if (dtype == DType::bf16)
      words = {pack_pair<bf16>(in[0], in[1]), pack_pair<bf16>(in[2], in[3])};
    else
      words = {pack_pair<f16>(in[0], in[1]), pack_pair<f16>(in[2], in[3])};
    store8(static_cast<uint16_t*>(p) + i, words);
  }
}

__device__ inline bool accessible_by_four(const void* p, DType dtype) {
  return reinterpret_cast<uintptr_t>(p) % (dtype == DType::f32 ? 16 : 8) == 0;
}

// Calls f(i, elements) with 4 elements as long as `by_four` and the chunk allow, then with 1: a constant's type each.
template <class F>
__device__ inline void for_each_four(int elements, bool by_four, F&& f) {
  const int fours = by_four ? elements / 4 * 4 : 0;
  for (int i = static_cast<int>(threadIdx.x) * 4; i < fours; i += kThreads * 4) f(i, std::integral_constant<int, 4>{});
  for (int i = fours + static_cast<int>(threadIdx.x); i < elements; i += kThreads)
    f(i, std::integral_constant<int, 1>{});
}

template <int n>
__device__ inline void add_squares(double& sum, const float (&v)[n]) {
#pragma unroll
  for (int j = 0; j < n; ++j) sum += static_cast<double>(v[j]) * v[j];
}

// tensors.squares[chunk] = the sum of the squares of the chunk's gradients.
__global__ void __launch_bounds__(kThreads) grad_squares_kernel(const __grid_constant__ Tensors t) {
  const Chunk chunk = find_chunk(t);
  const auto dtype = static_cast<DType>(t.grad_dtypes[chunk.tensor]);
  const char* grad = at(t.grads[chunk.tensor], dtype, chunk.offset);
  double sum = 0;
  for_each_four(chunk.elements, accessible_by_four(grad, dtype), [&](int i, auto n) {
    float g[n()];
    load_floats(g, grad, dtype, i);
    add_squares(sum, g);
  });
  sum = block_sum<kThreads / kWarp>(sum);
  if (threadIdx.x == 0) t.squares[blockIdx.x] = sum;
}

// norm = sqrt(sum of squares) / grad_scale, or *given. Where wanted also factor, what a gradient is multiplied by:
// +-min(1, max_norm / (norm + 1e-6)) / grad_scale, or NaN where the norm is not finite.
__global__ void __launch_bounds__(kNormThreads)
    grad_norm_kernel(float* norm, float* factor, const double* squares, int64_t chunks, const float* given,
                     double max_norm, double grad_scale, bool maximize) {
  double sum = 0;
  if (!given) {
    for (int64_t i = threadIdx.x; i < chunks; i += kNormThreads) sum += squares[i];
    sum = block_sum<kNormThreads / kWarp>(sum);
  }
  if (threadIdx.x != 0) return;
  const float found = given ? *given : static_cast<float>(sqrt(sum) / grad_scale);
  *norm = found;
  if (!factor) return;
  const double clip = fmin(max_norm / (static_cast<double>(found) + 1e-6), 1.0);
  *factor = found <= 3.402823466e38f ? static_cast<float>((maximize ? -clip : clip) / grad_scale) : __builtin_nanf("");
}

// The step's constants, as the inner loop uses them.
struct Scalars {
  float grad_factor, one_minus_beta1, beta2, one_minus_beta2, decay, step_size, inverse_root_correction, eps;
};

Scalars scalars_of(const AdamW& p) {
  const double step = static_cast<double>(p.step);
  const double correction1 = 1 - __builtin_pow(p.beta1, step), correction2 = 1 - __builtin_pow(p.beta2, step);
  return {static_cast<float>((p.maximize ? -1 : 1) / p.grad_scale),
          static_cast<float>(1 - p.beta1),
          static_cast<float>(p.beta2),
          static_cast<float>(1 - p.beta2),
          static_cast<float>(1 - p.lr * p.weight_decay),
          static_cast<float>(p.lr / correction1),
          static_cast<float>(1 / __builtin_sqrt(correction2)),
          static_cast<float>(p.eps)};
}

// `factor`: of gradients, instead of scalars.grad_factor; NaN: no update. Products and sums are spelt out, so that an
// element's bits do not depend on whether it is one of four.
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const __grid_constant__ Tensors t, const Scalars scalars, const float* factor) {
  const float grad_factor = factor ? *factor : scalars.grad_factor;
  if (grad_factor != grad_factor) return;
  const Chunk chunk = find_chunk(t);
  const int tensor = chunk.tensor;
  const auto param_dtype = static_cast<DType>(t.param_dtypes[tensor]);
  const auto grad_dtype = static_cast<DType>(t.grad_dtypes[tensor]);
  char* param = const_cast<char*>(at(t.params[tensor], param_dtype, chunk.offset));
  const char* grad = at(t.grads[tensor], grad_dtype, chunk.offset);
  float* exp_avg = t.exp_avgs[tensor] + chunk.offset;
  float* exp_avg_sq = t.exp_avg_sqs[tensor] + chunk.offset;
  float* master = t.masters[tensor] ? t.masters[tensor] + chunk.offset : nullptr;
  const bool by_four = accessible_by_four(param, param_dtype) && accessible_by_four(grad, grad_dtype) &&
                       aligned16(exp_avg) && aligned16(exp_avg_sq) && aligned16(master);
  double squares = 0;
  for_each_four(chunk.elements, by_four, [&](int i, auto n) {
    float raw[n()], m[n()], v[n()], p[n()];
    load_floats(raw, grad, grad_dtype, i);
    load_floats(m, exp_avg, DType::f32, i);
    load_floats(v, exp_avg_sq, DType::f32, i);
    if (master)
      load_floats(p, master, DType::f32, i);
    else
      load_floats(p, param, param_dtype, i);
    if (t.squares) add_squares(squares, raw);
#pragma unroll
    for (int j = 0; j < n(); ++j) {
      const float g = __fmul_rn(raw[j], grad_factor);
      m[j] = fmaf(__fadd_rn(g, -m[j]), scalars.one_minus_beta1, m[j]);
      v[j] = fmaf(__fmul_rn(g, scalars.one_minus_beta2), g, __fmul_rn(v[j], scalars.beta2));
      const float denominator = fmaf(sqrtf(v[j]), scalars.inverse_root_correction, scalars.eps);
      p[j] = fmaf(p[j], scalars.decay, -(__fmul_rn(m[j], scalars.step_size) / denominator));
    }
    store_floats(m, exp_avg, DType::f32, i);
    store_floats(v, exp_avg_sq, DType::f32, i);
    if (master) store_floats(p, master, DType::f32, i);
    store_floats(p, param, param_dtype, i);
  });
  if (!t.squares) return;
  squares = block_sum<kThreads / kWarp>(squares);
  if (threadIdx.x == 0) t.squares[blockIdx.x] = squares;
}

int64_t count_chunks(const int64_t* sizes, int64_t count) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) chunks += chunks_of(sizes[i]);
  return chunks;
}

// Calls run(tensors, blocks) for every kTensors tensors that have elements. fill(tensors, to, from) copies one's
// fields.
template <class Params, class Fill, class Run>
Status for_each_launch(const Params& p, double* squares, Fill&& fill, Run&& run) {
  constexpr int64_t kMostBlocks = 0x7fffffff;
  Tensors t{};
  const auto flush = [&]() -> Status {
    const int blocks = t.first_chunk[t.count];
    t.squares = squares;
    const Status status = blocks ? run(t, static_cast<unsigned>(blocks)) : Status{};
    if (squares) squares += blocks;
    t = {};
    return status;
  };
  for (int64_t i = 0; i < p.count; ++i) {
    const int64_t chunks = chunks_of(p.sizes[i]);
    if (chunks == 0) continue;
    if (chunks > kMostBlocks) return {Status::unsupported_shape, i, p.sizes[i]};
    if (t.count == kTensors || t.first_chunk[t.count] + chunks > kMostBlocks)
      if (const Status status = flush(); status.code != Status::ok) return status;
    const int to = t.count++;
    t.grads[to] = p.grads[i];
    t.sizes[to] = p.sizes[i];
    t.grad_dtypes[to] = static_cast<int8_t>(p.grad_dtypes[i]);
    t.first_chunk[to + 1] = t.first_chunk[to] + static_cast<int>(chunks);
    fill(t, to, i);
  }
  return flush();
}

template <class Params>
Status sum_squares(const Params& p, double* squares, Launch& launch) {
  return for_each_launch(
      p, squares, [](Tensors&, int, int64_t) {},
      [&](const Tensors& t, unsigned blocks) { return launch.run<grad_squares_kernel>(blocks, kThreads, 0, t); });
}

}  // namespace

Status grad_norm(const GradNorm& p, Launch& launch) {
  const int64_t chunks = count_chunks(p.sizes, p.count);
  double* squares = launch.scratch<double>(chunks);
  const Status status = sum_squares(p, squares, launch);
  if (status.code != Status::ok) return status;
  return launch.run<grad_norm_kernel>(1, kNormThreads, 0, p.norm, nullptr, squares, chunks, nullptr, 0.0, p.grad_scale,
                                      false);
}

Status adamw(const AdamW& p, Launch& launch) {
  const int64_t chunks = count_chunks(p.sizes, p.count);
  double* squares = p.total_norm ? nullptr : launch.scratch<double>(chunks);
  const bool clip = p.max_norm > 0;
  float* factor = clip ? launch.scratch<float>(1) : nullptr;
  const auto find_norm = [&] {
    return launch.run<grad_norm_kernel>(1, kNormThreads, 0, p.norm, factor, squares, chunks, p.total_norm, p.max_norm,
                                        p.grad_scale, p.maximize);
  };
  if (clip) {
    Status status = p.total_norm ? Status{} : sum_squares(p, squares, launch);
    if (status.code == Status::ok) status = find_norm();
    if (status.code != Status::ok) return status;
  }
  const Scalars scalars = scalars_of(p);
  const Status status = for_each_launch(
      p, clip ? nullptr : squares,
      [&](Tensors& t, int to, int64_t from) {
        t.params[to] = p.params[from];
        t.exp_avgs[to] = p.exp_avgs[from];
        t.exp_avg_sqs[to] = p.exp_avg_sqs[from];
        t.masters[to] = p.masters[from];
        t.param_dtypes[to] = static_cast<int8_t>(p.param_dtypes[from]);
      },
      [&](const Tensors& t, unsigned blocks) {
        return launch.run<adamw_kernel>(blocks, kThreads, 0, t, scalars, factor);
      });
  if (clip || status.code != Status::ok) return status;
  return find_norm();
}

}  // namespace fastgpt::FASTGPT_ISA
