// attention_forward: out = dropped(softmax(score(scale Q K^T))) V and the log-sum-exp of every query; FlashAttention-2
// (Dao, 2023) on tensor cores for bfloat16 and float16. csrc/fastgpt.h has the formulas and options.
//
// Shapes: B batch, T queries, S keys, H heads, Hkv key/value heads, D head dim.
// Flops: 4 B H T S D, half of it when causal. Bytes: Q and out once, K and V once per tile of rows (from L2 but for the
// first time).
//
// One block of four warps per tile of rows and key/value head; rows are (query, head of the group) pairs. It goes over
// the tiles of keys that its band meets: while it multiplies one, cp.async brings the next, with one barrier a tile.
// Scores, weights and the output stay in registers: the accumulators of Q K^T are the A fragments of P V as they lie.
// Tiles come in two kinds:
//   plain     no option but the band, all rows 16-byte aligned. A warp has 32 rows (16 for D > 128), so each fragment
//             of K and V read from shared memory serves two products. Only tiles that the band cuts are masked, and a
//             warp skips those that none of its rows sees.
//   general   masks, ALiBi, softcap, dropout, pages, any alignment and head dim: 16 rows a warp, and whatever a score
//             needs is looked up where it is needed, by run-time flags.
#include "cuda/attention_forward.cuh"

namespace fastgpt::FASTGPT_ISA {
namespace {

template <int kDim, bool kPlain>
struct Shape {
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = kPlain && kDim <= 128 ? 2 : 1;  // of 16 rows a warp
  static constexpr int kRows = 16 * kBlocks * kThreads / kWarp;
  static constexpr int kKeys = kPlain && kDim == 64 ? 64 : 32;
  static constexpr bool kHoldQ = kDim == 64;  // in registers: read from shared memory once
  static constexpr int kTileElements = kKeys * kDim;
  template <class T>
  static constexpr size_t kShared = sizeof(T) * (kRows * kDim + 4 * kTileElements);  // Q, and two of K and V
};

template <class T, int kDim, bool kPlain>
__global__ void __launch_bounds__(128, kDim <= 128 ? 2 : 1)
    attention_forward_kernel(const AttentionForward p, const int tiles, const bool aligned) {
  using Sizes = Shape<kDim, kPlain>;
  constexpr int kThreads = Sizes::kThreads, kRows = Sizes::kRows, kKeys = Sizes::kKeys, kBlocks = Sizes::kBlocks;
  constexpr int kTileElements = Sizes::kTileElements;
  FASTGPT_SHARED_DYNAMIC(T, q_tile);
  T* const kv_tiles = q_tile + kRows * kDim;

  const int head_index = blockIdx.x / tiles, kv_heads = static_cast<int>(p.kv_heads);
  const int tile = tiles - 1 - static_cast<int>(blockIdx.x % tiles);  // causal: the longest first
  const int batch = head_index / kv_heads;
  const Sequence sequence = sequence_of(p, batch);
  const PackedRows rows(p, sequence, batch, head_index % kv_heads);
  const Band band = band_of(p, sequence);
  const int first_row = tile * kRows;
  if (first_row >= rows.count) return;

  const bool fast = kPlain || aligned;
  const T* const q = static_cast<const T*>(p.q);
  const T* const k = static_cast<const T*>(p.k);
  const T* const v = static_cast<const T*>(p.v);
  const int dim = static_cast<int>(p.dim), value_dim = static_cast<int>(p.value_dim);
  const auto load_keys = [&](int key, int stage) {
    T* const k_tile = kv_tiles + stage * 2 * kTileElements;
    if constexpr (kPlain) {
      const int64_t row = sequence.first_key + key;
      const int count = sequence.keys - key;
      load_rows<kKeys, kDim, kThreads>(k_tile, row_of(k, p.k_strides, batch, rows.kv_head, row), p.k_strides[2], count,
                                       dim);
      load_rows<kKeys, kDim, kThreads>(k_tile + kTileElements, row_of(v, p.v_strides, batch, rows.kv_head, row),
                                       p.v_strides[2], count, value_dim);
    } else {
      load_tile<kKeys, kDim, kThreads>(k_tile, k, dim, fast,
                                       [&](int r) { return key_row(p, k, p.k_strides, sequence, rows, key + r); });
      load_tile<kKeys, kDim, kThreads>(k_tile + kTileElements, v, value_dim, fast,
                                       [&](int r) { return key_row(p, v, p.v_strides, sequence, rows, key + r); });
    }
    ptx::cp_async_commit();
  };

  // The keys that the block's rows see, and those of this warp's rows.
  const int last_row = min(first_row + kRows, rows.count) - 1;
  const int begin = band.first_key(rows.query(first_row)) / kKeys * kKeys, end = band.end_key(rows.query(last_row));
  const int lane = threadIdx.x % kWarp, warp_tile_row = threadIdx.x / kWarp * 16 * kBlocks;
  const int warp_row = first_row + warp_tile_row, own_row = warp_row + lane / 4;
  const int warp_first = rows.query(min(warp_row, last_row));
  const int warp_last = rows.query(min(warp_row + 16 * kBlocks - 1, last_row));
  const int warp_begin = band.first_key(warp_first), warp_end = warp_row <= last_row ? band.end_key(warp_last) : 0;
  const int whole_begin = band.first_key(warp_last), whole_end = band.end_key(warp_first);  // seen by all rows

  WarpAttention<T, kDim, kBlocks, kKeys> warp;
  warp.clear();
  [[maybe_unused]] uint32_t held_q[Sizes::kHoldQ ? kBlocks : 1][Sizes::kHoldQ ? kDim / 16 : 1][4];
  if (begin < end) {
    load_tile<kRows, kDim, kThreads, 1>(
        q_tile, q, dim, fast, [&](int r) { return packed_row(q, p.q_strides, sequence, rows, first_row + r); });
    load_keys(begin, 0);
  }
  for (int key = begin, stage = 0; key < end; key += kKeys, stage ^= 1) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this tile is there for all; all are done with the other stage
    if (key + kKeys < end) load_keys(key + kKeys, stage ^ 1);
    if constexpr (Sizes::kHoldQ) {
      if (key == begin) {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block)
#pragma unroll
          for (int step = 0; step < kDim / 16; ++step)
            load_a<kDim>(held_q[block][step], q_tile, warp_tile_row + 16 * block, 2 * step);
      }
    }
    if (key + kKeys <= warp_begin || key >= warp_end) continue;
    const T* const k_tile = kv_tiles + stage * 2 * kTileElements;
    warp.multiply_keys(k_tile, [&](uint32_t (&a)[4], int block, int step) {
      if constexpr (Sizes::kHoldQ) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = held_q[block][step][i];
      } else {
        load_a<kDim>(a, q_tile, warp_tile_row + 16 * block, 2 * step);
      }
    });
    const bool cut = key < whole_begin || key + kKeys > whole_end;
    if constexpr (kPlain) {
      warp.scale_scores(static_cast<float>(p.scale) * kLog2e);
      if (cut) warp.mask_band(band, rows, own_row, key);
    } else if (cut || has_options(p)) {
      warp.apply_options(p, band, rows, own_row, key);
    } else {
      warp.scale_scores(static_cast<float>(p.scale) * kLog2e);
    }
    warp.softmax();
    if constexpr (!kPlain)
      if (p.dropout_threshold > 0) warp.drop(p, rows, own_row, key);
    warp.multiply_values(k_tile + kTileElements);
  }

  // Through the warp's own rows of the Q tile, so that 16 bytes of a row are written at once.
  warp.sum_lanes();
  __syncwarp();
  warp.for_each_row([&](int block, int half) {
    const int r = own_row + 16 * block + 8 * half, tile_row = r - first_row;
    const int head = rows.head(min(r, last_row));
    const RowEnd row_end = end_row<T>(p, head, warp.m[block][half], warp.l[block][half]);
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d)
      store4(q_tile + tile_offset<T, kDim>(tile_row, d) + lane % 4 * 2,
             pack_pair<T>(finished<T>(warp.o[block][d][2 * half], row_end),
                          finished<T>(warp.o[block][d][2 * half + 1], row_end)));
    if (r <= last_row && lane % 4 == 0) p.lse[lse_offset(p, sequence, batch, head) + rows.query(r)] = row_end.lse;
  });
  __syncwarp();
  constexpr int kChunks = kDim / kPack<T>;
  const int chunk = lane % kChunks, column = chunk * kPack<T>;
#pragma unroll 1
  for (int r = lane / kChunks; r < 16 * kBlocks && warp_row + r <= last_row; r += kWarp / kChunks) {
    T* const to = packed_row(static_cast<T*>(p.out), p.out_strides, sequence, rows, warp_row + r);
    const T* const from = q_tile + tile_offset<T, kDim>(warp_tile_row + r, chunk);
    if (fast) {
      if (column < value_dim) store_pack(to + column, load_pack(from));
    } else {
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i)
        if (column + i < value_dim) to[column + i] = from[i];
    }
  }
}

template <class T, int kDim, bool kPlain>
Status launch_forward(const AttentionForward& p, Launch& launch, bool aligned) {
  const int64_t tiles = ceil_div(p.queries * (p.heads / p.kv_heads), Shape<kDim, kPlain>::kRows);
  const int64_t blocks = tiles * p.batch * p.kv_heads;
  if (blocks == 0) return {};
  if (blocks > 0x7fffffff) return {Status::unsupported_shape, 0, blocks};
  return launch.run<attention_forward_kernel<T, kDim, kPlain>>(
      static_cast<unsigned>(blocks), Shape<kDim, kPlain>::kThreads, Shape<kDim, kPlain>::template kShared<T>, p,
      static_cast<int>(tiles), aligned);
}

}  // namespace

Status attention_forward(const AttentionForward& p, Launch& launch) {
  const Status status = check_attention(p);
  if (status.code != Status::ok) return status;
  if (p.dtype == DType::f32) return attention_forward_f32(p, launch);
  if (splits_keys(p)) return attention_decode(p, launch);
  return dispatch_dtype(p.dtype, [&](auto t) -> Status {
    using T = typename decltype(t)::type;
    if constexpr (sizeof(T) == 2) {
      const bool aligned = all_aligned<T>(p);
      return dispatch_dim(p, [&](auto dim) -> Status {
        if (aligned && !has_options(p) && !p.block_table)
          return launch_forward<T, decltype(dim)::value, true>(p, launch, true);
        return launch_forward<T, decltype(dim)::value, false>(p, launch, aligned);
      });
    }
    return {Status::unsupported_dtype, 0, static_cast<int64_t>(p.dtype)};
  });
}

}  // namespace fastgpt::FASTGPT_ISA
