// Accesses of 4, 8 and 16 bytes, in global or shared memory. One 16-byte access per lane is what a GPU moves best.
#pragma once

#include "cuda/core/cuda.cuh"

namespace fastgpt::FASTGPT_ISA {

#if defined(__CUDACC__)
#define FASTGPT_ACCESS(type, bytes)                                                          \
  __device__ inline type load##bytes(const void* p) { return *static_cast<const type*>(p); } \
  __device__ inline void store##bytes(void* p, type value) { *static_cast<type*>(p) = value; }
#else
#define FASTGPT_ACCESS(type, bytes)                                                          \
  inline type load##bytes(const void* p SIMT_CALLER) { return ::simt::load<type>(p, site); } \
  inline void store##bytes(void* p, type value SIMT_CALLER) { ::simt::store<type>(p, value, site); }
#endif
FASTGPT_ACCESS(uint4, 16)
FASTGPT_ACCESS(uint2, 8)
FASTGPT_ACCESS(uint32_t, 4)
#undef FASTGPT_ACCESS

// Elements of T in 16 bytes.
template <class T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));

FASTGPT_HOST_DEVICE inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Two 16-bit values in one word; `low` comes first in memory.
template <class T>
__device__ inline uint32_t pack_pair(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t out;
  if constexpr (std::is_same_v<T, bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
#else
  return uint32_t{cast<T>(low).bits} | uint32_t{cast<T>(high).bits} << 16;
#endif
}

// 16 bytes of T in registers. All indices must be known when unrolled, or the words go to local memory.
template <class T>
struct Pack {
  uint4 words;

  __device__ uint32_t word(int i) const { return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w; }
  __device__ void set_word(int i, uint32_t value) {
    if (i == 0) words.x = value;
    if (i == 1) words.y = value;
    if (i == 2) words.z = value;
    if (i == 3) words.w = value;
  }
  __device__ void to_floats(float (&out)[kPack<T>]) const {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) out[i] = get(i);
  }
  __device__ float get(int i) const {
    if constexpr (sizeof(T) == 4)
      return __uint_as_float(word(i));
    else
      return to_float(T{static_cast<uint16_t>(word(i / 2) >> i % 2 * 16)});
  }
  __device__ void from_floats(const float (&in)[kPack<T>]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4)
        set_word(i, __float_as_uint(in[i]));
      else
        set_word(i, pack_pair<T>(in[2 * i], in[2 * i + 1]));
    }
  }
};

template <class T>
__device__ inline Pack<T> load_pack(const T* p SIMT_CALLER) {
  return {load16(p FASTGPT_SITE)};
}
template <class T>
__device__ inline void store_pack(T* p, const Pack<T>& value SIMT_CALLER) {
  store16(p, value.words FASTGPT_SITE);
}

// --- rows of floats, whatever they are stored in ---
//
// kN elements at p: one, or whole packs at an aligned address. The loads are of memory that nothing writes while the
// kernel runs (LDG.CONSTANT), so the compiler may move them ahead of stores.

#if defined(__CUDACC__)
__device__ inline uint4 load16_constant(const void* p) { return __ldg(static_cast<const uint4*>(p)); }
#else
inline uint4 load16_constant(const void* p SIMT_CALLER) { return load16(p, site); }
#endif

// How many elements a thread takes at once.
template <class T, bool kVector>
constexpr int kCell = kVector ? kPack<T> : 1;

// kN elements as they are stored: half the registers of floats, for 16-bit types.
template <class T>
struct Single {
  T value;
  __device__ void to_floats(float (&out)[1]) const { out[0] = to_float(value); }
};
template <class T, int kN>
using Cell = std::conditional_t<kN == 1, Single<T>, Pack<T>>;

template <class T>
__device__ inline void load_cell(const T* p, Single<T>& cell) {
  if constexpr (sizeof(T) == 4)
    cell.value = __ldg(p);
  else
    cell.value.bits = __ldg(&p->bits);
}
template <class T>
__device__ inline void load_cell(const T* p, Pack<T>& cell SIMT_CALLER) {
  cell.words = load16_constant(p FASTGPT_SITE);
}

template <class T, int kN>
__device__ inline void load_floats(const T* p, float (&out)[kN] SIMT_CALLER) {
  if constexpr (kN == 1) {
    Single<T> cell;
    load_cell(p, cell);
    cell.to_floats(out);
  } else {
    static_assert(kN % kPack<T> == 0);
#pragma unroll
    for (int i = 0; i < kN; i += kPack<T>) {
      const Pack<T> pack{load16_constant(p + i FASTGPT_SITE)};
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) out[i + j] = pack.get(j);
    }
  }
}

template <class T, int kN>
__device__ inline void store_floats(T* p, const float (&in)[kN] SIMT_CALLER) {
  if constexpr (kN == 1) {
    *p = cast<T>(in[0]);
  } else {
    static_assert(kN % kPack<T> == 0);
#pragma unroll
    for (int i = 0; i < kN; i += kPack<T>) {
      float part[kPack<T>];
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) part[j] = in[i + j];
      Pack<T> pack;
      pack.from_floats(part);
      store_pack(p + i, pack FASTGPT_SITE);
    }
  }
}

// kN elements from `at` on of a weight or a bias, stored as the tensor's T or as float.
template <class T, int kN>
__device__ inline void load_parameters(const void* p, DType dtype, int64_t at, float (&out)[kN] SIMT_CALLER) {
  if (sizeof(T) == 4 || dtype == DType::f32)
    load_floats(static_cast<const float*>(p) + at, out FASTGPT_SITE);
  else
    load_floats(static_cast<const T*>(p) + at, out FASTGPT_SITE);
}

// Whether all of these addresses are multiples of 16; null ones do not count.
template <class... Pointers>
inline bool all_aligned16(const Pointers*... p) {
  return (aligned16(p) && ...);
}

}  // namespace fastgpt::FASTGPT_ISA
