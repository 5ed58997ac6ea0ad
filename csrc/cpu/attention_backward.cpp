// attention, backward, from the inputs, the output and the log-sum-exp (FlashAttention, Dao et al., 2022, section 3.1).
//
//   P = exp(scale Q K^T + mask - lse),  dV = P^T dO,  dP = dO V^T,  delta = rowsum(dO * O),  dS = P * (dP - delta),
//   dQ = scale dS K,  dK = scale dS^T Q,  dsink = -sum(exp(sink - lse) delta)
//
// Dropout multiplies P in dV, and dP. Where scores are capped, dS is multiplied by 1 - tanh^2 for dQ and dK.
//
// Flops: five products, 10 T S D a head (the forward has two). P and dS exist only as tiles of kQueries x kKeys. For
// every block of keys, for every block of queries: S and dP a group of rows at a time, then dV and dK of the block,
// then dQ. dS and P come out row by row; dV and dK want them by columns, which the micro-kernel reads as they lie (for
// bfloat16 the pairs run along the queries there, so two rows are interleaved into words).
//
// No atomics: dK and dV add up over (query head of the group, block of queries), dQ over blocks of keys, always in that
// order. With heads enough for the threads one task does a key/value head with its whole group. With fewer, two passes
// recompute S and dP, one over blocks of keys for dK and dV, one over blocks of queries for dQ: seven products instead
// of five, but every core at work, and the same additions in the same order, so the same bits.
#include "cpu/attention_options.h"

namespace fastgpt::FASTGPT_ISA {
namespace {

// A block of keys and of queries; multiples of kRows and kLanes at every level. The larger, the fewer times are sums of
// dQ, dK and dV loaded and stored; the tiles of P and dS go to the second-level cache.
constexpr int64_t kKeys = 192;
constexpr int64_t kQueries = 96;
constexpr double kGrainFlops = 1e6;  // worth a thread: about 20 us
constexpr double kProducts = 5;

inline int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }

// What one task does: blocks of keys [key_begin, key_end) and of queries [query_begin, query_end).
struct Part {
  int64_t key_begin, key_end, query_begin, query_end;
  bool want_dkv, want_dq;
};

// Scratch of a task, carved from one allocation.
struct Scratch {
  float *keys_t, *values_t, *keys;  // blocks of keys: K^T and V^T for S and dP, K for dQ
  float *dk, *dv;  // sums over the whole group
  float *q, *dout;  // one query head: rows of words for S and dP
  float *q_pairs, *dout_pairs;  // the same for dK and dV; in float32 the rows serve
  float* dq;
  float *lse, *delta;
};

template <class Dot, class T>
struct Task {
  const AttentionBackward& p;
  const Band band;
  const Dropout dropout;
  const bool options = has_score_options(p);
  const float scale = static_cast<float>(p.scale);
  const bool in_place = p.heads / p.kv_heads * p.queries <= kDirectRows;  // as the forward
  // Words in a row, in whole vectors: the same memory can then be read as A and, in float32, as B.
  const int64_t dim_words = (p.dim + Dot::kPair - 1) / Dot::kPair;
  const int64_t value_words = (p.value_dim + Dot::kPair - 1) / Dot::kPair;
  const int64_t dim_width = round_up(p.dim, kLanes), value_width = round_up(p.value_dim, kLanes);
  const int64_t dim_stride = Dot::kPair == 1 ? dim_width : round_up(dim_words, kLanes);
  const int64_t value_stride = Dot::kPair == 1 ? value_width : round_up(value_words, kLanes);

  const bool short_heads =
      (p.queries * (p.dim + 2 * p.value_dim) + p.keys * (p.dim + p.value_dim)) * static_cast<int64_t>(sizeof(T)) <=
      kShortHead;

  Task(const AttentionBackward& params, int64_t first_head) : p(params), band(params), dropout(params, first_head) {}

  int64_t group() const { return p.heads / p.kv_heads; }
  int64_t queries_in(int64_t block) const { return least(kQueries, p.queries - block * kQueries); }
  int64_t keys_in(int64_t block) const { return least(kKeys, p.keys - block * kKeys); }
  // Whether any query of the block sees any key of the block.
  bool meet(int64_t key_block, int64_t query_block) const {
    const int64_t i = query_block * kQueries, key = key_block * kKeys;
    return band.first(i) < key + kKeys && band.last(i + queries_in(query_block) - 1) > key;
  }

  // Where everything lies; returns the number of floats. With `at` null it only counts.
  int64_t carve(const Part& part, float* at, Scratch& s) const {
    const int64_t keys = (part.key_end - part.key_begin) * kKeys;
    const int64_t queries = (part.query_end - part.query_begin) * kQueries;
    int64_t total = 0;
    const auto take = [&](float*& field, int64_t count) {
      field = at + total;
      total += round_up(count, 16);
    };
    take(s.keys_t, keys * dim_words);
    take(s.values_t, keys * value_words);
    take(s.keys, part.want_dq ? keys / Dot::kPair * dim_width : 0);
    take(s.dk, part.want_dkv ? keys * dim_width : 0);
    take(s.dv, part.want_dkv ? keys * value_width : 0);
    take(s.q, queries * dim_stride);
    take(s.dout, queries * value_stride);
    take(s.q_pairs, Dot::kPair > 1 && part.want_dkv ? queries / Dot::kPair * dim_width : 0);
    take(s.dout_pairs, Dot::kPair > 1 && part.want_dkv ? queries / Dot::kPair * value_width : 0);
    take(s.dq, part.want_dq ? queries * dim_width : 0);
    take(s.lse, queries);
    take(s.delta, queries);
    if (Dot::kPair == 1) s.q_pairs = s.q, s.dout_pairs = s.dout;
    return total;
  }

  // Gradients of key/value head (b, g) within `part`. False when memory is short.
  bool run(int64_t b, int64_t g, const Part& part) const {
    Scratch s;
    AlignedBuffer<float> buffer(carve(part, nullptr, s));
    if (!buffer) return false;
    carve(part, buffer.data(), s);
    pack_keys(b, g, part, s);
    if (part.want_dkv) {
      const int64_t keys = (part.key_end - part.key_begin) * kKeys;
      std::memset(s.dk, 0, static_cast<size_t>(keys * dim_width) * 4);
      std::memset(s.dv, 0, static_cast<size_t>(keys * value_width) * 4);
    }
    for (int64_t h = g * group(); h < (g + 1) * group(); ++h) {
      pack_queries(b, h, part, s);
      if (part.want_dq)
        std::memset(s.dq, 0, static_cast<size_t>((part.query_end - part.query_begin) * kQueries * dim_width) * 4);
      for (int64_t n = part.key_begin; n < part.key_end; ++n)
        for (int64_t m = part.query_begin; m < part.query_end; ++m)
          if (meet(n, m)) tile(b, h, n, m, part, s);
      if (part.want_dq)
        unpack(head(static_cast<T*>(p.dq), p.dq_strides, b, h), p.dq_strides[2], s.dq, part.query_begin * kQueries,
               least(part.query_end * kQueries, p.queries), p.dim, dim_width, scale);
    }
    if (part.want_dkv) {
      const int64_t from = part.key_begin * kKeys, to = least(part.key_end * kKeys, p.keys);
      unpack(head(static_cast<T*>(p.dk), p.dk_strides, b, g), p.dk_strides[2], s.dk, from, to, p.dim, dim_width, scale);
      unpack(head(static_cast<T*>(p.dv), p.dv_strides, b, g), p.dv_strides[2], s.dv, from, to, p.value_dim, value_width,
             1.0f);
    }
    return true;
  }

  void pack_keys(int64_t b, int64_t g, const Part& part, const Scratch& s) const {
    const T* key = head(static_cast<const T*>(p.k), p.k_strides, b, g);
    const T* value = head(static_cast<const T*>(p.v), p.v_strides, b, g);
    for (int64_t block = part.key_begin; block < part.key_end; ++block) {
      const int64_t at = block * kKeys, count = keys_in(block), n = block - part.key_begin;
      const T* k = key + at * p.k_strides[2];
      const T* v = value + at * p.v_strides[2];
      pack_transposed<Dot>(s.keys_t + n * kKeys * dim_words, kKeys, k, p.k_strides[2], count, p.dim);
      pack_transposed<Dot>(s.values_t + n * kKeys * value_words, kKeys, v, p.v_strides[2], count, p.value_dim);
      if (part.want_dq)
        pack_pairs<Dot>(s.keys + n * kKeys / Dot::kPair * dim_width, k, p.k_strides[2], count,
                        round_up(count, Dot::kPair), p.dim, dim_width);
    }
  }

  void pack_queries(int64_t b, int64_t h, const Part& part, const Scratch& s) const {
    const int64_t from = part.query_begin * kQueries, to = least(part.query_end * kQueries, p.queries);
    const int64_t count = to - from, rows = round_up(count, kRows);
    const T* q = head(static_cast<const T*>(p.q), p.q_strides, b, h) + from * p.q_strides[2];
    const T* dout = head(static_cast<const T*>(p.dout), p.dout_strides, b, h) + from * p.dout_strides[2];
    const T* out = head(static_cast<const T*>(p.out), p.out_strides, b, h) + from * p.out_strides[2];
    pack_rows<Dot>(s.q, dim_stride, q, p.q_strides[2], count, rows, p.dim);
    pack_rows<Dot>(s.dout, value_stride, dout, p.dout_strides[2], count, rows, p.value_dim);
    if (Dot::kPair > 1 && part.want_dkv) {
      pack_pairs<Dot>(s.q_pairs, q, p.q_strides[2], count, rows, p.dim, dim_width);
      pack_pairs<Dot>(s.dout_pairs, dout, p.dout_strides[2], count, rows, p.value_dim, value_width);
    }
    const float* lse = p.lse + b * p.lse_strides[0] + h * p.lse_strides[1] + from;
    // Rows past the end: exp(0 - inf) = 0, so they add nothing anywhere.
    for (int64_t i = 0; i < rows; ++i) s.lse[i] = i < count ? lse[i] : __builtin_inff();
    for (int64_t i = 0; i < rows; i += kLanes)
      store(s.delta + i,
            delta(dout + i * p.dout_strides[2], out + i * p.out_strides[2], s.dout + i * value_stride, count - i));
  }

  // delta = rowsum(dO * O) of kLanes queries (zero past `count`), in the very additions of dP: where a query sees one
  // key, O = V and dP - delta is exactly zero. A sum in another order leaves its rounding errors there.
  Vec delta(const T* dout, const T* out, const float* dout_rows, int64_t count) const {
    if (count <= 0) return Vec{};
    alignas(64) float out_t[kLanes * 256], dout_t[kLanes * 256];
    if (in_place) {
      alignas(64) float dots[kDirectRows * kLanes];
      const int64_t rows = least(count, kDirectRows);
      dot_rows<Dot>(dots, kLanes, dout_rows, value_stride, rows, out, p.out_strides[2], rows, p.value_dim, 1.0f);
      Vec total = {};
      for (int64_t r = 0; r < rows; ++r) total[r] = dots[r * kLanes + r];
      return total;
    }
    pack_transposed<Dot>(out_t, kLanes, out, p.out_strides[2], least(count, kLanes), p.value_dim);
    pack_transposed<Dot>(dout_t, kLanes, dout, p.dout_strides[2], least(count, kLanes), p.value_dim);
    Vec total = {};
    const int64_t stretch = stretch_of(value_words);
    for (int64_t k = 0; k < value_words; k += stretch) {
      Vec sum = {};
      for (int64_t w = k; w < least(k + stretch, value_words); ++w)
        sum = Dot::step(sum, load(dout_t + w * kLanes), load(out_t + w * kLanes));
      total = k == 0 ? sum : total + sum;
    }
    return total;
  }

  // One block of keys against one block of queries of head (b, h).
  void tile(int64_t b, int64_t h, int64_t key_block, int64_t query_block, const Part& part, const Scratch& s) const {
    // P and dS by words of pairs of queries, for dV and dK. Columns that a group of queries does not see stay unset.
    alignas(64) float probability[kQueries / Dot::kPair * kKeys], gradient[kQueries / Dot::kPair * kKeys];
    // The rows as the products give them; dS also by words of pairs of keys, for dQ. float32 needs no copy.
    alignas(64) float p_rows[kRows * kKeys], ds_rows[kRows * kKeys];
    alignas(64) float slopes[kRows * kKeys], keeps[kRows * kKeys];
    const int64_t n = key_block - part.key_begin, m = (query_block - part.query_begin) * kQueries;
    const int64_t key = key_block * kKeys, query = query_block * kQueries, count = queries_in(query_block);
    const int64_t rows = round_up(count, kRows);
    const float* keys_t = s.keys_t + n * kKeys * dim_words;
    const float* values_t = s.values_t + n * kKeys * value_words;
    const T* k = head(static_cast<const T*>(p.k), p.k_strides, b, h / group()) + key * p.k_strides[2];
    const T* v = head(static_cast<const T*>(p.v), p.v_strides, b, h / group()) + key * p.v_strides[2];

    if constexpr (kLanes % kRows) {  // kRows keys may then reach into columns beside those that a group sees
      std::memset(probability, 0, sizeof(float) * static_cast<size_t>(rows * kKeys));
      std::memset(gradient, 0, sizeof(float) * static_cast<size_t>(rows * kKeys));
    }
    for (int64_t i = 0; i < rows; i += kRows) {
      const int64_t live = least(kRows, count - i);
      const Columns columns(band, query + i, query + i + live, key, kKeys);
      if (short_heads && key_block == part.key_begin) ask_for(b, h, query + i, live);
      if (columns.empty()) continue;
      float* p_words = probability + i / Dot::kPair * kKeys;
      float* ds_words = gradient + i / Dot::kPair * kKeys;
      float* p_at = Dot::kPair == 1 ? p_words : p_rows;
      float* ds_at = Dot::kPair == 1 ? ds_words : ds_rows;
      products(p_at, s.q + (m + i) * dim_stride, dim_stride, keys_t, dim_words, columns, live, k, p.k_strides[2],
               keys_in(key_block), p.dim, scale);
      if (p.softcap > 0) std::memset(slopes, 0, sizeof slopes);  // rows past the end stay zero
      if (dropout) std::memset(keeps, 0, sizeof keeps);
      mask(b, h, query + i, live, key, columns, p_at, slopes);
      if (dropout) multipliers(b, h, query + i, live, key, columns, keeps);
      products(ds_at, s.dout + (m + i) * value_stride, value_stride, values_t, value_words, columns, live, v,
               p.v_strides[2], keys_in(key_block), p.value_dim, 1.0f);
      const float *lse = s.lse + m + i, *delta = s.delta + m + i;
      if (dropout || p.softcap > 0)
        gradients<true>(p_at, ds_at, p_words, ds_words, lse, delta, columns, p.softcap > 0 ? slopes : nullptr,
                        dropout ? keeps : nullptr);
      else
        gradients<false>(p_at, ds_at, p_words, ds_words, lse, delta, columns, nullptr, nullptr);
      if (part.want_dq)
        add_dq(ds_at, query + i, live, key, columns, s.keys + n * kKeys / Dot::kPair * dim_width,
               s.dq + (m + i) * dim_width);
    }
    if (part.want_dkv) add_dkv(probability, gradient, query, rows, key, s, n, m);
  }

  // Asks for n rows from row i on of what head (b, h) will write and what the next head will read.
  void ask_for(int64_t b, int64_t h, int64_t i, int64_t n) const {
    const int64_t g = h / group(), to = least(i + n, p.keys);
    prefetch<1>(head(static_cast<const T*>(p.dq), p.dq_strides, b, h), p.dq_strides[2], i, i + n, p.dim);
    if ((h + 1) % group() == 0) {
      prefetch<1>(head(static_cast<const T*>(p.dk), p.dk_strides, b, g), p.dk_strides[2], i, to, p.dim);
      prefetch<1>(head(static_cast<const T*>(p.dv), p.dv_strides, b, g), p.dv_strides[2], i, to, p.value_dim);
    }
    if (++h == p.heads) h = 0, ++b;
    if (b == p.batch) return;
    prefetch(head(static_cast<const T*>(p.q), p.q_strides, b, h), p.q_strides[2], i, i + n, p.dim);
    prefetch(head(static_cast<const T*>(p.dout), p.dout_strides, b, h), p.dout_strides[2], i, i + n, p.value_dim);
    prefetch(head(static_cast<const T*>(p.out), p.out_strides, b, h), p.out_strides[2], i, i + n, p.value_dim);
    if (h % group()) return;
    prefetch(head(static_cast<const T*>(p.k), p.k_strides, b, h / group()), p.k_strides[2], i, to, p.dim);
    prefetch(head(static_cast<const T*>(p.v), p.v_strides, b, h / group()), p.v_strides[2], i, to, p.value_dim);
  }

  // P = exp(S - lse) and dS = P (dP - delta) of kRows queries, from S in p_rows and dP in ds_rows. `keeps`, if not
  // null, is what dropout multiplies P and dP by, `slopes` what softcap multiplies dS by.
  template <bool kOptions>
  static void gradients(float* p_rows, float* ds_rows, float* p_words, float* ds_words, const float* lse,
                        const float* delta, Columns columns, const float* slopes, const float* keeps) {
    for (int64_t r = 0; r < kRows; r += Dot::kPair)
      for (int64_t c = columns.begin; c < columns.end; c += kLanes) {
        Vec e[Dot::kPair], ds[Dot::kPair];
        for (int64_t n = 0; n < Dot::kPair; ++n) {
          const int64_t at = (r + n) * kKeys + c;
          e[n] = exp_softmax<Dot::kTarget>(load(p_rows + at) - lse[r + n]);
          Vec dp = load(ds_rows + at);
          if (kOptions && keeps) dp = dp * load(keeps + at);
          ds[n] = e[n] * (dp - delta[r + n]);
          if (kOptions && slopes) ds[n] = ds[n] * load(slopes + at);
          if (kOptions && keeps) e[n] = e[n] * load(keeps + at);
        }
        float* p_at = p_words + r / Dot::kPair * kKeys + c;
        float* ds_at = ds_words + r / Dot::kPair * kKeys + c;
        if constexpr (Dot::kPair == 1) {
          store(p_at, e[0]);
          store(ds_at, ds[0]);
        } else {
          store(p_at, Dot::pair(e[0], e[1]));
          float* words = ds_rows + r * kKeys + c / 2;  // overwrites dP, which has been read up to here
          store(ds_at, Dot::pair(ds[0], ds[1], words, words + kKeys));
        }
      }
  }

  // Rows of a times the columns of x: packed and transposed in `packed`, in place at `x`. The same additions as in the
  // forward, so that exp(score - lse) is exactly 1 where a query sees one key.
  void products(float* to, const float* a, int64_t a_stride, const float* packed, int64_t words, Columns columns,
                int64_t live, const T* x, int64_t x_stride, int64_t count, int64_t dim, float factor) const {
    if (!in_place) return dot_products<Dot>(to, kKeys, a, a_stride, packed, kKeys, words, columns, factor);
    std::memset(to, 0, sizeof(float) * kRows * kKeys);
    dot_rows<Dot>(to, kKeys, a, a_stride, live, x, x_stride, count, dim, factor);
    for (int64_t r = 0; r < live; ++r) {  // in place all keys are read; beside the columns the tile stays zero
      std::memset(to + r * kKeys, 0, sizeof(float) * static_cast<size_t>(columns.begin));
      std::memset(to + r * kKeys + columns.end, 0, sizeof(float) * static_cast<size_t>(kKeys - columns.end));
    }
  }

  // Masks the scores of kRows queries: -inf where a query does not see the key.
  void mask(int64_t b, int64_t h, int64_t i, int64_t live, int64_t key, Columns columns, float* to,
            float* slopes) const {
    if (options)
      for (int64_t r = 0; r < live; ++r)
        apply_options(p, to + r * kKeys, slopes + r * kKeys, b, h, i + r, key, columns);
    for (int64_t r = 0; r < live; ++r) hide(to + r * kKeys, band, i + r, key, columns);
  }

  // What dropout multiplies the weights of kRows queries by.
  void multipliers(int64_t b, int64_t h, int64_t i, int64_t live, int64_t key, Columns columns, float* to) const {
    for (int64_t r = 0; r < live; ++r)
      dropout.for_each(b * p.heads + h, i + r, key, columns,
                       [&](int64_t c, bool kept) { to[r * kKeys + c] = kept ? dropout.scale : 0.0f; });
  }

  // dq of kRows queries += dS K, over the keys that some of them see.
  void add_dq(const float* ds, int64_t query, int64_t live, int64_t key, Columns columns, const float* keys,
              float* dq) const {
    const auto [from, count] = words_seen<Dot>(band, query, query + live, key, columns);
    keys += from * dim_width;
    for_each_column_tile(dim_width / kLanes, [&, from = from, count = count](auto width, int64_t at) {
      multiply<Dot, decltype(width)::value, false>(ds + from, kKeys, keys + at * kLanes, dim_width, count,
                                                   [&](int r, int j, Vec sum) {
                                                     float* to = dq + r * dim_width + (at + j) * kLanes;
                                                     store(to, load(to) + sum);
                                                   });
    });
  }

  // dv += P^T dO and dk += dS^T Q for the block of keys, kRows keys at a time, over the queries that see any of them.
  void add_dkv(const float* probability, const float* gradient, int64_t query, int64_t rows, int64_t key,
               const Scratch& s, int64_t n, int64_t m) const {
    const int64_t count = least(kKeys, p.keys - key);
    for (int64_t j = 0; j < count; j += kRows) {
      int64_t from = 0, to = rows;
      while (from < rows && band.last(least(query + from + kRows, p.queries) - 1) <= key + j) from += kRows;
      while (to > from && band.first(query + to - kRows) >= key + j + kRows) to -= kRows;
      const int64_t first = from / Dot::kPair, words = (to - from) / Dot::kPair;
      if (words == 0) continue;
      const auto add = [&](const float* a, const float* b, int64_t b_width, float* sums) {
        for_each_column_tile(b_width / kLanes, [&](auto width, int64_t at) {
          multiply<Dot, decltype(width)::value, true>(
              a + first * kKeys + j, kKeys, b + (m / Dot::kPair + first) * b_width + at * kLanes, b_width, words,
              [&](int r, int column, Vec sum) {
                float* to_row = sums + (n * kKeys + j + r) * b_width + (at + column) * kLanes;
                store(to_row, load(to_row) + sum);
              });
        });
      };
      add(probability, s.dout_pairs, value_width, s.dv);
      add(gradient, s.q_pairs, dim_width, s.dk);
    }
  }

  static void unpack(T* out, int64_t out_stride, const float* sums, int64_t from, int64_t to, int64_t dim,
                     int64_t width, float factor) {
    for (int64_t i = from; i < to; ++i) {
      prefetch<1>(out, out_stride, i + kAhead, least(i + kAhead + 1, to), dim);
      for (int64_t c = 0; c < dim; c += kLanes)
        store(out + i * out_stride + c, load(sums + (i - from) * width + c) * factor, dim - c);
    }
  }
};

// dsinks, over the batch and the queries in order; in double precision, for their terms cancel.
template <class T>
void sink_gradients(const AttentionBackward& p) {
  const double flops = 2.0 * static_cast<double>(p.total_queries * p.value_dim);
  parallel_for(0, p.heads, static_cast<int64_t>(kGrainFlops / (flops + 1)) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) {
      double total = 0;
      for (int64_t b = 0; b < p.batch; ++b) {
        const AttentionBackward one = sequence_of(p, b);
        const T* dout = static_cast<const T*>(one.dout) + h * p.dout_strides[1];
        const T* out = static_cast<const T*>(one.out) + h * p.out_strides[1];
        const float* lse = one.lse + h * p.lse_strides[1];
        for (int64_t i = 0; i < one.queries; ++i, dout += p.dout_strides[2], out += p.out_strides[2]) {
          VecD delta = {};
          for_each_vector(p.value_dim, [&](int64_t c, int64_t n) {
            const Doubles x = to_double(load(dout + c, n)), y = to_double(load(out + c, n));
            delta += x.low * y.low + x.high * y.high;
          });
          double sum = 0;
          for (int lane = 0; lane < kLanes / 2; ++lane) sum += delta[lane];
          total -= __builtin_exp(static_cast<double>(p.sinks[h]) - lse[i]) * sum;
        }
      }
      p.dsinks[h] = static_cast<float>(total);
    }
  });
}

template <class T, class Dot>
Status backward(const AttentionBackward& p, int64_t first_head) {
  const Task<Dot, T> task(p, first_head);
  const int64_t heads = p.batch * p.kv_heads, threads = thread_count();
  const int64_t key_blocks = blocks_of(p.keys, kKeys), query_blocks = blocks_of(p.queries, kQueries);
  const double flops = flops_of(p, kProducts);
  int32_t short_of_memory = 0;
  // Runs part(n) of `pieces` for every head.
  const auto run = [&](int64_t pieces, auto&& part) {
    parallel_for(0, heads * pieces, static_cast<int64_t>(kGrainFlops / (flops / static_cast<double>(pieces) + 1)) + 1,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t n = begin; n < end; ++n) {
                     const int64_t head_index = n / pieces;
                     if (!task.run(head_index / p.kv_heads, head_index % p.kv_heads, part(n % pieces)))
                       __atomic_store_n(&short_of_memory, 1, __ATOMIC_RELAXED);
                   }
                 });
  };
  if (heads >= threads || flops * static_cast<double>(heads) < 4 * kGrainFlops) {
    run(1, [&](int64_t) { return Part{0, key_blocks, 0, query_blocks, true, true}; });
  } else {
    const int64_t wanted = (4 * threads + heads - 1) / heads;
    const int64_t key_pieces = least(key_blocks, wanted), query_pieces = least(query_blocks, wanted);
    run(key_pieces, [&](int64_t n) {
      return Part{key_blocks * n / key_pieces, key_blocks * (n + 1) / key_pieces, 0, query_blocks, true, false};
    });
    run(query_pieces, [&](int64_t n) {
      return Part{0, key_blocks, query_blocks * n / query_pieces, query_blocks * (n + 1) / query_pieces, false, true};
    });
  }
  if (short_of_memory) return {Status::out_of_memory, 0, 4 * (p.keys * 5 + p.queries * 3) * most(p.dim, p.value_dim)};
  return {};
}

}  // namespace

Status attention_backward(const AttentionBackward& p) {
  if (p.dim > 256 || p.value_dim > 256) return {Status::unsupported_shape, 0, most(p.dim, p.value_dim)};
  if (p.dsinks) {
    const auto gradients = [&](auto tag) {
      sink_gradients<typename decltype(tag)::type>(p);
      return Status{};
    };
    dispatch_dtype(p.dtype, gradients);
  }
  return for_each_sequence(p, flops_of(p, kProducts) * static_cast<double>(p.kv_heads), kGrainFlops,
                           [&](const AttentionBackward& one, int64_t first_head) {
                             return dispatch_dot(p.dtype, [&](auto tag, auto dot) {
                               return backward<typename decltype(tag)::type, decltype(dot)>(one, first_head);
                             });
                           });
}

}  // namespace fastgpt::FASTGPT_ISA
