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
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8, kColumns = 3;
#elif defined(__AVX2__)
constexpr int kRows = 6, kColumns = 2;
#else
constexpr int kRows = 4, kColumns = 2;
#endif

#define FASTGPT_INLINE inline __attribute__((always_inline))

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
inline int64_t round_down(int64_t n, int64_t unit) { return n / unit * unit; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

struct DotF32 {
  static constexpr int kPair = 1;  // elements in a word
  using Element = float;
  static FASTGPT_INLINE Vec broadcast(const float* a) { return splat(*a); }
  static FASTGPT_INLINE Vec step(Vec sum, Vec a, Vec b) { return sum + a * b; }
  static FASTGPT_INLINE void store_row(float* words, int64_t vector, Vec v) { store(words + vector * kLanes, v); }
};

#if defined(__AVX512BF16__)
struct DotBF16 {
  static constexpr int kPair = 2;
  using Element = bf16;
  static FASTGPT_INLINE Vec broadcast(const float* a) { return (Vec)_mm512_set1_epi32((int)load_bits<uint32_t>(a)); }
  static FASTGPT_INLINE Vec step(Vec sum, Vec a, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  static FASTGPT_INLINE void store_row(float* words, int64_t vector, Vec v) {
    const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(words + vector * (kLanes / 2), &half, sizeof half);
  }
  // Words whose low halves are `even` and whose high halves are `odd`.
  static FASTGPT_INLINE Vec pair(Vec even, Vec odd) {
    const __m256i low = (__m256i)_mm512_cvtneps_pbh((__m512)even), high = (__m256i)_mm512_cvtneps_pbh((__m512)odd);
    return (Vec)_mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
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

// e^x for x <= 88, in the softmax mostly x <= 0: within about 1 ulp, exact at 0, zero below e^-104 (e^-87 without
// AVX-512), NaN stays NaN. x = n ln 2 + r; e^r by a minimax polynomial whose constant term is 1. The single-word ln 2
// costs 2e-9 n, nothing where e^x is not itself negligible beside the row's maximum of 1.
FASTGPT_INLINE Vec exp_softmax(Vec x) {
  const float log2e = 1.44269504088896341f, ln2 = 0.693147180559945309f;
#if defined(__AVX512F__)
  x = (Vec)_mm512_max_ps(_mm512_set1_ps(-104.5f), (__m512)x);  // the second operand wins when it is NaN
  const Vec n = (Vec)_mm512_roundscale_ps((__m512)(x * log2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const float round_to_int = 12582912.0f;  // 1.5 * 2^23
  const Vec shifted = x * log2e + round_to_int;
  const Vec n = shifted - round_to_int;
#endif
  const Vec r = x - n * ln2;
  Vec p = splat(0.00138436442f);
  p = p * r + 0.00837416337f;
  p = p * r + 0.0416680026f;
  p = p * r + 0.166664312f;
  p = p * r + 0.499999942f;
  p = p * r + 1.00000003f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const Vec power = as_float((as_int(shifted) << 23) + 0x3f800000);
  return x < -87.3f ? Vec{} : p * power;
#endif
}

// --- packing ---

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
  for (int64_t k = 0; k < rows / Dot::kPair; ++k)
    for (int64_t c = 0; c < width; c += kLanes) {
      const auto part = [&](int64_t r) { return r < count && c < dim ? load(x + r * x_stride + c, dim - c) : Vec{}; };
      Vec words = part(k * Dot::kPair);
      if constexpr (Dot::kPair == 2)  // both are bfloat16 widened to float: the high half of 32 bits
        words = as_float(as_uint(words) >> 16 | as_uint(part(2 * k + 1)));
      store(out + k * width + c, words);
    }
}

// kLanes x kLanes words, transposed in registers by exchanging blocks of 1, 2, 4, ...
FASTGPT_INLINE void transpose(Vec (&v)[kLanes]) {
#pragma GCC unroll 4
  for (int block = 1; block < kLanes; block *= 2) {
    VecI low, high;  // lanes of a then lanes of b (+ kLanes)
    for (int i = 0; i < kLanes; ++i) {
      low[i] = (i & block) ? kLanes + i - block : i;
      high[i] = (i & block) ? kLanes + i : i + block;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & block) continue;
      const Vec a = v[i], b = v[i + block];
      v[i] = __builtin_shuffle(a, b, low);
      v[i + block] = __builtin_shuffle(a, b, high);
    }
  }
}

// Transposed B operand: [words of dim][keys], zero beyond `count` keys up to `keys` (a multiple of kLanes).
template <class Dot, class T>
void pack_transposed(float* out, const T* x, int64_t x_stride, int64_t count, int64_t keys, int64_t dim) {
  const int64_t words = (dim + Dot::kPair - 1) / Dot::kPair;
  for (int64_t j = 0; j < keys; j += kLanes)
    for (int64_t w = 0; w < words; w += kLanes) {
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i)
        block[i] = j + i < count ? load_words<Dot>(x + (j + i) * x_stride, w * Dot::kPair, dim) : Vec{};
      transpose(block);
      for (int64_t i = 0; i < least(kLanes, words - w); ++i) store(out + (w + i) * keys + j, block[i]);
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

// Sets s[c] to `value` for columns of [columns) that query i does not see. s[0] is key `key`.
inline void hide(float* s, const Band& band, int64_t i, int64_t key, Columns columns, float value) {
  const int64_t first = band.first(i) - key, last = band.last(i) - key;
  for (int64_t c = columns.begin; c < least(first, columns.end); ++c) s[c] = value;
  for (int64_t c = most(last, columns.begin); c < columns.end; ++c) s[c] = value;
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
