// Bugs for the sanitizers to notice, compiled into every level of a sanitized build as the kernels are.
//
// Each is fastgpt_planted_<level>_<name>(data, n, wrong): `data` is a tensor of n floats, n > 64. With wrong = 0 it
// does the same work without the bug, and nothing may be reported.
#include "core/aligned.h"
#include "core/parallel.h"
#include "core/simd.h"

#define FASTGPT_JOIN2(level, name) fastgpt_planted_##level##_##name
#define FASTGPT_JOIN(level, name) FASTGPT_JOIN2(level, name)
#define FASTGPT_PLANTED(name)                                                                                     \
  extern "C" __attribute__((visibility("default"))) float FASTGPT_JOIN(FASTGPT_ISA, name)(float* data, int64_t n, \
                                                                                          int32_t wrong)

using namespace fastgpt;
using namespace fastgpt::FASTGPT_ISA;

// --- AddressSanitizer ---

// A whole vector where only a part of one is left.
FASTGPT_PLANTED(vector_past_the_end) {
  const int64_t last = n - (wrong ? kLanes / 2 : kLanes);
  return sum(load(data + last));
}

FASTGPT_PLANTED(tail_load_past_the_end) { return sum(load(data + n - 2, wrong ? 3 : 2)); }

FASTGPT_PLANTED(tail_store_past_the_end) {
  store(data + n - 2, splat(1), wrong ? 3 : 2);
  return data[n - 1];
}

FASTGPT_PLANTED(before_the_beginning) { return data[wrong ? -1 : 0]; }

FASTGPT_PLANTED(scratch_past_the_end) {
  AlignedBuffer<float> scratch(n);
  for (int64_t i = 0; i < n + (wrong ? 1 : 0); ++i) scratch.data()[i] = data[0];
  return scratch.data()[n - 1];
}

FASTGPT_PLANTED(scratch_after_its_end) {
  const float* kept = nullptr;
  {
    AlignedBuffer<float> scratch(n);
    scratch.data()[0] = data[0];
    kept = wrong ? scratch.data() : data;
  }
  return *kept;
}

FASTGPT_PLANTED(lanes_past_the_end) {
  float lanes[kLanes];
  store(lanes, splat(data[0]));
  const volatile int64_t index = wrong ? kLanes : kLanes - 1;
  return lanes[index];
}

// --- UndefinedBehaviorSanitizer ---

FASTGPT_PLANTED(index_of_32_bits) {
  const int32_t rows = wrong ? 65536 : 1, cols = static_cast<int32_t>(n) + 65536;
  return static_cast<float>(rows * cols);
}

FASTGPT_PLANTED(misaligned_load) {
  const char* bytes = reinterpret_cast<const char*>(data) + (wrong ? 1 : 0);
  return *reinterpret_cast<const float*>(bytes);
}

FASTGPT_PLANTED(shift_of_too_many_bits) {
  const volatile int32_t bits = wrong ? 32 : 31;
  return static_cast<float>(1u << bits);
}

FASTGPT_PLANTED(float_beyond_integers) {
  const volatile float value = wrong ? 1e20f : 1e9f;
  return static_cast<float>(static_cast<int32_t>(value));
}

FASTGPT_PLANTED(null_pointer) { return *(wrong ? static_cast<const volatile float*>(nullptr) : data); }

// --- ThreadSanitizer ---

// All pieces add to the same number.
FASTGPT_PLANTED(shared_sum) {
  float total = 0, pieces[64] = {};
  parallel_for(0, 64, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (wrong)
        total += data[i];
      else
        pieces[i] = data[i];
    }
  });
  for (const float piece : pieces) total += piece;
  return total;
}

// Every piece writes one element of the next.
FASTGPT_PLANTED(overlapping_pieces) {
  parallel_for(0, n - 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end + (wrong ? 1 : 0); ++i) data[i] = static_cast<float>(i);
  });
  return data[0];
}

// The same with vectors: a full one where the piece ends within it.
FASTGPT_PLANTED(vector_into_the_next_piece) {
  parallel_for(0, n / kLanes * kLanes - kLanes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kLanes)
      store(data + i, splat(1), wrong ? kLanes : (end - i < kLanes ? end - i : kLanes));
  });
  return data[0];
}

// Read by one piece while another writes it.
FASTGPT_PLANTED(read_of_another_piece) {
  float out[64];
  parallel_for(0, 64, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = wrong && i > 0 ? out[i - 1] + data[i] : data[i];
  });
  return out[63];
}
