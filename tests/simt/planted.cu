// Kernels with one bug each, of every kind that the checked emulator must see, and beside each a sound twin that it
// must not accuse. The line that must be named ends in a comment `BUG <kernel>`.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "shared.h"
#include "simt/cuda.h"
#include "simt/ptx.h"

namespace {

constexpr int kThreads = 64;
// On the heap, and far from one another: what lies beside an array must not be another one.
float* const input = static_cast<float*>(std::aligned_alloc(256, 1 << 16));
float* const output = input + 4096;
int* const counter = reinterpret_cast<int*>(input + 8192);
constexpr size_t kBytes = 256 * sizeof(float);

__global__ void race_without_barrier(float* out) {
  SHARED(float, s, kThreads);
  s[threadIdx.x] = 0;
  __syncthreads();
  s[threadIdx.x] = threadIdx.x + 1;
  out[threadIdx.x] = s[(threadIdx.x + 33) % kThreads];  // BUG race_without_barrier
}
__global__ void no_race_with_barrier(float* out) {
  SHARED(float, s, kThreads);
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = s[(threadIdx.x + 33) % kThreads];
}

__global__ void race_on_reuse(float* out) {
  SHARED(float, s, kThreads);
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = s[(threadIdx.x + 33) % kThreads];
  s[threadIdx.x] = 2.0f * threadIdx.x;  // BUG race_on_reuse
}
__global__ void no_race_on_reuse(float* out) {
  SHARED(float, s, kThreads);
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = s[(threadIdx.x + 33) % kThreads];
  __syncthreads();
  s[threadIdx.x] = 2.0f * threadIdx.x;
}

// A shuffle makes lanes meet, but orders no memory.
__global__ void race_after_shuffle(float* out) {
  SHARED(float, s, kThreads);
  s[threadIdx.x] = threadIdx.x;
  const float other = __shfl_xor_sync(simt::kFullMask, 1.0f, 1);
  out[threadIdx.x] = other + s[threadIdx.x ^ 1];  // BUG race_after_shuffle
}
__global__ void no_race_after_syncwarp(float* out) {
  SHARED(float, s, kThreads);
  s[threadIdx.x] = threadIdx.x;
  __syncwarp();
  out[threadIdx.x] = s[threadIdx.x ^ 1];
}
// The half that did not meet is not ordered.
__global__ void race_across_half_syncwarps(float* out) {
  SHARED(float, s, kThreads);
  s[threadIdx.x] = 0;
  __syncthreads();
  s[threadIdx.x] = threadIdx.x + 1;
  __syncwarp(threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u);
  out[threadIdx.x] = s[threadIdx.x ^ 16];  // BUG race_across_half_syncwarps
}
__global__ void no_race_within_half_syncwarps(float* out) {
  SHARED(float, s, kThreads);
  s[threadIdx.x] = threadIdx.x;
  __syncwarp(threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u);
  out[threadIdx.x] = s[threadIdx.x ^ 8];
}

__global__ void race_between_blocks(float* out) {
  out[threadIdx.x] = blockIdx.x;  // BUG race_between_blocks
}
__global__ void no_race_of_equal_writes(float* out) { out[threadIdx.x] = 7.0f; }

__global__ void race_with_atomic(int* count) {
  atomicAdd(&count[0], 1);
  if (threadIdx.x == 33) count[0] = 0;  // BUG race_with_atomic
}
__global__ void no_race_of_atomics(int* count) { atomicAdd(&count[0], 1); }

// The last block to arrive reads what the others wrote.
__global__ void race_with_other_blocks_results(float* out, int* count) {
  SHARED(int, last, 1);
  out[blockIdx.x] = 1.0f;
  if (threadIdx.x == 0) last[0] = atomicAdd(&count[0], 1) == static_cast<int>(gridDim.x) - 1;
  __syncthreads();
  if (last[0] && threadIdx.x == 0)
    for (unsigned i = 0; i < gridDim.x; ++i) out[100] = out[i];  // BUG race_with_other_blocks_results
}
__global__ void no_race_with_fence(float* out, int* count) {
  SHARED(int, last, 1);
  if (threadIdx.x == 0) {
    out[blockIdx.x] = 1.0f;
    __threadfence();
    last[0] = atomicAdd(&count[0], 1) == static_cast<int>(gridDim.x) - 1;
    __threadfence();
  }
  __syncthreads();
  if (last[0] && threadIdx.x == 0)
    for (unsigned i = 0; i < gridDim.x; ++i) out[100] = out[i];
}

__global__ void out_of_bounds_read(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x + 256 - kThreads + 1];  // BUG out_of_bounds_read
}
__global__ void out_of_bounds_write(float* out) {
  out[threadIdx.x + 256 - kThreads + 1] = 1;  // BUG out_of_bounds_write
}
__global__ void out_of_bounds_shared(float* out) {
  SHARED(float, s, kThreads);
  s[threadIdx.x + 1] = 1;  // BUG out_of_bounds_shared
  out[threadIdx.x] = 0;
}
__global__ void within_bounds(const float* in, float* out) { out[threadIdx.x] = in[threadIdx.x + 256 - kThreads]; }

__global__ void uninitialised_shared(float* out) {
  SHARED(float, s, kThreads);
  if (threadIdx.x > 0) s[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];  // BUG uninitialised_shared
}
__global__ void uninitialised_global(float* out) {
  out[threadIdx.x] += 1;  // BUG uninitialised_global
}

__global__ void divergent_barrier(float* out) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();  // BUG divergent_barrier
  out[threadIdx.x] = 0;
}
__global__ void missed_barrier(float* out) {
  if (threadIdx.x == 40) return;
  out[threadIdx.x] = 0;
  __syncthreads();  // BUG missed_barrier
}
__global__ void divergent_shuffle(float* out) {
  float v = threadIdx.x;
  if (threadIdx.x % 2)
    v = __shfl_xor_sync(simt::kFullMask, v, 1);
  else
    v = __shfl_xor_sync(simt::kFullMask, v, 1);  // BUG divergent_shuffle
  out[threadIdx.x] = v;
}
__global__ void lane_not_in_its_mask(float* out) {
  out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.0f, 0);  // BUG lane_not_in_its_mask
}

__global__ void unwaited_copy(const float* in, float* out) {
  SHARED(float, s, 4 * kThreads);
  simt::copy_async(s + 4 * threadIdx.x, in + 4 * (threadIdx.x % 32), 16, true, SIMT_SITE);
  simt::copy_async_commit();
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];  // BUG unwaited_copy
}
// Waits for the group before the one that it needs.
__global__ void copy_waited_one_group_short(const float* in, float* out) {
  SHARED(float, s, 8 * kThreads);
  for (int group = 0; group < 2; ++group) {
    simt::copy_async(s + 4 * (threadIdx.x + group * kThreads), in + 4 * (threadIdx.x % 32), 16, true, SIMT_SITE);
    simt::copy_async_commit();
  }
  simt::copy_async_wait(1, SIMT_SITE);
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x + 4 * kThreads];  // BUG copy_waited_one_group_short
}
// Each thread has waited for its own copies, not for its neighbour's.
__global__ void copy_without_barrier(const float* in, float* out) {
  SHARED(float, s, 4 * kThreads);
  simt::copy_async(s + 4 * threadIdx.x, in + 4 * (threadIdx.x % 32), 16, true, SIMT_SITE);
  simt::copy_async_commit();
  simt::copy_async_wait(0, SIMT_SITE);
  out[threadIdx.x] = s[(4 * threadIdx.x + 132) % (4 * kThreads)];  // BUG copy_without_barrier
}
__global__ void copy_waited_for(const float* in, float* out) {
  SHARED(float, s, 4 * kThreads);
  simt::copy_async(s + 4 * threadIdx.x, in + 4 * (threadIdx.x % 32), 16, true, SIMT_SITE);
  simt::copy_async_commit();
  simt::copy_async_wait(0, SIMT_SITE);
  __syncthreads();
  out[threadIdx.x] = s[(4 * threadIdx.x + 132) % (4 * kThreads)];
}
// The next tile's copy overwrites the one that others still read.
__global__ void copy_over_readers(const float* in, float* out) {
  SHARED(float, s, 4 * kThreads);
  for (int tile = 0; tile < 2; ++tile) {
    simt::copy_async(s + 4 * threadIdx.x, in + 4 * (threadIdx.x % 32), 16, true, SIMT_SITE);  // BUG copy_over_readers
    simt::copy_async_commit();
    simt::copy_async_wait(0, SIMT_SITE);
    __syncthreads();
    out[threadIdx.x] = s[(4 * threadIdx.x + 132) % (4 * kThreads)];
  }
}

__global__ void misaligned_vector(const float* in, float* out) {
  const uint4 v = simt::load<uint4>(in + 4 * (threadIdx.x % 16) + 1, SIMT_SITE);  // BUG misaligned_vector
  out[threadIdx.x] = __uint_as_float(v.x);
}
__global__ void misaligned_scalar(const float* in, float* out) {
  const char* bytes = reinterpret_cast<const char*>(in) + 2;
  out[threadIdx.x] = reinterpret_cast<const float*>(bytes)[threadIdx.x];  // BUG misaligned_scalar
}
__global__ void misaligned_copy(const float* in, float* out) {
  SHARED(float, s, 4 * kThreads);
  simt::copy_async(s + 4 * threadIdx.x, in + threadIdx.x % 32, 16, true, SIMT_SITE);  // BUG misaligned_copy
  out[threadIdx.x] = 0;
}
__global__ void ldmatrix_outside_shared(const float* in, float* out) {
  uint32_t r[4];
  simt::ldmatrix<4, false>(r, in + 4 * (threadIdx.x % 32), SIMT_SITE);  // BUG ldmatrix_outside_shared
  out[threadIdx.x] = __uint_as_float(r[0]);
}

template <auto kernel, class... Arguments>
void run(unsigned blocks, Arguments... arguments) {
  simt::launch_as<kernel>(kernel, blocks, kThreads, 0, arguments...);
}

#define WITH(blocks, kernel, ...) {#kernel, [] { run<kernel>(blocks, __VA_ARGS__); }}
const std::map<std::string, void (*)()> kernels = {WITH(1, race_without_barrier, output),
                                                   WITH(1, no_race_with_barrier, output),
                                                   WITH(1, race_on_reuse, output),
                                                   WITH(1, no_race_on_reuse, output),
                                                   WITH(1, race_after_shuffle, output),
                                                   WITH(1, no_race_after_syncwarp, output),
                                                   WITH(1, race_across_half_syncwarps, output),
                                                   WITH(1, no_race_within_half_syncwarps, output),
                                                   WITH(2, race_between_blocks, output),
                                                   WITH(2, no_race_of_equal_writes, output),
                                                   WITH(1, race_with_atomic, counter),
                                                   WITH(2, no_race_of_atomics, counter),
                                                   WITH(3, race_with_other_blocks_results, output, counter),
                                                   WITH(3, no_race_with_fence, output, counter),
                                                   WITH(1, out_of_bounds_read, input, output),
                                                   WITH(1, out_of_bounds_write, output),
                                                   WITH(1, out_of_bounds_shared, output),
                                                   WITH(1, within_bounds, input, output),
                                                   WITH(1, uninitialised_shared, output),
                                                   WITH(1, uninitialised_global, output),
                                                   WITH(1, divergent_barrier, output),
                                                   WITH(1, missed_barrier, output),
                                                   WITH(1, divergent_shuffle, output),
                                                   WITH(1, lane_not_in_its_mask, output),
                                                   WITH(1, unwaited_copy, input, output),
                                                   WITH(1, copy_waited_one_group_short, input, output),
                                                   WITH(1, copy_without_barrier, input, output),
                                                   WITH(1, copy_waited_for, input, output),
                                                   WITH(1, copy_over_readers, input, output),
                                                   WITH(1, misaligned_vector, input, output),
                                                   WITH(1, misaligned_scalar, input, output),
                                                   WITH(1, misaligned_copy, input, output),
                                                   WITH(1, ldmatrix_outside_shared, input, output)};

}  // namespace

// Runs a kernel under a schedule (0 forward, 1 reverse, 2 random); `message` is what the emulator said, or empty.
extern "C" void run_planted(const char* name, int order, int lazy, char* message, int size) {
  simt::schedule() = {static_cast<simt::Order>(order), 1, lazy != 0};
  message[0] = 0;
#if defined(SIMT_CHECKED)
  simt::check::clear_regions();
  simt::check::add_region(input, kBytes, true);
  simt::check::add_region(output, kBytes, false);
  simt::check::add_region(counter, sizeof(int), true);
#endif
  counter[0] = 0;
  try {
    kernels.at(name)();
  } catch (const simt::Error& error) {
    std::snprintf(message, size, "%s", error.what());
  }
}
