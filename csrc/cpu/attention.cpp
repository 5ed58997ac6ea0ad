// attention, forward: out = softmax(scale Q K^T + mask) V, one block of keys at a time (FlashAttention, Dao et al.,
// 2022).
//
//   for each block of keys:  s = scale q k^T + mask,  m' = max(m, max(s)),  p = exp(s - m'),
//                            l = l exp(m - m') + sum(p),  o = o exp(m - m') + p v,  m = m'
//   out = o / l,  lse = m + log(l)
//
// A sink is a key without a value, met first: m = sink, l = 1. Dropout clears weights of p after they were summed, and
// out is scaled by what it keeps.
//
// Flops: 4 T S D a head, half of that when causal. The T x S scores never exist: a group of kRows queries meets kKeys
// keys in a tile of a few kB. K and V of a head are packed once a task, in blocks that stay in the second-level cache,
// and are shared by all query heads of the group. Blocks outside the band of the causal rule and the window are
// skipped, and inside the block that it cuts, vectors of keys that the group cannot see are.
//
// A few queries over many keys (decoding) read K and V once, in place (`direct`).
//
// One row's result does not depend on the rows beside it, so tasks may be cut as the number of threads likes.
#include "cpu/attention_options.h"

namespace fastgpt::FASTGPT_ISA {
namespace {

constexpr int64_t kKeys = 192;          // a block of keys: with D = 64, 48 kB each of K and V in float32
constexpr int64_t kQueries = 48;        // a block of queries: the unit of scheduling
constexpr int64_t kDirectKeys = 256;    // keys a step there: their scores stay in the first-level cache
constexpr double kGrainFlops = 1e6;     // worth a thread: about 20 us
constexpr double kProducts = 2;

template <class Dot, class T>
struct Task {
  const AttentionForward& p;
  const Band band;
  const Dropout dropout;
  const bool options = has_score_options(p);
  const int64_t dim_words = (p.dim + Dot::kPair - 1) / Dot::kPair;
  const int64_t out_vectors = (p.value_dim + kLanes - 1) / kLanes;
  const int64_t out_width = out_vectors * kLanes;
  const bool short_heads =
      !p.block_table &&
      (p.queries * p.dim + p.keys * (p.dim + p.value_dim)) * static_cast<int64_t>(sizeof(T)) <= kShortHead;

  Task(const AttentionForward& params, int64_t first_head) : p(params), band(params), dropout(params, first_head) {}

  int64_t group() const { return p.heads / p.kv_heads; }
  int64_t key_block_words() const { return dim_words * kKeys; }
  int64_t value_block_words() const { return kKeys / Dot::kPair * out_width; }

  // Asks for n rows from row i on of query head (b, h), and of its key/value head if it is the first of the group.
  void ask_for(int64_t b, int64_t h, int64_t i, int64_t n) const {
    if (b == p.batch) return;
    prefetch(head(static_cast<const T*>(p.q), p.q_strides, b, h), p.q_strides[2], i, i + n, p.dim);
    if (h % group()) return;
    const int64_t to = least(i + n, p.keys);
    prefetch(head(static_cast<const T*>(p.k), p.k_strides, b, h / group()), p.k_strides[2], i, to, p.dim);
    prefetch(head(static_cast<const T*>(p.v), p.v_strides, b, h / group()), p.v_strides[2], i, to, p.value_dim);
  }

  // Queries [i, i + n) of head (b, h), n <= kRows, over the packed blocks of keys; block `first_block` comes first.
  void rows(int64_t b, int64_t h, int64_t i, int64_t n, const float* k, const float* v, int64_t first_block) const {
    alignas(64) float s[kRows * kKeys];
    alignas(64) float q[kRows * 256];
    alignas(64) float o[kRows * 256];
    alignas(64) float alpha[kLanes];
    Vec m = splat(p.sinks ? p.sinks[h] : -__builtin_inff()), l[kRows] = {};  // of row r: lane r of m, the sum of l[r]
    const T* query = head(static_cast<const T*>(p.q), p.q_strides, b, h) + i * p.q_strides[2];
    pack_rows<Dot>(q, dim_words, query, p.q_strides[2], n, kRows, p.dim);
    T* out = head(static_cast<T*>(p.out), p.out_strides, b, h) + i * p.out_strides[2];
    prefetch<1>(out, p.out_strides[2], 0, n, p.value_dim);
    if (short_heads)
      ask_for(h + 1 < p.heads ? b : b + 1, h + 1 < p.heads ? h + 1 : 0, i, n);
    else
      prefetch(query, p.q_strides[2], n, least(2 * n, p.queries - i), p.dim);
    std::memset(o, 0, sizeof(float) * static_cast<size_t>(kRows * out_width));
    for (int r = 0; r < kRows; ++r) l[r][0] = sink_weight(h);

    const float scale = static_cast<float>(p.scale);
    const int64_t begin = band.first(i) / kKeys, end = (band.last(i + n - 1) + kKeys - 1) / kKeys;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t key = block * kKeys;
      const Columns columns(band, i, i + n, key, kKeys);
      if (columns.empty()) continue;
      const float* keys = k + (block - first_block) * key_block_words();
      dot_products<Dot>(s, kKeys, q, dim_words, keys, kKeys, dim_words, columns, scale);
      if (options)
        for (int64_t r = 0; r < n; ++r) apply_options(p, s + r * kKeys, nullptr, b, h, i + r, key, columns);
      for (int64_t r = 0; r < n; ++r) hide(s + r * kKeys, band, i + r, key, columns);
      softmax(s, m, alpha, l, columns);
      if (dropout)
        for (int64_t r = 0; r < n; ++r)
          drop(reinterpret_cast<typename Dot::Element*>(s + r * kKeys), b, h, i + r, key, columns);
      const auto [from, count] = words_seen<Dot>(band, i, i + n, key, columns);
      const float* values = v + (block - first_block) * value_block_words() + from * out_width;
      for_each_column_tile(out_vectors, [&, from = from, count = count](auto tile, int64_t at) {
        multiply<Dot, decltype(tile)::value, false>(s + from, kKeys, values + at * kLanes, out_width, count,
                                                    [&](int r, int j, Vec sum) {
                                                      float* at_row = o + r * out_width + (at + j) * kLanes;
                                                      store(at_row, load(at_row) * alpha[r] + sum);
                                                    });
      });
    }
    finish(b, h, i, n, o, m, across_rows(l, [](Vec a, Vec c) { return a + c; }));
  }

  // One step of the online softmax: s becomes p (as words), m, alpha = exp(m - m') and l follow.
  static FASTGPT_INLINE void softmax(float* s, Vec& m, float* alpha, Vec (&l)[kRows], Columns columns) {
    Vec top[kRows];
    for (int r = 0; r < kRows; ++r) {
      top[r] = splat(-__builtin_inff());
      for (int64_t c = columns.begin; c < columns.end; c += kLanes) top[r] = max(top[r], load(s + r * kKeys + c));
    }
    // While a row has seen nothing its maximum is -inf; exp(-inf - 0) is the zero that exp(-inf + inf) is not.
    const Vec now = max(m, across_rows(top, [](Vec a, Vec c) { return max(a, c); }));
    const Vec base = now == -__builtin_inff() ? Vec{} : now;
    store(alpha, exp_softmax<Dot::kTarget>(m - base));
    m = now;
    alignas(64) float bases[kLanes];
    store(bases, base);
    for (int r = 0; r < kRows; ++r) {
      Vec total = {};
      for (int64_t c = columns.begin; c < columns.end; c += kLanes) {
        const Vec e = exp_softmax<Dot::kTarget>(load(s + r * kKeys + c) - bases[r]);
        total += e;
        Dot::store_row(s + r * kKeys, c / kLanes, e);
      }
      l[r] = l[r] * alpha[r] + total;
    }
  }

  // What l begins with: the weight of the sink, which m begins with.
  float sink_weight(int64_t h) const { return p.sinks && p.sinks[h] != -__builtin_inff() ? 1.0f : 0.0f; }

  // Clears the weights of query i that dropout drops.
  template <class E>
  void drop(E* weights, int64_t b, int64_t h, int64_t i, int64_t key, Columns columns) const {
    dropout.for_each(b * p.heads + h, i, key, columns, [&](int64_t c, bool kept) {
      if (!kept) weights[c] = E{};
    });
  }

  // Key or value rows [i, i + count) of head (b, g): f(rows, n) for each run of n that lie evenly, in one page.
  template <class F>
  void for_each_run(const void* x, const int64_t (&strides)[3], int64_t b, int64_t g, int64_t i, int64_t count,
                    F&& f) const {
    const T* rows = static_cast<const T*>(x) + g * strides[1];
    if (!p.block_table) return f(rows + b * strides[0] + i * strides[2], count);
    for (int64_t end = i + count; i < end;) {
      const int64_t in_page = i % p.page_size, n = least(end - i, p.page_size - in_page);
      f(rows + p.block_table[i / p.page_size] * strides[0] + in_page * strides[2], n);
      i += n;
    }
  }

  // out = o / l and lse = m + log(l) of queries [i, i + n) of head (b, h), n <= kLanes. l == 0: it saw no key, o is
  // zero.
  void finish(int64_t b, int64_t h, int64_t i, int64_t n, const float* o, Vec m, Vec l) const {
    T* out = head(static_cast<T*>(p.out), p.out_strides, b, h) + i * p.out_strides[2];
    alignas(64) float divisor[kLanes];
    store(divisor, l == 0.0f ? splat(1.0f) : l);
    for (int64_t r = 0; r < n; ++r)
      for (int64_t c = 0; c < p.value_dim; c += kLanes)
        store(out + r * p.out_strides[2] + c, load(o + r * out_width + c) * dropout.scale / divisor[r],
              p.value_dim - c);
    store(p.lse + b * p.lse_strides[0] + h * p.lse_strides[1] + i, l == 0.0f ? splat(__builtin_inff()) : m + log(l), n);
  }

  // Packs the blocks of keys [first_block, end_block) of key/value head (b, g). False when memory is short.
  bool pack(int64_t b, int64_t g, int64_t first_block, int64_t end_block, float* k, float* v) const {
    AlignedBuffer<T> gathered(p.block_table ? kKeys * most(p.dim, p.value_dim) : 0);
    if (!gathered) return false;
    // f(rows, stride) of a block of keys, with the pieces of its pages side by side.
    const auto block_of = [&](const void* x, const int64_t (&strides)[3], int64_t dim, int64_t at, int64_t count,
                              auto&& f) {
      if (!p.block_table) return f(head(static_cast<const T*>(x), strides, b, g) + at * strides[2], strides[2]);
      T* to = gathered.data();
      for_each_run(x, strides, b, g, at, count, [&](const T* rows, int64_t n) {
        for (int64_t r = 0; r < n; ++r, to += dim)
          std::memcpy(to, rows + r * strides[2], static_cast<size_t>(dim) * sizeof(T));
      });
      f(static_cast<const T*>(gathered.data()), dim);
    };
    for (int64_t block = first_block; block < end_block; ++block) {
      const int64_t at = block * kKeys, count = least(kKeys, p.keys - at);
      block_of(p.k, p.k_strides, p.dim, at, count,
               [&](const T* rows, int64_t stride) { pack_transposed<Dot>(k, kKeys, rows, stride, count, p.dim); });
      block_of(p.v, p.v_strides, p.value_dim, at, count, [&](const T* rows, int64_t stride) {
        pack_pairs<Dot>(v, rows, stride, count, round_up(count, Dot::kPair), p.value_dim, out_width);
      });
      k += key_block_words();
      v += value_block_words();
    }
    return true;
  }

  // Piece `piece` of `pieces` of the query blocks of key/value head (b, g). Blocks are dealt 0, last, 1, last - 1, ...
  // so that pieces of a causal head weigh about the same.
  bool run(int64_t b, int64_t g, int64_t piece, int64_t pieces) const {
    const int64_t blocks = (p.queries + kQueries - 1) / kQueries;
    const int64_t begin = blocks * piece / pieces, end = blocks * (piece + 1) / pieces;
    const auto dealt = [&](int64_t n) { return n % 2 ? blocks - 1 - n / 2 : n / 2; };
    int64_t first = p.keys, last = 0;
    for (int64_t n = begin; n < end; ++n) {
      const int64_t i = dealt(n) * kQueries;
      first = least(first, band.first(i));
      last = most(last, band.last(least(i + kQueries, p.queries) - 1));
    }
    const int64_t first_block = first / kKeys, end_block = most((last + kKeys - 1) / kKeys, first_block);
    AlignedBuffer<float> k((end_block - first_block) * key_block_words());
    AlignedBuffer<float> v((end_block - first_block) * value_block_words());
    if (!k || !v || !pack(b, g, first_block, end_block, k.data(), v.data())) return false;
    for (int64_t h = g * group(); h < (g + 1) * group(); ++h)
      for (int64_t n = begin; n < end; ++n) {
        const int64_t from = dealt(n) * kQueries, to = least(from + kQueries, p.queries);
        for (int64_t i = from; i < to; i += kRows) rows(b, h, i, least(kRows, to - i), k.data(), v.data(), first_block);
      }
    return true;
  }

  // The rows (query heads of the group x queries, at most kDirectRows) of key/value head (b, g) over K and V in place.
  void direct(int64_t b, int64_t g) const {
    alignas(64) float q[kDirectRows * 256], o[kDirectRows * 256];
    alignas(64) float s[kDirectRows * kDirectKeys];
    float m[kDirectRows], l[kDirectRows];
    const int64_t rows = group() * p.queries, word_stride = round_up(dim_words, kLanes);
    int64_t first = p.keys, last = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t h = g * group() + r / p.queries, i = r % p.queries;
      pack_rows<Dot>(q + r * word_stride, word_stride,
                     head(static_cast<const T*>(p.q), p.q_strides, b, h) + i * p.q_strides[2], 0, 1, 1, p.dim);
      m[r] = p.sinks ? p.sinks[h] : -__builtin_inff();
      l[r] = sink_weight(h);
      first = least(first, band.first(i));
      last = most(last, band.last(i));
    }
    std::memset(o, 0, sizeof(float) * static_cast<size_t>(rows * out_width));
    for (int64_t at = first; at < last; at += kDirectKeys) {
      const int64_t count = least(kDirectKeys, last - at);
      int64_t done = 0;
      for_each_run(p.k, p.k_strides, b, g, at, count, [&](const T* key, int64_t n) {
        dot_rows<Dot>(s + done, kDirectKeys, q, word_stride, rows, key, p.k_strides[2], n, p.dim,
                      static_cast<float>(p.scale));
        done += n;
      });
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t h = g * group() + r / p.queries, i = r % p.queries;
        const Columns columns(count);
        float* row = s + r * kDirectKeys;
        if (options) apply_options(p, row, nullptr, b, h, i, at, columns);
        hide(row, band, i, at, columns);
        Vec top = splat(m[r]);
        for (int64_t c = 0; c < columns.end; c += kLanes) top = max(top, load(row + c));
        const float now = max_lane(top), base = now == -__builtin_inff() ? 0.0f : now;
        const float alpha = exp_softmax<Dot::kTarget>(splat(m[r] - base))[0];
        Vec total = {};
        for (int64_t c = 0; c < columns.end; c += kLanes) {
          const Vec e = exp_softmax<Dot::kTarget>(load(row + c) - base);
          total += e;
          store(row + c, e);
        }
        m[r] = now;
        l[r] = l[r] * alpha + sum(total);
        if (dropout) drop(row, b, h, i, at, columns);
        float keep = alpha;
        for_each_run(p.v, p.v_strides, b, g, at, count, [&](const T* value, int64_t n) {
          weighted_sum(row, value, n, keep, o + r * out_width);
          row += n, keep = 1.0f;
        });
      }
    }
    for (int64_t r = 0; r < rows; ++r)
      finish(b, g * group() + r / p.queries, r % p.queries, 1, o + r * out_width, splat(m[r]), splat(l[r]));
  }

  // o = o alpha + sum_j w[j] v_j.
  void weighted_sum(const float* w, const T* value, int64_t count, float alpha, float* o) const {
    constexpr int kWide = 4;
    int64_t c = 0;
    for (; c + kWide * kLanes <= p.value_dim; c += kWide * kLanes) {
      Vec total[kWide];
      for (int n = 0; n < kWide; ++n) total[n] = load(o + c + n * kLanes) * alpha;
      for (int64_t j = 0; j < count; ++j)
        for (int n = 0; n < kWide; ++n) total[n] += w[j] * load(value + j * p.v_strides[2] + c + n * kLanes);
      for (int n = 0; n < kWide; ++n) store(o + c + n * kLanes, total[n]);
    }
    for (; c < p.value_dim; c += kLanes) {
      Vec total = load(o + c) * alpha;
      for (int64_t j = 0; j < count; ++j) total += w[j] * load(value + j * p.v_strides[2] + c, p.value_dim - c);
      store(o + c, total);
    }
  }
};

template <class T, class Dot>
Status forward(const AttentionForward& p, int64_t first_head) {
  const Task<Dot, T> task(p, first_head);
  const int64_t heads = p.batch * p.kv_heads;
  const double flops = flops_of(p, kProducts);
  if (task.group() * p.queries <= kDirectRows) {
    parallel_for(0, heads, static_cast<int64_t>(kGrainFlops / (flops + 1)) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) task.direct(n / p.kv_heads, n % p.kv_heads);
    });
    return {};
  }
  // A head is cut into pieces only when there are too few heads for the threads: each piece packs K and V for itself.
  const int64_t blocks = (p.queries + kQueries - 1) / kQueries, threads = thread_count();
  const bool enough = threads == 1 || heads % threads == 0 || heads >= 4 * threads;
  const int64_t pieces = enough ? 1 : least(blocks, (4 * threads + heads - 1) / heads);
  int32_t short_of_memory = 0;
  parallel_for(0, heads * pieces, static_cast<int64_t>(kGrainFlops / (flops / static_cast<double>(pieces) + 1)) + 1,
               [&](int64_t begin, int64_t end) {
                 for (int64_t n = begin; n < end; ++n) {
                   const int64_t head_index = n / pieces;
                   if (!task.run(head_index / p.kv_heads, head_index % p.kv_heads, n % pieces, pieces))
                     __atomic_store_n(&short_of_memory, 1, __ATOMIC_RELAXED);
                 }
               });
  if (short_of_memory) return {Status::out_of_memory, 0, p.keys * (p.dim + p.value_dim) * 4};
  return {};
}

}  // namespace

Status attention_forward(const AttentionForward& p) {
  if (p.dim > 256 || p.value_dim > 256) return {Status::unsupported_shape, 0, most(p.dim, p.value_dim)};
  return for_each_sequence(p, flops_of(p, kProducts) * static_cast<double>(p.kv_heads), kGrainFlops,
                           [&](const AttentionForward& one, int64_t first_head) {
                             return dispatch_dot(p.dtype, [&](auto tag, auto dot) {
                               return forward<typename decltype(tag)::type, decltype(dot)>(one, first_head);
                             });
                           });
}

}  // namespace fastgpt::FASTGPT_ISA
