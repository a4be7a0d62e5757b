/* The filler thread: the only producer of events and the only consumer of commands. It never blocks outside
 * io_uring_enter and never waits for Python. */
#define _GNU_SOURCE
#include "core.h"

#include <sys/prctl.h>

void tb_filler_wake(tb_engine *e)
{
    tb_ring_kick(&e->commands);
}

/* The state first: a free fill may become another block's while we look, and only its state says when its token is set.
 * The other way round an old token could match, and the state be the new fill's (R5). */
static tb_fill *by_token(tb_engine *e, uint32_t token)
{
    tb_fill *fill = &e->fills[token % TB_MAX_FILLS];
    return __atomic_load_n(&fill->state, __ATOMIC_ACQUIRE) == FILL_ASKED && fill->token == token ? fill : NULL;
}

static void on_fill(tb_engine *e, const tb_record *command)
{
    tb_fill *fill = by_token(e, command->token);
    bool inside = command->value % TB_PAGE_BYTES == 0 && command->value <= e->staging_bytes - TB_BLOCK_BYTES; /* I12 */
    if (!fill || !inside) { /* R5: a token of a fill that ended, or no command of ours: say so and touch nothing */
        tb_say(e, (tb_record){.kind = TB_EV_FILLED, .token = command->token, .value = command->value, .result = -ESTALE});
        return;
    }
    uint16_t valid = tb_valid_pages(fill->layer, fill->block);
    fill->staging_offset = command->value;
    tb_fill_stage(e, fill, (uint16_t)(command->pages & valid & (uint16_t)~fill->staged));
    tb_fill_put(e, fill);
    if (command->result == 1 || fill->staged == valid)
        tb_fill_keep(e, fill);
}

static void on_fail(tb_engine *e, const tb_record *command)
{
    tb_fill *fill = by_token(e, command->token);
    if (!fill) {
        tb_say(e, (tb_record){.kind = TB_EV_FILLED, .token = command->token, .value = command->value, .result = -ESTALE});
        return;
    }
    fill->staged = 0; /* whoever still waits gets the error */
    tb_fill_end(e, fill, command->result < 0 ? command->result : -EIO, 0, 0);
}

static bool take_commands(tb_engine *e)
{
    tb_record batch[64];
    int count = tb_ring_pop(&e->commands, batch, 64);
    for (int i = 0; i < count; i++) {
        if (batch[i].kind == TB_CMD_FILL)
            on_fill(e, &batch[i]);
        else if (batch[i].kind == TB_CMD_FAIL)
            on_fail(e, &batch[i]);
        else if (batch[i].kind == TB_CMD_EVICT) {
            e->evict_wanted += batch[i].value;
            e->evict_steps = 0;
        }
    }
    return count > 0;
}

static bool take_misses(tb_engine *e)
{
    tb_fill *stack = __atomic_exchange_n(&e->miss_inbox, NULL, __ATOMIC_SEQ_CST), *oldest = NULL;
    while (stack) {
        tb_fill *next = stack->next;
        stack->next = oldest;
        oldest = stack;
        stack = next;
    }
    bool any = oldest != NULL;
    for (tb_fill *fill = oldest; fill; fill = fill->next)
        tb_say(e, (tb_record){.kind = TB_EV_MISS, .layer = fill->layer->id, .token = fill->token, .block = fill->block, .pages = fill->want});
    return any;
}

/* tb_door_drain: ends every parked request of a draining door. Their fills go on, others may wait for the same block. */
static void drain_scan(tb_engine *e)
{
    uint32_t used = __atomic_load_n(&e->fills_used, __ATOMIC_ACQUIRE);
    for (uint32_t i = 0; i < used; i++) {
        tb_fill *fill = &e->fills[i];
        if (__atomic_load_n(&fill->state, __ATOMIC_ACQUIRE) == FILL_FREE)
            continue;
        tb_req *gone = NULL, **gone_end = &gone;
        tb_lock *stripe = tb_stripe(fill->layer, fill->block);
        tb_lock_take(stripe);
        tb_req **link = &fill->parked;
        while (*link) {
            tb_req *req = *link;
            if (!TB_LOAD(&req->queue->draining)) {
                link = &req->next;
                continue;
            }
            *link = req->next;
            req->next = NULL;
            *gone_end = req;
            gone_end = &req->next;
        }
        fill->parked_end = link;
        tb_lock_give(stripe);
        tb_hand_back_all(gone, -EIO);
    }
}

static void take_completions(tb_engine *e)
{
    struct io_uring_cqe *cqe;
    unsigned head, count = 0;
    io_uring_for_each_cqe(&e->ring, head, cqe)
    {
        uint64_t ud = cqe->user_data;
        count++;
        if (tb_ud_kind(ud) != UD_SLOT_WRITE) {
            tb_wake_arm(&e->ring, e->commands.wake_fd, &e->wake_value);
            continue;
        }
        tb_fill *fill = tb_ud_pointer(ud);
        if (cqe->res != (int)tb_ud_bytes(ud))
            fill->result = cqe->res < 0 ? cqe->res : -EIO;
        e->writes_inflight--;
        if (--fill->inflight == 0)
            tb_fill_written(e, fill);
    }
    io_uring_cq_advance(&e->ring, count);
}

void *tb_filler_main(void *argument)
{
    tb_engine *e = argument;
    pthread_setname_np(pthread_self(), "tb-filler");
    prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
    tb_wake_arm(&e->ring, e->commands.wake_fd, &e->wake_value);
    for (;;) {
        bool busy = take_misses(e);
        busy |= take_commands(e);
        if (__atomic_exchange_n(&e->drain_scan, 0, __ATOMIC_SEQ_CST))
            drain_scan(e);
        if (e->evict_wanted)
            tb_evict_turn(e);
        if (__atomic_load_n(&e->events.head, __ATOMIC_ACQUIRE) != e->events.tail)
            tb_ring_kick(&e->events); /* once per turn, not per record: 8 times cheaper (core.md, 2) */
        bool quit = __atomic_load_n(&e->filler_quit, __ATOMIC_ACQUIRE);
        if (quit && !e->writes_inflight)
            break;
        bool idle = tb_ring_arm(&e->commands) && !busy && !e->evict_wanted && !__atomic_load_n(&e->miss_inbox, __ATOMIC_SEQ_CST) &&
                    !__atomic_load_n(&e->drain_scan, __ATOMIC_SEQ_CST) && !(__atomic_load_n(&e->filler_quit, __ATOMIC_SEQ_CST) && !quit);
        io_uring_submit_and_wait(&e->ring, idle ? 1 : 0);
        if (!idle)
            io_uring_get_events(&e->ring); /* DEFER_TASKRUN: completions appear only when asked for */
        take_completions(e);
    }
    return NULL;
}
