/* Primitives: a spinlock that is held for tens of nanoseconds, intrusive stacks that any thread may push to, bit sets. */
#ifndef TB_PRIM_H
#define TB_PRIM_H

#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

typedef struct {
    uint32_t held;
} tb_lock;

static inline void tb_relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Never held across a system call; yields after a while only because a holder may have been preempted. */
static inline void tb_lock_take(tb_lock *lock)
{
    for (unsigned spins = 0; __atomic_exchange_n(&lock->held, 1, __ATOMIC_ACQUIRE); spins++) {
        if (spins < 128)
            tb_relax();
        else
            sched_yield();
    }
}

static inline void tb_lock_give(tb_lock *lock)
{
    __atomic_store_n(&lock->held, 0, __ATOMIC_RELEASE);
}

#define TB_LOAD(p) __atomic_load_n((p), __ATOMIC_RELAXED)
/* For counters that one thread writes and any may read: no locked instruction. */
#define TB_COUNT(p, n) __atomic_store_n((p), TB_LOAD(p) + (n), __ATOMIC_RELAXED)
/* For counters that several threads write. */
#define TB_ADD(p, n) __atomic_fetch_add((p), (n), __ATOMIC_RELAXED)

/* A clock that costs no system call: the processor's, which ticks at one rate on all cores, or else nanoseconds. */
static inline uint64_t tb_ticks(void)
{
#if defined(__x86_64__)
    return __builtin_ia32_rdtsc();
#else
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
#endif
}

static inline bool tb_bit_get(const uint64_t *bits, uint64_t i)
{
    return __atomic_load_n(&bits[i >> 6], __ATOMIC_ACQUIRE) >> (i & 63) & 1;
}

static inline void tb_bit_set(uint64_t *bits, uint64_t i)
{
    __atomic_fetch_or(&bits[i >> 6], 1ull << (i & 63), __ATOMIC_SEQ_CST);
}

static inline uint64_t tb_round_up(uint64_t n, uint64_t to)
{
    return (n + to - 1) / to * to;
}

#endif
