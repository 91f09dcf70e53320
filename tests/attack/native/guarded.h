// Memory that detects reading or writing one byte too many.

#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

// `count` elements filled with bytes of `fill`. With GUARD_PAGES, an inaccessible page directly after the last element,
// or directly before the first, catches vector loads that sanitizers do not see. Without it, the memory comes from
// malloc, for AddressSanitizer.
template <typename T>
class Guarded {
 public:
  explicit Guarded(int64_t count, bool guard_first = false, int fill = 0xff) : count_(count) {
    const size_t bytes = count * sizeof(T);
#if defined(GUARD_PAGES)
    const size_t page = sysconf(_SC_PAGESIZE), inside = (bytes + page - 1) / page * page;
    mapped_ = inside + 2 * page;
    base_ = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    char* first = static_cast<char*>(base_) + page;
    if (inside && mprotect(first, inside, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
    data_ = reinterpret_cast<T*>(guard_first ? first : first + inside - bytes);
#else
    (void)guard_first;
    base_ = std::malloc(bytes);
    data_ = static_cast<T*>(base_);
#endif
    if (bytes) std::memset(data_, fill, bytes);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() {
#if defined(GUARD_PAGES)
    munmap(base_, mapped_);
#else
    std::free(base_);
#endif
  }
  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  int64_t size() const { return count_; }

 private:
  int64_t count_;
  void* base_;
  size_t mapped_ = 0;
  T* data_;
};
