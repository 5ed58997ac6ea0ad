// What the forward kernels share: packed rows, pieces of a sequence's keys, a warp's online softmax on tensor cores,
// and the end of a row.
#pragma once

#include "cuda/attention.cuh"

namespace fastgpt::FASTGPT_ISA {

Status attention_forward_f32(const AttentionForward& p, Launch& launch);  // attention_forward_f32.cu
Status attention_decode(const AttentionForward& p, Launch& launch);       // attention_decode.cu: 16-bit, few queries

// Calls run(std::integral_constant<int, kDim>) for the least compiled head dim that holds keys' and values'.
template <class F>
inline Status dispatch_dim(const AttentionForward& p, F&& run) {
  const int64_t dim = p.dim > p.value_dim ? p.dim : p.value_dim;
  if (dim <= 64) return run(std::integral_constant<int, 64>{});
  if (dim <= 128) return run(std::integral_constant<int, 128>{});
  return run(std::integral_constant<int, 256>{});
}

template <class T>
inline bool all_aligned(const AttentionForward& p) {
  return rows_aligned<T>(p.q, p.q_strides, p.dim) && rows_aligned<T>(p.k, p.k_strides, p.dim) &&
         rows_aligned<T>(p.v, p.v_strides, p.value_dim) && rows_aligned<T>(p.out, p.out_strides, p.value_dim);
}

// --- rows ---

// The rows that share a key/value head: row r is query r / group of query head r % group of the group. So few queries
// of many heads fill a tile, and its keys are read once for all of them.
struct PackedRows {
  int batch, kv_head, group, count;

  __device__ int query(int r) const { return r / group; }
  __device__ int head(int r) const { return kv_head * group + r % group; }
  // Of a row that is there or, past the end, of the last one: its options are looked up, its result is not used.
  __device__ RowOptions options(const AttentionForward& p, int r) const {
    r = min(r, count - 1);
    return row_options(p, batch, head(r), query(r));
  }
};

__device__ inline PackedRows packed_rows(const Sequence& s, int batch, int kv_head, int group) {
  return {batch, kv_head, group, s.queries * group};
}
inline int group_of(const AttentionForward& p) { return static_cast<int>(p.heads / p.kv_heads); }

// The address of row r of a [B, H, T, D] tensor, null past the end.
template <class T>
__device__ inline T* packed_row(T* x, const int64_t (&strides)[3], const Sequence& s, const PackedRows& rows, int r) {
  if (r >= rows.count) return nullptr;
  return row_of(x, strides, rows.batch, rows.head(r), s.first_query + rows.query(r));
}

// The address of key j in k or v, null past the end; in its page if there are pages.
template <class T>
__device__ inline const T* key_row(const AttentionForward& p, const T* x, const int64_t (&strides)[3],
                                   const Sequence& s, const PackedRows& rows, int j) {
  if (j >= s.keys) return nullptr;
  if (!p.block_table) return row_of(x, strides, rows.batch, rows.kv_head, s.first_key + j);
  const int page_size = static_cast<int>(p.page_size), page = j / page_size;
  const int block = p.block_table[rows.batch * p.block_table_stride + page];
  return x + block * strides[0] + rows.kv_head * strides[1] + (j - page * page_size) * strides[2];
}

// --- pieces ---
//
// With few queries, the keys of a sequence are split over blocks. Its pieces depend on its own length alone, so that
// its bits do not depend on its neighbours nor on the device.

constexpr int kSplitRows = 64;  // rows of a key/value head that count as few
constexpr int kSplitUnit = 64;     // a piece is a multiple of this
constexpr int kSplitKeys = 256;    // the least that is worth a block of its own, unless the caller asks
constexpr int kMaxSplits = 64;     // unless the caller asks: what one warp adds up at the end

// A packed batch is never split, because its longest sequence must not change its neighbours' bits.
inline bool splits_keys(const AttentionForward& p) {
  return !p.cu_seqlens_q && (p.num_splits > 1 || p.queries * (p.heads / p.kv_heads) <= kSplitRows);
}
FASTGPT_HOST_DEVICE inline int split_length(const AttentionForward& p, int keys) {
  const int64_t count = p.num_splits > 0 ? p.num_splits : kMaxSplits;
  const int64_t length = round_up(ceil_div(keys, count), kSplitUnit),
                least = p.num_splits > 0 ? kSplitUnit : kSplitKeys;
  return static_cast<int>(length > least ? length : least);
}
// No sequence of at most p.keys keys has more pieces.
inline int64_t most_splits(const AttentionForward& p) {
  const int64_t count = p.num_splits > 0 ? p.num_splits : kMaxSplits;
  const int64_t pieces = ceil_div(p.keys, p.num_splits > 0 ? kSplitUnit : kSplitKeys);
  return pieces < 1 ? 1 : pieces < count ? pieces : count;
}

// Where the pieces' results lie until they are added up: o and (m, l) of each row and piece. Null: there is one piece.
struct Partials {
  float* o;   // [B, Hkv, rows, splits, kDim]
  float* ml;  // [B, Hkv, rows, splits, 2]
  int splits;
};
inline Partials make_partials(const AttentionForward& p, Launch& launch, int dim) {
  const int64_t splits = most_splits(p), rows = p.batch * p.heads * p.queries;
  if (splits == 1 || !splits_keys(p)) return {nullptr, nullptr, 1};
  float* o = launch.scratch<float>(rows * splits * dim);
  return {o, launch.scratch<float>(rows * splits * 2), static_cast<int>(splits)};
}
// Of row r (of p.queries' rows, as packed) and piece `split`.
__device__ inline int64_t partial_index(const AttentionForward& p, const Partials& partials, const PackedRows& rows,
                                        int r, int split) {
  const int64_t before = (rows.batch * p.kv_heads + rows.kv_head) * p.queries * rows.group;
  return (before + r) * partials.splits + split;
}
// out and lse from the pieces; attention_decode.cu.
Status combine_partials(const AttentionForward& p, Launch& launch, const Partials& partials, int dim);

// --- the softmax ---

// Scores are held in units in which exp is cheap: base 2 for the 16-bit types, whose P is rounded anyway; natural for
// float, where the product with log2(e) would be one rounding more.
template <class T>
constexpr float kScoreUnit = sizeof(T) == 4 ? 1.0f : kLog2e;
template <class T>
__device__ inline float exponential(float x) {
  if constexpr (sizeof(T) == 4) return expf(x);
  return ptx::exp2(x);
}
// The maximum to subtract: where nothing is seen yet, exp(-inf - 0) is 0 and not NaN.
__device__ inline float finite_or_zero(float m) { return m == -__builtin_inff() ? 0.0f : m; }

// Score j of a row with options or at the band's edge, from q . k.
template <class T>
__device__ inline float final_score(const AttentionForward& p, const Band& band, const RowOptions& row, int j,
                                    float dot) {
  const float bias = score_bias<T>(p, band, row, j);
  if (bias == -__builtin_inff()) return bias;
  return (capped(p, __fmul_rn(dot, static_cast<float>(p.scale))) + bias) * kScoreUnit<T>;
}

// The end of a row whose sum of exp(score - m) is l: out = o * factor / divisor.
struct RowEnd {
  float factor, divisor, lse;
};
template <class T>
__device__ inline RowEnd end_row(const AttentionForward& p, int head, float m, float l) {
  float most = m, factor = 1.0f;
  if (p.sinks) {
    const float sink = p.sinks[head] * kScoreUnit<T>;
    most = fmaxf(m, sink);
    const float base = finite_or_zero(most);
    factor = exponential<T>(m - base);
    l = l * factor + exponential<T>(sink - base);
  }
  if (most == -__builtin_inff()) return {0.0f, 1.0f, __builtin_inff()};
  const float lse = sizeof(T) == 4 ? most + logf(l) : most * kLn2 + logf(l);
  return {p.dropout_threshold > 0 ? factor * dropout_scale(p) : factor, l, lse};
}

// A value of out, from the sum of weights times values.
template <class T>
__device__ inline float finished(float o, const RowEnd& end) {
  if constexpr (sizeof(T) == 4) return o * end.factor / end.divisor;  // one rounding less
  return o * __fdividef(end.factor, end.divisor);
}

// --- 16 x kBlocks rows of a warp, on tensor cores ---
//
// Lane 4 g + t holds rows g and g + 8 of each block of 16, and of every 8 columns 2t and 2t + 1.
template <class T, int kDim, int kBlocks, int kKeys>
struct WarpAttention {
  float o[kBlocks][kDim / 8][4];
  float m[kBlocks][2], l[kBlocks][2];  // l: this lane's part of the sum
  float s[kBlocks][kKeys / 8][4];      // the scores of a tile of keys, then their weights

  __device__ void clear() {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[block][d][e] = 0.0f;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        m[block][half] = -__builtin_inff();
        l[block][half] = 0.0f;
      }
    }
  }

  // f(block, half) for the lane's rows 16 block + 8 half + g.
  template <class F>
  __device__ static void for_each_row(F&& f) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int half = 0; half < 2; ++half) f(block, half);
  }

  // s = Q K^T; fragment(a, block, step) gives A of 16 rows and of dims 16 step ... .
  template <class Fragment>
  __device__ void multiply_keys(const T* k, Fragment&& fragment) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[block][n][e] = 0.0f;
#pragma unroll 4
    for (int step = 0; step < kDim / 16; ++step) {
      uint32_t a[kBlocks][4];
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) fragment(a[block], block, step);
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t b0[2], b1[2];
        load_b_transposed<kDim>(b0, b1, k, 16 * n, 2 * step);
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
          ptx::mma_m16n8k16<T>(s[block][2 * n], a[block], b0);
          ptx::mma_m16n8k16<T>(s[block][2 * n + 1], a[block], b1);
        }
      }
    }
  }

  // s becomes the weights exp(s - m) with the new maximum m; o and l follow it.
  __device__ void softmax() {
    float shrink[kBlocks][2];
    bool moved = false;
    for_each_row([&](int block, int half) {
      float most = m[block][half];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) most = fmaxf(most, fmaxf(s[block][n][2 * half], s[block][n][2 * half + 1]));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
      const float base = finite_or_zero(most);
      shrink[block][half] = ptx::exp2(m[block][half] - base);
      moved = moved || most != m[block][half];
      m[block][half] = most;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          s[block][n][e] = ptx::exp2(s[block][n][e] - base);
          sum += s[block][n][e];
        }
      l[block][half] = l[block][half] * shrink[block][half] + sum;
    });
    if (!__any_sync(kAllLanes, moved)) return;  // after the first tiles the maxima rarely move
    for_each_row([&](int block, int half) {
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d) {
        o[block][d][2 * half] *= shrink[block][half];
        o[block][d][2 * half + 1] *= shrink[block][half];
      }
    });
  }

  // o += s V
  __device__ void multiply_values(const T* v) {
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      uint32_t a[kBlocks][4];
#pragma unroll
      for (int block = 0; block < kBlocks; ++block)
        accumulators_to_a<T>(a[block], s[block][2 * step], s[block][2 * step + 1]);
#pragma unroll
      for (int n = 0; n < kDim / 16; ++n) {
        uint32_t b0[2], b1[2];
        load_b<kDim>(b0, b1, v, 16 * step, 2 * n);
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
          ptx::mma_m16n8k16<T>(o[block][2 * n], a[block], b0);
          ptx::mma_m16n8k16<T>(o[block][2 * n + 1], a[block], b1);
        }
      }
    }
  }

  // l over the four lanes that share a row.
  __device__ void sum_lanes() {
    for_each_row([&](int block, int half) {
      float sum = l[block][half];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      l[block][half] = sum;
    });
  }

  // Scores from s = q . k where they need nothing but the scale.
  __device__ void scale_scores(float scale) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[block][n][e] *= scale;
  }

  // -inf where a query does not see its key. `row` is the lane's first row, `key` the tile's first key.
  __device__ void mask_band(const Band& band, const PackedRows& rows, int row, int key) {
    const int column = key + threadIdx.x % 4 * 2;
    for_each_row([&](int block, int half) {
      const int i = rows.query(row + 16 * block + 8 * half);
      const int first = band.first_key(i) - column, end = band.end_key(i) - column;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (8 * n + e < first || 8 * n + e >= end) s[block][n][2 * half + e] = -__builtin_inff();
    });
  }

  // f(n, scores of keys 8 n + 2 t and 8 n + 2 t + 1 of the tile, options of their row) for all n and rows of the lane.
  // The body is long, so it stands once per row, for n = 0, and the tile is turned under it.
  template <class F>
  __device__ void for_each_score(const AttentionForward& p, const PackedRows& rows, int row, F&& f) {
    RowOptions options[kBlocks][2];
    for_each_row([&](int block, int half) { options[block][half] = rows.options(p, row + 16 * block + 8 * half); });
#pragma unroll 1
    for (int n = 0; n < kKeys / 8; ++n) {
      for_each_row(
          [&](int block, int half) { f(n, s[block][0][2 * half], s[block][0][2 * half + 1], options[block][half]); });
#pragma unroll
      for (int block = 0; block < kBlocks; ++block)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float first = s[block][0][e];
#pragma unroll
          for (int i = 0; i < kKeys / 8 - 1; ++i) s[block][i][e] = s[block][i + 1][e];
          s[block][kKeys / 8 - 1][e] = first;
        }
    }
  }

  // Scores from s = q . k with everything that may be asked.
  __device__ void apply_options(const AttentionForward& p, const Band& band, const PackedRows& rows, int row, int key) {
    const int column = key + threadIdx.x % 4 * 2;
    for_each_score(p, rows, row, [&](int n, float& even, float& odd, const RowOptions& options) {
      even = final_score<T>(p, band, options, column + 8 * n, even);
      odd = final_score<T>(p, band, options, column + 8 * n + 1, odd);
    });
  }

  // Zeroes the weights that dropout drops (l keeps them).
  __device__ void drop(const AttentionForward& p, const PackedRows& rows, int row, int key) {
    for_each_score(p, rows, row, [&](int n, float& even, float& odd, const RowOptions& options) {
      const uint32_t word = dropout_word(p, options, key / 8 + n, threadIdx.x % 4);
      if (!dropout_keeps(p, word, 0)) even = 0.0f;
      if (!dropout_keeps(p, word, 1)) odd = 0.0f;
    });
  }
};

}  // namespace fastgpt::FASTGPT_ISA
