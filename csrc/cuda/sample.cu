// sample: one token a row, after penalties, bias, temperature, top-k, top-p and min-p (fastgpt/ops/sample.py defines
// every step). One launch, one block a row, nothing sorted, and from the same bits the token that the CPU draws.
//
// Why the same token: a weight is 2^e by a fixed sequence of IEEE operations (this file is compiled with --fmad=false),
// rounded to an integer in units of 2^-42, so a sum has no order; counts and sums are then integers, and every choice
// below is a comparison of integers or of logits. Neither threads nor lanes nor the order of atomics can matter.
//
// One thing is done over and over, select(): the largest key t such that the elements with keys >= t weigh at least so
// much. 256 bins over the range of the keys that are left, the bin in which the sum is reached, and again over that
// bin.
//   top-k: keys are logits' ordered bits, every weight is 1;  top-p: the same keys, real weights;
//   draw:  keys are tokens in descending order, real weights, and the random number says how much.
//
// Passes over a row of V elements (the first comes from memory, the others from L2; 16 bytes a load):
//   always      the largest logit, NaN and +inf; every lane of every 16 bytes of a thread keeps its own maximum
//   top-k       the k-th largest of those maxima bounds the k-th largest logit from below, and tightly: one pass moves
//               what reaches it, little more than k, to shared memory, where all else happens
//   top-p       one pass sums the weights in 256 bins of a sixth of an octave, which gives the total and the bin of the
//               threshold; one more moves that bin and all above it to shared memory
//   otherwise   one pass sums the weights, a contiguous part of the row for each warp, and the part in which the token
//               lies is looked at again
// What does not fit into shared memory (kCapacity elements) stays where it is, and select() reads the row each time.
// Penalties and bias are applied once, into a row of the workspace (4 V bytes more, written and read back).
//
// Bytes: V elements from memory. Operations: about 35 V for a pass that needs weights; one block does not reach the
// memory's speed, but one launch for a few microseconds is what a decoding step has (docs/ops/sample.md, "CUDA").
#include "core/philox.h"
#include "cuda/core/launch.h"
#include "cuda/select.cuh"

namespace fastgpt::FASTGPT_ISA {
namespace {

using namespace selection;

constexpr double kLog2e = 1.4426950408889634;  // as math.log2(math.e), to the bit
constexpr double kLn2 = 0.6931471805599453;
constexpr int kWeightBits = 42;  // the most likely token weighs 2^42; 2^20 such weights fit into 63 bits
// Temperatures beyond count as these, as on the CPU.
constexpr double kLowestTemperature = 1e-30, kHighestTemperature = 1e30;

constexpr int kMaxThreads = 1024;
constexpr int kElementsPerThread = 16;  // a block has so many threads that each gets about this many
// Elements that shared memory holds, as (logit, token): 64 KiB, and 66 in all, of the 99 that every device has.
constexpr int kCapacity = 8192;

struct Options {
  double temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
};
struct Keys {
  int64_t top_k, seed, position;
};

// What a row's options come to. Thread 0 works it out: on many GPUs a block-wide double division takes microseconds.
struct Plan {
  int valid, greedy;  // 0 or 1: one byte each would be stored byte by byte
  int top_k;  // 0: off
  double top_p;  // 1: off
  float scale;  // log2(e) / temperature
  float lowest_weight;  // min-p; 0: off
  double temperature;
};

// What the threads of a block tell each other.
struct Board {
  Bins bins;
  Plan plan;
  uint32_t best_key, floor_key;  // of the largest logit, and of the smallest of the maxima
  uint32_t low_key, high_key;
  int first;  // the token found
  float min_p_logit;  // min-p keeps nothing below
};

// --- weights ---

// log2 of a weight: 0 for the largest logit; -64 and below count as -64, whose weight is 0.
__device__ inline float exponent(float value, float best, float scale) { return fmaxf((value - best) * scale, -64.0f); }

// 2^e, as the CPU computes it: every operation here, in this order, and none fused.
__device__ inline float power_of_two(float e) {
  const float round_to_int = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float shifted = e + round_to_int;
  const float fraction = e - (shifted - round_to_int);
  float p = 0.00015353361959569156f;
  p = p * fraction + 0.0013398875016719103f;
  p = p * fraction + 0.00961843691766262f;
  p = p * fraction + 0.055503323674201965f;
  p = p * fraction + 0.24022647738456726f;
  p = p * fraction + 0.6931471824645996f;
  p = p * fraction + 1.0f;
  return __uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));
}

// weight * 2^42 to the nearest integer, ties to even. In 32-bit operations: double precision, and conversions to 64
// bits, run at a thirty-second of their speed on some GPUs.
__device__ inline uint64_t rounded(float weight) {
  const int power = static_cast<int>(__float_as_uint(weight) >> 23) - 127;
  if (power < kWeightBits - 19 - kWeightBits) return static_cast<uint64_t>(__float2int_rn(weight * 4398046511104.0f));
  return uint64_t{(__float_as_uint(weight) & 0x7fffffu) | 0x800000u} << (power + kWeightBits - 23);
}

// --- steps ---

__device__ inline Options options_of(const Sample& p, int64_t index) {
  return *reinterpret_cast<const Options*>(p.reals ? p.reals + index * 6 : p.all_reals);
}
__device__ inline Keys keys_of(const Sample& p, int64_t index) {
  return *reinterpret_cast<const Keys*>(p.integers ? p.integers + index * 3 : p.all_integers);
}
__device__ inline int64_t row_key(const Sample& p, int64_t index) {
  return p.row ? p.row[index] : p.all_row >= 0 ? p.all_row : index;
}

// Field by field: the checked emulator does not see a struct that is copied as a whole.
__device__ inline void make_plan(Plan& plan, const Sample& p, int64_t index) {
  const Options o = options_of(p, index);
  const Keys keys = keys_of(p, index);
  const double infinity = __builtin_inf();
  plan.valid = o.temperature >= 0 && o.temperature < infinity && o.top_p > 0 && o.top_p <= 1 && o.min_p >= 0 &&
               o.min_p <= 1 && o.repetition_penalty > 0 && o.repetition_penalty < infinity &&
               fabs(o.presence_penalty) < infinity && fabs(o.frequency_penalty) < infinity && keys.top_k >= 0 &&
               keys.position >= 0 && row_key(p, index) >> 32 == 0;
  plan.greedy = o.temperature == 0;
  const double temperature = fmin(fmax(o.temperature, kLowestTemperature), kHighestTemperature);
  plan.temperature = temperature;
  plan.scale = static_cast<float>(kLog2e / temperature);
  plan.top_k = keys.top_k < p.vocab ? static_cast<int>(keys.top_k) : 0;
  plan.top_p = o.top_p;
  const float nearest = static_cast<float>(o.min_p);
  plan.lowest_weight = nearest < o.min_p ? __uint_as_float(__float_as_uint(nearest) + 1) : nearest;
}

// The logits after penalties and bias, in `x`. False if a previous token is none of the vocabulary's.
template <class T>
__device__ inline bool adjust(const Sample& p, int64_t index, float* x, uint32_t* counts) {
  const T* logits = static_cast<const T*>(p.logits) + index * p.logits_stride;
  const float* bias = p.logit_bias ? p.logit_bias + index * p.bias_stride : nullptr;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < p.vocab; i += blockDim.x)
    x[i] = bias ? to_float(logits[i]) + bias[i] : to_float(logits[i]);
  if (!p.previous_count) return true;

  const int64_t* previous = p.previous + index * p.previous_count;
  const auto each = [&](auto&& f) {
    for (int64_t i = threadIdx.x; i < p.previous_count; i += blockDim.x)
      if (previous[i] >= 0 && previous[i] < p.vocab) f(previous[i]);
    __syncthreads();
  };
  each([&](int64_t token) { counts[token] = 0; });
  each([&](int64_t token) { atomicAdd(&counts[token], 1u); });
  const Options o = options_of(p, index);
  each([&](int64_t token) {
    const uint32_t count = atomicExch(&counts[token], 0u);
    if (!count) return;  // another thread has this token
    double v = to_float(logits[token]);
    v = v > 0 ? v / o.repetition_penalty : v * o.repetition_penalty;
    const float penalised = static_cast<float>(v - o.presence_penalty - o.frequency_penalty * count);
    x[token] = bias ? penalised + bias[token] : penalised;
  });
  bool known = true;
  for (int64_t i = threadIdx.x; i < p.previous_count; i += blockDim.x)
    known &= previous[i] >= -1 && previous[i] < p.vocab;
  return known;
}

__device__ inline void write(const Sample& p, int64_t index, int64_t token, float value, float best, double temperature,
                             uint64_t total) {
  const double distance = static_cast<double>(value - best + 0.0f) / temperature;  // -0 - 0 counts as 0
  p.token[index] = token;
  p.log_prob[index] = static_cast<float>(distance - (log(static_cast<double>(total)) - kWeightBits * kLn2));
}

__device__ inline uint64_t random_of(const Sample& p, int64_t index) {
  const Keys keys = keys_of(p, index);
  return uniform_bits(static_cast<uint64_t>(keys.seed), static_cast<uint32_t>(row_key(p, index)),
                      static_cast<uint64_t>(keys.position), kSampleStream);
}

// Temperature 0: the first of the largest, and its log-softmax.
template <class X>
__device__ inline void take_best(const Sample& p, int64_t index, const Row<X>& row, float best, Board& board) {
  const float scale = static_cast<float>(kLog2e);
  if (threadIdx.x == 0) board.first = row.vocab;
  clear(board.bins);
  uint64_t sum = 0;
  int first = row.vocab;
  const Part mine = part_of(0, row.packs, warp_index());
  stream<1>(row, mine.begin, mine.end, [&](const float (&values)[kPack<X>], int token) {
#pragma unroll
    for (int i = 0; i < kPack<X>; ++i) {
      sum += rounded(power_of_two(exponent(values[i], best, scale)));
      if (values[i] == best) first = min(first, token + i);
    }
  });
  if (first < row.vocab) atomicMin(&board.first, first);
  add(board.bins, 0, sum);
  find(board.bins, [](uint64_t) { return uint64_t{1}; });
  if (threadIdx.x == 0) write(p, index, board.first, best, best, 1.0, board.bins.total);
}

// Draws from the row itself: sums of contiguous parts, the part that holds the token in parts again, and in the end
// one warp goes along it.
template <class X, class Weigh>
__device__ inline Selected draw_from_row(const Row<X>& row, uint64_t random, Weigh&& weigh, Board& board) {
  const int warps = blockDim.x / kWarp, lane = lane_index();
  Selected result{0, 0};
  Part left{0, row.packs};
  for (bool first = true; first || (warps > 1 && left.end - left.begin > 2 * kWarp); first = false) {
    clear(board.bins);
    const Part mine = part_of(left.begin, left.end, warp_index());
    uint64_t sum = 0;
    stream<1>(row, mine.begin, mine.end, [&](const float (&values)[kPack<X>], int) {
#pragma unroll
      for (int i = 0; i < kPack<X>; ++i) sum += weigh(values[i]);
    });
    sum = warp_sum(sum);
    if (lane == 0) add_one(board.bins, warp_index(), sum);
    const uint64_t needed = first ? 0 : board.bins.left;
    find(board.bins, [&](uint64_t total) { return first ? __umul64hi(random, total) + 1 : needed; });
    if (first) result.total = board.bins.total;
    left = part_of(left.begin, left.end, board.bins.bin);
  }
  if (warp_index() == 0) {
    uint64_t needed = board.bins.left;
    for (int at = left.begin; at < left.end; at += kWarp) {
      const int pack = at + lane;
      float values[kPack<X>];
      row.load(min(pack, row.packs)).to_floats(values);
      uint64_t weights[kPack<X>], mine = 0;
#pragma unroll
      for (int i = 0; i < kPack<X>; ++i) mine += weights[i] = pack < left.end ? weigh(values[i]) : 0;
      uint64_t so_far = mine;
#pragma unroll
      for (int step = 1; step < kWarp; step *= 2) {
        const uint64_t before = __shfl_up_sync(kAllLanes, so_far, step);
        if (lane >= step) so_far += before;
      }
      const uint32_t reached = __ballot_sync(kAllLanes, so_far >= needed);
      if (reached) {
        if (lane == __ffs(static_cast<int>(reached)) - 1) {
          needed -= so_far - mine;
          int token = row.token(pack);
          bool found = false;
#pragma unroll
          for (int i = 0; i < kPack<X>; ++i) {
            found |= weights[i] >= needed;
            if (!found) {
              needed -= weights[i];
              ++token;
            }
          }
          board.first = token;
        }
        break;
      }
      needed -= __shfl_sync(kAllLanes, so_far, kWarp - 1);
    }
  }
  __syncthreads();
  result.key = static_cast<uint32_t>(board.first);
  return result;
}

// The row's filters and its draw; `groups` maxima stand in the list.
template <class X>
__device__ inline void draw(const Sample& p, int64_t index, const Row<X>& row, const List& list, int groups,
                            Board& board) {
  const float best = from_ordered_bits(board.best_key), scale = board.plan.scale;
  const auto in_row = [&](int token) { return static_cast<uint32_t>(token) < static_cast<uint32_t>(row.vocab); };
  const auto weigh = [&](float value) { return rounded(power_of_two(exponent(value, best, scale))); };
  Survivors<X> left{row, list, false};
  float lowest = -kInfinity;

  if (const int top_k = board.plan.top_k) {
    const auto k_of = [&](uint64_t) { return static_cast<uint64_t>(top_k); };
    float bound = -kInfinity;
    if (top_k <= groups) {
      bound = from_ordered_bits(select(board.bins, board.floor_key, board.best_key, k_of, [&](auto&& f) {
                                  for (int at = warp_index() * kWarp; at < groups; at += blockDim.x)
                                    f(ordered_bits(list.value[at + lane_index()]), 1);
                                }).key);
    }
    left.listed = collect(board.bins, row, list, [&](float value) { return value >= bound; });
    const int count = board.bins.count;
    lowest = from_ordered_bits(select(board.bins, ordered_bits(bound), board.best_key, k_of, [&](auto&& f) {
                                 left.each(count, [&](float v, int token) { f(ordered_bits(v), in_row(token)); });
                               }).key);
  }

  if (const double top_p = board.plan.top_p; top_p < 1) {
    // Bins of 1 / 5.9 octaves cover the 43 in which a weight is not 0.
    const auto bin_of = [&](float v) { return min(static_cast<int>(exponent(v, best, scale) * -5.9f), kBins - 1); };
    clear(board.bins);
    left.each(board.bins.count, [&](float v, int) { add(board.bins, bin_of(v), v >= lowest ? weigh(v) : 0); });
    find(board.bins, [&](uint64_t total) {
      const double share = ceil(top_p * static_cast<double>(total));
      const uint64_t needed = share < 1 ? 1 : static_cast<uint64_t>(share);
      return needed < total ? needed : total;
    });
    const int bin = board.bins.bin;
    const uint64_t needed = board.bins.left;
    if (!left.listed)
      left.listed = collect(board.bins, row, list, [&](float v) { return v >= lowest && bin_of(v) <= bin; });
    const int count = board.bins.count;
    const auto in_bin = [&](auto&& f) {
      left.each(count, [&](float v, int) { f(ordered_bits(v), v >= lowest && bin_of(v) == bin ? weigh(v) : 0); });
    };
    if (threadIdx.x == 0) {
      board.low_key = ~0u;
      board.high_key = 0;
    }
    __syncthreads();
    uint32_t low = ~0u, high = 0;
    in_bin([&](uint32_t key, uint64_t weight) {
      if (weight) {
        low = min(low, key);
        high = max(high, key);
      }
    });
    if (low <= high) {
      atomicMin(&board.low_key, low);
      atomicMax(&board.high_key, high);
    }
    __syncthreads();
    lowest = from_ordered_bits(
        select(board.bins, board.low_key, board.high_key, [&](uint64_t) { return needed; }, in_bin).key);
  }

  const float lowest_weight = board.plan.lowest_weight;
  lowest = fmaxf(lowest, board.min_p_logit);  // only saves the exponential of what min-p drops anyway
  const auto weigh_kept = [&](float value) -> uint64_t {
    if (!(value >= lowest)) return 0;
    const float weight = power_of_two(exponent(value, best, scale));
    return weight >= lowest_weight ? rounded(weight) : 0;
  };
  const uint64_t random = random_of(p, index);
  Selected drawn;
  if (left.listed) {
    const uint32_t last = static_cast<uint32_t>(row.vocab) - 1;
    const int count = board.bins.count;
    drawn = select(
        board.bins, 0, last, [&](uint64_t total) { return __umul64hi(random, total) + 1; },
        [&](auto&& f) {
          left.each_of_list(count, [&](float v, int token) { f(last - static_cast<uint32_t>(token), weigh_kept(v)); });
        });
    drawn.key = last - drawn.key;
  } else {
    drawn = draw_from_row(row, random, weigh_kept, board);
  }
  if (threadIdx.x == 0)
    write(p, index, drawn.key, to_float(row.x[drawn.key]), best, board.plan.temperature, drawn.total);
}

// X is what the rows are read as: T, or float where they are adjusted first.
template <class X, class T>
__global__ void __launch_bounds__(kMaxThreads)
    sample_kernel(const Sample p, float* workspace, uint32_t* counts, int64_t padded, int capacity) {
  FASTGPT_SHARED(Board, boards, 1);
  FASTGPT_SHARED_DYNAMIC(float, elements);
  Board& board = boards[0];
  const List list{elements, reinterpret_cast<int32_t*>(elements + capacity), capacity};
  const int groups = static_cast<int>(blockDim.x) * kPack<X>;

  for (int64_t index = blockIdx.x; index < p.rows; index += gridDim.x) {
    __syncthreads();  // everyone is done with the last row
    if (threadIdx.x == 0) {
      make_plan(board.plan, p, index);
      board.best_key = 0;
      board.floor_key = ~0u;
      board.bins.count = 0;
    }
    bool invalid = false;
    const X* x = nullptr;
    if constexpr (std::is_same_v<X, T>) x = static_cast<const T*>(p.logits) + index * p.logits_stride;
    if constexpr (std::is_same_v<X, float>) {
      if (workspace) {
        float* const adjusted = workspace + blockIdx.x * padded;
        invalid = !adjust<T>(p, index, adjusted, counts + blockIdx.x * p.vocab);
        x = adjusted;
      }
    }
    __syncthreads();

    const Row<X> row(x, static_cast<int>(p.vocab));
    float maxima[kPack<X>];
#pragma unroll
    for (int i = 0; i < kPack<X>; ++i) maxima[i] = -kInfinity;
    const Part mine = part_of(0, row.packs, warp_index());
    stream<4>(row, mine.begin, mine.end, [&](const float (&values)[kPack<X>], int) {
#pragma unroll
      for (int i = 0; i < kPack<X>; ++i) {
        invalid |= !(values[i] < kInfinity);
        maxima[i] = fmaxf(maxima[i], values[i]);
      }
    });
    float best = -kInfinity, floor = kInfinity;
#pragma unroll
    for (int i = 0; i < kPack<X>; ++i) {
      best = fmaxf(best, maxima[i]);
      floor = fminf(floor, maxima[i]);
      list.value[i * blockDim.x + threadIdx.x] = maxima[i];
    }
    best = warp_max(best);
    floor = -warp_max(-floor);
    if (lane_index() == 0) {
      atomicMax(&board.best_key, ordered_bits(best));
      atomicMin(&board.floor_key, ordered_bits(floor));
    }
    invalid = __syncthreads_or(invalid) || !board.plan.valid;
    best = from_ordered_bits(board.best_key);
    if (invalid || best == -kInfinity) {  // nobody on the host knows in time to raise an error
      if (threadIdx.x == 0) {
        p.token[index] = -1;
        p.log_prob[index] = __builtin_nanf("");
      }
    } else if (board.plan.greedy) {
      take_best(p, index, row, best, board);
    } else {
      if (threadIdx.x == 0) {  // a weight's error is far below 1e-4
        const float weight = board.plan.lowest_weight;
        board.min_p_logit =
            weight > 0 ? static_cast<float>(best + board.plan.temperature * (log(static_cast<double>(weight)) - 1e-4) -
                                            1e-6 * fabs(static_cast<double>(best)))
                       : -kInfinity;
      }
      __syncthreads();
      draw(p, index, row, list, groups, board);
    }
  }
}

template <class X, class T>
Status sample_rows(const Sample& p, Launch& launch, bool adjusted) {
  const int64_t wanted = round_up(ceil_div(p.vocab, kElementsPerThread), kWarp);
  const int threads = static_cast<int>(wanted < kMaxThreads ? wanted : kMaxThreads);
  const int capacity = static_cast<int>(p.vocab < kCapacity ? round_up(p.vocab, 4) : kCapacity);
  const int64_t groups = static_cast<int64_t>(threads) * kPack<X>;
  const size_t shared = static_cast<size_t>(2 * capacity > groups ? 2 * capacity : groups) * sizeof(float);

  // With a workspace, no more blocks than run at once: each has a row of its own there, and uses it again.
  const int64_t at_once = static_cast<int64_t>(launch.sms()) * (2 * kMaxThreads / threads);
  const int64_t blocks = adjusted && at_once < p.rows ? at_once : p.rows;
  const int64_t padded = round_up(p.vocab, 4);
  float* workspace = adjusted ? launch.scratch<float>(blocks * padded) : nullptr;
  uint32_t* counts = p.previous_count ? launch.scratch<uint32_t>(blocks * p.vocab) : nullptr;
  return launch.run<sample_kernel<X, T>>(dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
                                         shared, p, workspace, counts, padded, capacity);
}

}  // namespace

Status sample(const Sample& p, Launch& launch) {
  if (p.rows == 0) return {};
  const bool adjusted = p.previous_count || p.logit_bias;
  return dispatch_dtype(p.dtype, [&](auto t) -> Status {
    using T = typename decltype(t)::type;
    return adjusted ? sample_rows<float, T>(p, launch, true) : sample_rows<T, T>(p, launch, false);
  });
}

}  // namespace fastgpt::FASTGPT_ISA
