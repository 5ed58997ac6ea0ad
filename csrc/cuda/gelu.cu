// gelu of s = x + bias, exact or by the tanh approximation, forward and backward.
//
//   exact: y = s Phi(s),     y' = Phi(s) + s phi(s)           (normal distribution and density: cuda/core/math.cuh)
//   tanh:  y = s sigmoid(z), y' = p + s p (1 - p) z',  p = sigmoid(z), z = 2 sqrt(2/pi) (s + 0.044715 s^3)
//
// (1 + tanh u) / 2 = sigmoid(2u), so the tanh form needs one exponential and no tanh, and does not cancel for negative
// s; tanh.approx would save an operation and lose the negative tail. Bytes: forward reads x and writes y (2 N C
// elements), backward reads x and dy and writes dx (3 N C); everything is recomputed from x. About 30 operations an
// element (exact) or 20 (tanh).
//
// dbias: a block takes a strip of columns of a chunk of rows; column_sums.cuh adds the chunks.
#include "cuda/column_sums.cuh"
#include "cuda/core/math.cuh"
#include "cuda/elementwise.cuh"

namespace fastgpt::FASTGPT_ISA {
namespace {

// Beyond +-limit the derivative is 0 or 1 to the last bit, and so is y / s; the bounds keep inf * 0 out. NaN passes.
constexpr float kExactLimit = 15.0f, kTanhLimit = 100.0f;
constexpr float kSlope = 2.0f * 0.797884560802865356f;  // 2 sqrt(2 / pi)
constexpr float kCubic = 0.044715f;

template <Target kFor>
__device__ inline float gelu(float s, bool tanh) {
  if (tanh) {
    const float bounded = at_least(s, -kTanhLimit);
    return bounded * sigmoid<kFor>(bounded * (kSlope + kSlope * kCubic * (bounded * bounded))).value;
  }
  return at_least(s, -kExactLimit) * normal<kFor>(s).cdf;
}

template <Target kFor>
__device__ inline float gelu_derivative(float s, bool tanh) {
  if (tanh) {
    const float bounded = at_most(at_least(s, -kTanhLimit), kTanhLimit), square = bounded * bounded;
    const Sigmoid p = sigmoid<kFor>(bounded * (kSlope + kSlope * kCubic * square));
    const float slope = bounded * (kSlope + 3.0f * kSlope * kCubic * square);
    return p.value + p.value * p.complement * slope;
  }
  const float bounded = at_most(at_least(s, -kExactLimit), kExactLimit);
  const Normal n = normal<kFor>(bounded);
  return n.cdf + bounded * n.density;
}

// The bias of this thread's columns; 0 without one.
template <class T, int kN>
__device__ inline void load_bias(const void* bias, DType dtype, int64_t col, float (&out)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) out[i] = 0.0f;
  if (bias) load_parameters<T>(bias, dtype, col, out);
}

template <class T, bool kVector>
__global__ void __launch_bounds__(kElementwiseThreads) gelu_forward_kernel(const GeluForward p) {
  constexpr int kN = kCell<T, kVector>;
  const int64_t col = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kN, n = p.cols - col;
  if (n <= 0) return;
  float bias[kN];
  load_bias<T>(p.bias, p.bias_dtype, col, bias);
  const int64_t step = int64_t{gridDim.y} * blockDim.y;
  for (int64_t row = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; row < p.rows; row += step) {
    const int64_t at = row * p.cols + col;
    float s[kN];
    load_part(static_cast<const T*>(p.x) + at, n, s);
#pragma unroll
    for (int i = 0; i < kN; ++i) s[i] = gelu<kTarget<T>>(s[i] + bias[i], p.tanh);
    store_part(static_cast<T*>(p.y) + at, n, s);
  }
}

// Rows blockIdx.y * chunk_rows on. With a bias (kBias) the chunk's part of dbias goes to partial[chunk][column].
template <class T, bool kVector, bool kBias>
__global__ void __launch_bounds__(kElementwiseThreads)
    gelu_backward_kernel(const GeluBackward p, float* partial, int64_t rows_of_chunk) {
  constexpr int kN = kCell<T, kVector>;
  // A float bias has a float gradient, whatever x is.
  constexpr Target kFor = kBias ? Target::single : kTarget<T>;
  const int64_t col = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kN, n = p.cols - col;
  const int64_t first = blockIdx.y * rows_of_chunk;
  const int64_t last = first + rows_of_chunk < p.rows ? first + rows_of_chunk : p.rows;
  float bias[kN], sums[kN];
#pragma unroll
  for (int i = 0; i < kN; ++i) bias[i] = sums[i] = 0.0f;
  if (n > 0) {
    if constexpr (kBias) load_bias<T>(p.bias, p.bias_dtype, col, bias);
    for (int64_t row = first + threadIdx.y; row < last; row += blockDim.y) {
      const int64_t at = row * p.cols + col;
      float s[kN], d[kN];
      load_part(static_cast<const T*>(p.x) + at, n, s);
      load_part(static_cast<const T*>(p.dy) + at, n, d);
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        d[i] *= gelu_derivative<kFor>(s[i] + bias[i], p.tanh);
        if constexpr (kBias) sums[i] += d[i];
      }
      store_part(static_cast<T*>(p.dx) + at, n, d);
    }
  }
  if constexpr (kBias) {
    FASTGPT_SHARED(float, shared, kN* kElementwiseThreads / 2);
    add_over_y(sums, shared);
    if (threadIdx.y == 0 && n > 0) store_floats(partial + blockIdx.y * p.cols + col, sums);
  }
}

}  // namespace

Status gelu_forward(const GeluForward& p, Launch& launch) {
  return dispatch_dtypes(p.dtype, p.bias_dtype, [&](auto t, auto) -> Status {
    using T = typename decltype(t)::type;
    // Without a bias all elements may be one row, with an end that is no whole cell.
    const bool whole = p.cols % kPack<T> == 0;
    const bool vector = (whole || (p.rows == 1 && !p.bias)) && all_aligned16(p.x, p.y, p.bias);
    const int64_t cells = vector ? ceil_div(p.cols, kPack<T>) : p.cols;
    const dim3 block = elementwise_block(p.rows, cells), grid = elementwise_grid(p.rows, cells, block);
    if (vector) return launch.run<gelu_forward_kernel<T, true>>(grid, block, 0, p);
    return launch.run<gelu_forward_kernel<T, false>>(grid, block, 0, p);
  });
}

Status gelu_backward(const GeluBackward& p, Launch& launch) {
  return dispatch_dtypes(p.dtype, p.bias_dtype, [&](auto t, auto) -> Status {
    using T = typename decltype(t)::type;
    const auto run = [&](auto vector, auto bias) -> Status {
      constexpr bool kVector = decltype(vector)::value, kBias = decltype(bias)::value;
      const int64_t cells = ceil_div(p.cols, kCell<T, kVector>);
      const dim3 block = elementwise_block(p.rows, cells);
      // Without a bias nothing is summed, and chunks are as short as the grid allows.
      dim3 grid = elementwise_grid(p.rows, cells, block);
      const int64_t rows_of_chunk = kBias ? chunk_rows(p.rows, block.y) : round_up(ceil_div(p.rows, grid.y), block.y);
      const int64_t chunks = ceil_div(p.rows, rows_of_chunk);
      grid.y = static_cast<unsigned>(chunks);
      float* const partial = launch.scratch<float>(kBias ? chunks * p.cols : 0);
      const Status status =
          launch.run<gelu_backward_kernel<T, kVector, kBias>>(grid, block, 0, p, partial, rows_of_chunk);
      if (status.code != Status::ok || !kBias) return status;
      return write_column_sums(launch, partial, chunks, 1, p.cols, p.dbias, nullptr, p.bias_dtype);
    };
    const bool whole = p.cols % kPack<T> == 0, aligned = all_aligned16(p.x, p.dy, p.dx, p.bias);
    if (p.bias)
      return whole && aligned ? run(std::true_type{}, std::true_type{}) : run(std::false_type{}, std::true_type{});
    return (whole || p.rows == 1) && aligned ? run(std::true_type{}, std::false_type{})
                                             : run(std::false_type{}, std::false_type{});
  });
}

}  // namespace fastgpt::FASTGPT_ISA
