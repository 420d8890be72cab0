// Threads that meet after every phase of a block, and fetch what comes next while they wait.

#pragma once

#include <atomic>
#include <cstdint>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

#include "native_formats.h"

static const int64_t SPINS = 4096;      // looks at a meeting before a thread goes to sleep
static const int64_t AHEAD = 256 << 10;  // bytes of the next matrix that are fetched before their phase

struct Team {
    alignas(64) std::atomic<int32_t> arrived{0};
    alignas(64) std::atomic<int32_t> turn{0};
    std::atomic<int32_t> sleepers{0};
    alignas(64) std::atomic<int64_t> task{0};

    // Other programs may hold the core that a thread of the team waits for: spinning on would only keep it longer.
    void sleep(int32_t mine) {
#if defined(__linux__)
        sleepers.fetch_add(1);
        if (turn.load() == mine) syscall(SYS_futex, &turn, FUTEX_WAIT_PRIVATE, mine, nullptr, nullptr, 0);
        sleepers.fetch_sub(1);
#else
        (void)mine;
        sched_yield();
#endif
    }

    void next(int32_t mine) {
        turn.store(mine + 1);
#if defined(__linux__)
        if (sleepers.load()) syscall(SYS_futex, &turn, FUTEX_WAKE_PRIVATE, 1 << 20, nullptr, nullptr, 0);
#endif
    }
};

// One thread of a team: which part of the next matrix it will read, and how far that is on its way to the cache.
struct Member {
    Team *team;
    int64_t thread, threads;
    const char *at = nullptr, *end = nullptr;

    // The 16-row panels of a matrix, in whole grains, that are this thread's.
    void portion(int64_t n, int64_t grain, int64_t *first, int64_t *last) const {
        int64_t grains = (n + grain - 1) / grain;
        *first = grains * thread / threads * grain;
        *last = grains * (thread + 1) / threads * grain;
        if (*last > n) *last = n;
    }

    // Say what this thread reads next: rows of `row_bytes`.
    void expect(const Matrix &w, int64_t n, int64_t grain, int64_t row_bytes) {
        int64_t first, last;
        portion(n, grain, &first, &last);
        at = (const char *)w.codes + first * row_bytes;
        end = (const char *)w.codes + last * row_bytes;
        if (end > at + AHEAD) end = at + AHEAD;
    }

    void fetch_some(int64_t lines) {
        for (; lines > 0 && at < end; lines--, at += 64) __builtin_prefetch(at, 0, 2);
    }

    // Return once all threads are here.
    void meet() {
        if (threads == 1) return;
        const int32_t mine = team->turn.load(std::memory_order_relaxed);
        if (team->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            team->arrived.store(0, std::memory_order_relaxed);
            team->next(mine);
            return;
        }
        for (int64_t spins = 0; team->turn.load(std::memory_order_acquire) == mine; spins++) {
            fetch_some(1);
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
            if (spins >= SPINS) team->sleep(mine);
        }
    }
};
