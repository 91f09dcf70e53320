// Threads that share a caller's work.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace repvgg {

using Clock = std::chrono::steady_clock;

// Waits until `ready()`, but not for long, without giving up the core; returns whether it is ready. The gap between two
// layers of a net is a few microseconds, and waking a sleeping thread takes longer.
template <typename Ready>
bool spin_until(const Ready& ready) {
  constexpr std::chrono::microseconds PATIENCE(50);
  const auto end = Clock::now() + PATIENCE;
  do {
    for (int i = 0; i < 16; i++) {
      if (ready()) return true;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }
  } while (Clock::now() < end);
  return false;
}

// A thread that waits for calls, first spinning, then asleep.
class Helper {
 public:
  // Starts the thread, which runs `work` after each call until the process ends; throws if no more threads are allowed.
  template <typename Work>
  explicit Helper(const Work& work) {
    std::thread thread([this, work] {
      for (;;) {
        wait();
        work();
      }
    });
    handle_ = thread.native_handle();
    thread.detach();
  }

  void call() {
    calls_++;
    if (!asleep_) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    called_.notify_one();
  }

  // Lets a called thread that has not started yet do so on another core than the caller's. Linux may put it on that
  // core when it wakes, and leave it there for milliseconds, because the caller does not stop.
  void start_elsewhere() {
#if defined(__linux__)
    if (!asleep_ || moved_ || pthread_getaffinity_np(pthread_self(), sizeof cores_, &cores_)) return;
    cpu_set_t others = cores_;
    const int core = sched_getcpu();
    if (core < 0 || core >= CPU_SETSIZE) return;
    CPU_CLR(core, &others);
    if (CPU_COUNT(&others)) moved_ = !pthread_setaffinity_np(handle_, sizeof others, &others);
#endif
  }

 private:
  void wait() {
    const auto called = [this] { return calls_ != seen_; };
    if (!spin_until(called)) {
      std::unique_lock<std::mutex> lock(mutex_);
      asleep_ = true;
      called_.wait(lock, called);
      asleep_ = false;
    }
    seen_ = calls_;
#if defined(__linux__)
    if (moved_) {
      pthread_setaffinity_np(pthread_self(), sizeof cores_, &cores_);
      moved_ = false;
    }
#endif
  }

  std::atomic<uint32_t> calls_{0};
  std::atomic<bool> asleep_{false}, moved_{false};
  uint32_t seen_ = 0;
  std::mutex mutex_;
  std::condition_variable called_;
  std::thread::native_handle_type handle_;
#if defined(__linux__)
  cpu_set_t cores_;  // of the caller; written while `moved_` is false, read while it is true
#endif
};

// Threads for one caller at a time. XLA's pool has a thread for each core, the caller is one more, and all of them look
// for work for a while after each task: with few cores, the thread that has work must wait for one that has none.
class Helpers {
 public:
  // Never destroyed, because its threads run until the process ends.
  static Helpers& all() {
    static auto* const own = new Helpers;
    return *own;
  }

  // Runs tasks 0 … count - 1 on at most `threads` helpers and the caller, or returns false if another caller has the
  // helpers. Those that come too late are not waited for.
  template <typename Task>
  bool run(int64_t threads, int64_t count, const Task& task) {
    const std::unique_lock<std::mutex> caller(caller_, std::try_to_lock);
    if (!caller) return false;
    const int64_t called = start(threads);
    task_ = &task;
    call_ = [](const void* one, int64_t i) { (*static_cast<const Task*>(one))(i); };
    count_ = count;
    next_ = 0;
    open_ = true;
    for (int64_t i = 0; i < called; i++) helpers_[i]->call();
    constexpr std::chrono::microseconds USUAL(100);  // to wake a thread
    const auto late = Clock::now() + USUAL;
    for (int64_t i; (i = next_++) < count;) {
      task(i);
      if (Clock::now() > late)
        for (int64_t h = 0; h < called; h++) helpers_[h]->start_elsewhere();
    }
    open_ = false;
    // From here on no helper begins, and `task` may go when those that have begun are done.
    const auto done = [this] { return working_ == 0; };
    if (!spin_until(done)) {
      std::unique_lock<std::mutex> lock(mutex_);
      all_done_.wait(lock, done);
    }
    return true;
  }

 private:
  // Returns how many of `count` helpers there are, after starting those that are missing.
  int64_t start(int64_t count) {
    try {
      while (int64_t(helpers_.size()) < count)
        helpers_.push_back(std::make_unique<Helper>([this] { help(); }));
    } catch (const std::system_error&) {  // no more threads are allowed
    }
    return std::min<int64_t>(count, helpers_.size());
  }

  void help() {
    working_++;
    if (open_)
      for (int64_t i; (i = next_++) < count_;) call_(task_, i);
    if (--working_ == 0 && !open_) {
      const std::lock_guard<std::mutex> lock(mutex_);
      all_done_.notify_one();
    }
  }

  std::mutex caller_;
  std::vector<std::unique_ptr<Helper>> helpers_;
  // The caller's tasks: changed while `open_` is false and no helper is working.
  const void* task_ = nullptr;
  void (*call_)(const void*, int64_t) = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0}, working_{0};
  std::atomic<bool> open_{false};
  std::mutex mutex_;
  std::condition_variable all_done_;
};

}  // namespace repvgg
