/* Pacing: while slots are short, writes that need a new one take a ticket each, so many a second as Python says, and wait for their time.
 * So writers slow down little by little, where they would otherwise run at full speed into an empty free list and wait for a whole
 * commit. A write to a block that has a slot never waits here. */
#include "core.h"

#define LONGEST_S 1.0
#define SHORTEST_S 100e-6 /* a wait of less is none */

/* ns_per_block: 0 for no pacing. Event loop; those that wait go on when their time has come, or within a second. */
void tb_engine_set_pace(tb_engine *e, uint64_t ns_per_block)
{
    double tick_ns = tb_engine_tick_ns(e);
    __atomic_store_n(&e->pace_longest, (uint64_t)(LONGEST_S * 1e9 / tick_ns), __ATOMIC_RELAXED);
    __atomic_store_n(&e->pace_shortest, (uint64_t)(SHORTEST_S * 1e9 / tick_ns), __ATOMIC_RELAXED);
    __atomic_store_n(&e->pace_ns_per_tick, (uint64_t)(tick_ns * 1024), __ATOMIC_RELAXED);
    uint64_t step = (uint64_t)((double)ns_per_block / tick_ns);
    if (step < __atomic_exchange_n(&e->pace_ticks, step, __ATOMIC_RELAXED))
        __atomic_store_n(&e->pace_next, 0, __ATOMIC_RELAXED); /* nobody is to wait behind tickets of a slower pace */
}

/* In the request's queue. True: it waits, and is looked up again when its time has come. */
bool tb_pace(tb_req *req)
{
    tb_queue *queue = req->queue;
    tb_engine *e = queue->engine;
    uint64_t step = TB_LOAD(&e->pace_ticks), now = queue->now;
    if (!step || req->paced || TB_LOAD(&queue->draining))
        return false;
    req->paced = 1;
    uint64_t last = TB_LOAD(&e->pace_next), due;
    do {
        due = last > now ? last : now;
        if (due - now > TB_LOAD(&e->pace_longest)) /* tickets of a slower time */
            due = now + TB_LOAD(&e->pace_longest);
    } while (!__atomic_compare_exchange_n(&e->pace_next, &last, due + step, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    if (due - now < TB_LOAD(&e->pace_shortest))
        return false;
    req->due = due;
    req->next = NULL;
    *(queue->paced ? &queue->paced_last->next : &queue->paced) = req;
    queue->paced_last = req;
    TB_ADD(&queue->stats.waiting, 1);
    TB_COUNT(&queue->stats.paced, 1);
    return true;
}

/* Once a turn: those whose time has come, all when the pace is lifted or the door drains; and the clock for the others. */
void tb_pace_turn(tb_queue *queue)
{
    tb_engine *e = queue->engine;
    bool all = !TB_LOAD(&e->pace_ticks) || TB_LOAD(&queue->draining);
    while (queue->paced && (all || queue->paced->due <= queue->now)) {
        tb_req *req = queue->paced;
        queue->paced = req->next;
        TB_ADD(&queue->stats.waiting, -1ull);
        tb_resume(req);
    }
    if (!queue->paced || (queue->clock_set && queue->clock_due <= queue->paced->due))
        return;
    uint64_t ns = (queue->paced->due - queue->now) * TB_LOAD(&e->pace_ns_per_tick) / 1024;
    queue->clock = (struct __kernel_timespec){.tv_sec = (int64_t)(ns / 1000000000u), .tv_nsec = (int64_t)(ns % 1000000000u)};
    queue->clock_set = true;
    queue->clock_due = queue->paced->due;
    struct io_uring_sqe *sqe = tb_sqe(&queue->ring);
    io_uring_prep_timeout(sqe, &queue->clock, 0, 0);
    sqe->user_data = UD_CLOCK;
}
