/* A queue: one thread, one io_uring, a fixed set of requests with their buffers. What is particular to a door is in its
 * tb_door_ops. The thread never takes the GIL, never blocks outside io_uring_enter, and allocates nothing per request. */
#define _GNU_SOURCE
#include "core.h"

#include <stdio.h>
#include <sys/eventfd.h>

/* While misses stream, hits must not wait for the turn of whoever handles them: what a hit costs, a queue's thread does in
 * microseconds. With nothing but hits it is as nice as any, or it would take the processor from those who submit them after
 * each, and never find a batch. */
#define HURRY -10

static void hurry_as_needed(tb_queue *queue)
{
    bool streams = !TB_LOAD(&queue->engine->dozing);
    if (streams == queue->hurries)
        return;
    queue->hurries = streams;
    tb_thread_nice(streams ? HURRY : 0);
}

/* Any thread: gives a parked request back to its owner, who completes it or looks again. Once it is in the inbox its
 * owner may end it and leave, and the door be closed, before the wake-up below: tb_door_close waits for visitors. */
void tb_queue_hand_back(tb_req *req)
{
    tb_queue *queue = req->queue;
    TB_ADD(&queue->visitors, 1); /* seen by whoever sees the request in the inbox */
    TB_ADD(&queue->stats.waiting, -1ull);
    tb_push_req(&queue->inbox, req);
    tb_queue_wake(queue);
    __atomic_fetch_sub(&queue->visitors, 1, __ATOMIC_RELEASE);
}

void tb_queue_wake(tb_queue *queue)
{
    if (__atomic_exchange_n(&queue->armed, 0, __ATOMIC_SEQ_CST)) {
        uint64_t one = 1;
        ssize_t written = write(queue->wake_fd, &one, sizeof one);
        (void)written; /* EAGAIN: a wake-up is pending */
    }
}

static void take_inbox(tb_queue *queue)
{
    tb_req *stack = __atomic_exchange_n(&queue->inbox, NULL, __ATOMIC_SEQ_CST), *oldest = NULL;
    while (stack) {
        tb_req *next = stack->next;
        stack->next = oldest;
        oldest = stack;
        stack = next;
    }
    while (oldest) {
        tb_req *req = oldest;
        oldest = req->next;
        tb_resume(req);
    }
}

static void take_completions(tb_queue *queue)
{
    struct io_uring_cqe *cqe;
    unsigned head, count = 0;
    io_uring_for_each_cqe(&queue->ring, head, cqe)
    {
        uint64_t ud = cqe->user_data;
        count++;
        switch (tb_ud_kind(ud)) {
        case UD_SLOT_READ:
        case UD_VOLUME_READ:
            tb_slot_read_done(tb_ud_pointer(ud), cqe->res, tb_ud_bytes(ud), tb_ud_kind(ud) == UD_VOLUME_READ);
            break;
        case UD_WRITE:
            tb_volume_write_done(tb_ud_pointer(ud), cqe->res, tb_ud_bytes(ud));
            break;
        case UD_DATA:
            tb_data_done(tb_ud_pointer(ud), cqe->res, tb_ud_bytes(ud));
            break;
        case UD_SYNC:
            tb_sync_done(tb_ud_pointer(ud), cqe->res);
            break;
        case UD_RECORD_SYNC:
            tb_record_synced(tb_ud_pointer(ud), cqe->res);
            break;
        case UD_RECORD:
            tb_record_done(tb_ud_pointer(ud), cqe->res);
            break;
        case UD_MOVE:
            tb_move_done(tb_ud_pointer(ud), cqe->res, tb_ud_bytes(ud));
            break;
        case UD_CLOCK:
            queue->clock_set = false;
            break;
        case UD_ZEROS:
            tb_zeros_done(tb_ud_pointer(ud), cqe->res, tb_ud_bytes(ud));
            break;
        case UD_DOOR:
        case UD_DOOR_COPY:
        case UD_HOT:
            queue->ops->event(queue, ud, cqe->res);
            break;
        default:
            tb_wake_arm(&queue->ring, queue->wake_fd, &queue->wake_value);
        }
    }
    io_uring_cq_advance(&queue->ring, count);
}

static void tell_ready(tb_queue *queue, int failure)
{
    pthread_mutex_lock(&queue->ready_lock);
    queue->failure = failure;
    queue->ready = true;
    pthread_cond_signal(&queue->ready_cond);
    pthread_mutex_unlock(&queue->ready_lock);
}

static bool may_leave(tb_queue *queue)
{
    if (queue->leads) /* others wait for its record */
        return false;
    if (queue->done || (TB_LOAD(&queue->leaving) && TB_LOAD(&queue->stats.active) == 0))
        return true;
    return __atomic_load_n(&queue->quitting, __ATOMIC_ACQUIRE) && TB_LOAD(&queue->stats.active) == 0 &&
           !(queue->ops->waiting && queue->ops->waiting(queue));
}

static void serve_until_done(tb_queue *queue)
{
    while (!may_leave(queue)) {
        take_inbox(queue);
        if (queue->ops->turn)
            queue->ops->turn(queue);
        tb_clear_turn(queue);
        tb_pace_turn(queue);
        tb_journal_turn(queue);
        tb_tell_misses(queue);
        tb_trace_turn(queue);
        __atomic_exchange_n(&queue->armed, 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&queue->inbox, __ATOMIC_SEQ_CST) || (queue->ops->waiting && queue->ops->waiting(queue)))
            continue; /* came in while armed was still 0, so nobody wrote to wake_fd */
        if (may_leave(queue))
            break;
        int rc = queue->slices ? io_uring_submit_and_get_events(&queue->ring) : io_uring_submit_and_wait(&queue->ring, 1);
        TB_COUNT(&queue->stats.enters, 1);
        queue->now = tb_ticks();
        __atomic_store_n(&queue->armed, 0, __ATOMIC_RELAXED);
        if (rc < 0 && rc != -EINTR && rc != -EAGAIN && rc != -EBUSY) {
            queue->failure = rc; /* the ring itself is broken: nothing can be served any more */
            break;
        }
        take_completions(queue);
        hurry_as_needed(queue);
    }
    tb_journal_leave(queue);
    tb_tell_misses(queue); /* a fill that nobody hears of would never end */
}

static void *queue_main(void *argument)
{
    tb_queue *queue = argument;
    char name[32]; /* the kernel keeps 15 letters */
    snprintf(name, sizeof name, queue->number ? "tb-queue-%u.%u" : "tb-queue-%u", queue->id, queue->number);
    name[15] = 0;
    tb_thread_settle(name, queue->cpus, queue->cpus_bytes);
    queue->now = tb_ticks();
    int rc = tb_uring_init(&queue->ring, queue->depth < 64 ? 256 : queue->depth * 4u);
    if (rc < 0) {
        tell_ready(queue, rc);
        return NULL;
    }
    queue->ring_made = true;
    tb_wake_arm(&queue->ring, queue->wake_fd, &queue->wake_value);
    rc = queue->ops->start(queue);
    if (rc == 0) {
        rc = io_uring_submit(&queue->ring);
        rc = rc < 0 ? rc : 0;
    }
    tell_ready(queue, rc);
    if (rc == 0)
        serve_until_done(queue);
    if (queue->ops->stop)
        queue->ops->stop(queue);
    /* The ring is closed with the door, when this thread is gone. If a thread that lives on closes it, ublk of 6.12 may give it a
     * request after it has taken back those that it had, and waits for that one for ever. Only the registration is the thread's. */
    io_uring_unregister_ring_fd(&queue->ring);
    uint64_t one = 1;
    ssize_t written = write(queue->end_fd, &one, sizeof one);
    (void)written;
    return NULL;
}

/* Doors are opened and closed in several worker threads at once. */
static bool take_tags(tb_engine *engine, uint16_t depth)
{
    if (__atomic_add_fetch(&engine->tags, depth, __ATOMIC_RELAXED) <= TB_MAX_TAGS)
        return true;
    TB_ADD(&engine->tags, -(uint32_t)depth);
    return false;
}

/* On failure `door` is still the caller's; with success it belongs to the queue, whose `release` frees it. */
int tb_queue_new(tb_engine *engine, const tb_stack *stack, uint16_t depth, uint64_t hot_bytes, const tb_door_ops *ops, void *door,
                 tb_queue **out)
{
    if (depth == 0 || (!stack->volume && !stack->base))
        return -EINVAL;
    if (!take_tags(engine, depth)) /* more requests could miss than there are fills and ring records for */
        return -EMFILE;
    tb_queue *queue = calloc(1, sizeof *queue);
    if (!queue) {
        TB_ADD(&engine->tags, -(uint32_t)depth);
        return -ENOMEM;
    }
    queue->engine = engine;
    queue->volume = stack->volume;
    queue->base = stack->base;
    queue->size_bytes = stack->size_bytes;
    queue->depth = depth;
    queue->id = TB_ADD(&engine->next_door, 1);
    queue->armed = 0;
    queue->patience_ms = UINT32_MAX;
    queue->copy_fd = -1;
    queue->begun_end = &queue->begun;
    queue->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    queue->end_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pthread_mutex_init(&queue->ready_lock, NULL);
    pthread_cond_init(&queue->ready_cond, NULL);
    size_t bytes = (size_t)depth * TB_BLOCK_BYTES;
    queue->buffers = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    queue->olds = queue->volume ? mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) : NULL;
    queue->reqs = aligned_alloc(64, (size_t)depth * sizeof *queue->reqs);
    if (queue->buffers == MAP_FAILED || queue->olds == MAP_FAILED || !queue->reqs || queue->wake_fd < 0 || queue->end_fd < 0 || tb_hot_new(hot_bytes, &queue->hot)) {
        tb_queue_free(queue);
        return -ENOMEM;
    }
    if (queue->olds)
        madvise(queue->olds, bytes, MADV_DONTFORK);
    madvise(queue->buffers, bytes, MADV_DONTFORK); /* a fork's copy-on-write must not move them under the driver */
    memset(queue->reqs, 0, (size_t)depth * sizeof *queue->reqs);
    for (uint16_t tag = 0; tag < depth; tag++) {
        queue->reqs[tag].queue = queue;
        queue->reqs[tag].tag = tag;
        queue->reqs[tag].buffer = queue->buffers + (size_t)tag * TB_BLOCK_BYTES;
    }
    queue->ops = ops;
    queue->door = door;
    *out = queue;
    return 0;
}

static void count_door(tb_queue *queue, uint32_t n)
{
    if (queue->volume)
        TB_ADD(&queue->volume->doors, n);
    if (queue->base)
        TB_ADD(&queue->base->doors, n);
}

/* Starts the thread and waits until its first commands are submitted. On failure the queue is gone. */
int tb_queue_start(tb_queue *queue)
{
    int rc = tb_thread_start(&queue->thread, queue_main, queue);
    if (rc) {
        tb_queue_free(queue);
        return rc;
    }
    queue->started = true;
    pthread_mutex_lock(&queue->ready_lock);
    while (!queue->ready)
        pthread_cond_wait(&queue->ready_cond, &queue->ready_lock);
    rc = queue->failure;
    pthread_mutex_unlock(&queue->ready_lock);
    if (rc) {
        pthread_join(queue->thread, NULL);
        tb_queue_free(queue);
        return rc;
    }
    count_door(queue, 1);
    return 0;
}

void tb_queue_free(tb_queue *queue)
{
    tb_engine *engine = queue->engine;
    uint32_t tags = queue->depth;
    tb_door_set_patience(queue, UINT32_MAX);
    if (queue->ring_made)
        io_uring_queue_exit(&queue->ring);
    if (queue->ops && queue->ops->release)
        queue->ops->release(queue);
    if (queue->buffers && queue->buffers != MAP_FAILED)
        munmap(queue->buffers, (size_t)queue->depth * TB_BLOCK_BYTES);
    if (queue->olds && queue->olds != MAP_FAILED)
        munmap(queue->olds, (size_t)queue->depth * TB_BLOCK_BYTES);
    free(queue->reqs);
    tb_hot_free(queue->hot);
    tb_trace_free(queue);
    if (queue->wake_fd >= 0)
        close(queue->wake_fd);
    if (queue->end_fd >= 0)
        close(queue->end_fd);
    pthread_mutex_destroy(&queue->ready_lock);
    pthread_cond_destroy(&queue->ready_cond);
    free(queue);
    __atomic_fetch_sub(&engine->tags, tags, __ATOMIC_RELEASE); /* last: with no tag lent the engine may be freed */
}

/* Readable once the thread has ended. */
int tb_door_end_fd(tb_queue *queue)
{
    return queue->end_fd;
}

/* From here on every miss of this door, parked or to come, ends in EIO without Python; hits go on. To be called before
 * STOP_DEV: the kernel's stop waits for requests, and a daemon that dies meanwhile cannot be killed (core.md, trap 1).
 *
 * A request is parked under its stripe lock after a look at `draining`. Passing every lock once after the store means
 * that whoever looked before it has parked by now, where the filler's scan finds it. */
int tb_door_drain(tb_queue *queue)
{
    tb_engine *engine = queue->engine;
    __atomic_store_n(&queue->draining, 1, __ATOMIC_SEQ_CST);
    for (unsigned i = 0; i < TB_STRIPES; i++) {
        tb_lock_take(&engine->stripes[i].lock);
        tb_lock_give(&engine->stripes[i].lock);
    }
    __atomic_store_n(&engine->drain_scan, 1, __ATOMIC_SEQ_CST);
    tb_filler_wake(engine);
    return 0;
}

/* Hand-over: the thread ends when the slot reads that it has under way are over, and completes nothing any more. What it
 * leaves undone the driver issues again to the next daemon, so this is for devices with user recovery; any other door
 * drains and quits. */
int tb_door_leave(tb_queue *queue)
{
    if (queue->ops->may_drop)
        __atomic_store_n(&queue->leaving, 1, __ATOMIC_SEQ_CST);
    tb_door_drain(queue);
    return tb_door_quit(queue);
}

/* How long a request of this door may wait for a fill. UINT32_MAX: for ever; 0: until GIVE_UP says that the retries are
 * used up; else it ends in EIO after that many milliseconds, whatever Python does. */
void tb_door_set_patience(tb_queue *queue, uint32_t milliseconds)
{
    uint32_t before = __atomic_exchange_n(&queue->patience_ms, milliseconds, __ATOMIC_SEQ_CST);
    bool was = before != 0 && before != UINT32_MAX, is = milliseconds != 0 && milliseconds != UINT32_MAX;
    TB_ADD(&queue->engine->impatient, (uint32_t)is - (uint32_t)was);
}

/* Asks the thread to leave when its last request is done; drain first, or a miss may hold it. */
int tb_door_quit(tb_queue *queue)
{
    __atomic_store_n(&queue->quitting, 1, __ATOMIC_RELEASE);
    tb_queue_wake(queue);
    return 0;
}

/* Waits for the thread and frees the door. Not on the event loop. */
int tb_door_close(tb_queue *queue)
{
    if (queue->started) {
        pthread_join(queue->thread, NULL);
        while (__atomic_load_n(&queue->visitors, __ATOMIC_ACQUIRE))
            sched_yield(); /* a system call away from leaving */
        count_door(queue, -1u);
    }
    tb_queue_free(queue);
    return 0;
}

/* Adds this queue's: to counts, TB_TIERS times TB_LATENCY_BUCKETS, and to ticks, TB_TIERS. */
void tb_door_latencies(tb_queue *queue, uint64_t *counts, uint64_t *ticks)
{
    for (unsigned i = 0; i < TB_TIERS * TB_LATENCY_BUCKETS; i++)
        counts[i] += TB_LOAD(&queue->latencies[0][0] + i);
    for (unsigned tier = 0; tier < TB_TIERS; tier++)
        ticks[tier] += TB_LOAD(&queue->latency_ticks[tier]);
}

void tb_door_stats(tb_queue *queue, tb_stats *out)
{
    uint64_t *from = (uint64_t *)&queue->stats, *to = (uint64_t *)out;
    for (size_t i = 0; i < sizeof *out / sizeof *to; i++)
        to[i] = TB_LOAD(&from[i]);
    uint32_t now_ms = tb_now_ms();
    for (uint16_t tag = 0; tag < queue->depth; tag++) {
        uint32_t since_ms = TB_LOAD(&queue->reqs[tag].since_ms);
        if (since_ms && (int32_t)(now_ms - since_ms) > 0 && now_ms - since_ms > out->oldest_wait_ms)
            out->oldest_wait_ms = now_ms - since_ms;
    }
}
