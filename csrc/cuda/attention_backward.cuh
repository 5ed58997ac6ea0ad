// What the backward kernels share: the plan of a call, rows of a tensor, and the sinks' gradient.
#pragma once

#include "cuda/attention.cuh"
#include "cuda/core/reduce.cuh"

namespace fastgpt::FASTGPT_ISA {

// What a kernel gets beside the parameters.
struct BackwardPlan {
  float* delta;        // [H, total_queries]
  float* sink_shares;  // [H, B, blocks of kDeltaRows queries], where there are sinks
  bool q, k, v, dout, out, dq, dk, dv;  // whether the tensor's rows can be accessed 16 bytes at a time
};

constexpr int kDeltaRows = 64;  // queries of a block that computes delta
constexpr int64_t kMaxBlocks = 0x7fffffff;

// attention_backward_f32.cu: delta, dQ, dK and dV of float32.
Status attention_backward_f32(const AttentionBackward& p, const BackwardPlan& plan, Launch& launch);

// Launches kernel(p, plan, blocks a head) for every head and batch row; nothing where there are no blocks.
template <auto kernel>
inline Status run_blocks(const AttentionBackward& p, const BackwardPlan& plan, Launch& launch, int64_t blocks,
                         int64_t heads, int threads, size_t shared) {
  const int64_t all = blocks * p.batch * heads;
  if (all == 0) return {};
  if (all > kMaxBlocks) return {Status::unsupported_shape, 0, all};
  return launch.run<kernel>(static_cast<unsigned>(all), threads, shared, p, plan, static_cast<int>(blocks));
}
// Which of them this block is.
struct BlockOfHead {
  int block, head, batch;
};
__device__ inline BlockOfHead block_of_head(int blocks, int64_t heads) {
  const unsigned of_head = blockIdx.x / blocks, all_heads = static_cast<unsigned>(heads);
  return {static_cast<int>(blockIdx.x % blocks), static_cast<int>(of_head % all_heads),
          static_cast<int>(of_head / all_heads)};
}

__device__ inline int64_t delta_offset(const AttentionBackward& p, const Sequence& s, int b, int h) {
  return h * p.total_queries + (p.cu_seqlens_q ? s.first_query : b * p.queries);
}

// The rows of one head of a tensor: row r begins at first + r * stride, r < count.
template <class T>
struct Rows {
  T* first;
  int64_t stride;
  int count, dim;
  bool aligned;

  __device__ T* operator()(int r) const { return r < count ? first + r * stride : nullptr; }
};
// The tensors of batch row b, one head at a time.
template <class T>
struct BackwardTensors {
  const AttentionBackward& p;
  const BackwardPlan& plan;
  const Sequence& s;
  int b;

  __device__ Rows<const T> q(int h) const { return queries<const T>(p.q, p.q_strides, h, p.dim, plan.q); }
  __device__ Rows<const T> dout(int h) const {
    return queries<const T>(p.dout, p.dout_strides, h, p.value_dim, plan.dout);
  }
  __device__ Rows<const T> out(int h) const { return queries<const T>(p.out, p.out_strides, h, p.value_dim, plan.out); }
  __device__ Rows<const T> k(int h) const { return keys<const T>(p.k, p.k_strides, h, p.dim, plan.k); }
  __device__ Rows<const T> v(int h) const { return keys<const T>(p.v, p.v_strides, h, p.value_dim, plan.v); }
  __device__ Rows<T> dq(int h) const { return queries<T>(p.dq, p.dq_strides, h, p.dim, plan.dq); }
  __device__ Rows<T> dk(int h) const { return keys<T>(p.dk, p.dk_strides, h, p.dim, plan.dk); }
  __device__ Rows<T> dv(int h) const { return keys<T>(p.dv, p.dv_strides, h, p.value_dim, plan.dv); }

  template <class U, class Pointer>
  __device__ Rows<U> queries(Pointer x, const int64_t (&strides)[3], int h, int64_t dim, bool aligned) const {
    return {row_of(static_cast<U*>(x), strides, b, h, s.first_query), strides[2], s.queries, static_cast<int>(dim),
            aligned};
  }
  template <class U, class Pointer>
  __device__ Rows<U> keys(Pointer x, const int64_t (&strides)[3], int h, int64_t dim, bool aligned) const {
    return {row_of(static_cast<U*>(x), strides, b, h, s.first_key), strides[2], s.keys, static_cast<int>(dim), aligned};
  }
};

// Query heads that share a key/value head; 32 bits, because a GPU divides 64 by a subroutine.
__device__ inline int group_size(const AttentionBackward& p) {
  return static_cast<int>(p.heads) / static_cast<int>(p.kv_heads);
}

// Caps the score as capped() does; returns the derivative, 1 - tanh^2, which rounds less from the tangent itself.
__device__ inline float cap_with_slope(const AttentionBackward& p, float& score) {
  const float cap = static_cast<float>(p.softcap), t = tanhf(score / cap);
  score = cap * t;
  return fmaf(-t, t, 1.0f);
}

// What a row adds to -dsinks.
__device__ inline float sink_share(const AttentionBackward& p, int h, float lse, float delta) {
  return expf(p.sinks[h] - lse) * delta;
}
// Every thread of the block calls it with the shares of its rows.
template <int kThreads>
__device__ inline void store_shares(const AttentionBackward& p, const BackwardPlan& plan, int b, int h, int block,
                                    int blocks, float share) {
  share = block_sum<kThreads / kWarp>(share);
  if (threadIdx.x == 0) plan.sink_shares[(h * p.batch + b) * blocks + block] = share;
}

}  // namespace fastgpt::FASTGPT_ISA
