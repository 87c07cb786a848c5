// The library's own state: which instruction level it was built for, the thread pool, the threads' scratch memory.

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <new>

#include "common.h"
#include "simd.h"

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace kl {
namespace {

// torch's stable C interface: at::parallel_for and at::get_num_threads. Both return 0 when all went well.
using ParallelFor = int (*)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);
using NumThreads = int (*)(uint32_t*);

ParallelFor torch_parallel_for = nullptr;
NumThreads torch_num_threads = nullptr;

constexpr size_t kAlignment = 64;
constexpr size_t kFirstBlock = size_t{1} << 20;

}  // namespace

int64_t num_threads() {
  uint32_t count = 1;
  if (torch_num_threads == nullptr || torch_num_threads(&count) != 0) return 1;
  return count;
}

void run_on_threads(int64_t workers, void (*body)(int64_t, int64_t, void*), void* context) {
  // A worker that finds no item left returns, so it does not matter whether torch runs fewer of them.
  if (torch_parallel_for == nullptr || torch_parallel_for(0, workers, 1, body, context) != 0) body(0, 1, context);
}

void expect_use(void* begin, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  // Below this the call costs as much as it saves, and the memory is likely to have been used before.
  constexpr uintptr_t kLeast = uintptr_t{8} << 20, kLargePage = uintptr_t{2} << 20;
  if (bytes < kLeast) return;
  const uintptr_t first = reinterpret_cast<uintptr_t>(begin), end = first + bytes;
  const uintptr_t aligned = (first + kLargePage - 1) / kLargePage * kLargePage, length = end - aligned;
  // A refusal changes nothing but speed.
  static_cast<void>(madvise(reinterpret_cast<void*>(aligned), length / kLargePage * kLargePage, MADV_HUGEPAGE));
#else
  static_cast<void>(begin);
  static_cast<void>(bytes);
#endif
}

Arena& Arena::of_this_thread() {
  static thread_local Arena arena;
  return arena;
}

std::byte* Arena::take(size_t bytes) {
  bytes = (std::max<size_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
  while (true) {
    if (current_ >= 0) {
      const Block& block = blocks_[current_];
      if (static_cast<size_t>(block.begin + block.size - top_) >= bytes) {
        std::byte* taken = top_;
        top_ += bytes;
        return taken;
      }
    }
    // The next block: one kept from before if it is large enough, else a new one in its place.
    if (current_ + 1 >= kMaxBlocks) throw std::bad_alloc();
    Block& next = blocks_[++current_];
    if (next.size < bytes) {
      std::free(next.begin);
      next.size = std::max(bytes, kFirstBlock << std::min(current_, 8));
      next.begin = static_cast<std::byte*>(std::aligned_alloc(kAlignment, next.size));
      if (next.begin == nullptr) throw std::bad_alloc();
    }
    top_ = next.begin;
  }
}

void Arena::give_back(std::byte* mark) {
  // Blocks are entered in order and left in the reverse order; `mark` lies in the current one or in an earlier one.
  while (current_ > 0 && (mark < blocks_[current_].begin || mark >= blocks_[current_].begin + blocks_[current_].size)) {
    --current_;
  }
  top_ = mark;
}

Arena::~Arena() {
  for (Block& block : blocks_) std::free(block.begin);
}

}  // namespace kl

// The widest level this processor runs: 0 generic, 1 avx2, 2 avx512, 3 avx512_bf16.
KL_EXPORT int64_t kl_best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  return bf16 ? 3 : avx512 ? 2 : avx2 ? 1 : 0;
#else
  return 0;
#endif
}

KL_EXPORT int64_t kl_vector_floats() { return kl::kLanes; }

KL_EXPORT int64_t kl_set_threads(void* parallel_for, void* num_threads) {
  kl::torch_parallel_for = reinterpret_cast<kl::ParallelFor>(parallel_for);
  kl::torch_num_threads = reinterpret_cast<kl::NumThreads>(num_threads);
  return 0;
}

// Let malloc keep freed blocks of up to kKeptBlock for the next call instead of handing their pages back to the system: the
// page faults of a tensor that is mapped anew in every call cost more than what a kernel does with it. Larger blocks
// (caches, weights) go back as they are freed, so a process keeps no more than the most its smaller blocks ever took.
KL_EXPORT int64_t kl_keep_memory() {
#if defined(__GLIBC__)
  constexpr int kKeptBlock = 32 << 20, kKeptAtEnd = 512 << 20;
  mallopt(M_MMAP_THRESHOLD, kKeptBlock);
  mallopt(M_TRIM_THRESHOLD, kKeptAtEnd);
#endif
  return 0;
}

KL_EXPORT int64_t kl_num_threads() { return kl::num_threads(); }

// --- for tests of this file

KL_EXPORT int64_t kl_test_code(int64_t code) { return code; }

// Take and give back scratch memory in nested scopes of growing size; 1 if two pieces in use ever overlap.
KL_EXPORT int64_t kl_test_scratch(int64_t depth, int64_t size) {
  if (depth == 0) return 0;
  kl::Scratch<int64_t> mine(size);
  std::fill_n(mine.get(), size, depth);
  if (kl_test_scratch(depth - 1, 40 * size) != 0) return 1;
  { kl::Scratch<int64_t> passing(size / 2 + 1); std::fill_n(passing.get(), size / 2 + 1, int64_t{-1}); }
  return std::all_of(mine.get(), mine.get() + size, [=](int64_t value) { return value == depth; }) ? 0 : 1;
}

KL_EXPORT int64_t kl_test_parallel_sum(int64_t* total, int64_t count) {
  std::atomic<int64_t> sum{0};
  kl::parallel_for(count, [&](int64_t item) { sum.fetch_add(item, std::memory_order_relaxed); });
  *total = sum;
  return 0;
}
