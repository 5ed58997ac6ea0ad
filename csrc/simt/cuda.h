// What a kernel finds in CUDA's headers, for g++: qualifiers, built-in variables, intrinsics.
//
// Intrinsics at which threads meet are macros, to know where they stand in the source. Anything not listed here does
// not compile in the emulator, which is how it says that it does not have it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "simt/check.h"
#include "simt/runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __grid_constant__

using dim3 = ::simt::Dim3;
using cudaStream_t = void*;
struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

#define threadIdx (::simt::current->thread)
#define blockIdx (::simt::block_index)
#define blockDim (::simt::block_size)
#define gridDim (::simt::grid_size)
constexpr int warpSize = ::simt::kWarpSize;

namespace simt {

// A function that an instrumented kernel calls without its loads and stores being reported: it reports them itself.
#if defined(SIMT_CHECKED)
#define SIMT_UNSEEN __attribute__((no_sanitize_thread)) inline
#else
#define SIMT_UNSEEN inline
#endif

template <class T>
struct Shuffle {
  T value;
  int source;  // the lane to read
  T result;
};

template <class T>
SIMT_UNSEEN T shuffle(const char* kind, Site site, uint32_t mask, T value, int source) {
  Shuffle<T> mine{value, source, value};
  collective(kind, site, mask, &mine, [](void* const* arguments, uint32_t here) {
    for (int i = 0; i < kWarpSize; ++i) {
      if (!(here >> i & 1)) continue;
      auto* lane = static_cast<Shuffle<T>*>(arguments[i]);
      if (here >> lane->source & 1)
        lane->result = static_cast<const Shuffle<T>*>(arguments[lane->source])->value;
      else  // undefined on a GPU: something that no test takes for a result
        std::memset(static_cast<void*>(&lane->result), 0xff, sizeof(T));
    }
  });
  return mine.result;
}

inline int own_lane() { return static_cast<int>(current->lane()); }

template <class T>
T shuffle_from(Site site, uint32_t mask, T value, int lane, int width = kWarpSize) {
  return shuffle("__shfl_sync", site, mask, value, (own_lane() & ~(width - 1)) | (lane & (width - 1)));
}
template <class T>
T shuffle_xor(Site site, uint32_t mask, T value, int bits, int width = kWarpSize) {
  const int other = own_lane() ^ bits;  // lanes of a later segment are out of reach
  const bool reachable = other < (own_lane() & ~(width - 1)) + width;
  return shuffle("__shfl_xor_sync", site, mask, value, reachable ? other : own_lane());
}
template <class T>
T shuffle_up(Site site, uint32_t mask, T value, int delta, int width = kWarpSize) {
  const int other = own_lane() - delta;
  return shuffle("__shfl_up_sync", site, mask, value, other >= (own_lane() & ~(width - 1)) ? other : own_lane());
}
template <class T>
T shuffle_down(Site site, uint32_t mask, T value, int delta, int width = kWarpSize) {
  const int other = own_lane() + delta;
  return shuffle("__shfl_down_sync", site, mask, value,
                 other < (own_lane() & ~(width - 1)) + width ? other : own_lane());
}

struct Ballot {
  bool predicate;
  uint32_t result;
};
SIMT_UNSEEN uint32_t ballot(const char* kind, Site site, uint32_t mask, bool predicate) {
  Ballot mine{predicate, 0};
  collective(kind, site, mask, &mine, [](void* const* arguments, uint32_t here) {
    uint32_t votes = 0;
    for (int i = 0; i < kWarpSize; ++i)
      if ((here >> i & 1) && static_cast<const Ballot*>(arguments[i])->predicate) votes |= 1u << i;
    for (int i = 0; i < kWarpSize; ++i)
      if (here >> i & 1) static_cast<Ballot*>(arguments[i])->result = votes;
  });
  return mine.result;
}
inline bool vote_any(Site site, uint32_t mask, bool p) { return ballot("__any_sync", site, mask, p) != 0; }
inline bool vote_all(Site site, uint32_t mask, bool p) { return ballot("__all_sync", site, mask, !p) == 0; }

struct Match {
  uint64_t value;
  uint32_t result;
};
template <class T>
SIMT_UNSEEN uint32_t match_any(Site site, uint32_t mask, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  Match mine{0, 0};
  std::memcpy(&mine.value, &value, sizeof value);
  collective("__match_any_sync", site, mask, &mine, [](void* const* arguments, uint32_t here) {
    for (int i = 0; i < kWarpSize; ++i) {
      if (!(here >> i & 1)) continue;
      auto* lane = static_cast<Match*>(arguments[i]);
      for (int j = 0; j < kWarpSize; ++j)
        if ((here >> j & 1) && static_cast<const Match*>(arguments[j])->value == lane->value) lane->result |= 1u << j;
    }
  });
  return mine.result;
}

// Aligned access of 4, 8 or 16 bytes at once.
template <class T>
SIMT_UNSEEN T load(const void* address, Site site) {
  check_aligned(address, sizeof(T), "load", site);
  check::access(address, sizeof(T), check::Access::read, site);
  T value;
  std::memcpy(&value, address, sizeof value);
  return value;
}
template <class T>
SIMT_UNSEEN void store(void* address, const T& value, Site site) {
  check_aligned(address, sizeof(T), "store", site);
  check::access(address, sizeof(T), check::Access::write, site);
  std::memcpy(address, &value, sizeof value);
}

// old value; *address = change(old value)
template <class T, class Change>
SIMT_UNSEEN T atomic(T* address, Site site, Change change) {
  check_aligned(address, sizeof(T), "atomic", site);
  check::access(address, sizeof(T), check::Access::atomic, site);
  const T old = *address;
  *address = change(old);
  return old;
}

inline float flush_denormal(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }

// tanh.approx.f32 is documented to a relative error of 2^-11: the emulated one errs by as much, upwards or downwards,
// so that a kernel which cannot bear it fails here too.
inline float approximate_tanh(float x) {
  const float exact = std::tanh(x);
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const float wrong = exact * (1.0f + (bits & 1u ? 4.8e-4f : -4.8e-4f));
  return std::fabs(wrong) < 1.0f ? wrong : exact;
}

}  // namespace simt

// --- meeting points ---
#define __syncthreads() ((void)::simt::barrier(SIMT_SITE))
#define __syncthreads_or(predicate) (::simt::barrier(SIMT_SITE, (predicate) != 0).any ? 1 : 0)
#define __syncthreads_and(predicate) (::simt::barrier(SIMT_SITE, (predicate) != 0).all ? 1 : 0)
#define __syncthreads_count(predicate) (::simt::barrier(SIMT_SITE, (predicate) != 0).count)
#define __syncwarp(...) ::simt::sync_warp(SIMT_SITE __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_sync(...) ::simt::shuffle_from(SIMT_SITE, __VA_ARGS__)
#define __shfl_xor_sync(...) ::simt::shuffle_xor(SIMT_SITE, __VA_ARGS__)
#define __shfl_up_sync(...) ::simt::shuffle_up(SIMT_SITE, __VA_ARGS__)
#define __shfl_down_sync(...) ::simt::shuffle_down(SIMT_SITE, __VA_ARGS__)
#define __ballot_sync(mask, predicate) ::simt::ballot("__ballot_sync", SIMT_SITE, mask, (predicate) != 0)
#define __any_sync(mask, predicate) ::simt::vote_any(SIMT_SITE, mask, (predicate) != 0)
#define __all_sync(mask, predicate) ::simt::vote_all(SIMT_SITE, mask, (predicate) != 0)
#define __match_any_sync(mask, value) ::simt::match_any(SIMT_SITE, mask, value)
inline void __threadfence() { ::simt::check::fence(); }
inline void __threadfence_block() {}

// --- atomics ---
#define atomicAdd(address, value) \
  ::simt::atomic(address, SIMT_SITE, [&](auto old) { return static_cast<decltype(old)>(old + (value)); })
#define atomicSub(address, value) \
  ::simt::atomic(address, SIMT_SITE, [&](auto old) { return static_cast<decltype(old)>(old - (value)); })
#define atomicMax(address, value)                    \
  ::simt::atomic(address, SIMT_SITE, [&](auto old) { \
    const decltype(old) other = (value);             \
    return other > old ? other : old;                \
  })
#define atomicMin(address, value)                    \
  ::simt::atomic(address, SIMT_SITE, [&](auto old) { \
    const decltype(old) other = (value);             \
    return other < old ? other : old;                \
  })
#define atomicOr(address, value) \
  ::simt::atomic(address, SIMT_SITE, [&](auto old) { return old | static_cast<decltype(old)>(value); })
#define atomicAnd(address, value) \
  ::simt::atomic(address, SIMT_SITE, [&](auto old) { return old & static_cast<decltype(old)>(value); })
#define atomicExch(address, value) \
  ::simt::atomic(address, SIMT_SITE, [&](auto old) { return static_cast<decltype(old)>(value); })
#define atomicCAS(address, compare, value)                                                       \
  ::simt::atomic(address, SIMT_SITE, [&](auto old) {                                             \
    return old == static_cast<decltype(old)>(compare) ? static_cast<decltype(old)>(value) : old; \
  })

// --- integers and bits ---
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned __brev(unsigned x) {
  unsigned out = 0;
  for (int i = 0; i < 32; ++i) out |= (x >> i & 1u) << (31 - i);
  return out;
}
inline unsigned __float_as_uint(float x) {
  unsigned u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __uint_as_float(unsigned u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline float __int_as_float(int i) { return __uint_as_float(static_cast<unsigned>(i)); }
inline long long __double_as_longlong(double x) {
  long long i;
  std::memcpy(&i, &x, 8);
  return i;
}
inline double __longlong_as_double(long long i) {
  double x;
  std::memcpy(&x, &i, 8);
  return x;
}
#define __ldg(address) (*(address))

// --- floats --- (CUDA has these in the global namespace; glibc already declares some, hence the macros)
using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
#define __expf(x) (::simt::flush_denormal(expf(x)))
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __fdividef(a, b) ((a) / (b))
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
// Rounded on their own: the compiler must not see a product and a sum that it could contract.
__attribute__((noinline)) inline float __fmul_rn(float a, float b) { return a * b; }
__attribute__((noinline)) inline float __fadd_rn(float a, float b) { return a + b; }
__attribute__((noinline)) inline float __fsub_rn(float a, float b) { return a - b; }
__attribute__((noinline)) inline float __fdiv_rn(float a, float b) { return a / b; }
__attribute__((noinline)) inline double __dmul_rn(double a, double b) { return a * b; }
__attribute__((noinline)) inline double __dadd_rn(double a, double b) { return a + b; }
__attribute__((noinline)) inline double __dsub_rn(double a, double b) { return a - b; }
__attribute__((noinline)) inline double __ddiv_rn(double a, double b) { return a / b; }
