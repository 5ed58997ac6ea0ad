// Emulated bodies of the PTX instructions that move and multiply matrix fragments. The layouts of the fragments are
// those of the PTX ISA, sections "mma.m16n8k16" and "ldmatrix"; the tests compare them with an independent table.
#pragma once

#include "simt/cuda.h"

namespace simt {

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t{h} << 16 & 0x80000000u, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude << 13) * __uint_as_float(0x77800000u)));
}
inline float bfloat16_to_float(uint16_t b) { return __uint_as_float(uint32_t{b} << 16); }

struct Mma {
  float* d;           // 4: rows g and g + 8, columns 2t and 2t + 1; lane = 4 g + t
  const uint32_t* a;  // 4 pairs: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)
  const uint32_t* b;  // 2 pairs: rows 2t and 2t + 8 of column g
};

// d[16, 8] += a[16, 16] b[16, 8]
template <float (*kToFloat)(uint16_t)>
void mma_m16n8k16_complete(void* const* arguments, uint32_t here) {
  if (here != kFullMask) fail("mma needs all 32 lanes of the warp");
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& mma = *static_cast<const Mma*>(arguments[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) {
      float* pair = &a[g + r % 2 * 8][2 * t + r / 2 * 8];
      pair[0] = kToFloat(static_cast<uint16_t>(mma.a[r]));
      pair[1] = kToFloat(static_cast<uint16_t>(mma.a[r] >> 16));
      d[g + r / 2 * 8][2 * t + r % 2] = mma.d[r];
    }
    for (int r = 0; r < 2; ++r) {
      b[2 * t + r * 8][g] = kToFloat(static_cast<uint16_t>(mma.b[r]));
      b[2 * t + r * 8 + 1][g] = kToFloat(static_cast<uint16_t>(mma.b[r] >> 16));
    }
  }
  for (int i = 0; i < 16; ++i) {
    float sum[8];
    for (int j = 0; j < 8; ++j) sum[j] = 0;
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) sum[j] += a[i][k] * b[k][j];
    for (int j = 0; j < 8; ++j) d[i][j] += sum[j];
  }
  for (int lane = 0; lane < kWarpSize; ++lane)
    for (int r = 0; r < 4; ++r)
      static_cast<const Mma*>(arguments[lane])->d[r] = d[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2];
}

template <float (*kToFloat)(uint16_t)>
SIMT_UNSEEN void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  Mma mine{d, a, b};
  collective("mma.m16n8k16", site, kFullMask, &mine, &mma_m16n8k16_complete<kToFloat>);
}

struct LoadMatrix {
  const void* row;
  uint32_t* r;
};

// Lane 8 m + i gives the address of row i of matrix m; register m of lane 4 g + t gets elements 2t and 2t + 1 of row g
// of matrix m, or, transposed, of column g.
template <int kMatrices, bool kTranspose>
SIMT_UNSEEN void ldmatrix_complete(void* const* arguments, uint32_t here) {
  if (here != kFullMask) fail("ldmatrix needs all 32 lanes of the warp");
  for (int m = 0; m < kMatrices; ++m) {
    uint16_t matrix[8][8];
    for (int i = 0; i < 8; ++i) std::memcpy(matrix[i], static_cast<const LoadMatrix*>(arguments[8 * m + i])->row, 16);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint32_t low = kTranspose ? matrix[2 * t][g] : matrix[g][2 * t];
      const uint32_t high = kTranspose ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
      static_cast<const LoadMatrix*>(arguments[lane])->r[m] = low | high << 16;
    }
  }
}

template <int kMatrices, bool kTranspose>
SIMT_UNSEEN void ldmatrix(uint32_t* r, const void* row, Site site) {
  if (static_cast<int>(current->lane()) < 8 * kMatrices) {
    check_aligned(row, 16, "ldmatrix row", site);
    if (!is_shared(row, 16)) fail("ldmatrix at " + describe(site) + " reads outside the block's shared memory");
    check::access(row, 16, check::Access::read, site);
  }
  LoadMatrix mine{row, r};
  collective(kTranspose ? "ldmatrix.trans" : "ldmatrix", site, kFullMask, &mine,
             &ldmatrix_complete<kMatrices, kTranspose>);
}

}  // namespace simt
