// Selection without sorting, by one block, from a row in memory or from a list in shared memory: what sample is made
// of.
//
// select(): the largest key such that the elements from it upwards weigh at least so much. 256 bins over the range of
// the keys that are left, the bin in which the sum is reached, and again over that bin. Counts and weights are integers
// of 64 bits, so no sum depends on the order in which threads add to it.
#pragma once

#include "cuda/core/reduce.cuh"
#include "cuda/core/vector.cuh"

namespace fastgpt::FASTGPT_ISA::selection {

constexpr float kInfinity = __builtin_inff();
constexpr int kBins = 256;
constexpr int kBinsPerLane = kBins / kWarp;

// An unsigned integer that orders as the float does, and back. -0 counts as +0: what is at least +0 as a float must be
// so as a key, or a selection would look for elements that its range leaves out.
__device__ inline uint32_t ordered_bits(float x) {
  const uint32_t u = __float_as_uint(x + 0.0f);
  return u ^ (u >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ inline float from_ordered_bits(uint32_t key) {
  return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}

__device__ inline int lane_index() { return threadIdx.x % kWarp; }
__device__ inline int warp_index() { return threadIdx.x / kWarp; }

// --- the row in memory ---

__device__ inline uint32_t raw(const float* x) { return __float_as_uint(*x); }
template <class T>
__device__ uint32_t raw(const T* x) {
  return x->bits;
}
template <class T>
constexpr uint32_t kRawNothing = std::is_same_v<T, float>  ? 0xff800000u
                                 : std::is_same_v<T, bf16> ? 0xff80u
                                                           : 0xfc00u;

// A row as packs of 16 aligned bytes; the first and the last may reach beyond it, and hold -inf there.
template <class X>
struct Row {
  static constexpr int kEach = kPack<X>;
  const X* x;
  int vocab, packs;
  int before;  // elements of the first pack that come before the row

  __device__ Row(const X* row, int vocab) : x(row), vocab(vocab) {
    before = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(X));
    packs = (before + vocab + kEach - 1) / kEach;
  }
  __device__ int token(int pack) const { return pack * kEach - before; }
  __device__ Pack<X> load(int pack) const {
    const int first = token(pack);
    if (first >= 0 && first + kEach <= vocab) return load_pack(x + first);
    Pack<X> out{};
    constexpr int kBits = 8 * static_cast<int>(sizeof(X));
#pragma unroll 1  // rare: the code's size counts, not its speed
    for (int at = first; at < first + kEach; ++at) {  // a register of 128 bits, shifted down
      const uint32_t next = at >= 0 && at < vocab ? raw(x + at) : kRawNothing<X>;
      const auto joined = [](uint32_t low, uint32_t high) { return kBits == 32 ? high : low >> 16 | high << 16; };
      out.words = {joined(out.words.x, out.words.y), joined(out.words.y, out.words.z), joined(out.words.z, out.words.w),
                   joined(out.words.w, next)};
    }
    return out;
  }
};

// f(values, token of the first) for packs begin .. end - 1, spread over the lanes of a warp. All lanes call f equally
// often; where a lane has no pack, or a pack reaches beyond the row, the value is -inf and the token not in 0 .. V - 1.
// kAhead packs are loaded before the first is used.
template <int kAhead, class X, class F>
__device__ inline void stream(const Row<X>& row, int begin, int end, F&& f) {
  for (int at = begin; at < end; at += kAhead * kWarp) {
    Pack<X> packs[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) packs[k] = row.load(min(at + k * kWarp + lane_index(), row.packs));
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int pack = at + k * kWarp + lane_index();
      float values[kPack<X>];
      packs[k].to_floats(values);
      if (pack >= end) {
#pragma unroll
        for (int i = 0; i < kPack<X>; ++i) values[i] = -kInfinity;
      }
      f(values, pack < end ? row.token(pack) : row.vocab);
    }
  }
}

// The packs begin .. end - 1 in one contiguous part for each warp.
struct Part {
  int begin, end;
};
__device__ inline Part part_of(int begin, int end, int warp) {
  const int warps = blockDim.x / kWarp, each = (end - begin + warps - 1) / warps;
  return {min(begin + warp * each, end), min(begin + (warp + 1) * each, end)};
}

// --- sums in 256 bins ---

struct Bins {
  uint32_t low[kBins], high[kBins];  // sums of 64 bits: shared memory adds 32 at a time
  uint64_t total, left;  // what find() found
  int bin;
  int count;  // of elements that wanted a place in a list
};

__device__ inline void clear(Bins& bins) {
  for (int i = threadIdx.x; i < kBins; i += blockDim.x) bins.low[i] = bins.high[i] = 0;
  __syncthreads();
}

// Each sum that wraps around in the low word is seen by exactly one addition, whatever their order.
__device__ inline void add_one(Bins& bins, int bin, uint64_t weight) {
  const uint32_t low = static_cast<uint32_t>(weight);
  const uint32_t old = atomicAdd(&bins.low[bin], low);
  const uint32_t high = static_cast<uint32_t>(weight >> 32) + (old + low < low ? 1u : 0u);
  if (high) atomicAdd(&bins.high[bin], high);
}

// Adds every lane's weight to its bin. Lanes that agree on the bin, which additions one after the other would make
// slow, are added up first.
__device__ inline void add(Bins& bins, int bin, uint64_t weight) {
  const uint32_t some = __ballot_sync(kAllLanes, weight != 0);
  if (!some) return;
  const int theirs = __shfl_sync(kAllLanes, bin, __ffs(static_cast<int>(some)) - 1);
  if (__all_sync(kAllLanes, weight == 0 || bin == theirs)) {
    weight = warp_sum(weight);
    if (lane_index() == 0) add_one(bins, theirs, weight);
  } else if (weight) {
    add_one(bins, bin, weight);
  }
}

// The first bin at which the bins so far hold at least needed_of(total of all bins) > 0; what is still needed there.
template <class Needed>
__device__ inline void find(Bins& bins, Needed&& needed_of) {
  __syncthreads();
  if (warp_index() == 0) {
    const auto sum_of = [&](int bin) { return uint64_t{bins.high[bin]} << 32 | bins.low[bin]; };
    const int lane = lane_index(), first = lane * kBinsPerLane;
    uint64_t mine = 0;
#pragma unroll
    for (int i = 0; i < kBinsPerLane; i += 4) {
      const uint4 low = load16(&bins.low[first + i]), high = load16(&bins.high[first + i]);
      mine += uint64_t{low.x} + low.y + low.z + low.w + ((uint64_t{high.x} + high.y + high.z + high.w) << 32);
    }
    uint64_t so_far = mine;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const uint64_t before = __shfl_up_sync(kAllLanes, so_far, step);
      if (lane >= step) so_far += before;
    }
    const uint64_t total = __shfl_sync(kAllLanes, so_far, kWarp - 1);
    const uint64_t needed = needed_of(total);
    const uint32_t reached = __ballot_sync(kAllLanes, so_far >= needed);
    if (lane == __ffs(static_cast<int>(reached)) - 1) {
      uint64_t left = needed - (so_far - mine);
      int bin = first;
      for (uint64_t sum; (sum = sum_of(bin)) < left; ++bin) left -= sum;
      bins.bin = bin;
      bins.left = left;
      bins.total = total;
    }
  }
  __syncthreads();
}

struct Selected {
  uint32_t key;
  uint64_t total;  // of all elements with keys in the range
};

// The largest key in low .. high such that the elements from it up to `high` weigh at least needed_of(total).
// each(f) calls f(key, weight) for every element, all lanes of a warp at once.
template <class Needed, class Each>
__device__ inline Selected select(Bins& bins, uint32_t low, uint32_t high, Needed&& needed_of, Each&& each) {
  Selected result{0, 0};
#pragma unroll 1
  for (bool first = true; first || low < high; first = false) {
    const int shift = max(24 - __clz(static_cast<int>(high - low)), 0);
    clear(bins);
    each([&](uint32_t key, uint64_t weight) {
      add(bins, kBins - 1 - static_cast<int>((key - low) >> shift & (kBins - 1)),
          key >= low && key <= high ? weight : 0);
    });
    const uint64_t left = first ? 0 : bins.left;
    find(bins, [&](uint64_t total) { return first ? needed_of(total) : left; });
    if (first) result.total = bins.total;
    low += static_cast<uint32_t>(kBins - 1 - bins.bin) << shift;
    high = min(high - low, (1u << shift) - 1) + low;
  }
  result.key = low;
  return result;
}

// --- the survivors ---

// Elements in shared memory, in no order.
struct List {
  float* value;
  int32_t* token;
  int capacity;
};

// The elements on which the next step works: those of the list, or the whole row.
template <class X>
struct Survivors {
  const Row<X>& row;
  const List& list;
  bool listed;

  // f(value, token), all lanes of a warp at once; where there is no element, -inf and a token not in 0 .. V - 1.
  template <class F>
  __device__ void each_of_list(int count, F&& f) const {
    for (int at = warp_index() * kWarp; at < count; at += blockDim.x) {
      const int i = at + lane_index();
      f(i < count ? list.value[i] : -kInfinity, i < count ? list.token[i] : row.vocab);
    }
  }
  template <class F>
  __device__ void each(int count, F&& f) const {
    if (listed) {
      each_of_list(count, f);
    } else {
      const Part mine = part_of(0, row.packs, warp_index());
      stream<1>(row, mine.begin, mine.end, [&](float (&values)[kPack<X>], int token) {
#pragma unroll 1  // f is long, and its copies would not fit into the instruction cache
        for (int i = 0; i < kPack<X>; ++i) {
          f(values[0], token + i);
#pragma unroll
          for (int k = 0; k + 1 < kPack<X>; ++k) values[k] = values[k + 1];
        }
      });
    }
  }
};

// Copies the row's elements that wanted(value) to the list; false if there are too many for it.
template <class X, class Wanted>
__device__ inline bool collect(Bins& bins, const Row<X>& row, const List& list, Wanted&& wanted) {
  if (threadIdx.x == 0) bins.count = 0;
  __syncthreads();
  const Part mine = part_of(0, row.packs, warp_index());
  stream<2>(row, mine.begin, mine.end, [&](const float (&values)[kPack<X>], int token) {
    uint32_t mask = 0;
#pragma unroll
    for (int i = 0; i < kPack<X>; ++i) {
      const bool here = static_cast<uint32_t>(token + i) < static_cast<uint32_t>(row.vocab);
      mask |= (here && wanted(values[i]) ? 1u : 0u) << i;
    }
    if (!__any_sync(kAllLanes, mask != 0)) return;
    const uint32_t lanes_before = (1u << lane_index()) - 1;
    int before = 0, together = 0;
#pragma unroll
    for (int i = 0; i < kPack<X>; ++i) {
      const uint32_t votes = __ballot_sync(kAllLanes, mask >> i & 1);
      before += __popc(votes & lanes_before);
      together += __popc(votes);
    }
    int place = 0;
    if (lane_index() == 0) place = atomicAdd(&bins.count, together);
    place = __shfl_sync(kAllLanes, place, 0) + before;
#pragma unroll
    for (int i = 0; i < kPack<X>; ++i) {
      if (!(mask >> i & 1)) continue;
      if (place < list.capacity) {
        list.value[place] = values[i];
        list.token[place] = token + i;
      }
      ++place;
    }
  });
  __syncthreads();
  return bins.count <= list.capacity;
}

}  // namespace fastgpt::FASTGPT_ISA::selection
