#include "core/parallel.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace fastgpt {
namespace {

std::atomic<LoopFunction> loop_function{nullptr};
std::atomic<ThreadCountFunction> count_function{nullptr};
std::atomic<int> own_threads{1};

void own_loop(int64_t begin, int64_t end, int64_t grain, LoopBody body, void* context) {
  const int64_t pieces = std::min<int64_t>(own_threads, (end - begin + grain - 1) / grain);
  const int64_t step = (end - begin + pieces - 1) / pieces;
  std::vector<std::thread> workers;
  for (int64_t b = begin + step; b < end; b += step)
    workers.emplace_back([=] { body(b, std::min(b + step, end), context); });
  body(begin, std::min(begin + step, end), context);
  for (auto& worker : workers) worker.join();
}

}  // namespace

void set_parallel_functions(LoopFunction loop, ThreadCountFunction count) {
  loop_function = loop;
  count_function = count;
}

void set_own_threads(int count) { own_threads = std::max(count, 1); }

int thread_count() {
  uint32_t count = 1;
  const ThreadCountFunction ask = count_function;
  if (!ask) return own_threads;
  return ask(&count) == 0 ? static_cast<int>(count) : 1;
}

void run_parallel(int64_t begin, int64_t end, int64_t grain, LoopBody body, void* context) {
  const LoopFunction loop = loop_function;
  if (!loop)
    own_loop(begin, end, std::max<int64_t>(grain, 1), body, context);
  else if (loop(begin, end, std::max<int64_t>(grain, 1), body, context) != 0)
    body(begin, end, context);  // the pool refused the work before starting it: do it here, the result is the same
}

}  // namespace fastgpt
