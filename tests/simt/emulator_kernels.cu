// Kernels for the emulator's own tests (test_emulator.py): each shows what one of its parts does, or provokes a report.
// A line that a report must name ends in a comment `LINE <kernel>`.
#include "run.h"
#include "shared.h"
#include "simt/ptx.h"

namespace {

constexpr uint32_t kAll = simt::kFullMask;

// --- shuffles and votes: in = mask, then an argument for each lane; only lanes of the mask take part ---

enum Form { index_form, up_form, down_form, xor_form };
template <Form form, int width, class T = uint32_t>
__global__ void shuffle(const uint32_t* in, uint32_t* out) {
  const uint32_t mask = in[0];
  const int argument = static_cast<int>(in[1 + threadIdx.x]);
  if (!(mask >> threadIdx.x & 1)) return;
  const T value = static_cast<T>(100 + threadIdx.x);
  T got;
  if constexpr (form == index_form) got = __shfl_sync(mask, value, argument, width);
  if constexpr (form == up_form) got = __shfl_up_sync(mask, value, argument, width);
  if constexpr (form == down_form) got = __shfl_down_sync(mask, value, argument, width);
  if constexpr (form == xor_form) got = __shfl_xor_sync(mask, value, argument, width);
  out[threadIdx.x] = static_cast<uint32_t>(got);
}
__global__ void shuffle_keeps_every_bit(const uint32_t*, uint32_t* out) {
  const uint64_t wide = uint64_t{0x0123456789abcdefu} + threadIdx.x;
  const uint64_t next = __shfl_sync(kAll, wide, static_cast<int>(threadIdx.x) + 1);
  const double real = __shfl_xor_sync(kAll, 1.0 / (threadIdx.x + 1), 1);
  out[threadIdx.x] = next == 0x0123456789abcdefu + (threadIdx.x + 1) % 32 && real == 1.0 / ((threadIdx.x ^ 1) + 1);
}
// Two groups of one warp, each in a shuffle of its own at its own pace.
__global__ void shuffle_in_two_groups(const uint32_t*, uint32_t* out) {
  const bool low = threadIdx.x < 16;
  const uint32_t mask = low ? 0x0000ffffu : 0xffff0000u;
  uint32_t sum = threadIdx.x;
  if (low) {
    for (int bits = 8; bits; bits /= 2) sum += __shfl_xor_sync(mask, sum, bits);
  } else {
    for (int bits = 1; bits <= 8; bits *= 2) sum += __shfl_xor_sync(mask, sum, bits);
  }
  out[threadIdx.x] = sum;
}

__global__ void votes(const uint32_t* in, uint32_t* out) {  // out: ballot, any, all, match of each lane
  const uint32_t mask = in[0], mine = in[1 + threadIdx.x];
  if (!(mask >> threadIdx.x & 1)) return;
  out[threadIdx.x] = __ballot_sync(mask, mine & 1);
  out[32 + threadIdx.x] = __any_sync(mask, mine & 1);
  out[64 + threadIdx.x] = __all_sync(mask, mine & 1);
  out[96 + threadIdx.x] = __match_any_sync(mask, mine);
}
// Lanes that have returned are missed by nobody.
__global__ void exited_lanes(const uint32_t* in, uint32_t* out) {
  if (threadIdx.x >= in[0]) return;
  out[threadIdx.x] = __ballot_sync(kAll, true);
  out[32 + threadIdx.x] = __shfl_sync(kAll, threadIdx.x, static_cast<int>(threadIdx.x ^ 1));
}

// --- barriers ---

__global__ void barriers(const uint32_t* in, uint32_t* out) {  // out: count, or, and; then a value of another warp
  const unsigned t = threadIdx.x, n = blockDim.x;
  SHARED(uint32_t, s, 1024);
  out[t] = __syncthreads_count(in[t] != 0);
  out[n + t] = __syncthreads_or(in[t] != 0);
  out[2 * n + t] = __syncthreads_and(in[t] != 0);
  uint32_t sum = 0;
  for (unsigned round = 1; round < 4; ++round) {
    s[t] = t * round;
    __syncthreads();
    sum += s[(t + 33) % n];
    __syncthreads();
  }
  out[3 * n + t] = sum;
}

// --- indices, order, atomics ---

__global__ void indices(const uint32_t*, uint32_t* out) {
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * threads + thread] = block * 1000 + thread;
}
__global__ void order_of_blocks(const uint32_t*, uint32_t* out) {
  if (threadIdx.x == 0) out[1 + atomicAdd(&out[0], 1u)] = blockIdx.x;
}
__global__ void order_of_lanes(const uint32_t*, uint32_t* out) {
  SHARED(uint32_t, next, 1);
  if (threadIdx.x == 0) next[0] = 0;
  __syncthreads();
  out[atomicAdd(&next[0], 1u)] = threadIdx.x;
}
__global__ void atomics(const uint32_t* in, uint32_t* out) {
  const uint32_t v = in[threadIdx.x];
  atomicAdd(&out[0], v);
  atomicSub(&out[1], v);
  atomicMax(&out[2], v);
  atomicMin(&out[3], v);
  atomicOr(&out[4], 1u << v % 32);
  atomicAnd(&out[5], ~(1u << v % 32));
  atomicExch(&out[6], 7u);
  atomicCAS(&out[7], 0u, 1 + threadIdx.x);  // one of them
  atomicAdd(reinterpret_cast<unsigned long long*>(&out[8]), 0x100000000ull);
}

// --- shared memory ---

__global__ void shared_memory(const uint32_t*, uint32_t* out) {
  SHARED(unsigned char, odd, 3);
  SHARED(uint64_t, next, 5);
  auto* dynamic = static_cast<uint32_t*>(simt::shared_dynamic());
  const auto at = [&](const void* p) {
    return static_cast<uint32_t>(static_cast<const char*>(p) - reinterpret_cast<const char*>(dynamic));
  };
  if (threadIdx.x == 0) {
    uint32_t* mine = out + 8 * blockIdx.x;
    mine[0] = reinterpret_cast<uintptr_t>(dynamic) % 128;
    mine[1] = at(odd);
    mine[2] = at(next);
    mine[3] = dynamic[0];  // what the block before left there must not show
    mine[4] = static_cast<uint32_t>(next[4]);
    mine[5] = shared_array<uint64_t>(&next_key, 5) == next;  // the same variable each time
    dynamic[0] = 5;
    next[4] = 6;
  }
}
__global__ void too_much_static(const uint32_t*, uint32_t*) {
  SHARED(unsigned char, big, 60000);
  big[threadIdx.x] = 0;
}

// --- asynchronous copies ---

// Waits for one group too few before it reads the second.
__global__ void wrong_wait(const uint32_t* in, uint32_t* out) {
  SHARED(uint32_t, s, 256);
  for (int group = 0; group < 2; ++group) {
    const int at = group * 128 + threadIdx.x * 4;
    simt::copy_async(&s[at], in + at, 16, true, SIMT_SITE);
    simt::copy_async_commit();
  }
  simt::copy_async_wait(1, SIMT_SITE);
  for (int i = 0; i < 8; ++i) out[i * 32 + threadIdx.x] = s[i / 4 * 128 + threadIdx.x * 4 + i % 4];
}
// Waits for its own copies, but reads its neighbour's with no barrier.
__global__ void missing_barrier(const uint32_t* in, uint32_t* out) {
  SHARED(uint32_t, s, 128);
  simt::copy_async(&s[threadIdx.x * 4], in + threadIdx.x * 4, 16, true, SIMT_SITE);
  simt::copy_async_commit();
  simt::copy_async_wait(0, SIMT_SITE);
  out[threadIdx.x] = s[(threadIdx.x + 1) % 32 * 4];
}

// --- reports ---

__global__ void different_places(const uint32_t*, uint32_t* out) {
  if (threadIdx.x < 7)
    out[threadIdx.x] = __shfl_sync(kAll, 1, 0);  // LINE different_places
  else
    out[threadIdx.x] = __shfl_sync(kAll, 2, 0);  // LINE different_places
}
__global__ void different_masks(const uint32_t*, uint32_t* out) {
  out[threadIdx.x] = __shfl_sync(threadIdx.x < 7 ? 0x0000ffffu : kAll, 1, 0);  // LINE different_masks
}
__global__ void different_kinds(const uint32_t*, uint32_t* out) {
  if (threadIdx.x == 3)
    out[3] = __any_sync(kAll, true);  // LINE different_kinds
  else
    out[threadIdx.x] = __ballot_sync(kAll, true);  // LINE different_kinds
}
__global__ void not_in_mask(const uint32_t*, uint32_t* out) {
  out[threadIdx.x] = __ballot_sync(0xfffffff7u, true);  // LINE not_in_mask
}
__global__ void different_barriers(const uint32_t*, uint32_t* out) {
  if (threadIdx.x < 32)
    __syncthreads();  // LINE different_barriers
  else
    __syncthreads();  // LINE different_barriers
  out[threadIdx.x] = 0;
}
__global__ void returned_before_barrier(const uint32_t*, uint32_t* out) {
  if (threadIdx.x == 5) return;
  __syncthreads();  // LINE returned_before_barrier
  out[threadIdx.x] = 0;
}
// One warp in a barrier, of the other a lane that waits for lanes which are in that barrier too.
__global__ void deadlock(const uint32_t*, uint32_t* out) {
  if (threadIdx.x == 40) out[0] = __shfl_sync(kAll, 1, 0);  // LINE deadlock
  __syncthreads();  // LINE deadlock
}
__global__ void misaligned_load(const uint32_t* in, uint32_t* out) {
  out[threadIdx.x] = simt::load<uint4>(in + 1, SIMT_SITE).x;  // LINE misaligned_load
}
__global__ void misaligned_store(const uint32_t*, uint32_t* out) {
  simt::store(out + 1 + 2 * threadIdx.x, uint2{1, 2}, SIMT_SITE);  // LINE misaligned_store
}
__global__ void misaligned_copy(const uint32_t* in, uint32_t*) {
  SHARED(uint32_t, s, 128);
  simt::copy_async(&s[0], in + 2, 16, true, SIMT_SITE);  // LINE misaligned_copy
}
__global__ void copy_to_global(const uint32_t* in, uint32_t* out) {
  simt::copy_async(out, in, 16, true, SIMT_SITE);  // LINE copy_to_global
}
__global__ void half_a_warp_multiplies(const uint32_t* in, uint32_t* out) {
  float d[4] = {};
  const uint32_t a[4] = {in[0], 0, 0, 0}, b[2] = {};
  simt::mma_m16n8k16<simt::half_to_float>(d, a, b, SIMT_SITE);  // half the warp is not there
  out[threadIdx.x] = static_cast<uint32_t>(d[0]);
}

}  // namespace

#define FORMS(width)                                                  \
  {"shuffle_index_" #width, entry<shuffle<index_form, width>>()},     \
      {"shuffle_up_" #width, entry<shuffle<up_form, width>>()},       \
      {"shuffle_down_" #width, entry<shuffle<down_form, width>>()}, { \
    "shuffle_xor_" #width, entry<shuffle<xor_form, width>>()          \
  }
#define PLAIN(name) {#name, entry<name>()}
const std::map<std::string, Entry> kernels = {
    FORMS(1),
    FORMS(2),
    FORMS(4),
    FORMS(8),
    FORMS(16),
    FORMS(32),
    {"shuffle_float", entry<shuffle<index_form, 32, float>>()},
    {"shuffle_double", entry<shuffle<index_form, 32, double>>()},
    {"shuffle_wide", entry<shuffle<index_form, 32, uint64_t>>()},
    PLAIN(shuffle_keeps_every_bit),
    PLAIN(shuffle_in_two_groups),
    PLAIN(votes),
    PLAIN(exited_lanes),
    PLAIN(barriers),
    PLAIN(indices),
    PLAIN(order_of_blocks),
    PLAIN(order_of_lanes),
    PLAIN(atomics),
    PLAIN(shared_memory),
    PLAIN(too_much_static),
    PLAIN(wrong_wait),
    PLAIN(missing_barrier),
    PLAIN(different_places),
    PLAIN(different_masks),
    PLAIN(different_kinds),
    PLAIN(not_in_mask),
    PLAIN(different_barriers),
    PLAIN(returned_before_barrier),
    PLAIN(deadlock),
    PLAIN(misaligned_load),
    PLAIN(misaligned_store),
    PLAIN(misaligned_copy),
    PLAIN(copy_to_global),
    PLAIN(half_a_warp_multiplies),
};
