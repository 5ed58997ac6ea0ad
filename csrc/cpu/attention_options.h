// What attention's options do to the scores and weights of one query (softcap, ALiBi, masks, dropout), and the one
// sequence of a packed batch or of a cache as a dense batch.
#pragma once

#include "core/philox.h"
#include "cpu/attention.h"

namespace fastgpt::FASTGPT_ISA {

// --- scores ---

// tanh within 1 ulp below 0.625 (odd polynomial of least relative error, 7e-9) and 2 ulp above (by e^2x).
inline Vec tanh(Vec x) {
  const Vec size = abs(x), z = x * x;
  Vec p = splat(-0.005515156f);
  p = p * z + 0.020469412f;
  p = p * z - 0.05368802f;
  p = p * z + 0.1333083f;
  p = p * z - 0.3333326f;
  const Vec small = x + x * (z * p);
  const Vec large = 1.0f - 2.0f / (exp_bounded(min(splat(20.0f), size + size)) + 1.0f);
  return size < 0.625f ? small : (x < 0.0f ? -large : large);  // NaN: large, by way of `size`
}

template <class M>
void add_mask_row(float* s, const M* mask, int64_t stride, int64_t count) {
  if (stride == 0) {
    const float value = to_float(*mask);
    for (int64_t c = 0; c < count; ++c) s[c] += value;
  } else if (stride == 1) {
    int64_t c = 0;
    for (; c + kLanes <= count; c += kLanes) store(s + c, load(s + c) + load(mask + c));
    for (; c < count; ++c) s[c] += to_float(mask[c]);
  } else {
    for (int64_t c = 0; c < count; ++c) s[c] += to_float(mask[c * stride]);
  }
}

// s[c] += mask(b, h, i, key + c) for the columns; -inf where a boolean mask is false.
template <class Params>
void add_mask(const Params& p, float* s, int64_t b, int64_t h, int64_t i, int64_t key, Columns columns) {
  const int64_t at =
      b * p.mask_strides[0] + h * p.mask_strides[1] + i * p.mask_strides[2] + (key + columns.begin) * p.mask_strides[3];
  const int64_t stride = p.mask_strides[3], count = least(columns.end, p.keys - key) - columns.begin;
  s += columns.begin;
  if (p.mask_bool) {
    const uint8_t* mask = static_cast<const uint8_t*>(p.mask) + at;
    for (int64_t c = 0; c < count; ++c) s[c] = mask[c * stride] ? s[c] : -__builtin_inff();
    return;
  }
  switch (p.mask_dtype) {
    case DType::f32: return add_mask_row(s, static_cast<const float*>(p.mask) + at, stride, count);
    case DType::bf16: return add_mask_row(s, static_cast<const bf16*>(p.mask) + at, stride, count);
    case DType::f16: return add_mask_row(s, static_cast<const f16*>(p.mask) + at, stride, count);
  }
}

// The scores s[c] = scale q . k of query i of head (b, h) with the keys key + c: capped, biased and masked, but for the
// band. `slopes`, if not null, gets what the cap multiplies their gradients by. Out of line, so that the backward
// finds the very scores that the forward had.
template <class Params>
__attribute__((noinline)) void apply_options(const Params& p, float* s, float* slopes, int64_t b, int64_t h, int64_t i,
                                             int64_t key, Columns columns) {
  if (p.softcap > 0) {
    const float cap = static_cast<float>(p.softcap);
    for (int64_t c = columns.begin; c < columns.end; c += kLanes) {
      const Vec t = tanh(load(s + c) / cap);
      store(s + c, cap * t);
      if (slopes) store(slopes + c, 1.0f - t * t);
    }
  }
  if (p.alibi) {
    const float slope = p.alibi[b * p.alibi_stride + h];
    const float diagonal = static_cast<float>(i + p.keys - p.queries - key);  // exact below 2^24, as in the reference
    Vec column;
    for (int lane = 0; lane < kLanes; ++lane) column[lane] = static_cast<float>(columns.begin + lane);
    for (int64_t c = columns.begin; c < columns.end; c += kLanes, column += kLanes)
      store(s + c, load(s + c) - slope * abs(diagonal - column));
  }
  if (p.mask) add_mask(p, s, b, h, i, key, columns);
}

template <class Params>
inline bool has_score_options(const Params& p) {
  return p.mask || p.alibi || p.softcap > 0;
}

// --- dropout ---

// Dropout of the weights of a query, by the counters of core/philox.h. Weights that are kept count `scale` times.
struct Dropout {
  int64_t seed = 0, first_head = 0;  // of the first head of a sequence in the whole batch
  uint32_t threshold;
  float scale = 1.0f;

  template <class Params>
  Dropout(const Params& p, int64_t head) : first_head(head), threshold(static_cast<uint32_t>(p.dropout_threshold)) {
    if (!*this) return;
    seed = *p.dropout_seed;
    scale = threshold < 65536 ? 65536.0f / static_cast<float>(65536 - threshold) : 0.0f;
  }
  explicit operator bool() const { return threshold > 0; }

  // Calls f(c, whether the weight of key `key` + c is kept) for the columns. kLanes counters at a time, each of which
  // decides on eight keys.
  template <class F>
  void for_each(int64_t head, int64_t query, int64_t key, Columns columns, F&& f) const {
    for (int64_t from = round_down(key + columns.begin, 8); from < key + columns.end; from += 8 * kLanes) {
      PhiloxWords words[kLanes];
      for (int lane = 0; lane < kLanes; ++lane)
        words[lane] = dropout_words(seed, first_head + head, query, from / 8 + lane);
      uint16_t values[8 * kLanes];
      for (int lane = 0; lane < kLanes; ++lane)
        for (int n = 0; n < 8; ++n) values[8 * lane + n] = static_cast<uint16_t>(dropout_value(words[lane], n));
      const int64_t begin = most(from, key + columns.begin), end = least(from + 8 * kLanes, key + columns.end);
      for (int64_t j = begin; j < end; ++j) f(j - key, values[j - from] >= threshold);
    }
  }
};

// --- sequences ---

// Batch row b of a packed batch (cu_seqlens_q and cu_seqlens_k) or of a cache (cache_seqlens), as a batch of one.
template <class Params>
Params sequence_of(const Params& p, int64_t b) {
  Params one = p;
  const int64_t size = p.dtype == DType::f32 ? 4 : 2;
  const auto from = [&](auto*& x, const int64_t (&strides)[3], int64_t row) {
    using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<std::remove_reference_t<decltype(x)>>>,
                                    const char, char>;
    x = static_cast<Byte*>(x) + (b * strides[0] + row * strides[2]) * size;
  };
  const int64_t query = p.cu_seqlens_q ? p.cu_seqlens_q[b] : 0, key = p.cu_seqlens_k ? p.cu_seqlens_k[b] : 0;
  if (p.cu_seqlens_q) one.queries = p.cu_seqlens_q[b + 1] - query;
  if (p.cu_seqlens_k) one.keys = p.cu_seqlens_k[b + 1] - key;
  one.batch = 1;
  one.cu_seqlens_q = one.cu_seqlens_k = nullptr;
  one.lse = p.lse + b * p.lse_strides[0] + query;
  if (p.alibi) one.alibi = p.alibi + b * p.alibi_stride;
  from(one.q, p.q_strides, query);
  from(one.out, p.out_strides, query);
  bool pages = false;
  if constexpr (std::is_same_v<Params, AttentionForward>) {
    pages = p.block_table != nullptr;
    if (pages) one.block_table = p.block_table + b * p.block_table_stride;
    if (p.cache_seqlens) one.keys = p.cache_seqlens[b];
    one.cache_seqlens = nullptr;
  } else {
    from(one.dout, p.dout_strides, query);
    from(one.dq, p.dq_strides, query);
    from(one.dk, p.dk_strides, key);
    from(one.dv, p.dv_strides, key);
  }
  if (!pages) {  // pages belong to every sequence
    from(one.k, p.k_strides, key);
    from(one.v, p.v_strides, key);
  }
  return one;
}

// Calls run(params, first head) for the dense batch, or for each sequence: `flops` each, side by side where there are
// enough of them, otherwise one after the other with all threads inside.
template <class Params, class F>
Status for_each_sequence(const Params& p, double flops, double grain_flops, F&& run) {
  bool together = p.cu_seqlens_q == nullptr;
  if constexpr (std::is_same_v<Params, AttentionForward>) together = together && p.cache_seqlens == nullptr;
  if (together) return run(p, int64_t{0});
  Status failure{};
  int32_t failed = 0;
  const int64_t grain = p.batch < thread_count() ? p.batch : static_cast<int64_t>(grain_flops / (flops + 1)) + 1;
  parallel_for(0, p.batch, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const Params one = sequence_of(p, b);
      if (one.queries == 0) continue;
      const Status status = run(one, b * p.heads);
      if (status.code != Status::ok && __atomic_exchange_n(&failed, 1, __ATOMIC_ACQ_REL) == 0) failure = status;
    }
  });
  return failure;
}

}  // namespace fastgpt::FASTGPT_ISA
