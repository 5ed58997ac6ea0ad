// attention_decode: attention_forward for few queries, as when decoding with a cache (Flash-Decoding: Dao et al.,
// 2023), for bfloat16 and float16; and the sum of pieces of keys, for float too.
//
// Shapes: B batch, T queries, S keys, H heads, Hkv key/value heads, D head dim.
// Bytes: K and V once, 2 B Hkv S D elements, and what is left is small: this is bound by memory. Flops: 4 B H T S D.
//
// With few queries there are few tiles of rows, so the keys are split: a block takes 16 packed rows, one key/value head
// and one piece of the keys (256 of them up to 16384, then a 64th), and combine_kernel adds up the pieces. Inside a
// block the warps split the piece again: each goes over its own tiles of keys with its own two stages of cp.async, so
// no warp waits for another until the end, where their results are added through shared memory. 16 rows are what mma
// has; with one query and one head in a group 15 of them are zeros, which costs nothing that memory would not take
// anyway.
#include "cuda/attention_forward.cuh"
#include "cuda/core/reduce.cuh"

namespace fastgpt::FASTGPT_ISA {
namespace {

constexpr int kRows = 16;

template <int kDim>
struct Shape {
  static constexpr int kWarps = kDim == 256 ? 2 : 4;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kKeys = kDim == 64 ? 32 : 16;  // of a warp's tile
  static constexpr int kResident = kDim == 64 ? 3 : 2;  // blocks an SM, at least, by registers
  static constexpr int kTileElements = kKeys * kDim;
  static constexpr int kWarpElements = 4 * kTileElements;  // two stages of K and V
  static constexpr int kResultStride = kDim + 8;  // floats; eight rows' pairs of columns then lie in different banks
  template <class T>
  static constexpr size_t kShared = sizeof(T) * (kRows * kDim + kWarps * kWarpElements);
  static_assert(kRows * (kResultStride + 2) * 4 <= kWarpElements * 2, "a warp's result takes the place of its tiles");
  static_assert(kSplitUnit % kKeys == 0);
};

// The maximum over warps or pieces: their sums are multiplied by weight(m) before they are added.
template <class T>
struct Rescale {
  float m, base;
  __device__ explicit Rescale(float m) : m(m), base(finite_or_zero(m)) {}
  __device__ float weight(float other) const { return exponential<T>(other - base); }
};

template <class T, int kDim>
__global__ void __launch_bounds__(Shape<kDim>::kThreads, Shape<kDim>::kResident)
    attention_decode_kernel(const AttentionForward p, const Partials partials, const int tiles, const int group,
                            const bool aligned) {
  using Sizes = Shape<kDim>;
  constexpr int kWarps = Sizes::kWarps, kKeys = Sizes::kKeys, kTileElements = Sizes::kTileElements;
  FASTGPT_SHARED_DYNAMIC(T, q_tile);

  const int head_index = blockIdx.x / tiles, kv_heads = static_cast<int>(p.kv_heads);
  const int batch = head_index / kv_heads, piece = blockIdx.y;
  const Sequence sequence = sequence_of(p, batch);
  const PackedRows rows = packed_rows(sequence, batch, head_index % kv_heads, group);
  const Band band = band_of(p, sequence);
  const int first_row = static_cast<int>(blockIdx.x % tiles) * kRows;
  if (first_row >= rows.count) return;
  const int last_row = min(first_row + kRows, rows.count) - 1;
  const int first_query = rows.query(first_row), last_query = rows.query(last_row);

  const int length = split_length(p, sequence.keys);
  const int begin = max(piece * length, band.first_key(first_query) / kSplitUnit * kSplitUnit);
  const int end = min((piece + 1) * length, band.end_key(last_query));
  if (partials.splits > 1 && begin >= end) return;  // combine_kernel does not look at it

  const T* const q = static_cast<const T*>(p.q);
  const T* const k = static_cast<const T*>(p.k);
  const T* const v = static_cast<const T*>(p.v);
  const int dim = static_cast<int>(p.dim), value_dim = static_cast<int>(p.value_dim);
  const int lane = threadIdx.x % kWarp, warp_index = threadIdx.x / kWarp, own_row = first_row + lane / 4;
  T* const tiles_of_warp = q_tile + kRows * kDim + warp_index * Sizes::kWarpElements;
  const auto load_keys = [&](int key, int stage) {
    T* const k_tile = tiles_of_warp + stage * 2 * kTileElements;
    load_tile<kKeys, kDim, kWarp>(k_tile, k, dim, aligned,
                                  [&](int r) { return key_row(p, k, p.k_strides, sequence, rows, key + r); });
    load_tile<kKeys, kDim, kWarp>(k_tile + kTileElements, v, value_dim, aligned,
                                  [&](int r) { return key_row(p, v, p.v_strides, sequence, rows, key + r); });
  };

  int key = begin + warp_index * kKeys;
  load_tile<kRows, kDim, Sizes::kThreads, 1>(
      q_tile, q, dim, aligned, [&](int r) { return packed_row(q, p.q_strides, sequence, rows, first_row + r); });
  if (key < end) load_keys(key, 0);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();  // the Q tile is everyone's; from here on each warp is on its own

  WarpAttention<T, kDim, 1, kKeys> warp;
  warp.clear();
  for (int stage = 0; key < end; stage ^= 1) {
    const int next = key + kWarps * kKeys;
    ptx::cp_async_wait<0>();
    __syncwarp();  // this tile is there for all lanes; all are done with the other stage
    if (next < end) {
      load_keys(next, stage ^ 1);
      ptx::cp_async_commit();
    }
    const T* const k_tile = tiles_of_warp + stage * 2 * kTileElements;
    warp.multiply_keys(k_tile, [&](uint32_t (&a)[4], int, int step) { load_a<kDim>(a, q_tile, 0, 2 * step); });
    if (has_options(p) || !band.sees_all(first_query, last_query + 1, key, key + kKeys))
      warp.apply_options(p, band, rows, own_row, key);
    else
      warp.scale_scores(static_cast<float>(p.scale) * kLog2e);
    warp.softmax();
    if (p.dropout_threshold > 0) warp.drop(p, rows, own_row, key);
    warp.multiply_values(k_tile + kTileElements);
    key = next;
  }

  // The warps' results, each in the place of its tiles: o[16][kResultStride], then m[16] and l[16].
  float* const results = reinterpret_cast<float*>(q_tile + kRows * kDim);
  constexpr int kResultFloats = Sizes::kWarpElements * static_cast<int>(sizeof(T)) / 4;
  float* const own = results + warp_index * kResultFloats;
  warp.sum_lanes();
  __syncwarp();
  warp.for_each_row([&](int, int half) {
    const int r = lane / 4 + 8 * half;
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d)
      store8(own + r * Sizes::kResultStride + 8 * d + lane % 4 * 2,
             uint2{__float_as_uint(warp.o[0][d][2 * half]), __float_as_uint(warp.o[0][d][2 * half + 1])});
    if (lane % 4 == 0) {
      own[kRows * Sizes::kResultStride + r] = warp.m[0][half];
      own[kRows * (Sizes::kResultStride + 1) + r] = warp.l[0][half];
    }
  });
  __syncthreads();

  constexpr int kChunks = kDim / 8;
#pragma unroll 1
  for (int at = threadIdx.x; at < kRows * kChunks; at += Sizes::kThreads) {
    const int r = at / kChunks, column = at % kChunks * 8, row = first_row + r;
    if (row > last_row) break;
    const float* const maxima = results + kRows * Sizes::kResultStride + r;
    float m = maxima[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) m = fmaxf(m, maxima[w * kResultFloats]);
    const Rescale<T> rescale(m);
    float l = 0.0f, o[8] = {};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = rescale.weight(maxima[w * kResultFloats]);
      l += maxima[w * kResultFloats + kRows] * weight;
      const float* const from = results + w * kResultFloats + r * Sizes::kResultStride + column;
#pragma unroll
      for (int i = 0; i < 8; ++i) o[i] += from[i] * weight;
    }
    if (partials.splits > 1) {
      const int64_t index = partial_index(p, partials, rows, row, piece);
      float* const to = partials.o + index * kDim + column;
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        Pack<float> pack;
        pack.from_floats({o[i], o[i + 1], o[i + 2], o[i + 3]});
        store_pack(to + i, pack);
      }
      if (column == 0) {
        partials.ml[2 * index] = m;
        partials.ml[2 * index + 1] = l;
      }
      continue;
    }
    const int head = rows.head(row);
    const RowEnd row_end = end_row<T>(p, head, m, l);
    if (column == 0) p.lse[lse_offset(p, sequence, batch, head) + rows.query(row)] = row_end.lse;
#pragma unroll
    for (int i = 0; i < 8; ++i) o[i] = finished<T>(o[i], row_end);
    T* const to = packed_row(static_cast<T*>(p.out), p.out_strides, sequence, rows, row) + column;
    if (aligned) {
      Pack<T> pack;
      pack.from_floats(o);
      if (column < value_dim) store_pack(to, pack);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (column + i < value_dim) to[i] = cast<T>(o[i]);
    }
  }
}

constexpr int kCombineWarps = 4;

// One warp a row: the pieces' maxima and sums first, a lane a piece, then o, 32 columns at once.
template <class T>
__global__ void __launch_bounds__(kCombineWarps* kWarp)
    combine_kernel(const AttentionForward p, const Partials partials, const int group, const int dim) {
  const int lane = threadIdx.x % kWarp;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kCombineWarps + threadIdx.x / kWarp;
  const int64_t rows_per_head = p.queries * group;
  const int head_index = static_cast<int>(index / rows_per_head), kv_heads = static_cast<int>(p.kv_heads);
  const int batch = head_index / kv_heads, row = static_cast<int>(index % rows_per_head);
  if (batch >= p.batch) return;
  const Sequence sequence = sequence_of(p, batch);
  const PackedRows rows = packed_rows(sequence, batch, head_index % kv_heads, group);
  if (row >= rows.count) return;
  const Band band = band_of(p, sequence);
  const int query = rows.query(row), length = split_length(p, sequence.keys);
  const int first_key = band.first_key(query), end_key = band.end_key(query);
  const int begin = first_key / length, end = first_key < end_key ? (end_key - 1) / length + 1 : begin;

  const int64_t first = partial_index(p, partials, rows, row, 0);
  const float* const ml = partials.ml + 2 * first;
  float m = -__builtin_inff();
  for (int piece = begin + lane; piece < end; piece += kWarp) m = fmaxf(m, ml[2 * piece]);
  const Rescale<T> rescale(warp_max(m));
  float l = 0.0f;
  for (int piece = begin + lane; piece < end; piece += kWarp) l += ml[2 * piece + 1] * rescale.weight(ml[2 * piece]);
  const int head = rows.head(row);
  const RowEnd row_end = end_row<T>(p, head, rescale.m, warp_sum(l));
  if (lane == 0) p.lse[lse_offset(p, sequence, batch, head) + query] = row_end.lse;
  T* const to = packed_row(static_cast<T*>(p.out), p.out_strides, sequence, rows, row);
  for (int column = lane; column < p.value_dim; column += kWarp) {
    float o = 0.0f;
#pragma unroll 8
    for (int piece = begin; piece < end; ++piece)
      o += partials.o[(first + piece) * dim + column] * rescale.weight(ml[2 * piece]);
    to[column] = cast<T>(finished<T>(o, row_end));
  }
}

}  // namespace

Status combine_partials(const AttentionForward& p, Launch& launch, const Partials& partials, int dim) {
  if (partials.splits == 1) return {};
  return dispatch_dtype(p.dtype, [&](auto t) -> Status {
    using T = typename decltype(t)::type;
    const auto blocks = static_cast<unsigned>(ceil_div(p.batch * p.heads * p.queries, kCombineWarps));
    return launch.run<combine_kernel<T>>(blocks, kCombineWarps * kWarp, 0, p, partials, group_of(p), dim);
  });
}

Status attention_decode(const AttentionForward& p, Launch& launch) {
  return dispatch_dtype(p.dtype, [&](auto t) -> Status {
    using T = typename decltype(t)::type;
    if constexpr (sizeof(T) == 2) {
      return dispatch_dim(p, [&](auto dim) -> Status {
        constexpr int kDim = decltype(dim)::value;
        const Partials partials = make_partials(p, launch, kDim);
        const int64_t tiles = ceil_div(p.queries * (p.heads / p.kv_heads), kRows);
        const int64_t blocks = tiles * p.batch * p.kv_heads;
        if (blocks == 0) return {};
        if (blocks > 0x7fffffff) return {Status::unsupported_shape, 0, blocks};
        if (partials.splits > 65535) return {Status::unsupported_shape, 0, partials.splits};
        const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(partials.splits));
        const Status status = launch.run<attention_decode_kernel<T, kDim>>(
            grid, Shape<kDim>::kThreads, Shape<kDim>::template kShared<T>, p, partials, static_cast<int>(tiles),
            group_of(p), all_aligned<T>(p));
        return status.code == Status::ok ? combine_partials(p, launch, partials, kDim) : status;
      });
    }
    return {Status::unsupported_dtype, 0, static_cast<int64_t>(p.dtype)};
  });
}

}  // namespace fastgpt::FASTGPT_ISA
