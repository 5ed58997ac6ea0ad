// embedding: y[n, t] = weight[token[n, t]] + position_weight[start + t], and its gradients.
//
//   dweight[v] = sum of dy over the tokens equal to v, in token order;  dposition[p] = sum of dy over the tokens at p
//
// Bytes: forward reads a row and writes a row for each token. Backward reads dy once for each gradient and writes every
// row of it once; for GPT-2's vocabulary the rows that no token touched, all zero, are most of it.
//
// Backward without atomics: a stable counting sort lists the tokens of each vocabulary row in token order; each thread
// then owns whole rows and sums them in float, in that order. So the bits do not depend on threads. Ranges of equal
// work (rows + tokens, not rows alone) keep the threads even: frequent tokens have small numbers in most vocabularies.
#include "core/aligned.h"
#include "core/parallel.h"
#include "core/simd.h"

namespace fastgpt::FASTGPT_ISA {
namespace {

// A range worth a thread: 16k elements take about 10 us.
constexpr int64_t kGrainElements = 16384;
// Vectors of a row that are summed in registers at a time: enough to run along each row, few enough to stay there.
constexpr int kUnroll = 8;

inline int64_t token_at(const void* tokens, bool wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(tokens)[i] : static_cast<const int32_t*>(tokens)[i];
}

// `at` counts tokens.
template <class P>
Status check_tokens(const P& p) {
  for (int64_t i = 0; i < p.sequences * p.length; ++i) {
    const int64_t token = token_at(p.tokens, p.wide_tokens, i);
    if (token < 0 || token >= p.vocabulary) return {Status::bad_index, i, token};
  }
  return {};
}

// Every sequence's positions lie in the table. `at` counts entries of starts.
template <class P>
Status check_starts(const P& p) {
  const int64_t count = p.starts ? p.sequences / p.sequences_per_start : 0;
  for (int64_t i = 0; i < count; ++i)
    if (p.starts[i] < 0 || p.starts[i] + p.length > p.positions) return {Status::bad_index, i, p.starts[i]};
  return {};
}

template <class P>
int64_t start_of(const P& p, int64_t sequence) {
  return p.starts ? p.starts[sequence / p.sequences_per_start] : p.start;
}

template <class T>
Status forward(const EmbeddingForward& p) {
  Status status = check_tokens(p);
  if (status.code == Status::ok && p.position_weight) status = check_starts(p);
  if (status.code != Status::ok) return status;
  const int64_t count = p.sequences * p.length;
  const T* weight = static_cast<const T*>(p.weight);
  const T* position_weight = static_cast<const T*>(p.position_weight);
  T* y = static_cast<T*>(p.y);
  parallel_for(0, count, kGrainElements / p.width + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* row = weight + token_at(p.tokens, p.wide_tokens, i) * p.weight_stride;
      T* out = y + i * p.width;
      if (!position_weight) {
        std::memcpy(out, row, static_cast<size_t>(p.width) * sizeof(T));
        continue;
      }
      const T* position = position_weight + (start_of(p, i / p.length) + i % p.length) * p.position_stride;
      for_each_vector(p.width,
                      [&](int64_t c, int64_t n) { store(out + c, load(row + c, n) + load(position + c, n), n); });
    }
  });
  return {};
}

// out = scale * (sum over i < count of the row that row_of(i) points to); zero when count is 0.
template <class T, class F>
inline void sum_rows(T* out, int64_t width, int64_t count, float scale, F&& row_of) {
  if (count == 0) {
    std::memset(out, 0, static_cast<size_t>(width) * sizeof(T));
    return;
  }
  int64_t c = 0;
  for (; c + kUnroll * kLanes <= width; c += kUnroll * kLanes) {
    Vec total[kUnroll] = {};
    for (int64_t i = 0; i < count; ++i) {
      const T* row = row_of(i) + c;
      for (int j = 0; j < kUnroll; ++j) total[j] += load(row + j * kLanes);
    }
    for (int j = 0; j < kUnroll; ++j) store(out + c + j * kLanes, total[j] * scale);
  }
  for_each_vector(width - c, [&](int64_t d, int64_t n) {
    Vec total = {};
    for (int64_t i = 0; i < count; ++i) total += load(row_of(i) + c + d, n);
    store(out + c + d, total * scale, n);
  });
}

// out[k] = sum of the rows i of dy with key_of(i) == k, in the order of i, for every k < keys; key_of(i) < 0 leaves i
// out.
template <class T, class F>
Status sum_by_key(const EmbeddingBackward& p, T* out, int64_t keys, bool mean, F&& key_of) {
  const int64_t count = p.sequences * p.length;
  // first[k] .. first[k + 1]: the places in `order` of the rows with key k.
  AlignedBuffer<int64_t> first_buffer(keys + 1), order_buffer(count);
  if (!first_buffer || !order_buffer) return {Status::out_of_memory, 0, (keys + 1 + count) * 8};
  int64_t* first = first_buffer.data();
  int64_t* order = order_buffer.data();
  std::memset(first, 0, static_cast<size_t>(keys + 1) * 8);
  for (int64_t i = 0; i < count; ++i)
    if (const int64_t key = key_of(i); key >= 0) ++first[key];
  for (int64_t k = 0, total = 0; k <= keys; ++k) first[k] = total += first[k];
  for (int64_t i = count - 1; i >= 0; --i)  // backwards: each end moves down to its start, and equals keep their order
    if (const int64_t key = key_of(i); key >= 0) order[--first[key]] = i;

  // Key k stands at k + first[k] on a line of keys + rows units of work; a range takes the keys that stand on it.
  const int64_t work = keys + first[keys];
  auto key_from = [&](int64_t unit) {
    int64_t low = 0, high = keys;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (middle + first[middle] < unit)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  };
  const T* dy = static_cast<const T*>(p.dy);
  parallel_for(0, work, kGrainElements / p.width + 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = key_from(begin), last = key_from(end); k < last; ++k) {
      const int64_t* rows = order + first[k];
      const int64_t here = first[k + 1] - first[k];
      const float scale = mean ? 1.0f / static_cast<float>(here) : 1.0f;
      sum_rows(out + k * p.width, p.width, here, scale, [&](int64_t i) { return dy + rows[i] * p.dy_stride; });
    }
  });
  return {};
}

template <class T>
Status backward(const EmbeddingBackward& p) {
  Status status = p.dweight ? check_tokens(p) : Status{};
  if (status.code == Status::ok && p.dposition_weight) status = check_starts(p);
  if (status.code == Status::ok && p.dweight)
    status = sum_by_key(p, static_cast<T*>(p.dweight), p.vocabulary, p.scale_grad_by_freq, [&](int64_t i) {
      const int64_t token = token_at(p.tokens, p.wide_tokens, i);
      return token == p.padding ? -1 : token;
    });
  if (status.code == Status::ok && p.dposition_weight)
    status = sum_by_key(p, static_cast<T*>(p.dposition_weight), p.positions, false,
                        [&](int64_t i) { return start_of(p, i / p.length) + i % p.length; });
  return status;
}

}  // namespace

Status embedding_forward(const EmbeddingForward& p) {
  return dispatch_dtype(p.dtype, [&](auto t) { return forward<typename decltype(t)::type>(p); });
}

Status embedding_backward(const EmbeddingBackward& p) {
  return dispatch_dtype(p.dtype, [&](auto t) { return backward<typename decltype(t)::type>(p); });
}

}  // namespace fastgpt::FASTGPT_ISA
