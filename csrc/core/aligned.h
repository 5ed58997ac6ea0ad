// Scratch memory for CPU kernels: 64-byte aligned, freed on scope exit, null when memory is short.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "core/isa.h"

namespace fastgpt::FASTGPT_ISA {

template <class T>
class AlignedBuffer {
 public:
  explicit AlignedBuffer(int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(64, (static_cast<size_t>(count) * sizeof(T) + 64) / 64 * 64))) {}
  ~AlignedBuffer() { std::free(data_); }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  T* data() const { return data_; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  T* data_;
};

}  // namespace fastgpt::FASTGPT_ISA
