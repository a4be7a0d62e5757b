/* Making and unmaking an engine. */
#define _GNU_SOURCE
#include "core.h"

#include <linux/magic.h>
#include <sys/vfs.h>

static void *filler_main(void *argument)
{
    tb_engine *e = argument;
    int rc = tb_uring_init(&e->ring, 1024);
    rc = rc ? rc : io_uring_register_files(&e->ring, &e->slots_fd, 1);
    e->filler_failure = rc < 0 ? rc : 0;
    e->ring_made = e->filler_failure == 0;
    sem_post(&e->filler_ready);
    return e->filler_failure ? NULL : tb_filler_main(e);
}

static uint64_t monotonic_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* slots_fd: slot_count slots of 64 KiB, opened O_DIRECT; sums_fd: 64 bytes a slot. dio_align: what O_DIRECT on slots_fd
 * wants of offsets and lengths, 512 to 4096. No thread runs before tb_engine_start. */
int tb_engine_new(int slots_fd, uint32_t slot_count, int sums_fd, uint64_t staging_bytes, uint32_t dio_align, tb_engine **out)
{
    if (slot_count < 2 || staging_bytes < TB_BLOCK_BYTES || staging_bytes % TB_BLOCK_BYTES)
        return -EINVAL;
    if (dio_align < TB_SECTOR || dio_align > TB_PAGE_BYTES || dio_align & (dio_align - 1))
        return -EINVAL;
    tb_engine *e = aligned_alloc(64, tb_round_up(sizeof *e, 64));
    if (!e)
        return -ENOMEM;
    memset(e, 0, sizeof *e);
    e->events.wake_fd = e->commands.wake_fd = -1;
    e->slots_fd = slots_fd;
    e->slot_count = slot_count;
    struct statfs filesystem;
    e->in_memory = fstatfs(slots_fd, &filesystem) == 0 && filesystem.f_type == TMPFS_MAGIC;
    e->dio_align = dio_align;
    e->staging_bytes = staging_bytes;
    e->sums_fd = sums_fd;
    pthread_mutex_init(&e->sums_lock, NULL);
    e->staging = mmap(NULL, staging_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int rc = e->staging == MAP_FAILED ? -ENOMEM : tb_slots_init(e);
    rc = rc ? rc : tb_fills_init(e);
    rc = rc ? rc : tb_ring_init(&e->events);
    rc = rc ? rc : tb_ring_init(&e->commands);
    e->made_ticks = tb_ticks();
    e->made_ns = monotonic_ns();
    if (!rc) {
        madvise(e->staging, staging_bytes, MADV_DONTFORK);
        e->pending_end = &e->pending;
        tb_wait_init(e);
    }
    if (rc) {
        tb_engine_free(e);
        return rc;
    }
    *out = e;
    return 0;
}

int tb_engine_start(tb_engine *e)
{
    if (e->filler_running || !e->loaded)
        return -EINVAL;
    sem_init(&e->filler_ready, 0, 0);
    int rc = tb_thread_start(&e->filler, filler_main, e);
    if (rc)
        return rc;
    e->filler_running = true;
    while (sem_wait(&e->filler_ready) && errno == EINTR)
        ;
    return e->filler_failure;
}

/* Stops the filler after the writes in flight and frees all. -EBUSY while a door is open. */
int tb_engine_free(tb_engine *e)
{
    if (__atomic_load_n(&e->tags, __ATOMIC_ACQUIRE))
        return -EBUSY;
    if (e->filler_running) {
        __atomic_store_n(&e->filler_quit, 1, __ATOMIC_SEQ_CST);
        tb_filler_wake(e);
        pthread_join(e->filler, NULL);
    }
    if (e->ring_made)
        io_uring_queue_exit(&e->ring);
    for (unsigned id = 1; id < TB_MAX_LAYERS; id++)
        if (e->layers[id])
            tb_layer_close(e->layers[id]);
    tb_slots_exit(e);
    tb_journal_free(e);
    tb_ring_free(&e->events);
    tb_ring_free(&e->commands);
    if (e->fills)
        munmap(e->fills, TB_MAX_FILLS * sizeof *e->fills);
    if (e->staging != MAP_FAILED)
        munmap(e->staging, e->staging_bytes);
    free(e);
    return 0;
}

/* Readable when events wait. */
int tb_engine_event_fd(tb_engine *e)
{
    return e->events.wake_fd;
}

/* Staging memory, page-aligned: lent to Python by offset, see FILL and FILLED. */
uint8_t *tb_engine_staging(tb_engine *e)
{
    return e->staging;
}

/* Gives the memory behind it back until it is used again. For moments when none of it is lent. */
void tb_engine_trim_staging(tb_engine *e)
{
    madvise(e->staging, e->staging_bytes, MADV_DONTNEED);
}

/* How long the event loop may say nothing (tb_engine_beat) while requests wait before the process is ended; 0: for ever. */
void tb_engine_set_watchdog(tb_engine *e, uint32_t milliseconds)
{
    tb_engine_beat(e);
    __atomic_store_n(&e->watchdog_ms, milliseconds, __ATOMIC_RELAXED);
}

/* Event loop, from a timer: it lives. */
void tb_engine_beat(tb_engine *e)
{
    __atomic_store_n(&e->beat_ms, tb_now_ms(), __ATOMIC_RELAXED);
}

/* NEED_SPACE is said once when fewer slots than this are free, and again after the next EVICTED or commit. */
void tb_engine_set_low(tb_engine *e, uint32_t free_slots)
{
    __atomic_store_n(&e->low, free_slots, __ATOMIC_RELAXED);
}

/* Event loop only. Fewer than `max` events: none is left, and the next one makes the event fd readable. */
int tb_engine_poll(tb_engine *e, tb_record *out, int max)
{
    uint64_t drop;
    ssize_t got = read(e->events.wake_fd, &drop, sizeof drop);
    (void)got;
    int count = tb_ring_pop(&e->events, out, max);
    while (count < max && !tb_ring_arm(&e->events))
        count += tb_ring_pop(&e->events, out + count, max - count);
    return count;
}

/* How long a tick of the latencies is, in ns: measured over the engine's life so far. */
double tb_engine_tick_ns(tb_engine *e)
{
    uint64_t ticks = tb_ticks() - e->made_ticks;
    return ticks ? (double)(monotonic_ns() - e->made_ns) / (double)ticks : 1.0;
}

/* On the clock of the latencies. */
uint64_t tb_ticks_now(void)
{
    return tb_ticks();
}

/* Event loop only. All or nothing; -EAGAIN when they do not fit. */
int tb_engine_push(tb_engine *e, const tb_record *in, int count)
{
    int rc = tb_ring_push(&e->commands, in, count);
    if (rc == 0)
        tb_ring_kick(&e->commands);
    return rc;
}

void tb_engine_stats(tb_engine *e, tb_cache_stats *out)
{
    uint64_t *from = (uint64_t *)&e->stats, *to = (uint64_t *)out;
    for (size_t i = 0; i < sizeof *out / sizeof *to; i++)
        to[i] = TB_LOAD(&from[i]);
    out->slots = e->slot_count - 1;
    out->free = TB_LOAD(&e->free_count);
    out->quarantined = TB_LOAD(&e->quarantined);
    out->bad = TB_LOAD(&e->bad);
    out->released = TB_LOAD(&e->released);
    out->probation = TB_LOAD(&e->probation);
    out->volume_slots = TB_LOAD(&e->volume_slots);
    out->dirty_slots = TB_LOAD(&e->dirty_slots);
    out->far_slots = TB_LOAD(&e->far_slots);
    out->pinned = TB_LOAD(&e->pinned);
    out->needy = TB_LOAD(&e->needy_count);
    out->flush_failed = TB_LOAD(&e->flush_failed);
    out->fills = 0;
    for (uint32_t i = 0; i < __atomic_load_n(&e->fills_used, __ATOMIC_ACQUIRE); i++)
        out->fills += __atomic_load_n(&e->fills[i].state, __ATOMIC_RELAXED) != FILL_FREE;
}
