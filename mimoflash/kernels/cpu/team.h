// The threads of one call: they run the same code side by side, share out work by a counter and meet at barriers.
#pragma once
#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
inline void relax() { _mm_pause(); }
#else
inline void relax() {}
#endif

namespace mimoflash {

// What the threads of a call share.
struct Shared {
    std::atomic<int> threads{1};
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<int> round{0};
    alignas(64) std::atomic<int64_t> counter[2] = {{0}, {0}};
};

// One thread's view.
struct Team {
    Shared& shared;
    int id;
    int phase = 0;

    // Waits for all others. A machine may have given a thread's core to somebody else, so spinning ends in sleep.
    void barrier() {
        phase ^= 1;
        const int threads = shared.threads.load(std::memory_order_relaxed);
        if (threads == 1) {
            shared.counter[phase ^ 1].store(0, std::memory_order_relaxed);
            return;
        }
        int round = shared.round.load(std::memory_order_relaxed);
        if (shared.arrived.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
            shared.arrived.store(0, std::memory_order_relaxed);
            shared.counter[phase ^ 1].store(0, std::memory_order_relaxed);  // the phase that has ended
            shared.round.store(round + 1, std::memory_order_seq_cst);
            std::atomic_thread_fence(std::memory_order_seq_cst);  // notify_all must see who has gone to sleep
            shared.round.notify_all();
            return;
        }
        for (int spins = 0; spins < 2000; ++spins) {
            if (shared.round.load(std::memory_order_acquire) != round) return;
            relax();
        }
        while (shared.round.load(std::memory_order_acquire) == round) shared.round.wait(round);
    }

    // The next piece of the work between two barriers: 0, 1, 2, ... each given to one thread.
    int64_t next(int64_t pieces = 1) {
        return shared.counter[phase].fetch_add(pieces, std::memory_order_relaxed);
    }
};

// One parallel region for a whole call. `gomp_parallel` is GOMP_parallel of the OpenMP library that PyTorch has loaded,
// so that there is one pool of threads in the process; without it the caller's thread works alone.
// It may give fewer threads than were asked for (nested regions, limits): omp_get_num_threads says how many.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
inline GompParallel gomp_parallel = nullptr;
inline int (*omp_team_size)() = nullptr;

template <class Work>
struct Region {
    Shared shared;
    std::atomic<int> joined{0};
    const int asked;
    Work& work;
    Region(int threads, Work& w) : asked(threads), work(w) {}
    static void enter(void* self) {
        auto* region = static_cast<Region*>(self);
        if (region->asked > 1) region->shared.threads.store(omp_team_size(), std::memory_order_relaxed);
        Team team{region->shared, region->joined.fetch_add(1)};
        region->work(team);
    }
};

// Calls work(team) on `threads` threads and returns when all have.
template <class Work>
void parallel(int threads, Work work) {
    const bool pool = gomp_parallel != nullptr && omp_team_size != nullptr;
    Region<Work> region(pool ? threads : 1, work);
    if (region.asked > 1) {
        gomp_parallel(&Region<Work>::enter, &region, static_cast<unsigned>(threads), 0);
    } else {
        Region<Work>::enter(&region);
    }
}

}  // namespace mimoflash
