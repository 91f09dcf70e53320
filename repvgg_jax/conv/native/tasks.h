// Division of work into tasks for all threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "helpers.h"
#include "products.h"
#include "xla/ffi/api/ffi.h"

namespace repvgg {

namespace ffi = xla::ffi;

// Thread-local memory, kept for the thread's next task.
template <typename Element>
Element* scratch(int64_t count) {
  thread_local std::unique_ptr<void, decltype(&std::free)> memory(nullptr, &std::free);
  thread_local int64_t size = 0;
  const int64_t bytes = count * sizeof(Element);
  if (size < bytes) {
    memory.reset();
    void* found = nullptr;
    if (posix_memalign(&found, 64, bytes)) std::abort();
    memory.reset(found);
    size = bytes;
  }
  return static_cast<Element*>(memory.get());
}

// Memory that is reused from call to call: fresh allocations would cost a page fault every 4 KiB.
class Borrowed {
 public:
  explicit Borrowed(int64_t count) {
    const std::lock_guard<std::mutex> lock(mutex());
    if (!free_ones().empty()) {
      memory_ = std::move(free_ones().back());
      free_ones().pop_back();
    }
    if (int64_t(memory_.size()) < count + ALIGNMENT) memory_ = std::vector<float>(count + ALIGNMENT);
  }
  ~Borrowed() {
    const std::lock_guard<std::mutex> lock(mutex());
    free_ones().push_back(std::move(memory_));
  }
  // Aligned, so that vectors do not straddle cache lines.
  float* data() {
    const int64_t behind = reinterpret_cast<uintptr_t>(memory_.data()) / sizeof(float) % ALIGNMENT;
    return memory_.data() + (ALIGNMENT - behind) % ALIGNMENT;
  }
  const float* data() const { return const_cast<Borrowed*>(this)->data(); }

 private:
  static constexpr int64_t ALIGNMENT = 16;  // numbers
  static std::mutex& mutex() {
    static std::mutex own;
    return own;
  }
  static std::vector<std::vector<float>>& free_ones() {
    static std::vector<std::vector<float>> own;
    return own;
  }
  std::vector<float> memory_;
};

// Runs tasks 0 … count - 1 on the pool's threads and the caller.
template <typename Task>
void in_pool(ffi::ThreadPool& pool, int64_t count, const Task& task) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
  };
  auto state = std::make_shared<State>();
  // `task` is used only by threads that have claimed a number, and the caller waits for those.
  auto work = [state, count, &task] {
    int64_t finished = 0;
    for (int64_t i; (i = state->next.fetch_add(1)) < count; finished++) task(i);
    if (finished && state->done.fetch_add(finished) + finished == count) {
      const std::lock_guard<std::mutex> lock(state->mutex);
      state->all_done.notify_one();
    }
  };
  for (int64_t helpers = std::min(pool.num_threads(), count) - 1; helpers > 0; helpers--)
    pool.Schedule(decltype(work)(work));  // a copy: the pool outlives this call
  work();
  // The other threads are usually about to finish, so spin first. With more threads than cores, spinning on would delay
  // them.
  for (int spins = 0; spins < 1200; spins++) {
    if (state->done.load() == count) return;
    if (spins > 1000) std::this_thread::yield();
  }
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, [&] { return state->done.load() == count; });
}

// Runs tasks 0 … count - 1 on as many threads as the pool has.
template <typename Task>
void in_parallel(ffi::ThreadPool& pool, int64_t count, const Task& task) {
  const int64_t helpers = std::min(pool.num_threads(), count) - 1;
  if (helpers < 1)
    for (int64_t i = 0; i < count; i++) task(i);
  else if (!Helpers::all().run(helpers, count, task))
    in_pool(pool, count, task);
}

inline int64_t thread_count(ffi::ThreadPool& pool) { return std::max<int64_t>(pool.num_threads(), 1); }

struct Range {
  int64_t first, end;
};

// Part `part` of `count` things that are divided into `parts` nearly equal parts.
inline Range share(int64_t count, int64_t part, int64_t parts) {
  return {count * part / parts, count * (part + 1) / parts};
}

// Division of the work into blocks of some rows of one image, or several whole images: as large as `budget` numbers
// allow, of nearly equal size, and, if possible, as many for each thread. Rows are output rows. Each is computed from
// `window` rows of `line` numbers, and the windows of successive output rows are `stride` rows apart.
struct Blocks {
  static constexpr int64_t MIN_ROWS = 4;  // with fewer rows, the surplus of one part would outweigh the balance
  int64_t rows_of_image, parts, rows, images, sets, patch, count;

  Blocks(int64_t images, int64_t rows_of_image, int64_t line, int64_t stride, int64_t window, int64_t budget,
         int64_t threads)
      : rows_of_image(rows_of_image), images(images) {
    rows = std::min(rows_of_image, std::max<int64_t>(1, (budget / line - window) / stride + 1));
    if (images * ((rows_of_image + rows - 1) / rows) < 2 * threads)
      rows = std::max<int64_t>(1, std::min(rows, rows_of_image / 2));
    parts = (rows_of_image + rows - 1) / rows;
    const int64_t even = up_to(parts, threads);
    if (parts > 1 && images % threads && even * MIN_ROWS <= rows_of_image) parts = even;
    rows = (rows_of_image + parts - 1) / parts;
    patch = ((rows - 1) * stride + window) * line;
    const int64_t together = parts > 1 ? 1 : std::max<int64_t>(1, budget / patch);
    sets = std::min(images, up_to((images + together - 1) / together, threads));
    count = parts * sets;
  }

  struct Block {
    int64_t image, images, row, rows;
  };

  Block operator[](int64_t block) const {
    const auto [image, images_end] = share(images, block / parts, sets);
    const auto [row, rows_end] = share(rows_of_image, block % parts, parts);
    return {image, images_end - image, row, rows_end - row};
  }
};

// Number of parts to divide a group's panels into, so that `tasks` tasks, each divided so, keep all threads busy.
inline int64_t panel_parts(int64_t tasks, int64_t pairs, int64_t threads) {
  if (tasks >= 3 * threads || tasks % threads == 0) return 1;
  return std::min(pairs, (3 * threads + tasks - 1) / tasks);
}

// The panels of part `part` of `parts`, in whole pairs.
inline Range panel_range(int64_t panels, int64_t part, int64_t parts) {
  const int64_t pairs = (panels + PANELS - 1) / PANELS;
  const auto [first, end] = share(pairs, part, parts);
  return {first * PANELS, std::min(panels, end * PANELS)};
}

}  // namespace repvgg
