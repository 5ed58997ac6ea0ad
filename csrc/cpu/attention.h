// What attention's forward and backward share: micro-kernels, packing, geometry and masks.
//
// Every product is C[m][n] = sum_k A[m][k] B[k][n] with A broadcast by scalars and B read as vectors along n. A tile of
// kRows x kColumns vectors of C stays in registers; k runs over words. A word is what one lane multiplies in one step:
// a float (DotF32), or a pair of neighbours in k as bfloat16 (DotBF16, vdpbf16ps, with AVX-512 BF16 only). So operands
// lie as
//   A        [m][k words]       "rows": a row of words for every row of C
//   B        [k words][n]       "pairs": for bfloat16 word (k, n) holds B[2k][n] and B[2k + 1][n]
// and a transposed B (K in Q K^T) is packed by transposing words.
#pragma once

#include "core/aligned.h"
#include "core/math.h"
#include "core/parallel.h"

namespace fastgpt::FASTGPT_ISA {

// Register tile: kRows x kColumns accumulators, kColumns vectors of B and one broadcast: 28 of 32 registers, or 15
// of 16. Without FMA the product needs a register of its own.
#if defined(__AVX512F__)
constexpr int kRows = 8, kColumns = 3;
#elif defined(__aarch64__)
constexpr int kRows = 4, kColumns = 3;
#elif defined(__AVX2__)
constexpr int kRows = 6, kColumns = 2;
#else
constexpr int kRows = 4, kColumns = 2;
#endif
static_assert(kRows <= kLanes, "one lane for what is known of each row");

#define FASTGPT_INLINE inline __attribute__((always_inline))

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
inline int64_t round_down(int64_t n, int64_t unit) { return n / unit * unit; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

struct DotF32 {
  static constexpr int kPair = 1;  // elements in a word
  using Element = float;
  static constexpr Target kTarget = Target::single;  // how exactly the softmax is wanted
  static FASTGPT_INLINE Vec broadcast(const float* a) { return splat(*a); }
  static FASTGPT_INLINE Vec step(Vec sum, Vec a, Vec b) { return sum + a * b; }
  static FASTGPT_INLINE void store_row(float* words, int64_t vector, Vec v) { store(words + vector * kLanes, v); }
};

#if defined(__AVX512BF16__)
struct DotBF16 {
  static constexpr int kPair = 2;
  using Element = bf16;
  static constexpr Target kTarget = Target::half;
  static FASTGPT_INLINE Vec broadcast(const float* a) { return (Vec)_mm512_set1_epi32((int)load_bits<uint32_t>(a)); }
  static FASTGPT_INLINE Vec step(Vec sum, Vec a, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  static FASTGPT_INLINE void store_row(float* words, int64_t vector, Vec v) {
    const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(words + vector * (kLanes / 2), &half, sizeof half);
  }
  // Words whose low halves are `even` and whose high halves are `odd`; each is also stored as a row where one is given.
  static FASTGPT_INLINE Vec pair(Vec even, Vec odd, float* even_row = nullptr, float* odd_row = nullptr) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    if (even_row) {
      const __m256i low = _mm512_castsi512_si256(both), high = _mm512_extracti64x4_epi64(both, 1);
      std::memcpy(even_row, &low, sizeof low);
      std::memcpy(odd_row, &high, sizeof high);
    }
    typedef int16_t Halves __attribute__((vector_size(64)));
    Halves interleaved;
    for (int i = 0; i < kLanes; ++i) {
      interleaved[2 * i] = static_cast<int16_t>(i);
      interleaved[2 * i + 1] = static_cast<int16_t>(kLanes + i);
    }
    return (Vec)_mm512_permutexvar_epi16((__m512i)interleaved, both);
  }
};
#endif

template <int n>
struct Count {
  static constexpr int value = n;
};

// Splits `vectors` columns into register tiles of at most kColumns, as evenly as can be (4 = 2 + 2, not 3 + 1).
template <class F>
FASTGPT_INLINE void for_each_column_tile(int64_t vectors, F&& f) {
  int64_t tiles = (vectors + kColumns - 1) / kColumns;
  for (int64_t at = 0; tiles > 0; --tiles) {
    const int64_t width = (vectors - at + tiles - 1) / tiles;
    if (width == 1)
      f(Count<1>{}, at);
    else if (width == 2 || kColumns == 2)
      f(Count<2>{}, at);
    else
      f(Count<kColumns>{}, at);
    at += width;
  }
}

// One register tile: out(row, column vector, sum) for kRows rows and kTile column vectors. With kTransposedA, A lies as
// [k words][m]: a_stride is then the distance from one k to the next, otherwise from one row to the next.
template <class Dot, int kTile, bool kTransposedA, class Out>
FASTGPT_INLINE void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t words,
                             Out&& out) {
  Vec sum[kRows][kTile] = {};
  for (int64_t k = 0; k < words; ++k) {
    Vec column[kTile];
#pragma GCC unroll 8
    for (int j = 0; j < kTile; ++j) column[j] = load(b + k * b_stride + j * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec scalar = Dot::broadcast(kTransposedA ? a + k * a_stride + r : a + r * a_stride + k);
#pragma GCC unroll 8
      for (int j = 0; j < kTile; ++j) sum[r][j] = Dot::step(sum[r][j], scalar, column[j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < kTile; ++j) out(r, j, sum[r][j]);
}

// e^x for x <= 88, in the softmax mostly x <= 0: exact at 0, zero below e^-104 (e^-87 without AVX-512), NaN stays NaN.
// The single-word ln 2 costs 2e-9 of x, nothing where e^x is not itself negligible beside the row's maximum of 1.
#if defined(__AVX512F__)
// x = n ln 2 + r with n a multiple of 1/16, so |r| <= ln 2 / 32: e^x = 2^floor(n) 2^(j/16) e^r. The 16 powers lie in a
// register, split in two, and e^r needs degree 3 (1.6e-9), for half, whose result is rounded to 8 bits, degree 2
// (4e-7). Five multiplications (four); one polynomial for |r| <= ln 2 / 2 took eight and was no more accurate.
template <Target kFor>
FASTGPT_INLINE Vec exp_softmax(Vec x) {
  const Vec power = {1.0f,        1.04427373f, 1.09050775f, 1.13878858f, 1.18920708f, 1.24185777f,
                     1.29683959f, 1.35425556f, 1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f,
                     1.68179286f, 1.75625217f, 1.8340081f,  1.91520655f};
  const Vec missing = {0.0f,           4.83347016e-8f,  -1.30775399e-8f, 5.38622231e-8f,  3.79763527e-8f,
                       4.4968381e-8f,  -4.01899953e-8f, -1.01233493e-8f, 2.4203235e-8f,   -4.50089885e-8f,
                       8.07090483e-9f, 9.83621717e-9f,  -2.47553267e-8f, -9.23577037e-9f, -1.1239278e-8f,
                       9.84532811e-9f};
  const float round_to_16th = 786432.0f;  // 1.5 * 2^19: its sum with n 's float has j in the lowest four bits
  x = max(splat(-104.5f), x);
  const Vec shifted = x * 1.44269504088896341f + round_to_16th, n = shifted - round_to_16th;
  const Vec r = x - n * 0.693147180559945309f;
  const Vec t = (Vec)_mm512_permutexvar_ps((__m512i)shifted, (__m512)power);
  Vec e;
  if constexpr (kFor == Target::half) {
    e = r * (r * 0.50001961f + 1.0f) * t + t;
  } else {
    const Vec low = (Vec)_mm512_permutexvar_ps((__m512i)shifted, (__m512)missing);
    e = t + (r * ((r * 0.16667031f + 0.50001619f) * r + 1.0f) * t + low);
  }
  return (Vec)_mm512_scalef_ps((__m512)e, (__m512)n);  // takes the floor of n
}
#else
// x = n ln 2 + r with n whole; e^r by a minimax polynomial whose constant term is 1 (2e-9).
template <Target>
FASTGPT_INLINE Vec exp_softmax(Vec x) {
  const float round_to_int = 12582912.0f;  // 1.5 * 2^23
  const Vec shifted = x * 1.44269504088896341f + round_to_int, n = shifted - round_to_int;
  const Vec r = x - n * 0.693147180559945309f;
  Vec p = splat(0.00138436442f);
  p = p * r + 0.00837416337f;
  p = p * r + 0.0416680026f;
  p = p * r + 0.166664312f;
  p = p * r + 0.499999942f;
  p = p * r + 1.00000003f;
  p = p * r + 1.0f;
  const Vec two_to_n = as_float((as_int(shifted) << 23) + 0x3f800000);
  return x < -87.3f ? Vec{} : p * two_to_n;
}
#endif

// The lanes of a and b for which `block` is not set in a's number, or is: what one step of the transposition below, and
// of `across`, exchanges. A template, so that the indices are constants.
template <int kBlock, bool kOther>
FASTGPT_INLINE Vec exchange(Vec a, Vec b) {
  VecI lane;  // of a, then of b (+ kLanes)
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) lane[i] = ((i & kBlock) ? kLanes + i - kBlock : i) + (kOther ? kBlock : 0);
  return __builtin_shuffle(a, b, lane);
}

// kLanes x kLanes words, transposed in registers by exchanging blocks of 1, 2, 4, ...
template <int kBlock = 1>
FASTGPT_INLINE void transpose(Vec (&v)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kBlock) continue;
    const Vec a = v[i], b = v[i + kBlock];
    v[i] = exchange<kBlock, false>(a, b);
    v[i + kBlock] = exchange<kBlock, true>(a, b);
  }
  if constexpr (2 * kBlock < kLanes) transpose<2 * kBlock>(v);
}

// Lane r: the combination of all lanes of rows[r], for kRows rows at once, always in the same order. Each step makes
// one vector of two.
template <int kBlock = kLanes / 2, class F>
FASTGPT_INLINE Vec across(Vec (&v)[2 * kBlock], F&& combine) {
  Vec half[kBlock];
#pragma GCC unroll 8
  for (int i = 0; i < kBlock; ++i)
    half[i] = combine(exchange<kBlock, false>(v[i], v[i + kBlock]), exchange<kBlock, true>(v[i], v[i + kBlock]));
  if constexpr (kBlock == 1)
    return half[0];
  else
    return across<kBlock / 2>(half, combine);
}
template <class F>
FASTGPT_INLINE Vec across_rows(const Vec (&rows)[kRows], F&& combine) {
  Vec v[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) v[i] = rows[i % kRows];
  return across(v, combine);
}

// --- packing ---

// Asks for rows [from, to) of x, to be written if kWrite. Rows of a projection lie far apart (9 kB in a (B, T, 3, H, D)
// view), where no hardware prefetcher follows: short heads wait longer for memory than they multiply.
template <int kWrite = 0, class T>
inline void prefetch(const T* x, int64_t stride, int64_t from, int64_t to, int64_t dim) {
  for (int64_t r = from; r < to; ++r)
    for (int64_t c = 0; c < dim; c += 64 / static_cast<int64_t>(sizeof(T)))
      __builtin_prefetch(x + r * stride + c, kWrite, 2);
}
// While rows of a long head are packed, those so much further on are asked for.
constexpr int64_t kAhead = 32;
// The rows of a short head, of so many bytes at most, are asked for while the head before it is computed.
constexpr int64_t kShortHead = 384 << 10;

// kLanes words of a row from element `at` on, zero beyond `count` elements.
template <class Dot, class T>
FASTGPT_INLINE Vec load_words(const T* row, int64_t at, int64_t count) {
  const int64_t n = count - at;
  if constexpr (Dot::kPair == 1) {
    return n >= kLanes ? load(row + at) : load(row + at, n);
  } else {
    if (n >= 2 * kLanes) return load_bits<Vec>(row + at);
    Vec words = {};
    std::memcpy(&words, row + at, static_cast<size_t>(n) * sizeof(T));
    return words;
  }
}

// A operand: rows [0, count) of x as words, zero rows up to `rows`. Rows of the result are `stride` words apart.
template <class Dot, class T>
void pack_rows(float* out, int64_t stride, const T* x, int64_t x_stride, int64_t count, int64_t rows, int64_t dim) {
  for (int64_t r = 0; r < rows; ++r) {
    float* to = out + r * stride;
    prefetch(x, x_stride, r + kAhead, least(r + kAhead + 1, count), dim);
    for (int64_t w = 0; w < stride; w += kLanes) {
      const bool live = r < count && w * Dot::kPair < dim;
      const Vec words = live ? load_words<Dot>(x + r * x_stride, w * Dot::kPair, dim) : Vec{};
      store(to + w, words, stride - w);
    }
  }
}

// B operand: rows [0, count) of x, by pairs of rows for bfloat16, zero rows up to `rows` and zero columns up to
// `width`.
template <class Dot, class T>
void pack_pairs(float* out, const T* x, int64_t x_stride, int64_t count, int64_t rows, int64_t dim, int64_t width) {
  for (int64_t k = 0; k < rows / Dot::kPair; ++k) {
    prefetch(x, x_stride, k * Dot::kPair + kAhead, least((k + 1) * Dot::kPair + kAhead, count), dim);
    for (int64_t c = 0; c < width; c += kLanes) {
      const auto part = [&](int64_t r) { return r < count && c < dim ? load(x + r * x_stride + c, dim - c) : Vec{}; };
      Vec words = part(k * Dot::kPair);
      if constexpr (Dot::kPair == 2)  // both are bfloat16 widened to float: the high half of 32 bits
        words = as_float(as_uint(words) >> 16 | as_uint(part(2 * k + 1)));
      store(out + k * width + c, words);
    }
  }
}

// Transposed B operand: [words of dim][stride], the first `count` keys, zeros up to whole vectors; what lies beyond is
// left alone.
template <class Dot, class T>
void pack_transposed(float* out, int64_t stride, const T* x, int64_t x_stride, int64_t count, int64_t dim) {
  const int64_t words = (dim + Dot::kPair - 1) / Dot::kPair;
  for (int64_t j = 0; j < count; j += kLanes) {
    prefetch(x, x_stride, j + kAhead, least(j + kAhead + kLanes, count), dim);
    for (int64_t w = 0; w < words; w += kLanes) {
      Vec block[kLanes];
      const int64_t at = w * Dot::kPair, whole = at + kLanes * Dot::kPair;
      if (j + kLanes <= count && whole <= dim) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) block[i] = load_words<Dot>(x + (j + i) * x_stride, at, whole);
      } else {
        for (int i = 0; i < kLanes; ++i)
          block[i] = j + i < count ? load_words<Dot>(x + (j + i) * x_stride, at, dim) : Vec{};
      }
      transpose(block);
      for (int64_t i = 0; i < least(kLanes, words - w); ++i) store(out + (w + i) * stride + j, block[i]);
    }
  }
}

// --- which key a query sees ---

// The band of the causal rule and the window: query i sees the keys [first(i), last(i)); both grow with i.
struct Band {
  int64_t queries, keys, left, right, shift;

  template <class Params>
  explicit Band(const Params& p)
      : queries(p.queries),
        keys(p.keys),
        left(least(p.left, p.queries + p.keys)),
        right(least(p.right, p.queries + p.keys)),
        shift(p.bottom_right ? p.keys - p.queries : 0) {}
  int64_t first(int64_t i) const { return left < 0 ? 0 : least(most(i + shift - left, 0), keys); }
  int64_t last(int64_t i) const { return right < 0 ? keys : least(most(i + shift + right + 1, 0), keys); }
};

// The columns [begin, end) of the block of keys [key, key + block) that queries [from, to) may see, in whole vectors.
struct Columns {
  int64_t begin, end;
  explicit Columns(int64_t count) : begin(0), end(round_up(count, kLanes)) {}
  Columns(const Band& band, int64_t from, int64_t to, int64_t key, int64_t block) {
    begin = round_down(least(most(band.first(from) - key, 0), block), kLanes);
    end = round_up(least(most(band.last(to - 1) - key, 0), block), kLanes);
    if (end < begin) end = begin;
  }
  bool empty() const { return begin >= end; }
};

// The first word, and how many, of the keys of `columns` that some query of [from, to) sees: at the diagonal half a
// vector fewer than the columns.
struct Words {
  int64_t begin, count;
};
template <class Dot>
inline Words words_seen(const Band& band, int64_t from, int64_t to, int64_t key, Columns columns) {
  const int64_t begin = most(columns.begin, round_down(band.first(from) - key, Dot::kPair)) / Dot::kPair;
  const int64_t end = least(columns.end, round_up(band.last(to - 1) - key, Dot::kPair)) / Dot::kPair;
  return {begin, end - begin};
}

// Sets the scores of columns that query i does not see to -inf. s[0] is key `key`.
inline void hide(float* s, const Band& band, int64_t i, int64_t key, Columns columns) {
  const int64_t first = band.first(i) - key, last = band.last(i) - key;
  VecI lane;
  for (int c = 0; c < kLanes; ++c) lane[c] = c;
  const auto cut = [&](int64_t c) {
    const VecI at = lane + static_cast<int32_t>(c);
    const VecI seen = (at >= static_cast<int32_t>(first)) & (at < static_cast<int32_t>(last));
    store(s + c, seen ? load(s + c) : splat(-__builtin_inff()));
  };
  int64_t c = columns.begin;
  for (; c < least(first, columns.end); c += kLanes) cut(c);
  for (c = most(c, round_down(most(last, 0), kLanes)); c < columns.end; c += kLanes) cut(c);
}

// The start of head (b, h) in a tensor with strides (batch, head, row).
template <class T>
inline T* head(T* x, const int64_t (&strides)[3], int64_t b, int64_t h) {
  return x + b * strides[0] + h * strides[1];
}

// Dot products longer than 96 words are summed in stretches of about 64: one running sum of 256 terms rounds twice as
// badly as torch's.
inline int64_t stretch_of(int64_t words) {
  return words <= 96 ? most(words, 1) : (words + words / 64 - 1) / (words / 64);
}

// to[r][c] = factor * (row r of a . column c of b) for kRows rows and the columns, b lying as [words][keys].
template <class Dot>
FASTGPT_INLINE void dot_products(float* to, int64_t to_stride, const float* a, int64_t a_stride, const float* b,
                                 int64_t b_stride, int64_t words, Columns columns, float factor) {
  const int64_t stretch = stretch_of(words);
  for_each_column_tile((columns.end - columns.begin) / kLanes, [&](auto tile, int64_t at) {
    const int64_t c = columns.begin + at * kLanes;
    for (int64_t k = 0; k == 0 || k < words; k += stretch)  // no words: zeros
      multiply<Dot, decltype(tile)::value, false>(a + k, a_stride, b + k * b_stride + c, b_stride,
                                                  least(stretch, words - k), [&](int r, int j, Vec sum) {
                                                    float* out = to + r * to_stride + c + j * kLanes;
                                                    store(out, k == 0 ? sum * factor : load(out) + sum * factor);
                                                  });
  });
}

// Rows (query heads of a group x queries) up to which K and V are read in place: packing would triple the traffic.
constexpr int64_t kDirectRows = 4;

// to[r][j] = factor * (row r of a . row j of x) for j < count, zero up to the next multiple of kLanes. x lies in place;
// rows of a are words padded with zeros to whole vectors. The partial sums of kLanes rows of x are transposed, so that
// no lane idles in a reduction.
template <class Dot, class T>
void dot_rows(float* to, int64_t to_stride, const float* a, int64_t a_stride, int64_t rows, const T* x,
              int64_t x_stride, int64_t count, int64_t dim, float factor) {
  for (int64_t j = 0; j < count; j += kLanes)
    for (int64_t r = 0; r < rows; ++r) {
      Vec part[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        part[i] = Vec{};
        if (j + i < count)
          for (int64_t w = 0; w * Dot::kPair < dim; w += kLanes)
            part[i] = Dot::step(part[i], load_words<Dot>(x + (j + i) * x_stride, w * Dot::kPair, dim),
                                load(a + r * a_stride + w));
      }
      transpose(part);
      Vec total = part[0];
      for (int i = 1; i < kLanes; ++i) total += part[i];
      store(to + r * to_stride + j, total * factor);
    }
}

// Of a key/value head with its group, for so many products of queries and keys (or values).
template <class Params>
inline double flops_of(const Params& p, double products) {
  return products * static_cast<double>(p.queries) * static_cast<double>(p.keys) *
         static_cast<double>(p.dim + p.value_dim) * static_cast<double>(p.heads / p.kv_heads);
}

// Calls run(storage type, Dot) for the dtype: bfloat16 is multiplied as it is where the machine can.
template <class F>
inline Status dispatch_dot(DType dtype, F&& run) {
  return dispatch_dtype(dtype, [&](auto tag) {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<decltype(tag), TypeTag<bf16>>) return run(tag, DotBF16{});
#endif
    return run(tag, DotF32{});
  });
}

}  // namespace fastgpt::FASTGPT_ISA
