// The instruction-set level that a CPU source is being compiled for.
//
// Each csrc/cpu/*.cpp is compiled once per level with its own -march and FASTGPT_ISA, and everything it
// defines, headers included, lives in namespace fastgpt::FASTGPT_ISA: two levels never share an inline function, so
// the linker cannot hand AVX-512 code to a machine without it. For the same reason CPU kernels use no std containers.
#pragma once

#ifndef FASTGPT_ISA
#define FASTGPT_ISA portable
#endif

// For what kernels of the CPU and of CUDA share.
#if defined(__CUDACC__)
#define FASTGPT_HOST_DEVICE __host__ __device__
#else
#define FASTGPT_HOST_DEVICE
#endif
