// embedding: y[n, t] = weight[token[n, t]] + position_weight[start + t], and its gradients.
//
//   dweight[v] = sum of dy over the tokens equal to v;  dposition[p] = sum of dy over the tokens at p
//
// Bytes: forward reads one or two rows and writes a row for each token. Backward reads dy once for each gradient and
// writes every row of it once; for GPT-2's vocabulary the rows that no token touched, all zero, are most of it.
//
// Backward without atomics on floats: tokens are sorted by row, stably (radix sort, 8 bits a pass, two passes for a
// vocabulary of 65535; tiles of 2048 tokens, ranks within a warp from match_any), so each row has its tokens in order,
// and a block sums them, the columns side by side. A row of more than 128 tokens (a space, a padding token) would keep
// its block busy after all others are done: its tokens are cut into pieces of 128, summed by blocks of their own, and
// the pieces' sums are added in order. So the order of additions depends on the tokens alone. The positions of one
// start for all are sorted by formula. Workspace: 16 bytes a token, 4 a row, and a float row for each 64 tokens.
//
// A token or position out of range cannot be an exception without waiting for the device: its row of y is NaN, and the
// gradients leave it out.
#include "cuda/core/launch.h"
#include "cuda/core/vector.cuh"

namespace fastgpt::FASTGPT_ISA {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kDigits = kThreads;  // of a pass of the sort: one for each thread
constexpr int kDigitBits = 8;
constexpr int kItems = 8, kTile = kThreads * kItems;  // tokens that a block sorts
constexpr int kSumThreads = 128;                      // 16 bytes each are a row of 1024 elements of 16 bits
constexpr int kPiece = 128;                           // tokens that are summed one after another
constexpr int kAhead = 4;                             // rows on their way from memory at a time, for each thread
static_assert(kSumThreads == kPiece, "each thread looks whether a piece starts at its place");

// The row that token i names, or -1.
template <class P>
__device__ inline int64_t token_row(const P& p, int64_t i) {
  const int64_t token =
      p.wide_tokens ? static_cast<const int64_t*>(p.tokens)[i] : static_cast<const int32_t*>(p.tokens)[i];
  return token >= 0 && token < p.vocabulary ? token : -1;
}

// The row of token i's position, or -1.
template <class P>
__device__ inline int64_t position_row(const P& p, int64_t i) {
  const int64_t sequence = i / p.length;
  const int64_t start = p.starts ? p.starts[sequence / p.sequences_per_start] : p.start;
  if (start < 0 || start >= p.positions) return -1;
  const int64_t position = start + (i - sequence * p.length);
  return position < p.positions ? position : -1;
}

// A warp a token.
template <class T>
__global__ void __launch_bounds__(kThreads) embedding_forward_kernel(const EmbeddingForward p, bool by_packs) {
  const int lane = threadIdx.x % kWarp;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (i >= p.sequences * p.length) return;
  const int64_t token = token_row(p, i), position = p.position_weight ? position_row(p, i) : 0;
  T* y = static_cast<T*>(p.y) + i * p.width;
  if (token < 0 || position < 0) {
    for (int64_t c = lane; c < p.width; c += kWarp) y[c] = cast<T>(__builtin_nanf(""));
    return;
  }
  const T* row = static_cast<const T*>(p.weight) + token * p.weight_stride;
  const T* added =
      p.position_weight ? static_cast<const T*>(p.position_weight) + position * p.position_stride : nullptr;
  if (!by_packs) {
    for (int64_t c = lane; c < p.width; c += kWarp)
      y[c] = added ? cast<T>(to_float(row[c]) + to_float(added[c])) : row[c];
    return;
  }
  for (int64_t c = lane * kPack<T>; c < p.width; c += kWarp * kPack<T>) {
    Pack<T> v = load_pack(row + c);
    if (added) {
      const Pack<T> a = load_pack(added + c);
      float sum[kPack<T>];
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) sum[j] = v.get(j) + a.get(j);
      v.from_floats(sum);
    }
    store_pack(y + c, v);
  }
}

// --- sorting tokens by row ---

enum Key : int { token, position };  // a number as a template argument: one name whichever compiler prints it

// keys[i] is the row of token order[i]; `rows` for one that counts for none, so that it comes last.
// With positions of one start for all, the order is already that of the keys.
template <int key>
__global__ void __launch_bounds__(kThreads)
    embedding_keys_kernel(const EmbeddingBackward p, uint32_t* keys, int* order) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.sequences * p.length) return;
  int64_t at = i, row = -1;
  if constexpr (key == Key::token) {
    row = token_row(p, i);
    if (row == p.padding) row = -1;
  } else {
    if (!p.starts) at = i % p.sequences * p.length + i / p.sequences;
    row = position_row(p, at);
  }
  keys[i] = static_cast<uint32_t>(row >= 0 ? row : key == Key::token ? p.vocabulary : p.positions);
  order[i] = static_cast<int>(at);
}

__device__ inline int digit_of(uint32_t key, int shift) { return static_cast<int>(key >> shift) & (kDigits - 1); }

// histogram[tile][digit]: the number of the tile's keys with that digit.
__global__ void __launch_bounds__(kThreads)
    embedding_histogram_kernel(const uint32_t* keys, int count, int shift, int* histogram) {
  FASTGPT_SHARED(int, counts, kDigits);
  counts[threadIdx.x] = 0;
  __syncthreads();
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kTile;
  for (int64_t i = tile + threadIdx.x; i < tile + kTile && i < count; i += kThreads)
    atomicAdd(&counts[digit_of(keys[i], shift)], 1);
  __syncthreads();
  histogram[static_cast<int64_t>(blockIdx.x) * kDigits + threadIdx.x] = counts[threadIdx.x];
}

// The sum of the values of the threads before this one.
__device__ inline int exclusive_sum(int value) {
  FASTGPT_SHARED(int, warps, kWarps);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int sum = value;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int before = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += before;
  }
  if (lane == kWarp - 1) warps[warp] = sum;
  __syncthreads();
  for (int w = 0; w < warp; ++w) sum += warps[w];
  return sum - value;
}

// One pass of the sort: to where the keys with a smaller digit, and those before with the same, leave room.
__global__ void __launch_bounds__(kThreads)
    embedding_scatter_kernel(const uint32_t* keys, const int* order, uint32_t* sorted_keys, int* sorted_order,
                             int count, int shift, const int* histogram) {
  FASTGPT_SHARED(int, counts, kWarps* kDigits);  // keys of a warp with a digit; then where they go
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, digit_of_thread = threadIdx.x;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) counts[w * kDigits + threadIdx.x] = 0;
  __syncthreads();

  // A warp takes 32 keys after another; a key's rank counts those of its warp before it with the same digit.
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTile + warp * (kWarp * kItems) + lane;
  uint32_t key[kItems];
  int rank[kItems];
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    key[j] = first + j * kWarp < count ? keys[first + j * kWarp] : ~0u;  // beyond the end: in nobody's way
    const int digit = digit_of(key[j], shift);
    const uint32_t same = __match_any_sync(kAllLanes, digit);
    const int before = __popc(same & ((1u << lane) - 1));
    const int known = counts[warp * kDigits + digit];
    __syncwarp();
    if (before == 0) counts[warp * kDigits + digit] = known + __popc(same);
    __syncwarp();
    rank[j] = known + before;
  }

  int smaller_tiles = 0, all_tiles = 0;
  for (int64_t tile = 0; tile < gridDim.x; ++tile) {
    const int here = histogram[tile * kDigits + digit_of_thread];
    if (tile < blockIdx.x) smaller_tiles += here;
    all_tiles += here;
  }
  int place = exclusive_sum(all_tiles) + smaller_tiles;  // its barrier also ends the ranking
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const int here = counts[w * kDigits + digit_of_thread];
    counts[w * kDigits + digit_of_thread] = place;
    place += here;
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    if (first + j * kWarp >= count) continue;
    const int to = counts[warp * kDigits + digit_of(key[j], shift)] + rank[j];
    sorted_keys[to] = key[j];
    sorted_order[to] = order[first + j * kWarp];
  }
}

// first[k] = the number of keys below k, for k up to and including `rows`.
__global__ void __launch_bounds__(kThreads)
    embedding_first_kernel(const uint32_t* keys, int count, int64_t rows, int* first) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row > rows) return;
  int low = 0, high = count;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (keys[middle] < row)
      low = middle + 1;
    else
      high = middle;
  }
  first[row] = low;
}

// --- sums ---

template <int n, class T>
__device__ inline void load_columns(float (&out)[n], const T* p) {
  if constexpr (n == 1) {
    out[0] = to_float(*p);
  } else {
#pragma unroll
    for (int i = 0; i < n; i += kPack<T>) {
      const Pack<T> pack = load_pack(p + i);
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) out[i + j] = pack.get(j);
    }
  }
}
template <int n, class T>
__device__ inline void store_columns(T* p, const float (&in)[n]) {
  if constexpr (n == 1) {
    *p = cast<T>(in[0]);
  } else {
#pragma unroll
    for (int i = 0; i < n; i += kPack<T>) {
      float part[kPack<T>];
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) part[j] = in[i + j];
      Pack<T> pack;
      pack.from_floats(part);
      store_pack(p + i, pack);
    }
  }
}

// out[c] = scale * (the sum of row_of(i)[c] over i < count, in that order), by all threads of a block, n columns each.
template <int n, class T, class F>
__device__ inline void sum_rows(T* out, int64_t width, int count, float scale, F&& row_of) {
  for (int64_t c = static_cast<int64_t>(threadIdx.x) * n; c < width; c += kSumThreads * n) {
    float sum[n] = {};
    int i = 0;
    for (; i + kAhead <= count; i += kAhead) {
      float v[kAhead][n];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) load_columns(v[a], row_of(i + a) + c);
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
#pragma unroll
        for (int j = 0; j < n; ++j) sum[j] += v[a][j];
      }
    }
    for (; i < count; ++i) {
      float v[n];
      load_columns(v, row_of(i) + c);
#pragma unroll
      for (int j = 0; j < n; ++j) sum[j] += v[j];
    }
#pragma unroll
    for (int j = 0; j < n; ++j) sum[j] *= scale;
    store_columns(out + c, sum);
  }
}

// Tokens by row: those of row k are order[first[k]] .. order[first[k + 1] - 1].
struct Sorted {
  const uint32_t* keys;
  const int* order;
  const int* first;
  int64_t rows;
  int count;
};

// Where the sum of the piece that starts at `place` of the order is kept. Two pieces may start within the same kPiece
// places, but only one of them is the first of its row: rows cut into pieces are longer than that.
__device__ inline int64_t piece_row(int place, bool first_of_row) { return place / kPiece * 2 + first_of_row; }

// The sums of the pieces of rows with more than kPiece tokens.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    embedding_pieces_kernel(const EmbeddingBackward p, const Sorted sorted, float* pieces, bool by_packs) {
  FASTGPT_SHARED(int, starts, 2);  // of a piece that continues a row, and of a row's first; -1: none
  if (threadIdx.x < 2) starts[threadIdx.x] = -1;
  __syncthreads();
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kPiece + threadIdx.x;
  if (place < sorted.count && sorted.keys[place] < sorted.rows) {
    const int first = sorted.first[sorted.keys[place]], last = sorted.first[sorted.keys[place] + 1];
    if (last - first > kPiece && (place - first) % kPiece == 0) starts[place == first] = static_cast<int>(place);
  }
  __syncthreads();
  for (int s = 0; s < 2; ++s) {
    const int start = starts[s];
    if (start < 0) continue;
    const int count = min(sorted.first[sorted.keys[start] + 1] - start, kPiece);
    float* out = pieces + piece_row(start, s == 1) * p.width;
    const auto row_of = [&](int i) { return static_cast<const T*>(p.dy) + sorted.order[start + i] * p.dy_stride; };
    if (by_packs)
      sum_rows<kPack<T>>(out, p.width, count, 1.0f, row_of);
    else
      sum_rows<1>(out, p.width, count, 1.0f, row_of);
  }
}

// A block a row of the gradient.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    embedding_rows_kernel(const EmbeddingBackward p, T* out, const Sorted sorted, const float* pieces, bool mean,
                          bool by_packs) {
  const int64_t row = blockIdx.x;
  const int first = sorted.first[row], count = sorted.first[row + 1] - first;
  const float scale = mean && count > 0 ? 1.0f / static_cast<float>(count) : 1.0f;
  const auto sum = [&](int terms, auto row_of) {
    if (by_packs)
      sum_rows<kPack<T>>(out + row * p.width, p.width, terms, scale, row_of);
    else
      sum_rows<1>(out + row * p.width, p.width, terms, scale, row_of);
  };
  if (count <= kPiece)
    sum(count, [&](int i) { return static_cast<const T*>(p.dy) + sorted.order[first + i] * p.dy_stride; });
  else
    sum((count + kPiece - 1) / kPiece, [&](int i) { return pieces + piece_row(first + i * kPiece, i == 0) * p.width; });
}

// --- launches ---

constexpr int64_t kMost = 0x7fffffff - kTile;  // tokens and rows, counted in int

unsigned blocks_for(int64_t items, int64_t each) { return static_cast<unsigned>(ceil_div(items, each)); }

template <class T>
bool packable(const void* p, int64_t stride) {
  return aligned16(p) && stride % kPack<T> == 0;
}

// The memory that sorting and summing work in, for one gradient after the other.
struct Workspace {
  uint32_t* keys[2];
  int* order[2];
  int* histogram;
  int* first;
  float* pieces;
};

// out[k] = the sum of the rows of dy whose key is k, for every k < rows.
template <Key key, class T>
Status sum_by_key(const EmbeddingBackward& p, T* out, int64_t rows, bool mean, const Workspace& w, Launch& launch) {
  const int count = static_cast<int>(p.sequences * p.length);
  Status status =
      launch.run<embedding_keys_kernel<key>>(blocks_for(count, kThreads), kThreads, 0, p, w.keys[0], w.order[0]);
  int from = 0;
  const bool is_sorted = key == Key::position && !p.starts;
  for (int shift = 0; !is_sorted && rows >> shift != 0; shift += kDigitBits, from = 1 - from) {
    const unsigned tiles = blocks_for(count, kTile);
    if (status.code == Status::ok)
      status = launch.run<embedding_histogram_kernel>(tiles, kThreads, 0, w.keys[from], count, shift, w.histogram);
    if (status.code == Status::ok)
      status = launch.run<embedding_scatter_kernel>(tiles, kThreads, 0, w.keys[from], w.order[from], w.keys[1 - from],
                                                    w.order[1 - from], count, shift, w.histogram);
  }
  const Sorted sorted = {w.keys[from], w.order[from], w.first, rows, count};
  if (status.code == Status::ok)
    status = launch.run<embedding_first_kernel>(blocks_for(rows + 1, kThreads), kThreads, 0, sorted.keys, count, rows,
                                                w.first);
  const bool by_packs = packable<T>(p.dy, p.dy_stride) && packable<T>(out, p.width);
  if (status.code == Status::ok && count > kPiece)
    status = launch.run<embedding_pieces_kernel<T>>(blocks_for(count, kPiece), kSumThreads, 0, p, sorted, w.pieces,
                                                    by_packs);
  if (status.code == Status::ok && rows > 0)
    status = launch.run<embedding_rows_kernel<T>>(static_cast<unsigned>(rows), kSumThreads, 0, p, out, sorted, w.pieces,
                                                  mean, by_packs);
  return status;
}

}  // namespace

Status embedding_forward(const EmbeddingForward& p, Launch& launch) {
  const int64_t count = p.sequences * p.length;
  if (count > kMost) return {Status::unsupported_shape, 0, count};
  if (count == 0 || p.width == 0) return {};
  return dispatch_dtype(p.dtype, [&](auto t) -> Status {
    using T = typename decltype(t)::type;
    const bool by_packs = packable<T>(p.weight, p.weight_stride) && packable<T>(p.y, p.width) &&
                          (!p.position_weight || packable<T>(p.position_weight, p.position_stride));
    return launch.run<embedding_forward_kernel<T>>(blocks_for(count, kWarps), kThreads, 0, p, by_packs);
  });
}

Status embedding_backward(const EmbeddingBackward& p, Launch& launch) {
  const int64_t count = p.sequences * p.length;
  const int64_t vocabulary = p.dweight ? p.vocabulary : 0, positions = p.dposition_weight ? p.positions : 0;
  const int64_t rows = vocabulary > positions ? vocabulary : positions;
  if (count > kMost || rows > kMost) return {Status::unsupported_shape, 0, count > kMost ? count : rows};
  if (count == 0 || p.width == 0) return {Status::unsupported_shape, 0, 0};
  Workspace w;
  for (uint32_t*& keys : w.keys) keys = launch.scratch<uint32_t>(count);
  for (int*& order : w.order) order = launch.scratch<int>(count);
  w.histogram = launch.scratch<int>(ceil_div(count, kTile) * kDigits);
  w.first = launch.scratch<int>(rows + 1);
  w.pieces = count > kPiece ? launch.scratch<float>(ceil_div(count, kPiece) * 2 * p.width) : nullptr;
  return dispatch_dtype(p.dtype, [&](auto t) -> Status {
    using T = typename decltype(t)::type;
    Status status;
    if (p.dweight)
      status = sum_by_key<Key::token>(p, static_cast<T*>(p.dweight), p.vocabulary, p.scale_grad_by_freq, w, launch);
    if (status.code == Status::ok && p.dposition_weight)
      status = sum_by_key<Key::position>(p, static_cast<T*>(p.dposition_weight), p.positions, false, w, launch);
    return status;
  });
}

}  // namespace fastgpt::FASTGPT_ISA
