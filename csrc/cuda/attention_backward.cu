// attention, backward, from the inputs, the output and the log-sum-exp (FlashAttention-2, Dao, 2023, algorithm 2).
//
//   P = exp(scale Q K^T + bias - lse),  dV = P^T dO,  dP = dO V^T,  delta = rowsum(dO * O),  dS = P * (dP - delta),
//   dQ = scale dS K,  dK = scale dS^T Q;  options: see csrc/fastgpt.h
//
// B batch, T queries, S keys, H heads, Hkv key/value heads, D and Dv head dims. Three launches:
//
//   1. delta, and each block's share of dsinks.
//   2. dK and dV: a block owns a tile of keys and streams the tiles of queries that see them, of every query head of
//      the group in turn.
//   3. dQ: a block owns a tile of queries and streams the tiles of keys that they see.
//
// So nothing is added by two blocks, and there are no atomics and no workspace but delta: the result is the same in
// every run. The price is that P and dP are computed in 2 and in 3: seven products (14 T S D flops a head) instead of
// five. Of head dims above 128 the sums of dK and dV do not fit a thread's registers together, and 2 is two launches,
// one for dV and one for dK: eight products. Bytes: Q, K, V, O, dO read and dQ, dK, dV written once each from and to
// memory; tiles that are streamed come from the L2 cache.
//
// Launches 2 and 3 are one kernel. It owns the rows X (K, or Q) and Y (V, or dO) and streams X' (Q, or K) and Y' (dO,
// or V). A warp's 16 or 32 own rows against a tile of the stream:
//
//   S = X X'^T,  dP = Y Y'^T,  dX += dS X',  and of keys  dY += P Y'
//
// S, dP, P and dS stay in the registers of the warp: an accumulator of one product is the left operand of the next. So
// S is computed transposed where keys are owned, and no warp waits for another but for the stream's tiles, which are
// copied two deep by cp.async. float32 has a kernel of its own, attention_backward_f32.cuh, with the same plan.
//
// Tiles (own rows x stream rows, warps, shared memory; at most 99 KB a block, what sm_86 has):
//   D <= 64:  128 x 32, 4 warps of 32 rows, 49 KB     (a fragment of the stream serves 32 rows)
//   D <= 128: 128 x 32, 8 warps of 16 rows, 97 KB
//   D <= 256: 64 x 16, 4 warps of 16 rows, 97 KB; dV alone: 128 x 16, 8 warps, 97 KB
#include "cuda/attention_backward.cuh"

namespace fastgpt::FASTGPT_ISA {
namespace {

template <int kRows, int kCols, int kThreads, class T>
__device__ inline void fill(T* tile, const Rows<const T>& rows, int at) {
  load_tile<kRows, kCols, kThreads>(tile, rows.first, rows.dim, rows.aligned, [&](int r) { return rows(at + r); });
}

// --- delta ---

// --- delta ---

// delta of kDeltaRows queries, as the diagonal of dO O^T in the very additions that give dP: where a query sees one
// key, O is that key's V, and dP - delta is exactly zero.
template <class T, int kDim>
__global__ void __launch_bounds__(2 * kDeltaRows)
    attention_delta_kernel(const AttentionBackward p, const BackwardPlan plan, int blocks) {
  constexpr int kThreads = 2 * kDeltaRows;  // a warp has 16 rows
  FASTGPT_SHARED_DYNAMIC(T, shared);
  T* const dout = shared;
  T* const out = shared + kDeltaRows * kDim;
  const auto [block, h, b] = block_of_head(blocks, p.heads);
  const int first = block * kDeltaRows;
  const Sequence s = sequence_of(p, b);
  const BackwardTensors<T> tensors{p, plan, s, b};
  fill<kDeltaRows, kDim, kThreads>(dout, tensors.dout(h), first);
  fill<kDeltaRows, kDim, kThreads>(out, tensors.out(h), first);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();

  const int lane = threadIdx.x % kWarp, warp_row = threadIdx.x / kWarp * 16;
  float sums[2][4] = {};
  for (int chunk = 0; chunk * 8 < p.value_dim; chunk += 2) {
    uint32_t a[4], b0[2], b1[2];
    load_a<kDim>(a, dout, warp_row, chunk);
    load_b_transposed<kDim>(b0, b1, out, warp_row, chunk);
    ptx::mma_m16n8k16<T>(sums[0], a, b0);
    ptx::mma_m16n8k16<T>(sums[1], a, b1);
  }
  // Lane 4 g + t has (g, 2t), (g, 2t + 1) of the first accumulator, (g + 8, 8 + 2t), (g + 8, 8 + 2t + 1) of the second.
  const int g = lane / 4, t = lane % 4, i = first + warp_row + g;
  const bool diagonal = t == g / 2;
  float share = 0.0f;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = i + 8 * half;
    if (!diagonal || query >= s.queries) continue;
    const float delta = g % 2 ? sums[half][2 * half + 1] : sums[half][2 * half];
    plan.delta[delta_offset(p, s, b, h) + query] = delta;
    if (p.dsinks) share += sink_share(p, h, p.lse[lse_offset(p, s, b, h) + query], delta);
  }
  if (p.dsinks) store_shares<kThreads>(p, plan, b, h, block, blocks, share);
}

// dsinks of head blockIdx.x: the sum of its partial sums.
__global__ void __launch_bounds__(256)
    attention_sink_kernel(const AttentionBackward p, const BackwardPlan plan, int64_t count) {
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < count; i += 256) sum += plan.sink_shares[blockIdx.x * count + i];
  sum = block_sum<8>(sum);
  if (threadIdx.x == 0) p.dsinks[blockIdx.x] = -sum;
}

// --- gradients ---

// A number as a template argument, so that a kernel has one name whichever compiler prints it.
enum Gradient : int { dkv, dk, dv, dq };

template <class T_, int kDim_, int kGradient>
struct Shape {
  using T = T_;
  static constexpr int kDim = kDim_;
  static constexpr bool kKeys = kGradient != Gradient::dq;  // a block owns keys
  static constexpr bool kX = kGradient != Gradient::dv;     // dK or dQ is wanted
  static constexpr bool kY = kGradient == Gradient::dkv || kGradient == Gradient::dv;
  static constexpr int kAtoms = kDim == 64 ? 2 : 1;  // of 16 own rows, in a warp
  static constexpr int kWarps = kDim == 128 || kGradient == Gradient::dv ? 8 : 4;
  static constexpr int kThreads = kWarp * kWarps;
  static constexpr int kMinBlocks = kDim == 64 ? (kKeys ? 2 : 3) : 1;  // on an SM: bounds the registers
  static constexpr int kOwn = 16 * kAtoms * kWarps;
  static constexpr int kStream = kDim == 256 ? 16 : 32;  // rows of a tile
  static constexpr int kStep = kDim == 128 ? 32 : 16;    // of them that a warp multiplies with at once
  static constexpr int kBlocks = kStep / 16;
  static constexpr int kOwnTile = kOwn * kDim, kStreamTile = kStream * kDim;
  static constexpr int kElements = (kX ? 2 : 1) * kOwnTile + 4 * kStreamTile;
  static constexpr size_t kBytes = 2 * kElements + (kKeys ? 4 * kStream * sizeof(float) : 0);
};

// Bit n: whether dropout keeps the weight of key 8 block + n.
__device__ inline uint32_t kept_keys(const AttentionBackward& p, int head, int query, int block) {
  const PhiloxWords words = dropout_words(*p.dropout_seed, head, query, block);
  uint32_t kept = 0;
#pragma unroll
  for (int n = 0; n < 8; ++n)
    kept |= static_cast<uint32_t>(static_cast<int>(dropout_value(words, n)) >= static_cast<int>(p.dropout_threshold))
            << n;
  return kept;
}

// A warp's own rows against a tile of the stream: the accumulators s[atom][block][half] of S hold
// (16 atom + g, 16 block + 8 half + 2t) and so on.
template <class Shape>
struct Weights {
  static constexpr bool kKeys = Shape::kKeys;
  using Products = float[Shape::kAtoms][Shape::kBlocks][2][4];

  const AttentionBackward& p;
  const Band band;
  RowOptions options;   // of query 0
  const float scale;
  int row, column;      // the first own row, and the first of the stream
  const float* stats;   // keys own: lse and then delta of the tile's queries
  float lse[Shape::kAtoms][2], delta[Shape::kAtoms][2];  // queries own: of the lane's rows

  __device__ int lane() const { return threadIdx.x % kWarp; }
  // The queries and keys of the products.
  __device__ int query() const { return kKeys ? column : row; }
  __device__ int query_end() const { return query() + (kKeys ? Shape::kStep : 16 * Shape::kAtoms); }
  __device__ int key() const { return kKeys ? row : column; }
  __device__ int key_end() const { return key() + (kKeys ? 16 * Shape::kAtoms : Shape::kStep); }
  __device__ bool hidden() const {
    return query() >= band.queries || band.first_key(query()) >= key_end() || band.end_key(query_end() - 1) <= key();
  }
  __device__ bool plain() const { return !has_options(p) && band.sees_all(query(), query_end(), key(), key_end()); }

  // Bit 8 (kBlocks atom + block) + 4 half + e: whether dropout keeps the weight s[atom][block][half][e]. Each lane
  // draws for eight keys of one query, which is what one call of Philox decides, and the lanes exchange.
  __device__ uint32_t kept() const {
    const int g = lane() / 4, t = lane() % 4;
    uint32_t mine = 0;
#pragma unroll 1
    for (int n = 0; n < Shape::kAtoms * Shape::kBlocks; ++n) {
      const int own = row + n / Shape::kBlocks * 16, stream = column + n % Shape::kBlocks * 16;
      const int first_query = kKeys ? stream : own, first_key = kKeys ? own : stream;
      const uint32_t drawn = kept_keys(p, options.head, first_query + lane() % 16, first_key / 8 + lane() / 16);
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          // The query's place in its 16, the eight keys of the two, the key's place in its 8.
          const int i = kKeys ? 8 * half + 2 * t + e % 2 : g + e / 2 * 8;
          const int eight = kKeys ? e / 2 : half, j = kKeys ? g : 2 * t + e % 2;
          mine |= (__shfl_sync(kAllLanes, drawn, i + 16 * eight) >> j & 1u) << (8 * n + 4 * half + e);
        }
    }
    return mine;
  }

  // s becomes P, as dropout left it, and dp becomes dS. Without scores' options, of a tile that is seen whole: plain.
  __device__ void apply(Products& s, Products& dp) const {
    const int g = lane() / 4, t = lane() % 4;
    const bool plain = this->plain(), drops = p.dropout_threshold > 0;
    const uint32_t kept = drops ? this->kept() : 0;
    const float kept_scale = drops ? dropout_scale(p) : 1.0f;
#pragma unroll
    for (int block = 0; block < Shape::kBlocks; ++block)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int c = 16 * block + 8 * half + 2 * t;
        float column_lse[2], column_delta[2];
        if constexpr (kKeys) {
          const uint2 two_lse = load8(stats + c), two_delta = load8(stats + Shape::kStream + c);
          column_lse[0] = __uint_as_float(two_lse.x), column_lse[1] = __uint_as_float(two_lse.y);
          column_delta[0] = __uint_as_float(two_delta.x), column_delta[1] = __uint_as_float(two_delta.y);
        }
#pragma unroll
        for (int atom = 0; atom < Shape::kAtoms; ++atom)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float row_lse = kKeys ? column_lse[e % 2] : lse[atom][e / 2];
            const float row_delta = kKeys ? column_delta[e % 2] : delta[atom][e / 2];
            float& weight = s[atom][block][half][e];
            float& gradient = dp[atom][block][half][e];
            if (plain) {
              weight = ptx::exp2(fmaf(weight, scale, -row_lse) * kLog2e);
              gradient = weight * (gradient - row_delta);
              continue;
            }
            const int own = row + 16 * atom + g + e / 2 * 8, stream = column + c + e % 2;
            const int i = kKeys ? stream : own, j = kKeys ? own : stream;
            float slope = 1.0f, score = weight * scale;
            if (p.softcap > 0) slope = cap_with_slope(p, score);
            RowOptions of_row = options;
            of_row.query = i;
            of_row.mask += i * p.mask_strides[2];
            score += i < band.queries ? score_bias<typename Shape::T>(p, band, of_row, j) : -__builtin_inff();
            weight = ptx::exp2((score - row_lse) * kLog2e);
            if (drops) {
              const float factor =
                  kept >> (8 * (Shape::kBlocks * atom + block) + 4 * half + e) & 1u ? kept_scale : 0.0f;
              gradient = weight * (factor * gradient - row_delta) * slope;
              weight *= factor;
            } else {
              gradient = weight * (gradient - row_delta) * slope;
            }
          }
      }
  }
};

// products += the 16 columns at 8 chunk of the warp's own rows times those of the stream's rows.
template <class Shape, class T = typename Shape::T>
__device__ inline void multiply_own(float (&products)[Shape::kAtoms][Shape::kBlocks][2][4], const T* own,
                                    const T* stream, int row, int chunk) {
  uint32_t a[Shape::kAtoms][4];
#pragma unroll
  for (int atom = 0; atom < Shape::kAtoms; ++atom) load_a<Shape::kDim>(a[atom], own, row + 16 * atom, chunk);
#pragma unroll
  for (int block = 0; block < Shape::kBlocks; ++block) {
    uint32_t b0[2], b1[2];
    load_b_transposed<Shape::kDim>(b0, b1, stream, 16 * block, chunk);
#pragma unroll
    for (int atom = 0; atom < Shape::kAtoms; ++atom) {
      ptx::mma_m16n8k16<T>(products[atom][block][0], a[atom], b0);
      ptx::mma_m16n8k16<T>(products[atom][block][1], a[atom], b1);
    }
  }
}

// sums[16 own rows an atom, kDim] += a tile of the stream's products with the stream's rows.
template <class Shape, class T = typename Shape::T>
__device__ inline void multiply_stream(float (&sums)[Shape::kAtoms][Shape::kDim / 8][4],
                                       const float (&weights)[Shape::kAtoms][Shape::kBlocks][2][4], const T* tile,
                                       int chunks) {
  constexpr int kDim = Shape::kDim;
  uint32_t a[Shape::kAtoms][Shape::kBlocks][4];
#pragma unroll
  for (int atom = 0; atom < Shape::kAtoms; ++atom)
#pragma unroll
    for (int block = 0; block < Shape::kBlocks; ++block)
      accumulators_to_a<T>(a[atom][block], weights[atom][block][0], weights[atom][block][1]);
#pragma unroll
  for (int chunk = 0; chunk < kDim / 8; chunk += 4) {
    if (chunk >= chunks) break;
#pragma unroll
    for (int two = chunk; two < chunk + 4; two += 2)
#pragma unroll
      for (int block = 0; block < Shape::kBlocks; ++block) {
        uint32_t b0[2], b1[2];
        load_b<kDim>(b0, b1, tile, 16 * block, two);
#pragma unroll
        for (int atom = 0; atom < Shape::kAtoms; ++atom) {
          ptx::mma_m16n8k16<T>(sums[atom][two], a[atom][block], b0);
          ptx::mma_m16n8k16<T>(sums[atom][two + 1], a[atom][block], b1);
        }
      }
  }
}

// `p`, known to lie in global memory: for sm_100 and sm_120 nvcc loses sight of that, and would emit generic stores.
template <class T>
__device__ inline T* in_global(T* p) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

// Writes the block's sums, times `factor`, through `tile`.
template <class Shape, class T = typename Shape::T>
__device__ inline void store_sums(const float (&sums)[Shape::kAtoms][Shape::kDim / 8][4], float factor, T* tile,
                                  const Rows<T>& rows, int at) {
  constexpr int kDim = Shape::kDim;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int atom = 0; atom < Shape::kAtoms; ++atom)
#pragma unroll
    for (int chunk = 0; chunk < kDim / 8; ++chunk)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * (Shape::kAtoms * warp + atom) + g + 8 * half;
        store4(tile + tile_offset<T, kDim>(row, chunk) + 2 * t,
               pack_pair<T>(sums[atom][chunk][2 * half] * factor, sums[atom][chunk][2 * half + 1] * factor));
      }
  __syncthreads();
  constexpr int kChunks = kDim / 8, kStep = Shape::kThreads / kChunks;
  const int chunk = threadIdx.x % kChunks, column = 8 * chunk;
  if (column >= rows.dim) return;
  if (rows.aligned) {
#pragma unroll 4
    for (int r = threadIdx.x / kChunks; r < Shape::kOwn; r += kStep)
      if (T* const to = in_global(rows(at + r)))
        store_pack(to + column, load_pack(tile + tile_offset<T, kDim>(r, chunk)));
    return;
  }
  const int width = min(8, rows.dim - column);
#pragma unroll 1
  for (int r = threadIdx.x / kChunks; r < Shape::kOwn; r += kStep) {
    T* const to = rows(at + r);
#pragma unroll 1
    for (int i = 0; to != nullptr && i < width; ++i) to[column + i] = tile[tile_offset<T, kDim>(r, chunk) + i];
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kMinBlocks)
    attention_backward_kernel(const AttentionBackward p, const BackwardPlan plan, int tiles) {
  using T = typename S::T;
  constexpr int kDim = S::kDim, kOwn = S::kOwn, kStream = S::kStream, kThreads = S::kThreads;
  FASTGPT_SHARED_DYNAMIC(T, shared);
  T* const own_x = shared;
  T* const own_y = shared + S::kOwnTile;  // not of dV alone, which needs no dP
  T* const streams = shared + (S::kX ? 2 : 1) * S::kOwnTile;
  float* const stats = reinterpret_cast<float*>(shared + S::kElements);  // keys own: of two tiles, lse and delta

  const auto [tile, head, b] = block_of_head(tiles, S::kKeys ? p.kv_heads : p.heads);
  const int group = group_size(p);
  // First the tiles to which a causal band leaves the most work.
  const int own = (S::kKeys ? tile : tiles - 1 - tile) * kOwn;
  const Sequence sequence = sequence_of(p, b);
  const int own_count = S::kKeys ? sequence.keys : sequence.queries;
  if (own >= own_count) return;
  const Band band = band_of(p, sequence);

  const BackwardTensors<T> tensors{p, plan, sequence, b};

  // The tiles of the stream that meet the band: of keys' blocks, for each query head of the group.
  const int last = min(own + kOwn, own_count) - 1;
  const int begin = S::kKeys ? band.first_query(own) : band.first_key(own);
  const int end = S::kKeys ? band.end_query(last) : band.end_key(last);
  const int first_tile = begin / kStream, tiles_a_head = max((end + kStream - 1) / kStream - first_tile, 0);
  const int count = tiles_a_head * (S::kKeys ? group : 1);

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warp_row = 16 * S::kAtoms * warp;
  const int chunks = static_cast<int>(round_up(max(p.dim, p.value_dim), 32)) / 8;  // of a row; zeros past its end
  Weights<S> weights{p,
                     band,
                     row_options(p, b, S::kKeys ? head * group : head, 0),
                     static_cast<float>(p.scale),
                     own + warp_row,
                     0,
                     nullptr,
                     {},
                     {}};
  if constexpr (!S::kKeys) {
#pragma unroll
    for (int atom = 0; atom < S::kAtoms; ++atom)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = own + warp_row + 16 * atom + 8 * half + lane / 4;
        const bool inside = i < sequence.queries;
        weights.lse[atom][half] = inside ? p.lse[lse_offset(p, sequence, b, head) + i] : __builtin_inff();
        weights.delta[atom][half] = inside ? plan.delta[delta_offset(p, sequence, b, head) + i] : 0.0f;
      }
  }

  float x_sums[S::kX ? S::kAtoms : 1][kDim / 8][4] = {}, y_sums[S::kY ? S::kAtoms : 1][kDim / 8][4] = {};

  // Pass n copies tile n of the stream while it computes with tile n - 1.
  fill<kOwn, kDim, kThreads>(own_x, S::kKeys ? tensors.k(head) : tensors.q(head), own);
  if constexpr (S::kX) fill<kOwn, kDim, kThreads>(own_y, S::kKeys ? tensors.v(head) : tensors.dout(head), own);
  for (int n = 0; n <= count; ++n) {
    if (n > 0) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // tile n - 1 is there, and nobody computes with tile n - 2 any more
    }
    float stat = 0.0f;  // each of the first threads has one of the next tile's
    if (n < count) {
      const int at = (first_tile + n % tiles_a_head) * kStream;
      const int h = S::kKeys ? head * group + n / tiles_a_head : head / group;
      T* const stream = streams + n % 2 * 2 * S::kStreamTile;
      fill<kStream, kDim, kThreads>(stream, S::kKeys ? tensors.q(h) : tensors.k(h), at);
      fill<kStream, kDim, kThreads>(stream + S::kStreamTile, S::kKeys ? tensors.dout(h) : tensors.v(h), at);
      if (S::kKeys && threadIdx.x < 2 * kStream) {
        const int i = at + threadIdx.x % kStream;
        const bool inside = i < sequence.queries;
        if (threadIdx.x < kStream)
          stat = inside ? p.lse[lse_offset(p, sequence, b, h) + i] : __builtin_inff();
        else
          stat = inside ? plan.delta[delta_offset(p, sequence, b, h) + i] : 0.0f;
      }
    }
    ptx::cp_async_commit();
    if (n > 0) {
      if constexpr (S::kKeys) weights.options = row_options(p, b, head * group + (n - 1) / tiles_a_head, 0);
#pragma unroll 1
      for (int step = 0; step < kStream; step += S::kStep) {
        const T* const stream_x = streams + (n - 1) % 2 * 2 * S::kStreamTile + step * kDim;
        const T* const stream_y = stream_x + S::kStreamTile;
        weights.column = (first_tile + (n - 1) % tiles_a_head) * kStream + step;
        weights.stats = stats + (n - 1) % 2 * 2 * kStream + step;
        if (weights.hidden()) continue;
        float s[S::kAtoms][S::kBlocks][2][4] = {}, dp[S::kAtoms][S::kBlocks][2][4] = {};
#pragma unroll
        for (int chunk = 0; chunk < kDim / 8; chunk += 4) {
          if (chunk >= chunks) break;
#pragma unroll
          for (int two = chunk; two < chunk + 4; two += 2) {
            multiply_own<S>(s, own_x, stream_x, warp_row, two);
            if constexpr (S::kX) multiply_own<S>(dp, own_y, stream_y, warp_row, two);
          }
        }
        weights.apply(s, dp);
        if constexpr (S::kY) multiply_stream<S>(y_sums, s, stream_y, chunks);
        if constexpr (S::kX) multiply_stream<S>(x_sums, dp, stream_x, chunks);
      }
    }
    if (S::kKeys && n < count && threadIdx.x < 2 * kStream) stats[n % 2 * 2 * kStream + threadIdx.x] = stat;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();

  const float scale = static_cast<float>(p.scale);
  if constexpr (!S::kKeys) store_sums<S>(x_sums, scale, own_x, tensors.dq(head), own);
  if constexpr (S::kKeys && S::kX) store_sums<S>(x_sums, scale, own_x, tensors.dk(head), own);
  if constexpr (S::kY) store_sums<S>(y_sums, 1.0f, S::kX ? own_y : own_x, tensors.dv(head), own);
}

// --- launches ---

template <class S>
Status run_gradient(const AttentionBackward& p, const BackwardPlan& plan, Launch& launch) {
  return run_blocks<attention_backward_kernel<S>>(p, plan, launch, ceil_div(S::kKeys ? p.keys : p.queries, S::kOwn),
                                                  S::kKeys ? p.kv_heads : p.heads, S::kThreads, S::kBytes);
}

template <class T, int kDim>
Status run_all(const AttentionBackward& p, const BackwardPlan& plan, Launch& launch) {
  Status status = run_blocks<attention_delta_kernel<T, kDim>>(p, plan, launch, ceil_div(p.queries, kDeltaRows), p.heads,
                                                              2 * kDeltaRows, 2 * kDeltaRows * kDim * sizeof(T));
  if constexpr (kDim <= 128) {
    if (status.code == Status::ok) status = run_gradient<Shape<T, kDim, Gradient::dkv>>(p, plan, launch);
  } else {
    if (status.code == Status::ok) status = run_gradient<Shape<T, kDim, Gradient::dv>>(p, plan, launch);
    if (status.code == Status::ok) status = run_gradient<Shape<T, kDim, Gradient::dk>>(p, plan, launch);
  }
  if (status.code == Status::ok) status = run_gradient<Shape<T, kDim, Gradient::dq>>(p, plan, launch);
  return status;
}

}  // namespace

Status attention_backward(const AttentionBackward& p, Launch& launch) {
  Status status = check_attention(p);
  if (status.code != Status::ok) return status;
  const int64_t shares = p.dsinks ? p.batch * ceil_div(p.queries, kDeltaRows) : 0;
  status = dispatch_dtype(p.dtype, [&](auto tag) -> Status {
    using T = typename decltype(tag)::type;
    const BackwardPlan plan{
        launch.scratch<float>(p.heads * p.total_queries),   launch.scratch<float>(p.heads * shares),
        rows_aligned<T>(p.q, p.q_strides, p.dim),           rows_aligned<T>(p.k, p.k_strides, p.dim),
        rows_aligned<T>(p.v, p.v_strides, p.value_dim),     rows_aligned<T>(p.dout, p.dout_strides, p.value_dim),
        rows_aligned<T>(p.out, p.out_strides, p.value_dim), rows_aligned<T>(p.dq, p.dq_strides, p.dim),
        rows_aligned<T>(p.dk, p.dk_strides, p.dim),         rows_aligned<T>(p.dv, p.dv_strides, p.value_dim)};
    const int64_t dim = p.dim > p.value_dim ? p.dim : p.value_dim;
    Status done;
    if constexpr (sizeof(T) == 4)
      done = attention_backward_f32(p, plan, launch);
    else if (dim <= 64)
      done = run_all<T, 64>(p, plan, launch);
    else if (dim <= 128)
      done = run_all<T, 128>(p, plan, launch);
    else
      done = run_all<T, 256>(p, plan, launch);
    if (done.code == Status::ok && p.dsinks)
      done = launch.run<attention_sink_kernel>(static_cast<unsigned>(p.heads), 256, 0, p, plan, shares);
    return done;
  });
  return status;
}

}  // namespace fastgpt::FASTGPT_ISA
