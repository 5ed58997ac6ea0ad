// The native API of fastgpt: one parameter struct and one entry per kernel.
//
// Nothing here knows torch. A struct holds raw pointers, sizes and options; an entry returns a Status.
// Every backend (cpu, cuda and the emulator's) implements the same entries under its own namespace, and
// bindings.cpp exposes each struct field by field, by name, so a forgotten or misspelt field is an error.
//
// Shape legend: B batch, T query length, S key length, H heads, Hkv key/value heads, D head dim,
// C model width, V vocabulary, N rows (all leading dimensions flattened).
//
// To add a kernel: write its struct (fields, then FASTGPT_FIELDS with the same names), add one line to
// FASTGPT_FOR_EACH_KERNEL, and implement `Status name(const Struct&)` in csrc/cpu/<op>.cpp.
#pragma once

#include <cstdint>

#include "core/fields.h"

namespace fastgpt {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

// What a kernel says when it returns. `at` and `value` carry the numbers that the error sentence needs. A kernel that
// still runs when its entry returns (cuda's, and so the emulator's) never says what only the data in device memory
// show: bad_index, not_finite, empty_support. It writes NaN there, or what its struct says.
struct Status {
  enum Code : int32_t {
    ok = 0,
    unsupported_dtype,
    unsupported_shape,
    out_of_memory,
    bad_index,
    not_finite,
    empty_support,
    launch_failed  // value: the cudaError_t
  };
  Code code = ok;
  int64_t at = 0;     // where: a row, or an element
  int64_t value = 0;  // what was found there
};

// Attention, of query i and key j of batch row b and query head h, which reads key/value head h / (heads / kv_heads):
//
//   s = scale q_i . k_j                            s = softcap tanh(s / softcap)          where softcap > 0
//   s = s - alibi[b, h] |i + keys - queries - j|   s = s + mask[b, h, i, j], or -inf where a boolean mask is false
//   s = -inf unless i + shift - left <= j <= i + shift + right (a negative side: no limit), shift = keys - queries if
//       bottom_right, else 0
//   lse = log(exp(sink[h]) + sum_j exp(s_j)), +inf where nothing is summed (no sink, and no key is seen)
//   P = exp(s - lse), out_i = sum_j dropped(P)_j v_j
//
// Dropout: weight (b, h, i, j) is zero where value < dropout_threshold, else multiplied by 65536 / (65536 -
// dropout_threshold), with the 16-bit value of dropout_value(dropout_words(seed, b * heads + h, i, j / 8), j % 8), see
// core/philox.h. Threshold 65536 drops all.
//
// Strides are in elements and the last dimension is contiguous. Where batch row b lies:
//   dense    queries and keys are every row's lengths; strides are of batch, head, row.
//   varlen   cu_seqlens_q and cu_seqlens_k [B + 1] are given: row b has queries cu_seqlens_q[b] .. cu_seqlens_q[b + 1]
//            of q [total_queries, H, D] and the keys likewise; batch strides are 0; `queries` and `keys` are upper
//            bounds of the lengths; i, j, queries and keys in the formulas above are the row's own. Rows of no sequence
//            are not written: the caller has zeroed them.
//   cache    cache_seqlens [B] is given (forward only): row b has the keys 0 .. cache_seqlens[b], which is `keys` in
//   the
//            formulas above; `keys` is the upper bound. Without block_table k is [B, keys, Hkv, D]. With it k is
//            [pages, page_size, Hkv, D], the batch stride is of a page, and key j is row j % page_size of page
//            block_table[b * block_table_stride + j / page_size]. Pages past the row's last key hold anything.
struct AttentionForward {
  void* out;              // [B, H, T, Dv]
  float* lse;             // [B, H, T], of varlen [H, total_queries]; lse_strides are of batch and head
  const void* q;          // [B, H, T, D]
  const void* k;          // [B, Hkv, S, D]
  const void* v;          // [B, Hkv, S, Dv]
  const void* mask;       // [B, H, T, S] or null
  const float* sinks;     // [H] or null
  const float* alibi;     // [B, H], alibi_stride from one batch row to the next (0: the same for all); or null
  const int64_t* dropout_seed;  // one element; null without dropout
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;
  const int32_t* cache_seqlens;
  const int32_t* block_table;
  int64_t batch, heads, kv_heads, queries, keys, dim, value_dim;
  int64_t total_queries, total_keys;  // over the batch: B T and B S if dense; of a cache, total_keys is 0
  int64_t out_strides[3], q_strides[3], k_strides[3], v_strides[3];  // of batch, head, row
  int64_t lse_strides[2];
  int64_t mask_strides[4];
  int64_t alibi_stride, block_table_stride, page_size;  // page_size: 0 without block_table
  int64_t left, right;
  int64_t dropout_threshold;  // 0: no dropout
  int64_t num_splits;     // pieces that the keys of a query are split into; 0: the kernel chooses
  double scale, softcap;  // softcap 0: none
  bool bottom_right;
  DType dtype;            // of q, k, v, out
  DType mask_dtype;       // of an additive mask
  bool mask_bool;         // the mask is boolean: true takes part
  FASTGPT_FIELDS(out, lse, q, k, v, mask, sinks, alibi, dropout_seed, cu_seqlens_q, cu_seqlens_k, cache_seqlens,
                 block_table, batch, heads, kv_heads, queries, keys, dim, value_dim, total_queries, total_keys,
                 out_strides, q_strides, k_strides, v_strides, lse_strides, mask_strides, alibi_stride,
                 block_table_stride, page_size, left, right, dropout_threshold, num_splits, scale, softcap,
                 bottom_right, dtype, mask_dtype, mask_bool)
};

// Gradients of AttentionForward from its inputs, its output and its log-sum-exp; dense and varlen. No gradient of the
// mask nor of alibi. With dP = dout V^T (dropped as P was) and delta = rowsum(dout * out):
//   ds = P (dP - delta), times 1 - tanh(s / softcap)^2 for q and k;  dsinks[h] = -sum over b, i of exp(sink - lse)
//   delta
struct AttentionBackward {
  void* dq;               // [B, H, T, D]
  void* dk;               // [B, Hkv, S, D]
  void* dv;               // [B, Hkv, S, Dv]
  float* dsinks;          // [H]; null without sinks
  const void* dout;       // [B, H, T, Dv]
  const void* out;        // [B, H, T, Dv]
  const float* lse;       // as AttentionForward left it
  const void* q;
  const void* k;
  const void* v;
  const void* mask;
  const float* sinks;
  const float* alibi;
  const int64_t* dropout_seed;
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;
  int64_t batch, heads, kv_heads, queries, keys, dim, value_dim;
  int64_t total_queries, total_keys;
  int64_t dq_strides[3], dk_strides[3], dv_strides[3], dout_strides[3], out_strides[3], q_strides[3], k_strides[3],
      v_strides[3];
  int64_t lse_strides[2];
  int64_t mask_strides[4];
  int64_t alibi_stride;
  int64_t left, right;
  int64_t dropout_threshold;
  double scale, softcap;
  bool bottom_right;
  DType dtype, mask_dtype;
  bool mask_bool;
  FASTGPT_FIELDS(dq, dk, dv, dsinks, dout, out, lse, q, k, v, mask, sinks, alibi, dropout_seed, cu_seqlens_q,
                 cu_seqlens_k, batch, heads, kv_heads, queries, keys, dim, value_dim, total_queries, total_keys,
                 dq_strides, dk_strides, dv_strides, dout_strides, out_strides, q_strides, k_strides, v_strides,
                 lse_strides, mask_strides, alibi_stride, left, right, dropout_threshold, scale, softcap, bottom_right,
                 dtype, mask_dtype, mask_bool)
};

// y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias over rows of C, where s = x + residual.
struct LayerNormForward {
  void* y;                // [N, C]
  void* sum;              // [N, C] = x + residual; null when there is no residual
  float* mean;            // [N]
  float* rstd;            // [N] = 1 / sqrt(var + eps)
  const void* x;          // [N, C]
  const void* residual;   // [N, C] or null
  const void* weight;     // [C] or null
  const void* bias;       // [C] or null
  int64_t rows, cols;
  double eps;
  DType dtype;            // of x, residual, sum, y
  DType weight_dtype;     // of weight and bias
  FASTGPT_FIELDS(y, sum, mean, rstd, x, residual, weight, bias, rows, cols, eps, dtype, weight_dtype)
};

// Gradients of LayerNormForward. `x` is the normalised input (the sum, when a residual was added).
struct LayerNormBackward {
  void* dx;               // [N, C]; also the gradient of the residual
  void* dweight;          // [C] or null
  void* dbias;            // [C] or null
  const void* dy;         // [N, C]
  const void* dsum;       // [N, C] gradient that reached the sum from elsewhere, or null
  const void* x;          // [N, C]
  const void* weight;     // [C] or null
  const float* mean;      // [N]
  const float* rstd;      // [N]
  int64_t rows, cols;
  DType dtype, weight_dtype;
  FASTGPT_FIELDS(dx, dweight, dbias, dy, dsum, x, weight, mean, rstd, rows, cols, dtype, weight_dtype)
};

// y = s * rstd * weight over rows of C, where s = x + residual and rstd = 1 / sqrt(mean(s^2) + eps).
struct RmsNormForward {
  void* y;                // [N, C]
  void* sum;              // [N, C] = x + residual; null when there is no residual
  float* rstd;            // [N]
  const void* x;          // [N, C]
  const void* residual;   // [N, C] or null
  const void* weight;     // [C] or null
  int64_t rows, cols;
  double eps;
  DType dtype;            // of x, residual, sum, y
  DType weight_dtype;
  FASTGPT_FIELDS(y, sum, rstd, x, residual, weight, rows, cols, eps, dtype, weight_dtype)
};

// Gradients of RmsNormForward. `x` is the normalised input (the sum, when a residual was added).
struct RmsNormBackward {
  void* dx;               // [N, C]; also the gradient of the residual
  void* dweight;          // [C] or null
  const void* dy;         // [N, C]
  const void* dsum;       // [N, C] gradient that reached the sum from elsewhere, or null
  const void* x;          // [N, C]
  const void* weight;     // [C] or null
  const float* rstd;      // [N]
  int64_t rows, cols;
  DType dtype, weight_dtype;
  FASTGPT_FIELDS(dx, dweight, dy, dsum, x, weight, rstd, rows, cols, dtype, weight_dtype)
};

// y = gelu(x + bias): exact, or the tanh approximation. Without a bias the caller may pass one row of all elements.
struct GeluForward {
  void* y;                // [N, C]
  const void* x;          // [N, C]
  const void* bias;       // [C] or null
  int64_t rows, cols;
  bool tanh;
  DType dtype;            // of x, y
  DType bias_dtype;
  FASTGPT_FIELDS(y, x, bias, rows, cols, tanh, dtype, bias_dtype)
};

// Gradients of GeluForward.
struct GeluBackward {
  void* dx;               // [N, C]
  void* dbias;            // [C]; null without a bias
  const void* dy;         // [N, C]
  const void* x;          // [N, C]
  const void* bias;       // [C] or null
  int64_t rows, cols;
  bool tanh;
  DType dtype, bias_dtype;
  FASTGPT_FIELDS(dx, dbias, dy, x, bias, rows, cols, tanh, dtype, bias_dtype)
};

// y = gate * sigmoid(gate) * up. Strides are the elements from one row to the next.
struct SwigluForward {
  void* y;                // [N, C], contiguous
  const void* gate;       // [N, C], gate_stride
  const void* up;         // [N, C], up_stride
  int64_t rows, cols, gate_stride, up_stride;
  DType dtype;
  FASTGPT_FIELDS(y, gate, up, rows, cols, gate_stride, up_stride, dtype)
};

// Gradients of SwigluForward.
struct SwigluBackward {
  void* dgate;            // [N, C], gradient_stride
  void* dup;              // [N, C], gradient_stride
  const void* dy;         // [N, C], contiguous
  const void* gate;       // [N, C], gate_stride
  const void* up;         // [N, C], up_stride
  int64_t rows, cols, gate_stride, up_stride, gradient_stride;
  DType dtype;
  FASTGPT_FIELDS(dgate, dup, dy, gate, up, rows, cols, gate_stride, up_stride, gradient_stride, dtype)
};

// Per row with a target other than ignore_index, of x = logits + bias over C classes and e = label_smoothing:
//   lse = logsumexp(x),  loss = (1 - e) (lse - x[target]) + e (lse - mean(x)) + z_loss lse^2
// Other rows give zeros. Also the gradient of scale * loss by x, where dx is given. Where a kernel cannot report a bad
// target, that row's loss and gradient are NaN.
struct CrossEntropyForward {
  float* loss;            // [N]
  float* maximum;         // [N] lse = maximum + log(sum_exp)
  float* sum_exp;         // [N]
  double* totals;         // [2] the sum of the losses and the number of rows that count are added to it
  void* dx;               // [N, C] rows dx_stride apart, or null; may be x itself
  const void* x;          // [N, C] rows x_stride apart
  const void* bias;       // [C] or null
  const int64_t* target;  // [N] each in [0, C), or ignore_index
  const double* scale;    // of dx: one number; not read without dx
  int64_t rows, cols, x_stride, dx_stride, ignore_index;
  double label_smoothing, z_loss;
  DType dtype;            // of x, dx and bias
  FASTGPT_FIELDS(loss, maximum, sum_exp, totals, dx, x, bias, target, scale, rows, cols, x_stride, dx_stride,
                 ignore_index, label_smoothing, z_loss, dtype)
};

// dx = scale * d loss / d x, from the maximum and sum_exp that CrossEntropyForward found.
struct CrossEntropyBackward {
  void* dx;               // [N, C] rows dx_stride apart; may be x itself
  const float* scale;     // the gradient that reaches row i is scale[i * scale_stride]
  const float* maximum;   // [N]
  const float* sum_exp;   // [N]
  const void* x;          // [N, C] rows x_stride apart
  const void* bias;       // [C] or null
  const int64_t* target;  // [N]
  int64_t rows, cols, x_stride, dx_stride, scale_stride, ignore_index;
  double label_smoothing, z_loss;
  DType dtype;
  FASTGPT_FIELDS(dx, scale, maximum, sum_exp, x, bias, target, rows, cols, x_stride, dx_stride, scale_stride,
                 ignore_index, label_smoothing, z_loss, dtype)
};

// One token a row; fastgpt/ops/sample.py defines the steps. A row that holds NaN or +inf after penalties and bias is
// not_finite, one that holds only -inf is empty_support.
struct Sample {
  int64_t* token;           // [N]
  float* log_prob;          // [N]
  const void* logits;       // [N, V]
  const double* reals;      // [N, 6]: temperature, top_p, min_p, repetition, presence and frequency penalty; or null
  const int64_t* integers;  // [N, 3]: top_k, seed, position; or null
  const int64_t* row;       // [N], the row of the random number; or null
  const int64_t* previous;  // [N, L], -1 where there is none, or null
  const float* logit_bias;  // [N, V] or null
  int64_t rows, vocab, previous_count;
  int64_t logits_stride, bias_stride;         // elements from one row to the next
  double all_reals[6];                        // of all rows, where reals is null
  int64_t all_integers[3];                    // of all rows, where integers is null
  int64_t all_row;                            // of all rows, where row is null; -1: the index in the batch
  DType dtype;
  FASTGPT_FIELDS(token, log_prob, logits, reals, integers, row, previous, logit_bias, rows, vocab, previous_count,
                 logits_stride, bias_stride, all_reals, all_integers, all_row, dtype)
};

// Turns the pairs of each head's first `rotated` dims by their position's angle: (x1, x2) -> (x1 cos - x2 sin,
// x2 cos + x1 sin), or by the opposite angle. Dims have unit stride. Where a kernel cannot report a position outside
// the tables, those rows of y are NaN.
struct Rotary {
  void* y;                // [B, H, T, D]
  const void* x;          // [B, H, T, D]
  const void* cos;        // [max_len, rotated / 2]
  const void* sin;        // [max_len, rotated / 2]
  const int64_t* starts;  // [B] position of each batch row's first token, or null: `start` for all
  int64_t start, batch, heads, length, dim, rotated, max_len;
  int64_t x_strides[3], y_strides[3];  // of B, H, T, in elements
  bool interleaved;       // pairs are (2i, 2i + 1), not (i, i + rotated / 2)
  bool inverse;
  DType dtype;            // of x, y
  DType table_dtype;      // of cos, sin: dtype or f32
  FASTGPT_FIELDS(y, x, cos, sin, starts, start, batch, heads, length, dim, rotated, max_len, x_strides, y_strides,
                 interleaved, inverse, dtype, table_dtype)
};

// y[n, t] = weight[token[n, t]] + position_weight[start + t] for N sequences of T tokens. Where a kernel cannot report
// a bad token or position, the row of y is NaN, and the gradients leave it out.
struct EmbeddingForward {
  void* y;                      // [N, T, C]
  const void* tokens;           // [N, T] int64, or int32 if not wide_tokens
  const void* weight;           // [V, C], rows weight_stride apart
  const void* position_weight;  // [positions, C], rows position_stride apart; or null
  const int64_t* starts;        // [N / sequences_per_start], or null: `start` for all
  int64_t start, sequences, sequences_per_start, length, width, vocabulary, positions;
  int64_t weight_stride, position_stride;
  bool wide_tokens;
  DType dtype;
  FASTGPT_FIELDS(y, tokens, weight, position_weight, starts, start, sequences, sequences_per_start, length, width,
                 vocabulary, positions, weight_stride, position_stride, wide_tokens, dtype)
};

// Gradients of EmbeddingForward: each row is the sum over its tokens, in an order that depends on the tokens alone.
struct EmbeddingBackward {
  void* dweight;                // [V, C] or null
  void* dposition_weight;       // [positions, C] or null
  const void* dy;               // [N, T, C], rows dy_stride apart
  const void* tokens;           // [N, T]
  const int64_t* starts;        // as in EmbeddingForward
  int64_t start, sequences, sequences_per_start, length, width, vocabulary, positions, dy_stride;
  int64_t padding;              // this row of dweight is zero; -1: none
  bool scale_grad_by_freq;      // the mean over its tokens instead of the sum, for dweight
  bool wide_tokens;
  DType dtype;
  FASTGPT_FIELDS(dweight, dposition_weight, dy, tokens, starts, start, sequences, sequences_per_start, length, width,
                 vocabulary, positions, dy_stride, padding, scale_grad_by_freq, wide_tokens, dtype)
};

// One AdamW step over `count` tensors, in place; csrc/cpu/adamw.cpp has the formulas.
struct AdamW {
  void* const* params;
  const void* const* grads;
  float* const* exp_avgs;
  float* const* exp_avg_sqs;
  float* const* masters;        // per tensor: its float32 copy, which the parameter is rounded from, or null
  const int64_t* sizes;         // elements of each tensor
  const DType* param_dtypes;
  const DType* grad_dtypes;
  int64_t count;
  float* norm;                  // out: the norm of all gradients / grad_scale, before clipping
  const float* total_norm;      // clip by this norm instead, or null
  int64_t step;
  double lr, beta1, beta2, eps, weight_decay;
  double max_norm;              // <= 0: no clipping
  double grad_scale;            // gradients are divided by this
  bool maximize;
  FASTGPT_FIELDS(params, grads, exp_avgs, exp_avg_sqs, masters, sizes, param_dtypes, grad_dtypes, count, norm,
                 total_norm, step, lr, beta1, beta2, eps, weight_decay, max_norm, grad_scale, maximize)
};

// norm = sqrt(sum of squares of all gradients) / grad_scale.
struct GradNorm {
  float* norm;
  const void* const* grads;
  const int64_t* sizes;
  const DType* grad_dtypes;
  int64_t count;
  double grad_scale;
  FASTGPT_FIELDS(norm, grads, sizes, grad_dtypes, count, grad_scale)
};

}  // namespace fastgpt

// Every kernel: X(entry, parameters).
#define FASTGPT_FOR_EACH_KERNEL(X)                \
  X(attention_forward, AttentionForward)          \
  X(attention_backward, AttentionBackward)        \
  X(layer_norm_forward, LayerNormForward)         \
  X(layer_norm_backward, LayerNormBackward)       \
  X(rms_norm_forward, RmsNormForward)             \
  X(rms_norm_backward, RmsNormBackward)           \
  X(gelu_forward, GeluForward)                    \
  X(gelu_backward, GeluBackward)                  \
  X(swiglu_forward, SwigluForward)                \
  X(swiglu_backward, SwigluBackward)              \
  X(cross_entropy_forward, CrossEntropyForward)   \
  X(cross_entropy_backward, CrossEntropyBackward) \
  X(sample, Sample)                               \
  X(rotary, Rotary)                               \
  X(embedding_forward, EmbeddingForward)          \
  X(embedding_backward, EmbeddingBackward)        \
  X(adamw, AdamW)                                 \
  X(grad_norm, GradNorm)
