// attention_forward for float, without tensor cores (TF32 would drop 13 bits of every factor), for any number of
// queries: with few, the keys are split into pieces as in attention_decode.cu.
//
// Shapes, flops and bytes: attention_forward.cu. This one is bound by the FMA pipes: 4 B H T S D flops.
//
// One block of two threads a row takes a tile of packed rows. A warp has 16 rows: lane 8 g + c holds rows g, g + 4,
// g + 8, g + 12 and of every eight keys, or chunks of four columns, number c. Sums of products run over four floats of
// a row at a time, read from shared memory by 16-byte accesses; weights pass through shared memory, inside the warp.
// K and V have one tile each, and the next K comes while the weights multiply V. Dot products are summed in stretches,
// in the very order of attention_backward_f32.cu: the scores that it recomputes are then those that
// the log-sum-exp saved here was made of, bit for bit.
#include "cuda/attention_forward.cuh"

namespace fastgpt::FASTGPT_ISA {
namespace {

template <int kDim>
struct Shape {
  static constexpr int kRows = kDim == 256 ? 32 : 64, kThreads = 2 * kRows;
  static constexpr int kKeys = kDim == 256 ? 16 : 32;
  static constexpr int kWeightStride = kKeys + 8;  // floats; the four rows that are written at once in different banks
  static constexpr size_t kShared = sizeof(float) * (kRows * (kDim + kWeightStride) + 2 * kKeys * kDim);
  static_assert(kSplitUnit % kKeys == 0);
};

constexpr int kOwnRows = 4;  // a lane's rows

__device__ inline void multiply_add(float& sum, const Pack<float>& a, const Pack<float>& b) {
#pragma unroll
  for (int i = 0; i < 4; ++i) sum = fmaf(a.get(i), b.get(i), sum);
}

template <int kDim>
__global__ void __launch_bounds__(Shape<kDim>::kThreads, 2)
    attention_forward_f32_kernel(const AttentionForward p, const Partials partials, const int tiles, const int group,
                                 const bool aligned) {
  using Sizes = Shape<kDim>;
  constexpr int kRows = Sizes::kRows, kThreads = Sizes::kThreads, kKeys = Sizes::kKeys;
  constexpr int kOwnKeys = kKeys / 8, kOwnChunks = kDim / 32;
  FASTGPT_SHARED_DYNAMIC(float, q_tile);
  float* const k_tile = q_tile + kRows * kDim;
  float* const v_tile = k_tile + kKeys * kDim;
  float* const weights = v_tile + kKeys * kDim;

  const int head_index = blockIdx.x / tiles, kv_heads = static_cast<int>(p.kv_heads);
  const int tile = tiles - 1 - static_cast<int>(blockIdx.x % tiles);  // causal: the longest first
  const int batch = head_index / kv_heads, piece = blockIdx.y;
  const Sequence sequence = sequence_of(p, batch);
  const PackedRows rows = packed_rows(sequence, batch, head_index % kv_heads, group);
  const Band band = band_of(p, sequence);
  const int first_row = tile * kRows;
  if (first_row >= rows.count) return;
  const int last_row = min(first_row + kRows, rows.count) - 1;

  const int length =
      partials.splits > 1 ? split_length(p, sequence.keys) : static_cast<int>(round_up(sequence.keys, kKeys));
  const int begin = max(piece * length, band.first_key(rows.query(first_row)) / kSplitUnit * kSplitUnit);
  const int end = min((piece + 1) * length, band.end_key(rows.query(last_row)));
  if (partials.splits > 1 && begin >= end) return;  // combine_kernel does not look at it

  const int lane = threadIdx.x % kWarp, column = lane % 8, warp_tile_row = threadIdx.x / kWarp * 16;
  const int own_tile_row = warp_tile_row + lane / 8;  // and 4, 8 and 12 further
  const int warp_row = first_row + warp_tile_row;
  const int warp_first = rows.query(min(warp_row, last_row)), warp_last = rows.query(min(warp_row + 15, last_row));
  const int warp_begin = band.first_key(warp_first), warp_end = warp_row <= last_row ? band.end_key(warp_last) : 0;
  const int whole_begin = band.first_key(warp_last), whole_end = band.end_key(warp_first);  // seen by all rows

  const auto load = [&](float* to, const void* from, const int64_t (&strides)[3], int64_t dim, int key) {
    const float* const x = static_cast<const float*>(from);
    load_tile<kKeys, kDim, kThreads, 4>(to, x, static_cast<int>(dim), aligned,
                                        [&](int r) { return key_row(p, x, strides, sequence, rows, key + r); });
    ptx::cp_async_commit();
  };

  float o[kOwnRows][kOwnChunks][4], m[kOwnRows], l[kOwnRows];
#pragma unroll
  for (int i = 0; i < kOwnRows; ++i) {
    m[i] = -__builtin_inff();
    l[i] = 0.0f;
#pragma unroll
    for (int c = 0; c < kOwnChunks; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) o[i][c][e] = 0.0f;
  }
  if (begin < end) {
    const float* const q = static_cast<const float*>(p.q);
    load_tile<kRows, kDim, kThreads, 1>(q_tile, q, static_cast<int>(p.dim), aligned, [&](int r) {
      return packed_row(q, p.q_strides, sequence, rows, first_row + r);
    });
    load(k_tile, p.k, p.k_strides, p.dim, begin);
  }
  for (int key = begin; key < end; key += kKeys) {
    const bool seen = key + kKeys > warp_begin && key < warp_end;  // by any row of the warp
    ptx::cp_async_wait<0>();
    __syncthreads();  // K is there for all; all are done with V
    load(v_tile, p.v, p.v_strides, p.value_dim, key);
    float s[kOwnRows][kOwnKeys];
    if (seen) {
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i)
#pragma unroll
        for (int j = 0; j < kOwnKeys; ++j) s[i][j] = 0.0f;
#pragma unroll 1
      for (int stretch = 0; stretch < kDim; stretch += kStretch) {
        float part[kOwnRows][kOwnKeys] = {};
#pragma unroll 2
        for (int d = stretch; d < stretch + kStretch; d += 4) {
          Pack<float> a[kOwnRows];
#pragma unroll
          for (int i = 0; i < kOwnRows; ++i)
            a[i] = load_pack(q_tile + tile_offset<float, kDim>(own_tile_row + 4 * i, d / 4));
#pragma unroll
          for (int j = 0; j < kOwnKeys; ++j) {
            const Pack<float> b = load_pack(k_tile + tile_offset<float, kDim>(column + 8 * j, d / 4));
#pragma unroll
            for (int i = 0; i < kOwnRows; ++i) multiply_add(part[i][j], a[i], b);
          }
        }
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i)
#pragma unroll
          for (int j = 0; j < kOwnKeys; ++j) s[i][j] += part[i][j];
      }

      if (has_options(p) || key < whole_begin || key + kKeys > whole_end) {
        // The body is long, so it stands once per row, for j = 0, and the scores are turned under it.
        RowOptions options[kOwnRows];
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) options[i] = rows.options(p, first_row + own_tile_row + 4 * i);
#pragma unroll 1
        for (int j = 0; j < kOwnKeys; ++j)
#pragma unroll
          for (int i = 0; i < kOwnRows; ++i) {
            const float score = final_score<float>(p, band, options[i], key + column + 8 * j, s[i][0]);
#pragma unroll
            for (int n = 0; n < kOwnKeys - 1; ++n) s[i][n] = s[i][n + 1];
            s[i][kOwnKeys - 1] = score;
          }
      } else {
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i)
#pragma unroll
          for (int j = 0; j < kOwnKeys; ++j) s[i][j] = __fmul_rn(s[i][j], static_cast<float>(p.scale));
      }
      float* const own_weights = weights + own_tile_row * Sizes::kWeightStride + column;
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
        float most = m[i];
#pragma unroll
        for (int j = 0; j < kOwnKeys; ++j) most = fmaxf(most, s[i][j]);
#pragma unroll
        for (int bits = 4; bits > 0; bits /= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, bits));
        const float base = finite_or_zero(most), shrink = expf(m[i] - base);
        m[i] = most;
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kOwnKeys; ++j) {
          const float weight = expf(s[i][j] - base);
          sum += weight;
          own_weights[4 * i * Sizes::kWeightStride + 8 * j] = weight;
        }
        l[i] = l[i] * shrink + sum;
#pragma unroll
        for (int c = 0; c < kOwnChunks; ++c)
#pragma unroll
          for (int e = 0; e < 4; ++e) o[i][c][e] *= shrink;
      }
      if (p.dropout_threshold > 0) {
#pragma unroll 1
        for (int i = 0; i < kOwnRows; ++i) {
          const RowOptions options = rows.options(p, first_row + own_tile_row + 4 * i);
#pragma unroll 1
          for (int j = 0; j < kOwnKeys; ++j)
            if (!dropout_keeps(p, dropout_word(p, options, key / 8 + j, column / 2), column % 2))
              own_weights[4 * i * Sizes::kWeightStride + 8 * j] = 0.0f;
        }
      }
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // V is there for all; all are done with K
    if (key + kKeys < end) load(k_tile, p.k, p.k_strides, p.dim, key + kKeys);
    if (!seen) continue;
#pragma unroll 1
    for (int j = 0; j < kKeys; j += 4) {
      Pack<float> a[kOwnRows];
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) a[i] = load_pack(weights + (own_tile_row + 4 * i) * Sizes::kWeightStride + j);
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int c = 0; c < kOwnChunks; ++c) {
          const Pack<float> b = load_pack(v_tile + tile_offset<float, kDim>(j + n, column + 8 * c));
#pragma unroll
          for (int i = 0; i < kOwnRows; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) o[i][c][e] = fmaf(a[i].get(n), b.get(e), o[i][c][e]);
        }
    }
  }

#pragma unroll
  for (int i = 0; i < kOwnRows; ++i) {
#pragma unroll
    for (int bits = 4; bits > 0; bits /= 2) l[i] += __shfl_xor_sync(kAllLanes, l[i], bits);
    const int row = first_row + own_tile_row + 4 * i;
    if (row > last_row) continue;
    const int head = rows.head(row);
    float* to;
    int count;
    if (partials.splits > 1) {
      const int64_t index = partial_index(p, partials, rows, row, piece);
      to = partials.o + index * kDim;
      count = kDim;
      if (column == 0) {
        partials.ml[2 * index] = m[i];
        partials.ml[2 * index + 1] = l[i];
      }
    } else {
      const RowEnd row_end = end_row<float>(p, head, m[i], l[i]);
      to = packed_row(static_cast<float*>(p.out), p.out_strides, sequence, rows, row);
      count = static_cast<int>(p.value_dim);
      if (column == 0) p.lse[lse_offset(p, sequence, batch, head) + rows.query(row)] = row_end.lse;
#pragma unroll
      for (int c = 0; c < kOwnChunks; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[i][c][e] = finished<float>(o[i][c][e], row_end);
    }
#pragma unroll
    for (int c = 0; c < kOwnChunks; ++c) {
      const int at = 4 * (column + 8 * c);
      if (aligned || partials.splits > 1) {
        Pack<float> pack;
        pack.from_floats(o[i][c]);
        if (at < count) store_pack(to + at, pack);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (at + e < count) to[at + e] = o[i][c][e];
      }
    }
  }
}

}  // namespace

Status attention_forward_f32(const AttentionForward& p, Launch& launch) {
  return dispatch_dim(p, [&](auto dim) -> Status {
    constexpr int kDim = decltype(dim)::value;
    const Partials partials = make_partials(p, launch, kDim);
    const int64_t tiles = ceil_div(p.queries * (p.heads / p.kv_heads), Shape<kDim>::kRows);
    const int64_t blocks = tiles * p.batch * p.kv_heads;
    if (blocks == 0) return {};
    if (blocks > 0x7fffffff) return {Status::unsupported_shape, 0, blocks};
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(partials.splits));
    const Status status =
        launch.run<attention_forward_f32_kernel<kDim>>(grid, Shape<kDim>::kThreads, Shape<kDim>::kShared, p, partials,
                                                       static_cast<int>(tiles), group_of(p), all_aligned<float>(p));
    return status.code == Status::ok ? combine_partials(p, launch, partials, kDim) : status;
  });
}

}  // namespace fastgpt::FASTGPT_ISA
