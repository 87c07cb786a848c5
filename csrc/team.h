// A team: threads that walk through the same phases of one computation inside a single parallel region.
//
// A phase is a number of items that threads take as they become free; nobody starts the next phase before the last item
// of this one is done. Between phases the threads wait awake, which costs a fraction of a microsecond where a parallel
// region of its own costs several. An item is only ever waited for while a running thread works on it, so one thread
// alone, or a thread that comes late, finishes too.
//
// A thread may also be late by several phases, when the others did without it. So what stands between phases must depend
// on the arguments of the call alone: whatever earlier phases have written may be read inside an item only.
#pragma once

#include <thread>

#include "common.h"

namespace kl {

class Team {
 public:
  // Of one phase; `next` and `done` are on lines of their own, away from those of other phases.
  struct alignas(64) Phase {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
  };

  explicit Team(Phase* phases) : phases_(phases) {}

  // Run f(item) for every item in [0, count), on all threads of the team, and wait until all are done.
  template <class F>
  void phase(int64_t count, const F& f) {
    Phase& shared = phases_[current_++];
    int64_t mine = 0;
    for (int64_t item; (item = shared.next.fetch_add(1, std::memory_order_relaxed)) < count; ++mine) f(item);
    if (mine > 0) shared.done.fetch_add(mine, std::memory_order_release);
    for (int64_t spins = 0; shared.done.load(std::memory_order_acquire) < count; ++spins) {
      if (spins < kSpins) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  static constexpr int64_t kSpins = 4096;

  static KL_INLINE void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  Phase* phases_;
  int64_t current_ = 0;
};

// Run f(team) on every thread; `most_phases` bounds the phases that f walks through. All threads must walk through the
// same phases with the same counts.
template <class F>
void run_team(int64_t most_phases, const F& f) {
  Scratch<Team::Phase> phases(static_cast<size_t>(most_phases));
  for (int64_t i = 0; i < most_phases; ++i) new (phases.get() + i) Team::Phase();
  struct Context {
    const F& f;
    Team::Phase* phases;
  } context{f, phases};
  const int64_t workers = num_threads();
  auto body = [](int64_t, int64_t, void* raw) {
    auto& shared = *static_cast<Context*>(raw);
    Team team(shared.phases);
    shared.f(team);
  };
  if (workers <= 1) {
    body(0, 1, &context);
  } else {
    run_on_threads(workers, body, &context);
  }
}

}  // namespace kl
