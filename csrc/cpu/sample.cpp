// sample: one token a row, after penalties, bias, temperature, top-k, top-p and min-p (fastgpt/ops/sample.py defines
// every step; the reference there gives the same tokens from the same bits).
//
// The vocabulary is never sorted. One pass over the row finds its maximum and, along the way, the maximum of every
// group of elements (a lane of 64 vectors). With top-k, the k-th largest of these group maxima bounds the k-th largest
// element from below and is nearly as large, so a second pass keeps little more than k candidates, and all else works
// on those. Without top-k every element needs its exponential: one more pass, in the order of 15 us for 50257 elements.
// Thresholds come from radix selection over the bits of the logits: three histograms, no comparison; among few elements
// from comparing each with all.
//
// Bytes: the row is read twice, once from memory and once from cache. Floor: 0.02 ms for 50257 float32 at 10 GB/s.
//
// This file is compiled with -ffp-contract=off (CMakeLists.txt): a fused multiply-add would change the bits of a
// weight, and so, once in a while, the token. All that must be bit-exact is therefore in this file, not in a shared
// inline function, which the linker could take from a file compiled otherwise.
#include "core/aligned.h"
#include "core/parallel.h"
#include "core/philox.h"
#include "core/simd.h"

namespace fastgpt::FASTGPT_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr double kLog2e = 1.4426950408889634;  // as math.log2(math.e), to the bit
constexpr double kLn2 = 0.6931471805599453;
// A weight is exp((x - best) / temperature) in units of 2^-42, so the sum of 2^20 of them fits into int64.
constexpr int kWeightBits = 42;
// Adding a weight to 1.5 * 2^10, whose last bit is worth 2^-42, rounds it to an integer in the low bits of the sum.
constexpr double kRoundWeight = 1536.0;

// Temperatures beyond count as these: only logits 1e-29 or 1e29 apart could tell, and the scale would leave float32.
constexpr double kLowestTemperature = 1e-30, kHighestTemperature = 1e30;

// A range worth a thread: half a row of GPT-2's vocabulary takes about 10 us.
constexpr int64_t kGrainElements = 32768;
// The most vectors whose lane-wise maxima make the groups: 50257 elements give 800 groups with AVX-512.
constexpr int64_t kGroupVectors = 64;
// Radix digits from the top: 11, 11 and 10 bits.
constexpr int64_t kBins = 2048;
// Among so many elements comparing all with all beats three histograms, which touch 16 kB each: 128 x 8 comparisons.
constexpr int64_t kFew = 128;

struct Options {
  double temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
};
struct Keys {
  int64_t top_k, seed, position;
};
Options options_of(const Sample& p, int64_t row) {
  return *reinterpret_cast<const Options*>(p.reals ? p.reals + row * 6 : p.all_reals);
}
// Every option is in its range. A row where one is not has nothing to choose from; fastgpt/ops/sample.py says which.
bool possible(const Options& o) {
  const double infinity = __builtin_inf();
  return o.temperature >= 0 && o.temperature < infinity && o.top_p > 0 && o.top_p <= 1 && o.min_p >= 0 &&
         o.min_p <= 1 && o.repetition_penalty > 0 && o.repetition_penalty < infinity &&
         __builtin_fabs(o.presence_penalty) < infinity && __builtin_fabs(o.frequency_penalty) < infinity;
}
Keys keys_of(const Sample& p, int64_t row) {
  return *reinterpret_cast<const Keys*>(p.integers ? p.integers + row * 3 : p.all_integers);
}

// Memory of the calling thread that stays from call to call: to get 1.4 MB from malloc and touch its pages for the
// first time takes as long as the work. What a very large vocabulary needs is given back.
class ThreadMemory {
 public:
  explicit ThreadMemory(int64_t words) : words_(words) {
    Kept& kept = mine();
    if (kept.words < words) {
      std::free(kept.data);
      kept.data = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(words + 15) / 16 * 64));
      kept.words = kept.data ? words : 0;
    }
  }
  ~ThreadMemory() {
    constexpr int64_t most = 2 << 20;  // 8 MB: vocabularies of 300,000
    if (words_ > most) mine().clear();
  }
  ThreadMemory(const ThreadMemory&) = delete;
  ThreadMemory& operator=(const ThreadMemory&) = delete;
  float* data() const { return mine().data; }

 private:
  struct Kept {
    float* data = nullptr;
    int64_t words = 0;
    void clear() {
      std::free(data);
      data = nullptr;
      words = 0;
    }
    ~Kept() { clear(); }
  };
  static Kept& mine() {
    static thread_local Kept kept;
    return kept;
  }
  int64_t words_;
};

// Buffers of one thread, each for a whole row. Pages that are not touched cost nothing.
struct Scratch {
  float* x;  // the row after penalties and bias
  float* maxima;  // of the groups
  float* value;  // the candidates' logits
  int32_t* token;  // the candidates, ascending
  float* weight;  // the candidates' weights, not yet rounded; 0 where a filter dropped one
  int32_t* list;  // work space of select()
  int64_t* bins;  // work space of select()
  int32_t* counts;  // occurrences of every token among the previous ones; zero between rows

  static int64_t padded(int64_t vocab) { return (vocab + kLanes - 1) / kLanes * kLanes; }
  static int64_t words(int64_t vocab) { return 7 * padded(vocab) + 2 * kBins; }
  Scratch(float* memory, int64_t vocab) {
    const int64_t v = padded(vocab);
    bins = reinterpret_cast<int64_t*>(memory);
    maxima = memory + 2 * kBins;
    x = maxima + v;
    value = x + v;
    weight = value + v;
    token = reinterpret_cast<int32_t*>(weight + v);
    list = token + v;
    counts = list + v;
  }
};

// Logits on which the filters and the draw work: the whole row, or what a filter left of it.
struct Candidates {
  const float* value;
  const int32_t* token;  // null: candidate i is token i
  int64_t count;
};

struct Scan {
  float best;
  bool valid;  // no NaN, no +inf
};

// `vectors` of a row have their maxima, lane by lane, in one group each.
int64_t group_count(int64_t vocab, int64_t vectors) {
  const int64_t span = vectors * kLanes;
  return (vocab + span - 1) / span * kLanes;
}

// Groups so large that there are still at least two for every token that top-k keeps, for a tight bound.
int64_t group_vectors(int64_t vocab, int64_t top_k) {
  int64_t vectors = kGroupVectors;
  while (vectors > 1 && group_count(vocab, vectors) < 2 * top_k) vectors /= 4;
  return vectors;
}

// bias added, the row written to `out` (may be null), its maximum and the maxima of its groups.
template <class T>
Scan scan(const T* logits, const float* bias, float* out, int64_t vocab, int64_t vectors, float* maxima) {
  Vec best = splat(-kInfinity);
  VecI invalid = {};
  for (int64_t begin = 0; begin < vocab; begin += vectors * kLanes) {
    const int64_t end = begin + vectors * kLanes < vocab ? begin + vectors * kLanes : vocab;
    Vec even = splat(-kInfinity), odd = even;  // two chains hide the latency of the maximum
    const auto take = [&](int64_t c, int64_t n, Vec& group) {
      Vec v = load(logits + c, n, -kInfinity);
      if (bias) v = v + load(bias + c, n);
      if (out) store(out + c, v, n);
      invalid |= ~(v < kInfinity);
      group = max(v, group);
    };
    int64_t c = begin;
    for (; c + 2 * kLanes <= end; c += 2 * kLanes) {
      take(c, kLanes, even);
      take(c + kLanes, kLanes, odd);
    }
    for (; c < end; c += kLanes) take(c, end - c, even);
    even = max(even, odd);
    store(maxima, even);
    maxima += kLanes;
    best = max(even, best);
  }
  return {max_lane(best), lane_mask(invalid) == 0};
}

// Repetition, presence and frequency penalties on a float row; in double, rounded once.
void penalise(float* x, const Options& o, const int64_t* previous, int64_t count, int32_t* counts) {
  for (int64_t i = 0; i < count; ++i)
    if (previous[i] >= 0) ++counts[previous[i]];
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = previous[i];
    if (token < 0 || counts[token] == 0) continue;
    double v = x[token];
    v = v > 0 ? v / o.repetition_penalty : v * o.repetition_penalty;
    x[token] = static_cast<float>(v - o.presence_penalty - o.frequency_penalty * counts[token]);
    counts[token] = 0;
  }
}

// An unsigned integer that orders as the float does (-0 just below +0).
inline uint32_t ordered_bits(float x) {
  const uint32_t u = bits_of(x);
  return u ^ (u >> 31 ? 0xffffffffu : 0x80000000u);
}
inline float from_ordered_bits(uint32_t key) { return float_of(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu)); }

// The largest t such that the elements with value >= t weigh at least `needed` > 0 together; all of them do. With
// `listed`, the elements are those that s.list names.
template <class Weight>
float select(const float* value, int64_t count, bool listed, int64_t needed, Weight&& weight, Scratch& s) {
  constexpr int shifts[] = {21, 10, 0};
  uint32_t prefix = 0;
  for (int level = 0; level < 3; ++level) {
    const int shift = shifts[level];
    const uint32_t digit_mask = level < 2 ? kBins - 1 : kBins / 2 - 1;
    std::memset(s.bins, 0, kBins * sizeof(int64_t));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = listed ? s.list[i] : i;
      s.bins[ordered_bits(value[at]) >> shift & digit_mask] += weight(at);
    }
    uint32_t digit = digit_mask;
    while (s.bins[digit] < needed) needed -= s.bins[digit--];
    prefix |= digit << shift;
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = listed ? s.list[i] : i;
      s.list[kept] = static_cast<int32_t>(at);
      kept += (ordered_bits(value[at]) >> shift & digit_mask) == digit;
    }
    count = kept;
    listed = true;
  }
  return from_ordered_bits(prefix);
}

int64_t one(int64_t) { return 1; }

// The same for at most kFew elements, all of them: each one's mass is the weight of those that are at least as large.
template <class Weight>
float select_few(const float* value, int64_t count, int64_t needed, Weight&& weight) {
  float threshold = -kInfinity;
  for (int64_t i = 0; i < count; ++i) {
    if (value[i] <= threshold) continue;
    int64_t mass = 0;
    for (int64_t j = 0; j < count; ++j) mass += value[j] >= value[i] ? weight(j) : 0;
    if (mass >= needed) threshold = value[i];
  }
  return threshold;
}

// Writes the candidates with value >= threshold; in place is fine.
Candidates collect(Candidates from, float threshold, Scratch& s) {
  int64_t kept = 0;
  for_each_vector(from.count, [&](int64_t c, int64_t n) {
    uint32_t mask = lane_mask(load(from.value + c, n, -kInfinity) >= threshold);
    if (n < kLanes) mask &= (1u << n) - 1;
    for (; mask; mask &= mask - 1) {
      const int64_t at = c + __builtin_ctz(mask);
      s.value[kept] = from.value[at];
      s.token[kept++] = from.token ? from.token[at] : static_cast<int32_t>(at);
    }
  });
  return {s.value, s.token, kept};
}

int64_t count_at_least(const float* value, int64_t count, float threshold) {
  VecI total = {};
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) total -= load(value + c) >= threshold;
  int64_t result = 0;
  for (int i = 0; i < kLanes; ++i) result += total[i];
  for (; c < count; ++c) result += value[c] >= threshold;
  return result;
}

// A number that at least k of the maxima reach, and few more than k: by bisection, for which these lie in the cache.
float bound_of_kth(const float* maxima, int64_t groups, float best, int64_t k) {
  uint32_t low = ordered_bits(-kInfinity), high = ordered_bits(best);
  while (low < high) {
    const uint32_t middle = high - (high - low) / 2;
    const int64_t reach = count_at_least(maxima, groups, from_ordered_bits(middle));
    if (reach < k) {
      high = middle - 1;
      continue;
    }
    low = middle;
    if (reach <= k + k / 4) break;
  }
  return from_ordered_bits(low);
}

Candidates keep_top_k(Candidates all, int64_t k, float best, int64_t groups, Scratch& s) {
  const Candidates few = collect(all, bound_of_kth(s.maxima, groups, best, k), s);
  if (few.count == k) return few;
  const float kth =
      few.count <= kFew ? select_few(few.value, few.count, k, one) : select(few.value, few.count, false, k, one, s);
  return collect(few, kth, s);
}

// 2^e for e <= 0 (below -64, 2^-64: its weight rounds to 0). e = whole + fraction with |fraction| <= 1/2; 2^fraction by
// a polynomial, exactly 1 at 0, with relative error 2e-9 before rounding.
inline Vec power_of_two(Vec e) {
  const float round_to_int = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  e = max(e, splat(-64.0f));
  const Vec shifted = e + round_to_int;
  const Vec fraction = e - (shifted - round_to_int);
  Vec p = splat(0.00015353361959569156f);
  p = p * fraction + 0.0013398875016719103f;
  p = p * fraction + 0.00961843691766262f;
  p = p * fraction + 0.055503323674201965f;
  p = p * fraction + 0.24022647738456726f;
  p = p * fraction + 0.6931471824645996f;
  p = p * fraction + 1.0f;
  // Times 2^whole, exactly: the low 9 bits of `shifted`, whole itself, move to the exponent and are added there.
  return as_float(as_uint(p) + (as_uint(shifted) << 23));
}

struct Rounded {
  VecL low, high;
};
inline Rounded rounded(Vec weight) {
#if defined(__AVX512DQ__)
  const __m512 scaled = (__m512)(weight * static_cast<float>(int64_t{1} << kWeightBits));  // exact
  return {(VecL)_mm512_cvtps_epi64(_mm512_castps512_ps256(scaled)),
          (VecL)_mm512_cvtps_epi64(_mm512_extractf32x8_ps(scaled, 1))};
#endif
  const Doubles d = to_double(weight);
  const VecL base = (VecL)(VecD{} + kRoundWeight);
  return {(VecL)(d.low + kRoundWeight) - base, (VecL)(d.high + kRoundWeight) - base};
}
inline VecL rounded_pairs(Vec weight) {  // the two halves added
  const Rounded r = rounded(weight);
  return r.low + r.high;
}
inline int64_t rounded(float weight) {
  const double sum = weight + kRoundWeight, base = kRoundWeight;
  int64_t a, b;
  std::memcpy(&a, &sum, 8);
  std::memcpy(&b, &base, 8);
  return a - b;
}
inline int64_t lanes_sum(VecL v) {
  int64_t total = 0;
  for (int i = 0; i < kLanes / 2; ++i) total += v[i];
  return total;
}

// The weights of the candidates (null: not wanted), and their sum. `scale` is log2(e) / temperature.
int64_t weigh(Candidates from, float best, float scale, float* weight) {
  VecL total = {};
  for_each_vector(from.count, [&](int64_t c, int64_t n) {
    const Vec w = power_of_two((load(from.value + c, n, -kInfinity) - best) * scale);
    if (weight) store(weight + c, w, n);
    total += rounded_pairs(w);  // dead lanes weigh nothing
  });
  return lanes_sum(total);
}

// The smallest float that is at least x, for 0 <= x <= 1.
float not_below(double x) {
  const float nearest = static_cast<float>(x);
  return nearest < x ? float_of(bits_of(nearest) + 1) : nearest;
}

// The largest float that is at most x.
float not_above(double x) {
  const float nearest = static_cast<float>(x);
  return nearest > x ? from_ordered_bits(ordered_bits(nearest) - 1) : nearest;
}

// Zeroes the weights of candidates below either threshold, and returns the sum of the rest.
int64_t filter(Candidates from, float lowest_value, float lowest_weight, float* weight) {
  VecL total = {};
  for_each_vector(from.count, [&](int64_t c, int64_t n) {
    const Vec w = load(weight + c, n);
    const Vec kept = (load(from.value + c, n, -kInfinity) >= lowest_value) & (w >= lowest_weight) ? w : splat(0.0f);
    store(weight + c, kept, n);
    total += rounded_pairs(kept);
  });
  return lanes_sum(total);
}

// top-p's threshold. A first histogram over equal steps from `best` down to `bound` (whatever is below goes into the
// last bin) leaves few elements to select from even where the distribution is flat, and rarely adds to one bin twice in
// a row.
float top_p_threshold(Candidates from, float best, float bound, int64_t needed, Scratch& s) {
  const auto weight = [&](int64_t i) { return rounded(s.weight[i]); };
  if (from.count <= kFew) return select_few(from.value, from.count, needed, weight);
  float steps = kBins / (best - bound);
  steps = steps < 1e30f ? steps : 1e30f;
  const auto bin_of = [&](Vec value) {
    return __builtin_convertvector(min((best - value) * steps, splat(kBins - 1)), VecI);
  };
  std::memset(s.bins, 0, kBins * sizeof(int64_t));
  for_each_vector(from.count, [&](int64_t c, int64_t n) {
    const VecI bin = bin_of(load(from.value + c, n, -kInfinity));
    const Rounded w = rounded(load(s.weight + c, n));  // dead lanes weigh nothing
    for (int i = 0; i < kLanes / 2; ++i) {
      s.bins[bin[i]] += w.low[i];
      s.bins[bin[i + kLanes / 2]] += w.high[i];
    }
  });
  int32_t bin = 0;
  while (s.bins[bin] < needed) needed -= s.bins[bin++];
  int64_t kept = 0;
  for_each_vector(from.count, [&](int64_t c, int64_t n) {
    uint32_t mask = lane_mask(bin_of(load(from.value + c, n, -kInfinity)) == bin);
    if (n < kLanes) mask &= (1u << n) - 1;
    for (; mask; mask &= mask - 1) s.list[kept++] = static_cast<int32_t>(c + __builtin_ctz(mask));
  });
  return select(from.value, kept, true, needed, weight, s);
}

// The first candidate whose cumulative weight is above `target`.
int64_t find(const float* weight, int64_t count, int64_t target) {
  constexpr int64_t block = 16 * kLanes;
  int64_t c = 0;
  for (; c + block <= count; c += block) {
    VecL total = {};
    for (int64_t i = c; i < c + block; i += kLanes) total += rounded_pairs(load(weight + i));
    const int64_t sum = lanes_sum(total);
    if (sum > target) break;
    target -= sum;
  }
  for (; c < count - 1; ++c) {
    target -= rounded(weight[c]);
    if (target < 0) break;
  }
  return c;
}

// The first place of the maximum, by way of the first groups that reach it.
int64_t first_best(const float* x, int64_t vocab, float best, const float* maxima, int64_t vectors) {
  int64_t c = 0;
  for (; c + vectors * kLanes < vocab && lane_mask(load(maxima) == best) == 0; maxima += kLanes) c += vectors * kLanes;
  for (; c < vocab; c += kLanes) {
    const uint32_t mask = lane_mask(load(x + c, vocab - c, -kInfinity) == best);
    if (mask) return c + __builtin_ctz(mask);
  }
  return vocab - 1;
}

// log_prob of a logit whose row's kept weights add up to `total`.
float log_share(float value, float best, double temperature, int64_t total) {
  const double distance = static_cast<double>(value - best) / temperature;
  return static_cast<float>(distance - (__builtin_log(static_cast<double>(total)) - kWeightBits * kLn2));
}

// Draws from the row x, whose largest element is `best`; s.maxima are those of its groups of `vectors`.
void draw(const Sample& p, int64_t row, const float* x, float best, int64_t vectors, Scratch& s) {
  const Options o = options_of(p, row);
  const Keys keys = keys_of(p, row);
  Candidates from = {x, nullptr, p.vocab};
  if (o.temperature == 0) {
    p.token[row] = first_best(x, p.vocab, best, s.maxima, vectors);
    p.log_prob[row] = log_share(best, best, 1.0, weigh(from, best, static_cast<float>(kLog2e), nullptr));
    return;
  }
  const double at_least = o.temperature > kLowestTemperature ? o.temperature : kLowestTemperature;
  const double temperature = at_least < kHighestTemperature ? at_least : kHighestTemperature;
  const float scale = static_cast<float>(kLog2e / temperature);
  if (keys.top_k > 0 && keys.top_k < p.vocab)
    from = keep_top_k(from, keys.top_k, best, group_count(p.vocab, vectors), s);
  else if (o.top_p == 1 && o.min_p > 0)  // a weight's error is far below 1e-4
    from = collect(from, not_above(best + temperature * (__builtin_log(o.min_p) - 1e-4)), s);

  int64_t total = weigh(from, best, scale, s.weight);
  float lowest = -kInfinity;
  if (o.top_p < 1) {
    const double share = __builtin_ceil(o.top_p * static_cast<double>(total));
    int64_t needed = share < 1 ? 1 : static_cast<int64_t>(share);
    if (needed > total) needed = total;
    // Elements that weigh at most (total - needed) / count each cannot add up to what top-p drops, so its threshold
    // lies above them. Where that leaves few elements, go on with those alone, if their sum, which is exact, says so
    // too.
    const double spare = static_cast<double>(total - needed) / static_cast<double>(from.count);
    const double log_weight = __builtin_log(spare > 1 ? spare : 1.0) - kWeightBits * kLn2;
    const float bound = static_cast<float>(best + log_weight * temperature);
    if (!from.token && 4 * count_at_least(from.value, from.count, bound) < from.count) {
      const Candidates few = collect(from, bound, s);
      if (weigh(few, best, scale, s.weight) >= needed)
        from = few;
      else
        weigh(from, best, scale, s.weight);
    }
    lowest = top_p_threshold(from, best, bound, needed, s);
  }
  if (o.top_p < 1 || o.min_p > 0) total = filter(from, lowest, not_below(o.min_p), s.weight);

  const uint32_t row_key = static_cast<uint32_t>(p.row ? p.row[row] : p.all_row >= 0 ? p.all_row : row);
  const uint64_t random =
      uniform_bits(static_cast<uint64_t>(keys.seed), row_key, static_cast<uint64_t>(keys.position), kSampleStream);
  const int64_t target = static_cast<int64_t>(static_cast<unsigned __int128>(random) * total >> 64);
  const int64_t found = find(s.weight, from.count, target);
  p.token[row] = from.token ? from.token[found] : found;
  p.log_prob[row] = log_share(from.value[found], best, temperature, total);
}

template <class T>
Status sample_row(const Sample& p, int64_t row, Scratch& s) {
  const T* logits = static_cast<const T*>(p.logits) + row * p.logits_stride;
  const float* bias = p.logit_bias ? p.logit_bias + row * p.bias_stride : nullptr;
  const bool as_it_is = sizeof(T) == sizeof(float) && !bias && !p.previous_count;
  const Keys keys = keys_of(p, row);
  if (!possible(options_of(p, row)) || keys.top_k < 0 || keys.position < 0) return {Status::empty_support, row, 0};
  const int64_t vectors = group_vectors(p.vocab, keys.top_k < p.vocab ? keys.top_k : 0);
  Scan result;
  if (p.previous_count) {
    for_each_vector(p.vocab, [&](int64_t c, int64_t n) { store(s.x + c, load(logits + c, n), n); });
    penalise(s.x, options_of(p, row), p.previous + row * p.previous_count, p.previous_count, s.counts);
    result = scan(s.x, bias, bias ? s.x : nullptr, p.vocab, vectors, s.maxima);
  } else {
    result = scan(logits, bias, as_it_is ? nullptr : s.x, p.vocab, vectors, s.maxima);
  }
  if (!result.valid) return {Status::not_finite, row, 0};
  if (result.best == -kInfinity) return {Status::empty_support, row, 0};
  draw(p, row, as_it_is ? reinterpret_cast<const float*>(logits) : s.x, result.best, vectors, s);
  return {};
}

template <class T>
Status sample_rows(const Sample& p) {
  AlignedBuffer<Status> status(p.rows);
  if (!status) return {Status::out_of_memory, 0, p.rows * static_cast<int64_t>(sizeof(Status))};
  parallel_for(0, p.rows, kGrainElements / p.vocab + 1, [&](int64_t begin, int64_t end) {
    const int64_t words = Scratch::words(p.vocab);
    const ThreadMemory memory(words);
    if (!memory.data()) {
      for (int64_t row = begin; row < end; ++row) status.data()[row] = {Status::out_of_memory, row, words * 4};
      return;
    }
    Scratch scratch(memory.data(), p.vocab);
    if (p.previous_count) std::memset(scratch.counts, 0, static_cast<size_t>(p.vocab) * 4);
    for (int64_t row = begin; row < end; ++row) status.data()[row] = sample_row<T>(p, row, scratch);
  });
  for (int64_t row = 0; row < p.rows; ++row)  // the first bad row, whatever thread met it
    if (status.data()[row].code != Status::ok) return status.data()[row];
  return {};
}

}  // namespace

Status sample(const Sample& p) {
  return dispatch_dtype(p.dtype, [&](auto t) { return sample_rows<typename decltype(t)::type>(p); });
}

}  // namespace fastgpt::FASTGPT_ISA
