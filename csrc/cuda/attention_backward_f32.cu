// attention, backward, of float32: the plan of attention_backward.cu without tensor cores.
//
// A block of 256 threads owns 64 rows X and Y (of K and V, or of Q and dO) and streams the other two, X' and Y', 64
// rows at a time and 32 columns at a time: a thread has 4 x 4 products of S and dP, which go to shared memory, and then
// 4 rows x 2 columns of every 32 of dX += dS X' and dY += P Y'. 14 T S D flops a head. Chunks lie transposed in shared
// memory, rows of 64 padded to 68: four rows of a column are one 16-byte access, in either product.
//
// Products are summed kStretch at a time: one running sum loses more than torch's GEMM does.
#include "cuda/attention_backward.cuh"

namespace fastgpt::FASTGPT_ISA {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;  // rows, owned and of the stream
constexpr int kChunk = 32;  // columns in shared memory at once
constexpr int kPitch = kTile + 4;

// --- delta ---

// One thread a row, in the very additions that give dP: where a query sees one key, O is that key's V, and dP - delta
// is exactly zero.
__global__ void __launch_bounds__(kDeltaRows)
    attention_delta_f32_kernel(const AttentionBackward p, const BackwardPlan plan, int blocks) {
  constexpr int kColumns = kChunk + 1;  // rows in different banks
  FASTGPT_SHARED(float, dout, kDeltaRows* kColumns);
  FASTGPT_SHARED(float, out, kDeltaRows* kColumns);
  const auto [block, h, b] = block_of_head(blocks, p.heads);
  const Sequence s = sequence_of(p, b);
  const int first = block * kDeltaRows, query = first + static_cast<int>(threadIdx.x);
  const BackwardTensors<float> tensors{p, plan, s, b};
  const Rows<const float> dout_rows = tensors.dout(h), out_rows = tensors.out(h);
  const int lane = threadIdx.x % kWarp;
  float delta = 0.0f;
  for (int column = 0; column < p.value_dim; column += kChunk) {
    __syncthreads();
#pragma unroll 8
    for (int r = threadIdx.x / kWarp; r < kDeltaRows; r += kDeltaRows / kWarp) {
      const bool inside = first + r < s.queries && column + lane < p.value_dim;
      dout[r * kColumns + lane] = inside ? dout_rows(first + r)[column + lane] : 0.0f;
      out[r * kColumns + lane] = inside ? out_rows(first + r)[column + lane] : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int stretch = 0; stretch < kChunk; stretch += kStretch) {
      float part = 0.0f;
#pragma unroll
      for (int c = stretch; c < stretch + kStretch; ++c)
        part = fmaf(dout[threadIdx.x * kColumns + c], out[threadIdx.x * kColumns + c], part);
      delta += part;
    }
  }
  float share = 0.0f;
  if (query < s.queries) {
    plan.delta[delta_offset(p, s, b, h) + query] = delta;
    if (p.dsinks) share = sink_share(p, h, p.lse[lse_offset(p, s, b, h) + query], delta);
  }
  if (p.dsinks) store_shares<kDeltaRows>(p, plan, b, h, block, blocks, share);
}

// --- gradients ---

// Where thread n of the block reads or writes a chunk: four columns of a row. A warp has eight columns of 16 rows: 32
// bytes of memory a row, and all banks of the transposed chunk.
struct Piece {
  int row, column;
};
__device__ inline Piece piece(int n) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  return {lane / 2 + 16 * (warp % 4), 4 * (lane % 2 + 2 * (warp / 4) + 4 * n)};
}
constexpr int kPieces = kTile * kChunk / 4 / kThreads;

// chunk[c][r] = rows(at + r)[column + c], zero where there is none.
__device__ inline void load_chunk(float* chunk, const Rows<const float>& rows, int at, int column) {
#pragma unroll
  for (int n = 0; n < kPieces; ++n) {
    const Piece mine = piece(n);
    const float* const row = rows(at + mine.row);
    const int c = column + mine.column;
    float values[4] = {};
    if (row != nullptr && rows.aligned && c < rows.dim) {
      load_pack(row + c).to_floats(values);
    } else if (row != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (c + i < rows.dim) values[i] = row[c + i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) chunk[(mine.column + i) * kPitch + mine.row] = values[i];
  }
}
__device__ inline void store_chunk(const float* chunk, const Rows<float>& rows, int at, int column) {
#pragma unroll
  for (int n = 0; n < kPieces; ++n) {
    const Piece mine = piece(n);
    float* const row = rows(at + mine.row);
    const int c = column + mine.column;
    if (row == nullptr || c >= rows.dim) continue;
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = chunk[(mine.column + i) * kPitch + mine.row];
    if (rows.aligned) {
      Pack<float> pack;
      pack.from_floats(values);
      store_pack(row + c, pack);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (c + i < rows.dim) row[c + i] = values[i];
    }
  }
}

__device__ inline void load_four(float (&values)[4], const float* from) { load_pack(from).to_floats(values); }

// products[r][c] = own row 4 (thread / 16) + r times stream row 4 (thread % 16) + c.
__device__ inline void multiply_rows(float (&products)[4][4], const Rows<const float>& own, int own_at,
                                     const Rows<const float>& stream, int stream_at, float* own_chunk,
                                     float* stream_chunk) {
  const float* const a = own_chunk + threadIdx.x / 16 * 4;
  const float* const b = stream_chunk + threadIdx.x % 16 * 4;
#pragma unroll 1
  for (int column = 0; column < own.dim; column += kChunk) {
    __syncthreads();  // nobody reads the last chunks any more
    load_chunk(own_chunk, own, own_at, column);
    load_chunk(stream_chunk, stream, stream_at, column);
    __syncthreads();
#pragma unroll 1
    for (int stretch = 0; stretch < kChunk; stretch += kStretch) {
      float part[4][4] = {};
#pragma unroll 8
      for (int c = stretch; c < stretch + kStretch; ++c) {
        float x[4], y[4];
        load_four(x, a + c * kPitch);
        load_four(y, b + c * kPitch);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) part[i][j] = fmaf(x[i], y[j], part[i][j]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) products[i][j] += part[i][j];
    }
  }
}

// sums[chunk][i][e] of own row 4 (thread % 16) + i and column 32 chunk + 2 (thread / 16) + e += the sum over the
// stream's rows c of weights[c][row] stream[c][column].
template <int kChunks>
__device__ inline void add_products(float (&sums)[kChunks][4][2], const float* weights, const Rows<const float>& stream,
                                    int stream_at, float* stream_chunk) {
  const float* const a = weights + threadIdx.x % 16 * 4;
  const float* const b = stream_chunk + threadIdx.x / 16 * 2 * kPitch;
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    if (chunk * kChunk >= stream.dim) break;
    __syncthreads();
    load_chunk(stream_chunk, stream, stream_at, chunk * kChunk);
    __syncthreads();
#pragma unroll 1
    for (int stretch = 0; stretch < kTile; stretch += kStretch) {
      float part[4][2] = {};
#pragma unroll 2
      for (int c = stretch; c < stretch + kStretch; c += 4) {
        float y0[4], y1[4];
        load_four(y0, b + c);
        load_four(y1, b + kPitch + c);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          float x[4];
          load_four(x, a + (c + k) * kPitch);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            part[i][0] = fmaf(x[i], y0[k], part[i][0]);
            part[i][1] = fmaf(x[i], y1[k], part[i][1]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[chunk][i][0] += part[i][0];
        sums[chunk][i][1] += part[i][1];
      }
    }
  }
}

template <int kChunks>
__device__ inline void store_sums(const float (&sums)[kChunks][4][2], float factor, const Rows<float>& rows, int at,
                                  float* staging) {
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    if (chunk * kChunk >= rows.dim) break;
    __syncthreads();
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      Pack<float> pack;
      float values[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] = sums[chunk][i][e] * factor;
      pack.from_floats(values);
      store_pack(staging + (threadIdx.x / 16 * 2 + e) * kPitch + threadIdx.x % 16 * 4, pack);
    }
    __syncthreads();
    store_chunk(staging, rows, at, chunk * kChunk);
  }
}

// The weights of a thread's four queries and four keys: s becomes P, as dropout left it, and dp becomes dS.
template <bool kKeys>
__device__ inline void weigh(const AttentionBackward& p, const BackwardPlan& plan, const Sequence& sequence,
                             const Band& band, int b, int h, int query, int key, bool plain, float (&s)[4][4],
                             float (&dp)[4][4]) {
  const float scale = static_cast<float>(p.scale), kept_scale = dropout_scale(p);
  const bool drops = p.dropout_threshold > 0;
  const RowOptions options = row_options(p, b, h, 0);
  uint32_t kept = 0;  // bit 4 query + key
  if (drops) {
#pragma unroll 1
    for (int n = 0; n < 4; ++n) {
      RowOptions of_row = options;
      of_row.query = query + n;
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const uint32_t word = dropout_word(p, of_row, key / 8, key % 8 / 2 + pair);
#pragma unroll
        for (int e = 0; e < 2; ++e) kept |= static_cast<uint32_t>(dropout_keeps(p, word, e)) << (4 * n + 2 * pair + e);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int i = query + n;
    const bool inside = i < band.queries;
    const float lse = inside ? p.lse[lse_offset(p, sequence, b, h) + i] : __builtin_inff();
    const float delta = inside ? plan.delta[delta_offset(p, sequence, b, h) + i] : 0.0f;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      float& weight = kKeys ? s[m][n] : s[n][m];
      float& gradient = kKeys ? dp[m][n] : dp[n][m];
      float score = __fmul_rn(weight, scale), slope = 1.0f;
      if (!plain) {
        if (p.softcap > 0) slope = cap_with_slope(p, score);
        RowOptions of_row = options;
        of_row.query = i;
        of_row.mask += i * p.mask_strides[2];
        score += inside ? score_bias<float>(p, band, of_row, key + m) : -__builtin_inff();
      }
      weight = expf(score - lse);
      const float factor = drops ? (kept >> (4 * n + m) & 1u ? kept_scale : 0.0f) : 1.0f;
      gradient = weight * (factor * gradient - delta) * slope;
      weight *= factor;
    }
  }
}

// Four floats of each of the thread's stream rows 4 (thread % 16) + c, to weights[c][own row].
__device__ inline void store_weights(float* weights, const float (&values)[4][4]) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const float column[4] = {values[0][c], values[1][c], values[2][c], values[3][c]};
    Pack<float> pack;
    pack.from_floats(column);
    store_pack(weights + (threadIdx.x % 16 * 4 + c) * kPitch + threadIdx.x / 16 * 4, pack);
  }
}

template <bool kKeys>
constexpr size_t kSharedBytes = sizeof(float) * kPitch * (2 * kChunk + (kKeys ? 2 : 1) * kTile);

template <int kDim, bool kKeys>
__global__ void __launch_bounds__(kThreads)
    attention_backward_f32_kernel(const AttentionBackward p, const BackwardPlan plan, int tiles) {
  constexpr int kChunks = kDim / kChunk;
  FASTGPT_SHARED_DYNAMIC(float, shared);
  float* const own_chunk = shared;
  float* const stream_chunk = own_chunk + kChunk * kPitch;
  float* const gradients = stream_chunk + kChunk * kPitch;  // dS
  float* const weights = gradients + kTile * kPitch;  // P, where keys are owned

  const auto [tile, head, b] = block_of_head(tiles, kKeys ? p.kv_heads : p.heads);
  const int group = group_size(p);
  const int own = (kKeys ? tile : tiles - 1 - tile) * kTile;  // first those with the most work
  const Sequence sequence = sequence_of(p, b);
  const int own_count = kKeys ? sequence.keys : sequence.queries;
  if (own >= own_count) return;
  const Band band = band_of(p, sequence);
  const BackwardTensors<float> tensors{p, plan, sequence, b};

  const int last = min(own + kTile, own_count) - 1;
  const int begin = kKeys ? band.first_query(own) : band.first_key(own);
  const int end = kKeys ? band.end_query(last) : band.end_key(last);
  float x_sums[kChunks][4][2] = {}, y_sums[kKeys ? kChunks : 1][4][2] = {};
  for (int h = kKeys ? head * group : head; h < (kKeys ? (head + 1) * group : head + 1); ++h) {
    const int kv_head = h / group;
    for (int at = begin / kTile * kTile; at < end; at += kTile) {
      float s[4][4] = {}, dp[4][4] = {};
      const int query = kKeys ? at : own, key = kKeys ? own : at;
      const bool plain = !has_options(p) && band.sees_all(query, query + kTile, key, key + kTile);
      const int own_row = threadIdx.x / 16 * 4, stream_row = threadIdx.x % 16 * 4;
      if constexpr (kKeys) {
        multiply_rows(s, tensors.k(kv_head), own, tensors.q(h), at, own_chunk, stream_chunk);
        multiply_rows(dp, tensors.v(kv_head), own, tensors.dout(h), at, own_chunk, stream_chunk);
      } else {
        multiply_rows(s, tensors.q(h), own, tensors.k(kv_head), at, own_chunk, stream_chunk);
        multiply_rows(dp, tensors.dout(h), own, tensors.v(kv_head), at, own_chunk, stream_chunk);
      }
      weigh<kKeys>(p, plan, sequence, band, b, h, query + (kKeys ? stream_row : own_row),
                   key + (kKeys ? own_row : stream_row), plain, s, dp);
      store_weights(gradients, dp);
      if constexpr (kKeys) {
        store_weights(weights, s);
        add_products(x_sums, gradients, tensors.q(h), at, stream_chunk);
        add_products(y_sums, weights, tensors.dout(h), at, stream_chunk);
      } else {
        add_products(x_sums, gradients, tensors.k(kv_head), at, stream_chunk);
      }
    }
  }
  const float scale = static_cast<float>(p.scale);
  if constexpr (kKeys) {
    store_sums(x_sums, scale, tensors.dk(head), own, stream_chunk);
    store_sums(y_sums, 1.0f, tensors.dv(head), own, stream_chunk);
  } else {
    store_sums(x_sums, scale, tensors.dq(head), own, stream_chunk);
  }
}

template <int kDim>
Status run_all(const AttentionBackward& p, const BackwardPlan& plan, Launch& launch) {
  Status status = run_blocks<attention_backward_f32_kernel<kDim, true>>(p, plan, launch, ceil_div(p.keys, kTile),
                                                                        p.kv_heads, kThreads, kSharedBytes<true>);
  if (status.code == Status::ok)
    status = run_blocks<attention_backward_f32_kernel<kDim, false>>(p, plan, launch, ceil_div(p.queries, kTile),
                                                                    p.heads, kThreads, kSharedBytes<false>);
  return status;
}

}  // namespace

Status attention_backward_f32(const AttentionBackward& p, const BackwardPlan& plan, Launch& launch) {
  const Status status =
      run_blocks<attention_delta_f32_kernel>(p, plan, launch, ceil_div(p.queries, kDeltaRows), p.heads, kDeltaRows, 0);
  if (status.code != Status::ok) return status;
  if (p.dim <= 64 && p.value_dim <= 64) return run_all<64>(p, plan, launch);
  return run_all<256>(p, plan, launch);
}

}  // namespace fastgpt::FASTGPT_ISA
