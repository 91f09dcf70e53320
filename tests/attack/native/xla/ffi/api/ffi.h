// The part of XLA's foreign function interface that `conv3x3.cc` uses, so that a program can call its handlers without
// XLA and Python, under sanitizers, with buffers of exactly the right size.

#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace xla::ffi {

enum DataType { F32, BF16, U8, S8, S32 };

template <DataType>
struct NativeTypeOf;
template <>
struct NativeTypeOf<F32> {
  using type = float;
};
template <>
struct NativeTypeOf<BF16> {
  using type = uint16_t;
};
template <>
struct NativeTypeOf<U8> {
  using type = uint8_t;
};
template <>
struct NativeTypeOf<S8> {
  using type = int8_t;
};
template <>
struct NativeTypeOf<S32> {
  using type = int32_t;
};

class Error {
 public:
  static Error Success() { return Error(""); }
  static Error InvalidArgument(std::string message) { return Error(std::move(message)); }
  bool success() const { return message_.empty(); }
  const std::string& message() const { return message_; }

 private:
  explicit Error(std::string message) : message_(std::move(message)) {}
  std::string message_;
};

class AnyBuffer {
 public:
  using Dimensions = const std::vector<int64_t>&;
  AnyBuffer(DataType type, void* data, std::vector<int64_t> dimensions)
      : type_(type), data_(data), dimensions_(std::move(dimensions)) {}
  Dimensions dimensions() const { return dimensions_; }
  DataType element_type() const { return type_; }
  size_t element_count() const {
    size_t count = 1;
    for (int64_t dimension : dimensions_) count *= dimension;
    return count;
  }
  template <typename T>
  T* typed_data() const {
    return static_cast<T*>(data_);
  }
  void* untyped_data() const { return data_; }

 private:
  DataType type_;
  void* data_;
  std::vector<int64_t> dimensions_;
};

template <DataType TYPE>
class Buffer : public AnyBuffer {
 public:
  using Native = typename NativeTypeOf<TYPE>::type;
  Buffer(void* data, std::vector<int64_t> dimensions) : AnyBuffer(TYPE, data, std::move(dimensions)) {}
  Native* typed_data() const { return AnyBuffer::typed_data<Native>(); }
};

template <typename T>
class Result {
 public:
  Result(T value) : value_(std::move(value)) {}
  T* operator->() { return &value_; }

 private:
  T value_;
};

template <DataType TYPE>
using ResultBuffer = Result<Buffer<TYPE>>;

// Threads that take tasks from a queue; a copy is the same pool, as in XLA.
class ThreadPool {
 public:
  explicit ThreadPool(int threads) : state_(std::make_shared<State>(threads)) {}
  int64_t num_threads() const { return state_->threads.size(); }
  void Schedule(std::function<void()> task) {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    state_->tasks.push_back(std::move(task));
    state_->changed.notify_one();
  }

 private:
  struct State {
    explicit State(int count) {
      for (int i = 0; i < count; i++) threads.emplace_back([this] { work(); });
    }
    ~State() {
      {
        const std::lock_guard<std::mutex> lock(mutex);
        over = true;
        changed.notify_all();
      }
      for (std::thread& thread : threads) thread.join();
    }
    void work() {
      std::unique_lock<std::mutex> lock(mutex);
      for (;;) {
        changed.wait(lock, [&] { return over || !tasks.empty(); });
        if (tasks.empty()) return;
        std::function<void()> task = std::move(tasks.front());
        tasks.pop_front();
        lock.unlock();
        task();
        task = nullptr;
        lock.lock();
      }
    }
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<std::function<void()>> tasks;
    bool over = false;
    std::vector<std::thread> threads;
  };
  std::shared_ptr<State> state_;
};

}  // namespace xla::ffi

// The handlers are not looked up by name here.
#define XLA_FFI_DEFINE_HANDLER_SYMBOL(name, function, ...) static_assert(true)
