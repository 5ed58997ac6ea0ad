// What an entry launches its kernels with: the caller's stream, a workspace, and errors that become a Status.
//
// An entry runs twice. The first time is dry: scratch() only adds up how much workspace it wants and run() launches
// nothing. The second time the workspace is there. So nothing is allocated behind the caller's back, the two can never
// disagree, and the whole call can be captured in a CUDA graph.
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>

#include "cuda/core/cuda.cuh"

namespace fastgpt::FASTGPT_ISA {

class Launch {
 public:
  // Dry without a workspace; `workspace` may be null for good when no scratch is wanted.
  explicit Launch(cudaStream_t stream) : stream_(stream), dry_(true) {}
  Launch(cudaStream_t stream, void* workspace)
      : stream_(stream), workspace_(static_cast<char*>(workspace)), dry_(false) {}

  // `count` elements of device memory, aligned to 256 bytes, not initialised. Ask before the first run().
  template <class T>
  T* scratch(int64_t count) {
    char* at = workspace_ ? workspace_ + scratch_bytes_ : nullptr;
    scratch_bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), 256);
    return reinterpret_cast<T*>(at);
  }
  int64_t scratch_bytes() const { return scratch_bytes_; }

  // Launches kernel(arguments...), each argument converted to the kernel's parameter type.
  template <auto kernel, class... Arguments>
  Status run(dim3 grid, dim3 block, size_t dynamic_shared, const Arguments&... arguments) {
    if (dry_) return {};
    return run_as<kernel>(kernel, grid, block, dynamic_shared, arguments...);
  }

  // Of the device: for choosing how much to keep in flight, never for what is computed.
  int sms() const;
  // Bytes of shared memory that a block may have: 99 KiB on sm_86 and sm_89, 163 on sm_80, 227 on sm_90 and sm_100.
  int shared_limit() const;

 private:
#if defined(__CUDACC__)
  template <auto kernel, class... Params, class... Arguments>
  Status run_as(void (*)(Params...), dim3 grid, dim3 block, size_t dynamic_shared, const Arguments&... arguments) {
    static_assert(sizeof...(Params) == sizeof...(Arguments), "the kernel takes another number of arguments");
    const auto* function = reinterpret_cast<const void*>(kernel);
    if (dynamic_shared > 48 * 1024) {  // more needs to be asked for, per kernel and device
      const cudaError_t error =
          cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(dynamic_shared));
      if (error != cudaSuccess) return failed(error);
    }
    std::tuple<Params...> copies(static_cast<Params>(arguments)...);
    return std::apply(
        [&](auto&... copy) -> Status {
          void* pointers[] = {const_cast<void*>(static_cast<const void*>(&copy))...};
          const cudaError_t error = cudaLaunchKernel(function, grid, block, pointers, dynamic_shared, stream_);
          return error == cudaSuccess ? Status{} : failed(error);
        },
        copies);
  }
  static Status failed(cudaError_t error) {
    cudaGetLastError();  // clears it: the caller's next launch must not be blamed for this one
    return {Status::launch_failed, 0, static_cast<int64_t>(error)};
  }
#else
  template <auto kernel, class... Params, class... Arguments>
  Status run_as(void (*shape)(Params...), dim3 grid, dim3 block, size_t dynamic_shared, const Arguments&... arguments) {
    ::simt::launch_as<kernel>(shape, grid, block, dynamic_shared, arguments...);
    return {};
  }
#endif

  cudaStream_t stream_;
  char* workspace_ = nullptr;
  int64_t scratch_bytes_ = 0;
  bool dry_;
};

#if defined(__CUDACC__)
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}
inline int Launch::sms() const { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline int Launch::shared_limit() const { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
#else
inline int Launch::sms() const { return ::simt::device().sms; }
inline int Launch::shared_limit() const { return static_cast<int>(::simt::device().shared_limit); }
#endif

}  // namespace fastgpt::FASTGPT_ISA
