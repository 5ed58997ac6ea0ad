// Sums and maxima over a warp and over a block, in an order that is always the same; every lane gets the result.
#pragma once

#include "cuda/core/cuda.cuh"

namespace fastgpt::FASTGPT_ISA {

#if defined(__CUDACC__)
#define FASTGPT_SHUFFLE_XOR(value, bits) __shfl_xor_sync(kAllLanes, value, bits)
#else  // at the caller's place in the source
#define FASTGPT_SHUFFLE_XOR(value, bits) ::simt::shuffle_xor(site, kAllLanes, value, bits)
#endif

struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {  // NaN wins, so that it is not lost
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a > b || a != a ? a : b;
  }
};

template <class T, class Op>
__device__ inline T warp_reduce(T value, Op op SIMT_CALLER) {
#pragma unroll
  for (int bits = kWarp / 2; bits > 0; bits /= 2) value = op(value, FASTGPT_SHUFFLE_XOR(value, bits));
  return value;
}

template <class T>
__device__ inline T warp_sum(T value SIMT_CALLER) {
  return warp_reduce(value, Sum {} FASTGPT_SITE);
}
template <class T>
__device__ inline T warp_max(T value SIMT_CALLER) {
  return warp_reduce(value, Max {} FASTGPT_SITE);
}

// Over blockDim.x = 32 * kWarps threads of a one-dimensional block. May be called again at once.
template <int kWarps, class T, class Op>
__device__ inline T block_reduce(T value, T identity, Op op SIMT_CALLER) {
  static_assert(kWarps >= 1 && kWarps <= kWarp);
  value = warp_reduce(value, op FASTGPT_SITE);
  if constexpr (kWarps == 1) return value;
  FASTGPT_SHARED(T, partial, kWarps);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  __syncthreads();  // the last call's readers are done with `partial`
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  return warp_reduce(lane < kWarps ? partial[lane] : identity, op FASTGPT_SITE);
}
template <int kWarps, class T>
__device__ inline T block_sum(T value SIMT_CALLER) {
  return block_reduce<kWarps>(value, T{0}, Sum {} FASTGPT_SITE);
}
// Of floats: -inf where there is nothing.
template <int kWarps>
__device__ inline float block_max(float value SIMT_CALLER) {
  return block_reduce<kWarps>(value, -__builtin_inff(), Max {} FASTGPT_SITE);
}

}  // namespace fastgpt::FASTGPT_ISA
