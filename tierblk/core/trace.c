/* What each request did, for those who want to see it: while somebody reads, a queue's thread writes a record of each request that
 * has ended, over the oldest when nobody has come for it in time. It never waits and writes to nothing that others write to.
 *
 * The memory is mapped when tracing is first switched on, and stays mapped until the door is closed, so that neither the thread nor
 * a reader can meet memory that is gone. When tracing is off the thread gives back what lies behind it, for only the thread knows
 * that it does not write.
 *
 * A reader copies first and looks at trace_end then: what may have been written over meanwhile it throws away, and counts. */
#define _GNU_SOURCE
#include "core.h"

#define RING_BYTES (TB_TRACE_RECORDS * sizeof(tb_traced))
#define WORDS (sizeof(tb_traced) / sizeof(uint64_t))
#define CHUNK 256u

_Static_assert((TB_TRACE_RECORDS & (TB_TRACE_RECORDS - 1)) == 0, "positions wrap");

typedef union {
    tb_traced record;
    uint64_t words[WORDS];
} slot;

static void put(tb_queue *queue, const slot *from)
{
    slot *ring = (slot *)__atomic_load_n(&queue->trace, __ATOMIC_ACQUIRE);
    uint64_t end = queue->trace_end;
    if (!ring) /* switched off since it was asked */
        return;
    __atomic_thread_fence(__ATOMIC_RELEASE); /* who sees a word of this record sees that the one before it has ended */
    uint64_t *to = ring[end & (TB_TRACE_RECORDS - 1)].words;
    for (unsigned i = 0; i < WORDS; i++)
        __atomic_store_n(&to[i], from->words[i], __ATOMIC_RELAXED);
    __atomic_store_n(&queue->trace_end, end + 1, __ATOMIC_RELEASE);
}

static uint8_t tier_of(const tb_req *req)
{
    switch (req->op) {
    case TB_OP_READ:
        return req->missed ? TB_TIER_MISS : req->from_memory ? TB_TIER_MEMORY : req->all_zero ? TB_TIER_ZERO : TB_TIER_HIT;
    case TB_OP_WRITE:
        return TB_TIER_WRITE;
    case TB_OP_FLUSH:
        return TB_TIER_FLUSH;
    default:
        return TB_TIERS;
    }
}

static void trace(const tb_req *req, uint8_t op, uint8_t tier, uint64_t offset, uint64_t length)
{
    tb_queue *queue = req->queue;
    uint64_t now = queue->now;
    if (now == req->began) /* it ends in the turn in which it came, of which there is one reading */
        now = tb_ticks();
    slot record = {.record = {.began = req->began, .took = now - req->began, .offset = offset, .length = length, .op = op,
                              .tier = tier, .tag = req->tag, .result = (int16_t)(req->result < 0 ? req->result : 0),
                              .flags = req->fua ? TB_TRACE_FUA : 0}};
    put(queue, &record);
}

/* In the queue's thread, once for each request, when its result is final. */
void tb_trace_done(const tb_req *req)
{
    if (req->op == TB_OP_READ || req->op == TB_OP_WRITE)
        trace(req, req->op, tier_of(req), req->block * TB_BLOCK_BYTES + req->offset, req->length);
    else
        trace(req, req->op, tier_of(req), req->whole_start, req->whole_length);
}

/* Likewise, for one that never began. */
void tb_trace_refused(const tb_req *req, uint64_t start, uint64_t length)
{
    tb_req ended = *req;
    ended.began = req->queue->now;
    trace(&ended, req->op > TB_OP_ZEROES ? TB_OP_OTHER : req->op, TB_TIERS, start, length);
}

/* Once a turn. */
void tb_trace_turn(tb_queue *queue)
{
    if (queue->trace_kept == queue->trace_end || __atomic_load_n(&queue->trace, __ATOMIC_RELAXED))
        return;
    queue->trace_kept = queue->trace_end;
    madvise(queue->trace_ring, RING_BYTES, MADV_DONTNEED);
}

void tb_trace_free(tb_queue *queue)
{
    if (queue->trace_ring)
        munmap(queue->trace_ring, RING_BYTES);
}

/* Event loop, as all that follows. -ENOMEM. */
int tb_door_trace_start(tb_queue *queue)
{
    if (!queue->trace_ring) {
        void *ring = mmap(NULL, RING_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (ring == MAP_FAILED)
            return -ENOMEM;
        madvise(ring, RING_BYTES, MADV_DONTFORK);
        queue->trace_ring = ring;
    }
#ifdef MADV_POPULATE_WRITE
    madvise(queue->trace_ring, RING_BYTES, MADV_POPULATE_WRITE); /* or the thread meets a page fault now and then at first */
#endif
    __atomic_store_n(&queue->trace, queue->trace_ring, __ATOMIC_RELEASE);
    return 0;
}

/* What was recorded and not read is lost. */
void tb_door_trace_stop(tb_queue *queue)
{
    __atomic_store_n(&queue->trace, NULL, __ATOMIC_RELEASE);
    tb_queue_wake(queue); /* for tb_trace_turn */
}

/* Where a reader begins who wants to see what comes from now on. */
uint64_t tb_door_trace_end(tb_queue *queue)
{
    return __atomic_load_n(&queue->trace_end, __ATOMIC_ACQUIRE);
}

static bool is_wanted(const tb_traced *record, const tb_trace_filter *filter)
{
    if (!(filter->ops >> record->op & 1) || !(filter->tiers >> record->tier & 1) || record->took < filter->min_ticks)
        return false;
    return !filter->ranged || (record->offset < filter->end && record->length > 0 &&
                               (record->offset >= filter->start || record->length > filter->start - record->offset));
}

/* Records from *position on that pass the filter, the oldest first, at most `max`; *position is then where to go on. *lost grows by
 * how many were written over before they were read, whether or not they would have passed. Returns how many there are in `out`;
 * fewer than `max`: there are no more. */
int tb_door_trace_read(tb_queue *queue, uint64_t *position, const tb_trace_filter *filter, tb_traced *out, int max, uint64_t *lost)
{
    const slot *ring = (const slot *)queue->trace_ring;
    uint64_t end = tb_door_trace_end(queue), at = *position;
    int count = 0;
    while (ring && at < end && count < max) {
        slot copies[CHUNK];
        if (end - at > TB_TRACE_RECORDS) {
            *lost += end - at - TB_TRACE_RECORDS;
            at = end - TB_TRACE_RECORDS;
        }
        uint64_t room = (uint64_t)(max - count), n = end - at < CHUNK ? end - at : CHUNK;
        n = n < room ? n : room;
        for (uint64_t k = 0; k < n; k++)
            for (unsigned i = 0; i < WORDS; i++)
                copies[k].words[i] = TB_LOAD(&ring[(at + k) & (TB_TRACE_RECORDS - 1)].words[i]);
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        uint64_t now = __atomic_load_n(&queue->trace_end, __ATOMIC_RELAXED); /* the one of this number may be half written */
        uint64_t torn = now - at >= TB_TRACE_RECORDS ? now - at - TB_TRACE_RECORDS + 1 : 0;
        torn = torn < n ? torn : n;
        *lost += torn;
        for (uint64_t k = torn; k < n; k++)
            if (is_wanted(&copies[k].record, filter))
                out[count++] = copies[k].record;
        at += n;
    }
    *position = at;
    return count;
}
