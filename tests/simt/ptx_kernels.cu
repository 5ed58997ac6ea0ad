// One kernel of one warp for each wrapper of csrc/cuda/core/ptx.cuh.
#include "cuda/core/ptx.cuh"
#include "run.h"

namespace {

using namespace fastgpt::emulated;

float as_float(uint32_t bits) { return __uint_as_float(bits); }

// in: a (32 x 4 words), b (32 x 2), d (32 x 4 floats); out: d
template <class T>
__global__ void mma(const uint32_t* in, uint32_t* out) {
  const uint32_t* at = in + threadIdx.x * 4;
  const uint32_t a[4] = {at[0], at[1], at[2], at[3]};
  const uint32_t b[2] = {in[128 + threadIdx.x * 2], in[128 + threadIdx.x * 2 + 1]};
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = as_float(in[192 + threadIdx.x * 4 + i]);
  ptx::mma_m16n8k16<T>(d, a, b);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = __float_as_uint(d[i]);
}

// in: the row that each lane points at (32 words), 32 rows of 16 bytes; out: 32 x kMatrices words. A lane whose address
// does not count points nowhere.
template <int kMatrices, auto load>
__global__ void ldmatrix(const uint32_t* in, uint32_t* out) {
  FASTGPT_SHARED(uint32_t, rows, 128);
  for (int i = 0; i < 4; ++i) rows[threadIdx.x * 4 + i] = in[32 + threadIdx.x * 4 + i];
  __syncthreads();
  uint32_t r[kMatrices];
  load(r, threadIdx.x < 8 * kMatrices ? &rows[in[threadIdx.x] * 4] : nullptr, simt::Site{__FILE__, __LINE__});
  for (int i = 0; i < kMatrices; ++i) out[threadIdx.x * kMatrices + i] = r[i];
}

// in: 3 groups of 32 x 4 words; every third lane's copy is not valid. out: each group as seen after the wait that
// leaves the later ones on their way, and then all again.
__global__ void cp_async(const uint32_t* in, uint32_t* out) {
  FASTGPT_SHARED(uint32_t, stage, 3 * 128);
  const auto issue = [&](int group) {
    const int at = group * 128 + threadIdx.x * 4;
    const bool valid = threadIdx.x % 3 != 2;
    ptx::cp_async_16(&stage[at], valid ? in + at : in + 1, valid);  // an address that is not valid may be misaligned
    ptx::cp_async_commit();
  };
  const auto show = [&](int group, int slot) {
    __syncthreads();
    const int other = static_cast<int>(threadIdx.x) ^ 7;
    for (int i = 0; i < 4; ++i) out[slot * 128 + other * 4 + i] = stage[group * 128 + other * 4 + i];
  };
  issue(0);
  issue(1);
  issue(2);
  ptx::cp_async_wait<2>();
  show(0, 0);
  ptx::cp_async_wait<1>();
  show(1, 1);
  ptx::cp_async_wait<0>();
  show(2, 2);
  for (int group = 0; group < 3; ++group) show(group, 3 + group);
}

__global__ void exp2(const uint32_t* in, uint32_t* out) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = __float_as_uint(ptx::exp2(as_float(in[i])));
}
__global__ void tanh(const uint32_t* in, uint32_t* out) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = __float_as_uint(ptx::tanh(as_float(in[i])));
}
template <class T>
__global__ void pack_pair(const uint32_t* in, uint32_t* out) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = fastgpt::emulated::pack_pair<T>(as_float(in[2 * i]), as_float(in[2 * i + 1]));
}
// load_pack, get, from_floats, store_pack: a copy, in two ways.
template <class T>
__global__ void pack(const uint32_t* in, uint32_t* out) {
  constexpr int kEach = kPack<T>;
  const T* from = reinterpret_cast<const T*>(in) + threadIdx.x * kEach;
  T* to = reinterpret_cast<T*>(out) + threadIdx.x * kEach;
  const Pack<T> loaded = load_pack(from);
  float values[kEach];
  loaded.to_floats(values);
  Pack<T> made{};
  made.from_floats(values);
  store_pack(to, made);
  for (int i = 0; i < kEach; ++i) to[32 * kEach + i] = cast<T>(loaded.get(i));
}

}  // namespace

const std::map<std::string, Entry> kernels = {
    {"mma_bf16", entry<mma<bf16>>()},
    {"mma_f16", entry<mma<f16>>()},
    {"ldmatrix_x2", entry<ldmatrix<2, ptx::ldmatrix_x2>>()},
    {"ldmatrix_x4", entry<ldmatrix<4, ptx::ldmatrix_x4>>()},
    {"ldmatrix_x2_trans", entry<ldmatrix<2, ptx::ldmatrix_x2_trans>>()},
    {"ldmatrix_x4_trans", entry<ldmatrix<4, ptx::ldmatrix_x4_trans>>()},
    {"cp_async", entry<cp_async>()},
    {"exp2", entry<exp2>()},
    {"tanh", entry<tanh>()},
    {"pack_pair_bf16", entry<pack_pair<bf16>>()},
    {"pack_pair_f16", entry<pack_pair<f16>>()},
    {"pack_float", entry<pack<float>>()},
    {"pack_bf16", entry<pack<bf16>>()},
    {"pack_f16", entry<pack<f16>>()},
};
