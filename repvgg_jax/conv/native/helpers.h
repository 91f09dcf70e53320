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

namespace repvgg {

// Waits for at most `PATIENCE` without giving up the core: returns whether `ready()` became true. The gap between two
// layers of a net is a few microseconds, and waking a sleeping thread takes longer.
template <typename Ready>
bool spin_until(const Ready& ready) {
  constexpr std::chrono::microseconds PATIENCE(50);
  const auto start = std::chrono::steady_clock::now();
  for (;;) {
    for (int i = 0; i < 16; i++) {
      if (ready()) return true;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }
    if (std::chrono::steady_clock::now() - start > PATIENCE) return false;
  }
}

// Threads for one caller at a time. XLA's pool has a thread for each core, the caller is one more, and all of them look
// for work for a while after each task: with few cores, the thread that has work must wait for one that has none.
class Helpers {
 public:
  // Never destroyed, because its threads run until the process ends.
  static Helpers& all() {
    static auto* const own = new Helpers;
    return *own;
  }

  // Runs `act` on `count` helpers and the caller, or returns false if they work for another caller. `act` must return
  // when no work is left, and be right if any number of helpers run it, also none: those that come too late do not.
  template <typename Act>
  bool run(int64_t count, const Act& act) {
    const std::unique_lock<std::mutex> caller(caller_, std::try_to_lock);
    if (!caller) return false;
    start(count);
    act_ = &act;
    call_ = [](const void* one) { (*static_cast<const Act*>(one))(); };
    open_ = true;
    for (int64_t i = 0; i < std::min<int64_t>(count, helpers_.size()); i++) helpers_[i]->wake();
    act();
    open_ = false;
    // From here on no helper begins, and `act` may go when those that have begun are done.
    const auto done = [this] { return working_ == 0; };
    if (!spin_until(done)) {
      std::unique_lock<std::mutex> lock(mutex_);
      all_done_.wait(lock, done);
    }
    return true;
  }

 private:
  class Helper {
   public:
    void wake() {
      calls_++;
      if (!asleep_) return;
      const std::lock_guard<std::mutex> lock(mutex_);
      called_.notify_one();
    }
    void wait() {
      const auto called = [this] { return calls_ != seen_; };
      if (!spin_until(called)) {
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_ = true;
        called_.wait(lock, called);
        asleep_ = false;
      }
      seen_ = calls_;
    }

   private:
    std::atomic<uint32_t> calls_{0};
    std::atomic<bool> asleep_{false};
    uint32_t seen_ = 0;
    std::mutex mutex_;
    std::condition_variable called_;
  };

  void start(int64_t count) {
    while (int64_t(helpers_.size()) < count) {
      auto helper = std::make_unique<Helper>();
      try {
        std::thread([this, one = helper.get()] { help(*one); }).detach();
      } catch (const std::system_error&) {
        return;  // no more threads are allowed: those that run will do
      }
      helpers_.push_back(std::move(helper));
    }
  }

  void help(Helper& own) {
    for (;;) {
      own.wait();
      working_++;
      if (open_) call_(act_);
      if (--working_ == 0 && !open_) {
        const std::lock_guard<std::mutex> lock(mutex_);
        all_done_.notify_one();
      }
    }
  }

  std::mutex caller_;
  std::vector<std::unique_ptr<Helper>> helpers_;  // changed by the caller
  const void* act_ = nullptr;
  void (*call_)(const void*) = nullptr;
  std::atomic<bool> open_{false};
  std::atomic<int64_t> working_{0};
  std::mutex mutex_;
  std::condition_variable all_done_;
};

}  // namespace repvgg
