/* Writing fills to their slots. The whole blocks of a window go to a run of neighbouring slots in few large writes: 64 KiB
 * O_DIRECT writes cost several times the CPU of 1 MiB ones (DESIGN 6). A block waits for its neighbours in an open run, as
 * long as Python says that they follow; readers do not wait for it, they get their bytes out of staging.
 *
 * The sums are written through the file, not a mapping: a disk that fails is then an errno and no SIGBUS. */
#define _GNU_SOURCE
#include "core.h"

#define SLOW_WRITE_MS 500u
#define FAILURES_BEFORE_PAUSE 4u
#define KEPT_SHARE 4u /* of the staging memory: what writes under way leave, so that it can be used again at once */
#define WRITING_BLOCKS 32u /* 2 MiB: enough to keep a disk busy, and what a hit's read may find before it in the disk's queue */

/* Any thread. Once until the next EVICTED or commit; true if it was this once. */
bool tb_need_space(tb_engine *e)
{
    if (TB_LOAD(&e->need_space_told) || __atomic_exchange_n(&e->need_space_told, 1, __ATOMIC_SEQ_CST))
        return false;
    tb_say(e, (tb_record){.kind = TB_EV_NEED_SPACE, .value = TB_LOAD(&e->free_count)});
    return true;
}

/* Any thread: a slot was taken. True: the event loop is to be woken. */
bool tb_want_space(tb_engine *e)
{
    return TB_LOAD(&e->free_count) < TB_LOAD(&e->low) && !TB_LOAD(&e->vain) && tb_need_space(e);
}

/* Not cached, because there is no slot or the disk is no use at the moment: reads pass through (DESIGN 9). */
static void pass_through(tb_engine *e, tb_fill *fill)
{
    TB_COUNT(&e->stats.passed_blocks, 1);
    tb_fill_put(e, fill);
    tb_fill_end(e, fill, 1, 0, 0);
}

/* By the pause's beginning and length: an end kept as an instant would lie ahead again when the clock has gone half round. */
static bool pauses(const tb_engine *e)
{
    return e->now_ms - e->paused_ms < e->pause_ms;
}

/* A disk that fails is left alone for a while; one that is so slow that half of the staging memory waits for it gets
 * nothing more until it has caught up. Either way the network's speed is the reader's. */
static bool disk_is_no_use(tb_engine *e)
{
    if (pauses(e))
        return true;
    return (uint64_t)e->unwritten * TB_BLOCK_BYTES >= e->staging_bytes / 2 && e->now_ms - e->oldest_write_ms > SLOW_WRITE_MS;
}

/* The sums are made here, so that readers do not wait for them and what is not kept costs none. */
static void began(tb_engine *e, tb_fill *fill)
{
    tb_crc32c_pages(e->staging + fill->staging_offset, fill->writing, fill->sums);
    e->writing_blocks++;
    __atomic_store_n(&fill->state, FILL_WRITING, __ATOMIC_RELAXED); /* stats look at it from outside */
}

static void write_pages(tb_engine *e, tb_fill *fill)
{
    uint16_t mask = fill->writing;
    began(e, fill);
    while (mask) {
        uint32_t first = (uint32_t)__builtin_ctz(mask);
        uint32_t pages = (uint32_t)__builtin_ctz(~((uint32_t)mask >> first));
        mask &= (uint16_t)~(((1u << pages) - 1) << first);
        struct io_uring_sqe *sqe = tb_sqe(&e->ring);
        io_uring_prep_write(sqe, 0, e->staging + fill->staging_offset + first * TB_PAGE_BYTES, pages * TB_PAGE_BYTES,
                            (uint64_t)fill->slot * TB_BLOCK_BYTES + first * TB_PAGE_BYTES);
        sqe->flags |= IOSQE_FIXED_FILE;
        sqe->user_data = tb_ud(fill, UD_SLOT_WRITE, pages * TB_PAGE_BYTES);
        TB_COUNT(&e->stats.slot_write_calls, 1);
        fill->inflight++;
        e->writes_inflight++;
    }
}

/* Whether it can be part of a run: all of its block, for a slot of its own. A volume's is written at once: writes may wait for it. */
static bool may_join(const tb_fill *fill)
{
    return !fill->slot && !fill->layer->is_volume && fill->writing == (uint16_t)((1u << TB_BLOCK_PAGES) - 1);
}

/* How many of the pending fills from `fill` on, `most` at most, lie in staging memory one behind the other, as one write
 * can take them. */
static uint32_t neighbours(const tb_fill *fill, uint32_t most)
{
    uint32_t count = 1;
    for (const tb_fill *next = fill->next_written; next && count < most; fill = next, next = next->next_written, count++)
        if (!may_join(next) || next->staging_offset != fill->staging_offset + TB_BLOCK_BYTES)
            break;
    return count;
}

static bool write_alone(tb_engine *e)
{
    tb_fill *fill = e->pending;
    uint32_t got;
    if (!fill->slot && !TB_LOAD(&e->needy_count)) { /* a write that waits for a slot comes first: whoever reads needs none */
        fill->slot = tb_slot_take_run(e, 1, false, &got);
        fill->new_slot = fill->slot != 0;
        tb_want_space(e);
    }
    if (!fill->slot)
        return false;
    e->pending = fill->next_written;
    fill->next_written = NULL;
    write_pages(e, fill);
    return true;
}

/* Gives the first of the pending fills, `most` at most, their slots and writes them, in one piece as far as neighbouring
 * slots are free. False: there is no slot. */
static bool write_first(tb_engine *e, uint32_t most)
{
    if (!may_join(e->pending))
        return write_alone(e);
    uint32_t got = 0, slot = 0;
    if (!TB_LOAD(&e->needy_count))
        slot = tb_slot_take_run(e, neighbours(e->pending, most < TB_RUN_BLOCKS ? most : TB_RUN_BLOCKS), false, &got);
    tb_want_space(e);
    if (!slot)
        return false;
    tb_fill *first = e->pending, *fill = first, *last = first;
    struct io_uring_sqe *sqe = tb_sqe(&e->ring);
    io_uring_prep_write(sqe, 0, e->staging + first->staging_offset, got * TB_BLOCK_BYTES, (uint64_t)slot * TB_BLOCK_BYTES);
    sqe->flags |= IOSQE_FIXED_FILE;
    sqe->user_data = tb_ud(first, UD_RUN_WRITE, 0);
    TB_COUNT(&e->stats.slot_write_calls, 1);
    e->writes_inflight++;
    first->run_blocks = got;
    for (uint32_t i = 0; i < got; i++, fill = fill->next_written) {
        fill->slot = slot + i;
        fill->new_slot = 1;
        began(e, fill);
        last = fill;
    }
    e->pending = fill;
    last->next_written = NULL;
    return true;
}

/* Filler, once a turn: what is pending goes to the disk, as far as that keeps up. It is given little at once: nobody waits
 * for these writes, and a hit's read comes after those that it has. They hold their staging memory until they end; a quarter of
 * it is never theirs, so that with a disk that hangs, which disk_is_no_use finds out after a moment, there is
 * something left through which reads pass. */
void tb_write_turn(tb_engine *e)
{
    uint32_t blocks = (uint32_t)(e->staging_bytes / TB_BLOCK_BYTES), most = blocks - blocks / KEPT_SHARE;
    if (most > WRITING_BLOCKS)
        most = WRITING_BLOCKS;
    while (e->pending) {
        bool no_use = disk_is_no_use(e);
        if (!no_use && e->writing_blocks >= most)
            break;
        if (!no_use && write_first(e, most - e->writing_blocks))
            continue;
        tb_fill *fill = e->pending;
        e->pending = fill->next_written;
        e->unwritten--;
        pass_through(e, fill);
    }
    if (!e->pending)
        e->pending_end = &e->pending;
}

/* To the end of what is pending: from now on it waits for the disk, and no more for the network. */
static void add_pending(tb_engine *e, tb_fill *first, tb_fill **end)
{
    *end = NULL;
    *e->pending_end = first;
    e->pending_end = end;
    for (tb_fill *fill = first; fill; fill = fill->next_written) {
        fill->ready_ms = e->now_ms;
        if (e->unwritten++ == 0)
            e->oldest_write_ms = e->now_ms;
    }
}

/* It is complete. */
static void close_run(tb_engine *e, tb_run *run)
{
    add_pending(e, run->first, run->end);
    run->first = NULL;
    run->blocks = 0;
}

static tb_run *open_run(tb_engine *e, uint64_t staging_offset)
{
    tb_run *empty = NULL, *largest = &e->runs[0];
    for (unsigned i = 0; i < TB_OPEN_RUNS; i++) {
        tb_run *run = &e->runs[i];
        if (run->blocks && run->next_staging == staging_offset)
            return run;
        if (!run->blocks)
            empty = run;
        else if (run->blocks > largest->blocks)
            largest = run;
    }
    if (!empty) {
        close_run(e, largest);
        empty = largest;
    }
    empty->end = &empty->first;
    empty->opened_ms = e->now_ms;
    return empty;
}

/* A fill that has all that will come of it. `more`: the block behind it will follow, from the place behind it. */
void tb_write_add(tb_engine *e, tb_fill *fill, bool more)
{
    fill->next_written = NULL;
    if (disk_is_no_use(e)) {
        pass_through(e, fill);
        return;
    }
    __atomic_store_n(&fill->state, FILL_WRITING, __ATOMIC_RELAXED); /* nothing more is taken for it (R5) */
    if (!may_join(fill)) {
        add_pending(e, fill, &fill->next_written);
        return;
    }
    tb_run *run = open_run(e, fill->staging_offset);
    *run->end = fill;
    run->end = &fill->next_written;
    run->next_staging = fill->staging_offset + TB_BLOCK_BYTES;
    if (++run->blocks == TB_RUN_BLOCKS || !more)
        close_run(e, run);
}

/* The block at this place joins no run: what waits for it waits for nothing any more. */
void tb_write_gap(tb_engine *e, uint64_t staging_offset)
{
    for (unsigned i = 0; i < TB_OPEN_RUNS; i++)
        if (e->runs[i].blocks && e->runs[i].next_staging == staging_offset)
            close_run(e, &e->runs[i]);
}

/* Runs that are open for so long are written as they are: their neighbours do not come, or not soon. */
void tb_write_flush(tb_engine *e, uint32_t age_ms)
{
    for (unsigned i = 0; i < TB_OPEN_RUNS; i++)
        if (e->runs[i].blocks && e->now_ms - e->runs[i].opened_ms >= age_ms)
            close_run(e, &e->runs[i]);
}

/* One bad place is condemned. When write after write fails it is the disk, or its filesystem is full or read-only: the
 * places are not to blame, and it is tried again after a pause that doubles up to half a minute. */
static void write_failed(tb_engine *e, tb_fill *fill)
{
    TB_COUNT(&e->stats.slot_write_errors, 1);
    bool place = fill->result == -EIO && e->write_failures < FAILURES_BEFORE_PAUSE && tb_slot_may_condemn(e);
    /* Writes that were under way when the pause began say nothing new. */
    if (fill->result != -EAGAIN && fill->result != -EINTR && !pauses(e) && ++e->write_failures >= FAILURES_BEFORE_PAUSE) {
        uint32_t doublings = e->write_failures - FAILURES_BEFORE_PAUSE;
        e->paused_ms = e->now_ms;
        e->pause_ms = doublings < 7 ? 250u << doublings : 30000u;
    }
    if (fill->new_slot) {
        if (place)
            tb_slot_condemn(e, fill->slot);
        else
            tb_slot_give_back(e, fill->slot);
    }
    tb_fill_put(e, fill);
    tb_fill_end(e, fill, fill->result, 0, 0);
}

static void written(tb_engine *e, tb_fill *fill)
{
    e->writing_blocks--;
    e->unwritten--;
    e->oldest_write_ms = fill->ready_ms; /* they end about in the order in which they were ready */
    if (fill->result == 0)
        fill->result = tb_sums_write(e, fill->slot, fill->writing, fill->sums); /* I5: before the entry says cached */
    if (fill->result) {
        write_failed(e, fill);
        return;
    }
    e->write_failures = 0;
    if (++e->clock_fills > e->slot_count / 64) {
        e->clock_fills = 0;
        __atomic_store_n(&e->clock, (uint16_t)(e->clock + 1), __ATOMIC_RELAXED);
    }
    TB_COUNT(&e->stats.slot_writes, 1);
    tb_fill_end(e, fill, 0, fill->writing, 0);
}

void tb_write_done(tb_engine *e, tb_fill *fill, int result, uint32_t expected)
{
    if (result != (int)expected)
        fill->result = result < 0 ? result : -EIO;
    e->writes_inflight--;
    if (--fill->inflight == 0)
        written(e, fill);
}

void tb_run_done(tb_engine *e, tb_fill *fill, int result)
{
    int failure = result == (int)(fill->run_blocks * TB_BLOCK_BYTES) ? 0 : result < 0 ? result : -EIO;
    e->writes_inflight--;
    bool again = failure && fill->run_blocks > 1; /* which place was at fault only each block by itself can tell */
    for (tb_fill *next; fill; fill = next) {
        next = fill->next_written; /* read first: the fill is another's as soon as it has ended */
        if (again) {
            e->writing_blocks--;
            write_pages(e, fill);
            continue;
        }
        fill->result = failure;
        written(e, fill);
    }
}
