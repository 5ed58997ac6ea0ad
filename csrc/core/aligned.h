// Scratch memory for CPU kernels: 64-byte aligned, freed on scope exit, null when memory is short. Not a byte more than
// asked for, so that AddressSanitizer sees where it ends.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "core/isa.h"

namespace fastgpt::FASTGPT_ISA {

template <class T>
class AlignedBuffer {
 public:
  explicit AlignedBuffer(int64_t count) {
    void* memory = nullptr;
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    data_ = posix_memalign(&memory, 64, bytes ? bytes : 1) == 0 ? static_cast<T*>(memory) : nullptr;
  }
  ~AlignedBuffer() { std::free(data_); }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  T* data() const { return data_; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  T* data_;
};

}  // namespace fastgpt::FASTGPT_ISA
