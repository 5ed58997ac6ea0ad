// All inline PTX of the kernels: each instruction once, with its emulated body beside it. From sm_80 on.
#pragma once

#include "cuda/core/vector.cuh"
#if !defined(__CUDACC__)
#include "simt/ptx.h"
#endif

namespace fastgpt::FASTGPT_ISA::ptx {

#if defined(__CUDACC__)
__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
#endif

// d[16, 8] += a[16, 16] b[16, 8] over a warp; a row-major, b column-major, d in float. With lane = 4 g + t:
// a: pairs at (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8); b: pairs of rows 2t and 2t + 8 in column g;
// d: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <class T>
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] SIMT_CALLER) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
#if defined(__CUDACC__)
  if constexpr (std::is_same_v<T, bf16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  if constexpr (std::is_same_v<T, bf16>)
    ::simt::mma_m16n8k16<::simt::bfloat16_to_float>(d, a, b, site);
  else
    ::simt::mma_m16n8k16<::simt::half_to_float>(d, a, b, site);
#endif
}

// Matrices of 8 rows of 16 bytes: lane 8 m + i gives the address of row i of matrix m. Register m of lane 4 g + t is
// the pair at (g, 2t) of matrix m; with _trans the pair (2t, g), (2t + 1, g).
#if defined(__CUDACC__)
#define FASTGPT_LDMATRIX(name, matrices, trans, form, outputs, ...)            \
  __device__ inline void name(uint32_t (&r)[matrices], const void* row) {      \
    asm volatile("ldmatrix.sync.aligned.m8n8." form ".shared.b16 " outputs ";" \
                 : __VA_ARGS__                                                 \
                 : "r"(shared_address(row))                                    \
                 : "memory");                                                  \
  }
#else
#define FASTGPT_LDMATRIX(name, matrices, trans, form, outputs, ...)        \
  inline void name(uint32_t (&r)[matrices], const void* row SIMT_CALLER) { \
    ::simt::ldmatrix<matrices, trans>(r, row, site);                       \
  }
#endif
FASTGPT_LDMATRIX(ldmatrix_x4, 4, false, "x4", "{%0, %1, %2, %3}, [%4]", "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]))
FASTGPT_LDMATRIX(ldmatrix_x4_trans, 4, true, "x4.trans", "{%0, %1, %2, %3}, [%4]", "=r"(r[0]), "=r"(r[1]), "=r"(r[2]),
                 "=r"(r[3]))
FASTGPT_LDMATRIX(ldmatrix_x2, 2, false, "x2", "{%0, %1}, [%2]", "=r"(r[0]), "=r"(r[1]))
FASTGPT_LDMATRIX(ldmatrix_x2_trans, 2, true, "x2.trans", "{%0, %1}, [%2]", "=r"(r[0]), "=r"(r[1]))
#undef FASTGPT_LDMATRIX

// 16 bytes from global to shared memory, past the registers and L1; zeros where not `valid` (`global` is not read then,
// but must be an address that could be). Other threads see them after a wait of the issuing thread and a barrier.
__device__ inline void cp_async_16(void* shared, const void* global, bool valid SIMT_CALLER) {
#if defined(__CUDACC__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  ::simt::copy_async(shared, global, 16, valid, site);
#endif
}
// Closes a group of this thread's copies.
__device__ inline void cp_async_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  ::simt::copy_async_commit();
#endif
}
// Waits until at most kGroupsLeft of this thread's newest groups are still on their way.
template <int kGroupsLeft>
__device__ inline void cp_async_wait(SIMT_ONLY_CALLER) {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
#else
  ::simt::copy_async_wait(kGroupsLeft, site);
#endif
}

// 2^x to 2 ulp; denormal results are 0. exp2(-inf) = 0.
__device__ inline float exp2(float x) {
#if defined(__CUDACC__)
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
#else
  return ::simt::flush_denormal(::exp2f(::simt::flush_denormal(x)));
#endif
}
// tanh to a relative error of 2^-11.
__device__ inline float tanh(float x) {
#if defined(__CUDACC__)
  float out;
  asm("tanh.approx.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
#else
  return ::simt::approximate_tanh(x);
#endif
}

}  // namespace fastgpt::FASTGPT_ISA::ptx
