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

constexpr int kThreads = 128;

template <int kDim, bool kPlain>
struct Shape {
  static constexpr int kBlocks = kPlain && kDim <= 128 ? 2 : 1;  // of 16 rows a warp
  static constexpr int kRows = 16 * kBlocks * kThreads / kWarp;
  static constexpr int kKeys = kPlain && kDim == 64 ? 64 : 32;
  static constexpr int kTileElements = kKeys * kDim;
  template <class T>
  static constexpr size_t kShared = sizeof(T) * (kRows * kDim + 4 * kTileElements);  // Q, and two of K and V
};

// What a block and its warps need to know again and again. In shared memory: registers are what there is too little of.
template <class T>
struct Facts {
  struct Limits {
    int begin, end;  // of the keys that some row of a warp sees
    int whole_begin, whole_end;  // of those that all its rows see
  };
  const T *k, *v;  // of the head's first key; plain tiles
  Sequence sequence;
  Band band;
  PackedRows rows;
  int first_row, end;
  Limits warps[kThreads / kWarp];
};

// The end of a warp's rows.
template <class T, int kDim, bool kPlain, class Warp>
__device__ inline void write_rows(const AttentionForward& p, Warp& warp, T* q_tile, const Facts<T>& facts,
                                  bool aligned) {
  constexpr int kBlocks = Shape<kDim, kPlain>::kBlocks, kRows = Shape<kDim, kPlain>::kRows;
  const Sequence& sequence = facts.sequence;
  const PackedRows& rows = facts.rows;
  const int first_row = facts.first_row, batch = rows.batch;
  const int value_dim = static_cast<int>(p.value_dim), last_row = min(first_row + kRows, rows.count) - 1;
  const int lane = threadIdx.x % kWarp, warp_tile_row = threadIdx.x / kWarp * 16 * kBlocks;
  const int warp_row = first_row + warp_tile_row, own_row = warp_row + lane / 4;

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
    if (kPlain || aligned) {
      if (column < value_dim) store_pack(to + column, load_pack(from));
    } else {
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i)
        if (column + i < value_dim) to[column + i] = from[i];
    }
  }
}

template <class T, int kDim, bool kPlain>
__global__ void __launch_bounds__(kThreads, kDim <= 128 ? 2 : 1)
    attention_forward_kernel(const AttentionForward p, const int tiles, const int group, const bool aligned) {
  using Sizes = Shape<kDim, kPlain>;
  constexpr int kRows = Sizes::kRows, kKeys = Sizes::kKeys, kBlocks = Sizes::kBlocks;
  constexpr int kTileElements = Sizes::kTileElements;
  FASTGPT_SHARED_DYNAMIC(T, q_tile);
  FASTGPT_SHARED(Facts<T>, shared_facts, 1);
  const Facts<T>& facts = shared_facts[0];
  T* const kv_tiles = q_tile + kRows * kDim;
  const T* const q = static_cast<const T*>(p.q);
  const T* const k = static_cast<const T*>(p.k);
  const T* const v = static_cast<const T*>(p.v);
  const int dim = static_cast<int>(p.dim), value_dim = static_cast<int>(p.value_dim);

  const auto stage_of = [&](int key) { return kv_tiles + (key / kKeys & 1) * 2 * kTileElements; };  // of K, then V
  const auto load_keys = [&](int key) {
    T* const k_tile = stage_of(key);
    if constexpr (kPlain) {
      const int count = facts.sequence.keys - key;
      load_rows<kKeys, kDim, kThreads>(k_tile, facts.k + key * p.k_strides[2], p.k_strides[2], count, dim);
      load_rows<kKeys, kDim, kThreads>(k_tile + kTileElements, facts.v + key * p.v_strides[2], p.v_strides[2], count,
                                       value_dim);
    } else {
      load_tile<kKeys, kDim, kThreads>(k_tile, k, dim, aligned, [&](int r) {
        return key_row(p, k, p.k_strides, facts.sequence, facts.rows, key + r);
      });
      load_tile<kKeys, kDim, kThreads>(k_tile + kTileElements, v, value_dim, aligned, [&](int r) {
        return key_row(p, v, p.v_strides, facts.sequence, facts.rows, key + r);
      });
    }
    ptx::cp_async_commit();
  };

  int key;
  {
    const int head_index = blockIdx.x / tiles, kv_heads = static_cast<int>(p.kv_heads);
    const int tile = tiles - 1 - static_cast<int>(blockIdx.x % tiles);  // causal: the longest first
    const int batch = head_index / kv_heads, kv_head = head_index % kv_heads, first_row = tile * kRows;
    const Sequence sequence = sequence_of(p, batch);
    const PackedRows rows = packed_rows(sequence, batch, kv_head, group);
    const Band band = band_of(p, sequence);
    if (first_row >= rows.count) return;
    const int last_row = min(first_row + kRows, rows.count) - 1;
    const int end = band.end_key(rows.query(last_row));
    if (threadIdx.x == 0) {
      shared_facts[0].k = row_of(k, p.k_strides, batch, kv_head, sequence.first_key);
      shared_facts[0].v = row_of(v, p.v_strides, batch, kv_head, sequence.first_key);
      shared_facts[0].sequence = sequence;
      shared_facts[0].band = band;
      shared_facts[0].rows = rows;
      shared_facts[0].first_row = first_row;
      shared_facts[0].end = end;
    }
    if (threadIdx.x % kWarp == 0) {
      const int row = first_row + threadIdx.x / kWarp * 16 * kBlocks;
      const int first = rows.query(min(row, last_row)), last = rows.query(min(row + 16 * kBlocks - 1, last_row));
      shared_facts[0].warps[threadIdx.x / kWarp] = {band.first_key(first), row <= last_row ? band.end_key(last) : 0,
                                                    band.first_key(last), band.end_key(first)};
    }
    key = band.first_key(rows.query(first_row)) / kKeys * kKeys;
  }
  __syncthreads();

  WarpAttention<T, kDim, kBlocks, kKeys> warp;
  warp.clear();
  const int warp_tile_row = threadIdx.x / kWarp * 16 * kBlocks;
  if (key < facts.end) {
    load_tile<kRows, kDim, kThreads, 1>(q_tile, q, dim, kPlain || aligned, [&](int r) {
      return packed_row(q, p.q_strides, facts.sequence, facts.rows, facts.first_row + r);
    });
    load_keys(key);
  }
  for (; key < facts.end; key += kKeys) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this tile is there for all; all are done with the other stage
    if (key + kKeys < facts.end) load_keys(key + kKeys);
    const T* const k_tile = stage_of(key);
    const typename Facts<T>::Limits& own = facts.warps[threadIdx.x / kWarp];
    if (key + kKeys > own.begin && key < own.end) {
      warp.multiply_keys(k_tile, [&](uint32_t (&a)[4], int block, int step) {
        load_a<kDim>(a, q_tile, warp_tile_row + 16 * block, 2 * step);
      });
      const int own_row = facts.first_row + warp_tile_row + threadIdx.x % kWarp / 4;
      const bool cut = key < own.whole_begin || key + kKeys > own.whole_end;
      if constexpr (kPlain) {
        warp.scale_scores(static_cast<float>(p.scale) * kLog2e);
        if (cut) warp.mask_band(facts.band, facts.rows, own_row, key);
      } else if (cut || has_options(p)) {
        warp.apply_options(p, facts.band, facts.rows, own_row, key);
      } else {
        warp.scale_scores(static_cast<float>(p.scale) * kLog2e);
      }
      warp.softmax();
      if constexpr (!kPlain)
        if (p.dropout_threshold > 0) warp.drop(p, facts.rows, own_row, key);
      warp.multiply_values(k_tile + kTileElements);
    }
  }
  write_rows<T, kDim, kPlain>(p, warp, q_tile, facts, aligned);
}

template <class T, int kDim, bool kPlain>
Status launch_forward(const AttentionForward& p, Launch& launch, bool aligned) {
  const int64_t tiles = ceil_div(p.queries * (p.heads / p.kv_heads), Shape<kDim, kPlain>::kRows);
  const int64_t blocks = tiles * p.batch * p.kv_heads;
  if (blocks == 0) return {};
  if (blocks > 0x7fffffff) return {Status::unsupported_shape, 0, blocks};
  return launch.run<attention_forward_kernel<T, kDim, kPlain>>(static_cast<unsigned>(blocks), kThreads,
                                                               Shape<kDim, kPlain>::template kShared<T>, p,
                                                               static_cast<int>(tiles), group_of(p), aligned);
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
