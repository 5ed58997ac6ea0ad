// The parallel loop that every threaded CPU kernel uses.
//
// Inside Python it runs on torch's own thread pool (two pools that spin against each other make small
// work many times slower); without torch it starts plain threads. A kernel must give the same bits for any
// number of threads: split the work into pieces whose size does not depend on the thread count, write each
// piece's result to its own place, and combine in a fixed order.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fastgpt {

using LoopBody = void (*)(int64_t begin, int64_t end, void* context);
// Matches torch_parallel_for and torch_get_num_threads of torch's stable C interface (0 is success).
using LoopFunction = int32_t (*)(int64_t begin, int64_t end, int64_t grain, LoopBody body, void* context);
using ThreadCountFunction = int32_t (*)(uint32_t* count);

// Hands the loop to another pool (null, null: back to the core's own threads).
void set_parallel_functions(LoopFunction loop, ThreadCountFunction count);
// Threads of the core's own loop; used only while no other pool is set.
void set_own_threads(int count);
int thread_count();
void run_parallel(int64_t begin, int64_t end, int64_t grain, LoopBody body, void* context);

// Calls f(begin, end) on disjoint ranges that cover [begin, end); ranges are at least `grain` long, and a loop of
// one grain or less stays on the calling thread. Choose the grain so that a range is worth about 20 us.
template <class F>
inline void parallel_for(int64_t begin, int64_t end, int64_t grain, F&& f) {
  if (begin >= end) return;
#if defined(FASTGPT_SANITIZE_THREAD)
  grain = 1;  // threads for every loop, however small: the more pieces, the more races show
#endif
  if (end - begin <= grain) {
    f(begin, end);
    return;
  }
  using Fn = std::remove_reference_t<F>;
  run_parallel(
      begin, end, grain, [](int64_t b, int64_t e, void* context) { (*static_cast<Fn*>(context))(b, e); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// Element-wise work on a matrix [rows, cols]: calls f(row, col, n) for runs of n elements within a row, which together
// cover the matrix. A range of 16k elements takes 10 to 20 us.
constexpr int64_t kGrainElements = 16384;
template <class F>
inline void parallel_for_runs(int64_t rows, int64_t cols, F&& f) {
  parallel_for(0, rows * cols, kGrainElements, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin / cols, col = begin % cols; begin < end; ++row, col = 0) {
      const int64_t n = cols - col < end - begin ? cols - col : end - begin;
      f(row, col, n);
      begin += n;
    }
  });
}

}  // namespace fastgpt
