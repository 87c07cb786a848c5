// What every kernel file shares: exported symbols, the caller's thread pool, scratch memory, element types.
//
// Every .cpp file of this folder is compiled once for each instruction level into a library of its own (see build.py),
// so nothing here may depend on which other levels exist.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#define KL_EXPORT extern "C" __attribute__((visibility("default")))
#define KL_INLINE inline __attribute__((always_inline))

namespace kl {

// Element types as Python passes them.
enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1 };

// A bfloat16 is the upper half of a float32.
struct bf16 {
  uint16_t bits;
};

KL_INLINE float to_float(float x) { return x; }
KL_INLINE float to_float(bf16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &wide, sizeof y);
  return y;
}
// Round to nearest, ties to even; a NaN stays a NaN.
KL_INLINE bf16 to_bf16(float x) {
  uint32_t wide;
  std::memcpy(&wide, &x, sizeof wide);
  if ((wide & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<uint16_t>((wide >> 16) | 0x40)};
  return bf16{static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16)};
}
template <class T>
KL_INLINE T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    return to_bf16(x);
  }
}

// Call f with a value of the element type: dispatch(dtype, [&](auto zero) { using T = decltype(zero); ... }).
template <class F>
KL_INLINE auto dispatch(int64_t dtype, F&& f) {
  return dtype == kBFloat16 ? f(bf16{}) : f(float{});
}

// --- threads: torch's pool, through a pointer that Python hands over (runtime.cpp). Without one, the caller's thread.

int64_t num_threads();
void run_on_threads(int64_t workers, void (*body)(int64_t begin, int64_t end, void* context), void* context);

// Run f(item) for every item in [0, count), items handed out as threads become free. What an item computes must not
// depend on the thread that runs it, nor on how many there are.
template <class F>
void parallel_for(int64_t count, const F& f) {
  const int64_t workers = std::min(count, num_threads());
  if (workers <= 1) {
    for (int64_t item = 0; item < count; ++item) f(item);
    return;
  }
  struct Context {
    const F& f;
    int64_t count;
    std::atomic<int64_t> next{0};
  } context{f, count};
  run_on_threads(
      workers,
      [](int64_t, int64_t, void* raw) {
        auto& shared = *static_cast<Context*>(raw);
        for (int64_t item; (item = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.count;) shared.f(item);
      },
      &context);
}

// Run f(begin, end) over [0, count) cut into pieces of `grain`, for cheap items.
template <class F>
void parallel_ranges(int64_t count, int64_t grain, const F& f) {
  parallel_for((count + grain - 1) / grain,
               [&](int64_t piece) { f(piece * grain, std::min(count, (piece + 1) * grain)); });
}

// --- scratch: memory of a thread that lives from call to call, so that no call pays for fresh pages.
//
// A Scratch takes the memory behind those taken before it in the same thread and gives it back when it goes out of
// scope: allocate in nested scopes only. Contents are undefined.

class Arena {
 public:
  static Arena& of_this_thread();
  std::byte* take(size_t bytes);
  void give_back(std::byte* mark);

 private:
  struct Block {
    std::byte* begin;
    size_t size;
  };
  static constexpr int kMaxBlocks = 64;
  Block blocks_[kMaxBlocks] = {};
  int current_ = -1;
  std::byte* top_ = nullptr;

 public:
  ~Arena();
};

template <class T>
class Scratch {
 public:
  explicit Scratch(size_t count)
      : arena_(Arena::of_this_thread()), data_(reinterpret_cast<T*>(arena_.take(count * sizeof(T)))) {}
  ~Scratch() { arena_.give_back(reinterpret_cast<std::byte*>(data_)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() const { return data_; }
  T* get() const { return data_; }

 private:
  Arena& arena_;
  T* data_;
};

// Say of new memory of many megabytes, nothing of it written yet, that all of it will be: where the system has large
// pages it then takes them, and finding memory costs a fraction of what it does page by page.
void expect_use(void* begin, size_t bytes);

KL_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
KL_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace kl
