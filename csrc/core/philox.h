// Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//
// A random word is a pure function of a 64-bit key and a 128-bit counter, so any thread of any backend computes the
// same word without state. fastgpt's keys and counters, here and in fastgpt/ops/philox.py:
//
//   key     = (seed mod 2^32, seed div 2^32)
//   counter = (position mod 2^32, position div 2^32, row, stream)   sampling
//   counter = (key div 8, query, batch * heads + head, stream)      dropout of attention weights
#pragma once

#include <cstdint>

#include "core/isa.h"

namespace fastgpt::FASTGPT_ISA {

// Counter word 3: one constant per consumer, so that two consumers with one seed do not share numbers.
constexpr uint32_t kSampleStream = 1;
constexpr uint32_t kAttentionStream = 2;

struct PhiloxWords {
  uint32_t word[4];
};

FASTGPT_HOST_DEVICE inline PhiloxWords philox4x32(PhiloxWords counter, uint32_t key0, uint32_t key1) {
  PhiloxWords c = counter;
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c.word[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * c.word[2];
    c = {{static_cast<uint32_t>(product1 >> 32) ^ c.word[1] ^ key0, static_cast<uint32_t>(product1),
          static_cast<uint32_t>(product0 >> 32) ^ c.word[3] ^ key1, static_cast<uint32_t>(product0)}};
    key0 += 0x9E3779B9u;  // golden ratio and sqrt(3) - 1, as Weyl sequences
    key1 += 0xBB67AE85u;
  }
  return c;
}

// A uniform 64-bit integer for (seed, row, position).
FASTGPT_HOST_DEVICE inline uint64_t uniform_bits(uint64_t seed, uint32_t row, uint64_t position, uint32_t stream) {
  const PhiloxWords words =
      philox4x32({{static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), row, stream}},
                 static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return uint64_t{words.word[0]} << 32 | words.word[1];
}

// The bits that decide on the weights of `query` with the eight keys 8 key_block .. 8 key_block + 7, in attention;
// head = batch * heads + head.
FASTGPT_HOST_DEVICE inline PhiloxWords dropout_words(int64_t seed, int64_t head, int64_t query, int64_t key_block) {
  return philox4x32(
      {{static_cast<uint32_t>(key_block), static_cast<uint32_t>(query), static_cast<uint32_t>(head), kAttentionStream}},
      static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32));
}

// The 16-bit value of key 8 key_block + n, n in 0 .. 7: the low half of a word comes before its high half.
FASTGPT_HOST_DEVICE inline uint32_t dropout_value(const PhiloxWords& words, int n) {
  return words.word[n / 2] >> (n % 2 * 16) & 0xffffu;
}

}  // namespace fastgpt::FASTGPT_ISA
