// Shared memory of the test kernels, which know nothing of fastgpt: `type name[count]`.
#pragma once

#include "simt/runtime.h"

template <class T>
T* shared_array(const void* key, int count) {
  return static_cast<T*>(simt::shared_static(key, sizeof(T) * count, 16));
}
#define SHARED(type, name, count) \
  static char name##_key;         \
  type* const name = shared_array<type>(&name##_key, count)
