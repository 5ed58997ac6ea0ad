// What attention's forward and backward share: which keys a query sees, the options of a score, and tiles in shared
// memory with the fragments that tensor cores read from them.
//
// Indices inside a sequence are int: lengths are at most kMaxLength, and offsets into tensors are int64.
#pragma once

#include "core/philox.h"
#include "cuda/core/launch.h"
#include "cuda/core/ptx.cuh"
#include "cuda/core/vector.cuh"

namespace fastgpt::FASTGPT_ISA {

constexpr int kMaxHeadDim = 256;
constexpr int kMaxLength = (1 << 30) - 1;  // so that no sum of a position, a shift and a window overflows
constexpr int kStretch = 16;  // products of floats that are summed in a row; then the sums are
constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// What no kernel here takes; ops.attention refuses it first, with better words.
template <class Params>
inline Status check_attention(const Params& p) {
  if (p.dim > kMaxHeadDim) return {Status::unsupported_shape, 0, p.dim};
  if (p.value_dim > kMaxHeadDim) return {Status::unsupported_shape, 0, p.value_dim};
  if (p.queries > kMaxLength) return {Status::unsupported_shape, 0, p.queries};
  if (p.keys > kMaxLength) return {Status::unsupported_shape, 0, p.keys};
  return {};
}

// --- where things are ---

// Batch row b: its own lengths, and how many rows of the packed tensors come before it (varlen; else 0).
struct Sequence {
  int queries, keys;
  int64_t first_query, first_key;
};
template <class Params>
__device__ inline Sequence sequence_of(const Params& p, int b) {
  Sequence s{static_cast<int>(p.queries), static_cast<int>(p.keys), 0, 0};
  if (p.cu_seqlens_q) {
    s.first_query = p.cu_seqlens_q[b];
    s.queries = static_cast<int>(p.cu_seqlens_q[b + 1] - s.first_query);
  }
  if (p.cu_seqlens_k) {
    s.first_key = p.cu_seqlens_k[b];
    s.keys = static_cast<int>(p.cu_seqlens_k[b + 1] - s.first_key);
  }
  if constexpr (std::is_same_v<Params, AttentionForward>)
    if (p.cache_seqlens) s.keys = max(min(p.cache_seqlens[b], s.keys), 0);
  return s;
}

// Row `row` (from the beginning of the tensor, so with first_query or first_key) of head (b, h).
template <class T>
__device__ inline T* row_of(T* x, const int64_t (&strides)[3], int b, int h, int64_t row) {
  return x + b * strides[0] + h * strides[1] + row * strides[2];
}

// Where lse of head (b, h) and query 0 of the sequence lies.
template <class Params>
__device__ inline int64_t lse_offset(const Params& p, const Sequence& s, int b, int h) {
  return b * p.lse_strides[0] + h * p.lse_strides[1] + s.first_query;
}

// Query i sees the keys [first_key(i), end_key(i)), key j is seen by the queries [first_query(j), end_query(j)); either
// may be empty (first >= end). Both bounds grow with the argument, so those of a tile are the first's and the last's.
struct Band {
  int shift, left, right, queries, keys;

  __device__ int first_key(int i) const { return max(i + shift - left, 0); }
  __device__ int end_key(int i) const { return min(i + shift + right + 1, keys); }
  __device__ int first_query(int j) const { return max(j - shift - right, 0); }
  __device__ int end_query(int j) const { return min(j - shift + left + 1, queries); }
  __device__ bool sees(int i, int j) const { return j < keys && i + shift - left <= j && j <= i + shift + right; }
  // Whether each query of [i, i_end) sees each key of [j, j_end): such a tile needs no mask.
  __device__ bool sees_all(int i, int i_end, int j, int j_end) const {
    return first_key(i_end - 1) <= j && j_end <= end_key(i);
  }
};
template <class Params>
__device__ inline Band band_of(const Params& p, const Sequence& s) {
  const auto side = [](int64_t n) { return n < 0 || n > kMaxLength ? kMaxLength : static_cast<int>(n); };
  return {p.bottom_right ? s.keys - s.queries : 0, side(p.left), side(p.right), s.queries, s.keys};
}

// --- what is done to a score ---

// Whether a weight depends on anything but scale q . k and the band.
template <class Params>
FASTGPT_HOST_DEVICE inline bool has_options(const Params& p) {
  return p.mask || p.alibi || p.softcap > 0 || p.dropout_threshold > 0;
}

// softcap tanh(score / softcap); its derivative by score is 1 - (result / softcap)^2.
template <class Params>
__device__ inline float capped(const Params& p, float score) {
  if (!(p.softcap > 0)) return score;
  const float cap = static_cast<float>(p.softcap);
  return __fmul_rn(cap, tanhf(score / cap));
}

// The options of query i of head (b, h).
struct RowOptions {
  int query;
  int head;      // of dropout: b * heads + h
  float slope;   // of ALiBi; 0: none
  int64_t mask;  // the offset of mask(b, h, i, 0)
};
template <class Params>
__device__ inline RowOptions row_options(const Params& p, int b, int h, int i) {
  RowOptions row{i, static_cast<int>(b * p.heads) + h, 0.0f, 0};
  if (p.alibi) row.slope = p.alibi[b * p.alibi_stride + h];
  if (p.mask) row.mask = b * p.mask_strides[0] + h * p.mask_strides[1] + i * p.mask_strides[2];
  return row;
}

// What is added to the capped score of key j: the mask and ALiBi, -inf where the query does not see the key. Products
// are rounded on their own, so that the backward finds the score that the forward had, whatever a compiler contracts.
template <class T, class Params>
__device__ inline float score_bias(const Params& p, const Band& band, const RowOptions& row, int j) {
  if (!band.sees(row.query, j)) return -__builtin_inff();
  float bias = 0.0f;
  if (p.alibi) bias = -__fmul_rn(row.slope, static_cast<float>(abs(row.query + band.keys - band.queries - j)));
  if (p.mask) {
    const int64_t at = row.mask + j * p.mask_strides[3];
    if (p.mask_bool)
      bias = static_cast<const uint8_t*>(p.mask)[at] ? bias : -__builtin_inff();
    else if (p.mask_dtype == DType::f32)
      bias += static_cast<const float*>(p.mask)[at];
    else
      bias += to_float(static_cast<const T*>(p.mask)[at]);
  }
  return bias;
}

// The weights that dropout keeps are multiplied by this: 1 without dropout, 0 where all are dropped.
template <class Params>
__device__ inline float dropout_scale(const Params& p) {
  return p.dropout_threshold < 65536 ? 65536.0f / static_cast<float>(65536 - p.dropout_threshold) : 0.0f;
}
// The random word that decides on keys 8 block + 2 pair (its low half) and 8 block + 2 pair + 1 (its high half): those
// of one lane of an accumulator whose columns are keys.
template <class Params>
__device__ inline uint32_t dropout_word(const Params& p, const RowOptions& row, int block, int pair) {
  const PhiloxWords words = dropout_words(*p.dropout_seed, row.head, row.query, block);
  const uint32_t low = pair & 1 ? words.word[1] : words.word[0], high = pair & 1 ? words.word[3] : words.word[2];
  return pair & 2 ? high : low;
}
// Whether dropout keeps the weight of the key whose 16 random bits are the half `n` (0, 1) of the word.
template <class Params>
__device__ inline bool dropout_keeps(const Params& p, uint32_t word, int n) {
  return static_cast<int>(word >> n * 16 & 0xffffu) >= static_cast<int>(p.dropout_threshold);
}

// --- tiles ---
//
// A tile is [rows][kCols] of T in shared memory, in chunks of 16 bytes. Chunk c of row r lies where chunk
// c ^ (r's low bits) would: eight rows' chunks of one column, which is what ldmatrix reads at once, then lie in eight
// different groups of four banks, and so do the eight chunks of 128 bytes that are written at once.

template <class T, int kCols>
__device__ inline int tile_offset(int row, int chunk) {
  constexpr int kChunks = kCols / kPack<T>;
  static_assert(kChunks >= 2 && (kChunks & (kChunks - 1)) == 0, "a row is a power of two of chunks");
  constexpr int kRowsPerLine = kChunks < 8 ? 8 / kChunks : 1;  // a line: 128 bytes, all banks once
  return row * kCols + (chunk ^ (row / kRowsPerLine & (kChunks < 8 ? kChunks - 1 : 7))) * kPack<T>;
}

// Whether rows of a tensor can be read 16 bytes at a time.
template <class T>
inline bool rows_aligned(const void* x, const int64_t (&strides)[3], int64_t dim) {
  constexpr int64_t kUnit = kPack<T>;
  return aligned16(x) && strides[0] % kUnit == 0 && strides[1] % kUnit == 0 && strides[2] % kUnit == 0 &&
         dim % kUnit == 0;
}

// Fills a tile, by the kThreads of the block or by a warp: row r from source(r), `dim` elements and then zeros; zeros
// where source(r) is null. With `aligned` (rows_aligned) by cp.async, which the caller commits and waits for; else by
// plain accesses. `anywhere` is an address that can be read. Either way the tile is there after the barrier that
// follows the wait. kUnroll rows a thread at once: few where source() is long.
template <int kRows, int kCols, int kThreads, int kUnroll = 64, class T, class Source>
__device__ inline void load_tile(T* tile, const T* anywhere, int dim, bool aligned, Source source) {
  constexpr int kChunks = kCols / kPack<T>, kStep = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kRows % kStep == 0);
  const int thread = threadIdx.x % kThreads, chunk = thread % kChunks, first = thread / kChunks;
  const int column = chunk * kPack<T>;
  if (aligned) {
#pragma unroll kUnroll
    for (int r = 0; r < kRows; r += kStep) {
      const T* row = source(first + r);
      const bool valid = row != nullptr && column < dim;
      ptx::cp_async_16(tile + tile_offset<T, kCols>(first + r, chunk), valid ? row + column : anywhere, valid);
    }
    return;
  }
#pragma unroll 1
  for (int r = 0; r < kRows; r += kStep) {
    const T* row = source(first + r);
    float values[kPack<T>];
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i)
      values[i] = row != nullptr && column + i < dim ? to_float(row[column + i]) : 0.0f;
    Pack<T> pack;
    pack.from_floats(values);
    store_pack(tile + tile_offset<T, kCols>(first + r, chunk), pack);
  }
}

// The same for aligned rows that lie `stride` apart, of which the first `count` are there: fewer addresses to hold.
template <int kRows, int kCols, int kThreads, class T>
__device__ inline void load_rows(T* tile, const T* rows, int64_t stride, int count, int dim) {
  constexpr int kChunks = kCols / kPack<T>, kStep = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kRows % kStep == 0);
  const int thread = threadIdx.x % kThreads, chunk = thread % kChunks, first = thread / kChunks;
  const T* const from = rows + first * stride + chunk * kPack<T>;
#pragma unroll
  for (int r = 0; r < kRows; r += kStep) {
    const bool valid = first + r < count && chunk * kPack<T> < dim;
    ptx::cp_async_16(tile + tile_offset<T, kCols>(first + r, chunk), valid ? from + r * stride : rows, valid);
  }
}

// --- fragments of mma.m16n8k16 from tiles of 16-bit elements ---

// A[16, 16] at (row, 8 chunk) of a tile that holds A.
template <int kCols, class T>
__device__ inline void load_a(uint32_t (&a)[4], const T* tile, int row, int chunk) {
  const int lane = threadIdx.x % kWarp;
  ptx::ldmatrix_x4(a, tile + tile_offset<T, kCols>(row + lane % 16, chunk + lane / 16));
}
// A[16, 16] where the tile holds A transposed: its row `row` is A's column 0, its column 8 chunk A's row 0.
template <int kCols, class T>
__device__ inline void load_a_transposed(uint32_t (&a)[4], const T* tile, int row, int chunk) {
  const int lane = threadIdx.x % kWarp;
  ptx::ldmatrix_x4_trans(a, tile + tile_offset<T, kCols>(row + lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2));
}
// B[16, 16], two neighbours in n, where the tile holds B transposed (rows are n, as keys in Q K^T).
template <int kCols, class T>
__device__ inline void load_b_transposed(uint32_t (&b0)[2], uint32_t (&b1)[2], const T* tile, int row, int chunk) {
  const int lane = threadIdx.x % kWarp;
  uint32_t r[4];
  ptx::ldmatrix_x4(r, tile + tile_offset<T, kCols>(row + lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2));
  b0[0] = r[0], b0[1] = r[1], b1[0] = r[2], b1[1] = r[3];
}
// B[16, 16], two neighbours in n, of a tile that holds B (rows are k, as keys in P V).
template <int kCols, class T>
__device__ inline void load_b(uint32_t (&b0)[2], uint32_t (&b1)[2], const T* tile, int row, int chunk) {
  const int lane = threadIdx.x % kWarp;
  uint32_t r[4];
  ptx::ldmatrix_x4_trans(r, tile + tile_offset<T, kCols>(row + lane % 16, chunk + lane / 16));
  b0[0] = r[0], b0[1] = r[1], b1[0] = r[2], b1[1] = r[3];
}
// The A[16, 16] that two neighbouring accumulators [16, 8] make, rounded to T.
template <class T>
__device__ inline void accumulators_to_a(uint32_t (&a)[4], const float (&c0)[4], const float (&c1)[4]) {
  a[0] = pack_pair<T>(c0[0], c0[1]);
  a[1] = pack_pair<T>(c0[2], c0[3]);
  a[2] = pack_pair<T>(c1[0], c1[1]);
  a[3] = pack_pair<T>(c1[2], c1[3]);
}

}  // namespace fastgpt::FASTGPT_ISA
