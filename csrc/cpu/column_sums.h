// Sums down the columns of a matrix (gradients of weights and biases), with the same bits for any number of threads:
// a fixed number of rows is summed by one thread, and the partial sums are added in order.
#pragma once

#include "core/aligned.h"
#include "core/parallel.h"
#include "core/simd.h"

namespace fastgpt::FASTGPT_ISA {

class ColumnSums {
 public:
  // `kinds` sums of `cols` columns each over the same rows (dweight and dbias, say); may be 0.
  ColumnSums(int64_t rows, int64_t cols, int kinds)
      : rows_(rows), cols_(cols), kinds_(kinds), partials_(pieces() * kinds * cols) {}

  Status status() const {
    if (partials_) return {};
    return {Status::out_of_memory, 0, pieces() * kinds_ * cols_ * static_cast<int64_t>(sizeof(float))};
  }

  // Calls f(first, last, partial), in parallel, for pieces of rows [first, last); f adds their sums into `partial`,
  // [kinds][cols] and zero at the start.
  template <class F>
  void for_each_piece(F&& f) {
    parallel_for(0, pieces(), kGrainElements / (kRows * cols_) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        float* partial = partials_.data() + i * kinds_ * cols_;
        std::memset(partial, 0, static_cast<size_t>(kinds_ * cols_) * sizeof(float));
        f(i * kRows, (i + 1) * kRows < rows_ ? (i + 1) * kRows : rows_, partial);
      }
    });
  }

  // The partial sums in order, with Kahan's compensation: there may be thousands.
  template <class W>
  void write(int kind, W* out) const {
    for_each_vector(cols_, [&](int64_t c, int64_t n) {
      Vec total = {}, excess = {};
      for (int64_t i = 0; i < pieces(); ++i) {
        const Vec v = load(partials_.data() + (i * kinds_ + kind) * cols_ + c, n) - excess;
        const Vec next = total + v;
        excess = (next - total) - v;
        total = next;
      }
      store(out + c, total, n);
    });
  }

 private:
  static constexpr int64_t kRows = 64;
  int64_t pieces() const { return (rows_ + kRows - 1) / kRows; }
  int64_t rows_, cols_, kinds_;
  AlignedBuffer<float> partials_;
};

}  // namespace fastgpt::FASTGPT_ISA
