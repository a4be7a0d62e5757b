/* The filler thread: the only consumer of commands, and the producer of all events but MISS. It never blocks outside
 * io_uring_enter and never waits for Python. */
#define _GNU_SOURCE
#include "core.h"

#define LINGER_MS 1000u

void tb_filler_wake(tb_engine *e)
{
    tb_ring_kick(&e->commands);
}

/* After something that only the event loop can answer was counted (tb_needs_python): the filler looks at the clock from now on, for
 * the watchdog and for patience. */
void tb_rouse(tb_engine *e)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* the count before dozing; the filler looks the other way round */
    if (TB_LOAD(&e->dozing))
        tb_filler_wake(e);
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
    if (fill->gave_up) { /* its bytes come again: the remote is back */
        tb_lock *stripe = tb_stripe(fill->layer, fill->block);
        tb_lock_take(stripe);
        fill->gave_up = 0;
        tb_lock_give(stripe);
    }
    tb_fill_stage(e, fill, (uint16_t)(command->pages & valid & (uint16_t)~fill->staged));
    tb_fill_put(e, fill);
    if (command->result != TB_FILL_PART || fill->staged == valid)
        tb_fill_keep(e, fill, command->result == TB_FILL_WHOLE_MORE);
}

static void on_fail(tb_engine *e, const tb_record *command)
{
    tb_fill *fill = by_token(e, command->token);
    if (!fill) {
        tb_say(e, (tb_record){.kind = TB_EV_FILLED, .token = command->token, .value = command->value, .result = -ESTALE});
        return;
    }
    /* Whoever still waits gets the error. Not so when it was given up as something that nobody waits for: who came before
     * Python heard of it looks again, and has a fill of his own. */
    __atomic_store_n(&fill->staged, command->pages ? 1 : 0, __ATOMIC_RELAXED);
    tb_fill_end(e, fill, command->result < 0 ? command->result : -EIO, 0, 0);
    tb_write_flush(e, 0); /* what came of this window before waits for nothing any more */
}

static void on_give_up(tb_engine *e, const tb_record *command)
{
    tb_fill *fill = by_token(e, command->token);
    if (fill) /* else it has ended: nobody waits for it */
        tb_give_up(e, fill, command->result);
}

/* Begins a fill of a block that lacks pages and has none. False: enough are running. */
static bool prefetch(tb_engine *e, tb_layer *layer, uint64_t block, bool mark)
{
    if (layer->is_volume && !tb_map_has(layer, block)) /* the store has nothing of it */
        return true;
    if (TB_LOAD(&e->fills_active) >= TB_MAX_AHEAD || tb_map_prepare(layer, block))
        return false;
    tb_lock *stripe = tb_stripe(layer, block);
    tb_lock_take(stripe);
    tb_entry *entry = &layer->entries[block];
    tb_head head = entry->head;
    if (mark)
        entry->head.flags |= TB_ENTRY_MARKED;
    uint16_t missing = tb_missing(layer, block, head);
    tb_fill *fill = missing && !entry->fill ? tb_fill_begin(layer, block, missing) : NULL;
    if (fill)
        fill->told = fill->ahead = 1;
    tb_lock_give(stripe);
    if (fill)
        tb_say(e, (tb_record){.kind = TB_EV_MISS, .layer = layer->id, .token = fill->token, .block = block,
                              .value = missing, .result = 1, .pages = missing});
    return true;
}

static void on_prefetch(tb_engine *e, const tb_record *command)
{
    tb_layer *layer = command->layer < TB_MAX_LAYERS ? e->layers[command->layer] : NULL;
    if (!layer)
        return;
    for (uint64_t i = 0; i < command->value && command->block + i < layer->blocks; i++)
        if (!prefetch(e, layer, command->block + i, i == command->pages))
            return;
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
        } else if (batch[i].kind == TB_CMD_PREFETCH)
            on_prefetch(e, &batch[i]);
        else if (batch[i].kind == TB_CMD_GIVE_UP)
            on_give_up(e, &batch[i]);
    }
    return count > 0;
}

static void take_completions(tb_engine *e)
{
    struct io_uring_cqe *cqe;
    unsigned head, count = 0;
    io_uring_for_each_cqe(&e->ring, head, cqe)
    {
        uint64_t ud = cqe->user_data;
        count++;
        if (tb_ud_kind(ud) == UD_SLOT_WRITE)
            tb_write_done(e, tb_ud_pointer(ud), cqe->res, tb_ud_bytes(ud));
        else if (tb_ud_kind(ud) == UD_RUN_WRITE)
            tb_run_done(e, tb_ud_pointer(ud), cqe->res);
        else if (ud == UD_WAKE)
            tb_wake_arm(&e->ring, e->commands.wake_fd, &e->wake_value);
    }
    io_uring_cq_advance(&e->ring, count);
}

static void tell_notes(tb_engine *e)
{
    tb_note *list = __atomic_exchange_n(&e->note_inbox, NULL, __ATOMIC_SEQ_CST);
    while (list) {
        tb_note *note = list;
        list = note->next;
        tb_say(e, (tb_record){.kind = TB_EV_READ_ON, .layer = note->layer, .block = note->block});
        tb_lock_take(&e->fill_lock);
        note->next = e->note_free;
        e->note_free = note;
        tb_lock_give(&e->fill_lock);
    }
}

static bool has_work(tb_engine *e)
{
    return e->evict_wanted || tb_may_feed(e) || __atomic_load_n(&e->attention_inbox, __ATOMIC_SEQ_CST) ||
           __atomic_load_n(&e->note_inbox, __ATOMIC_SEQ_CST) || __atomic_load_n(&e->drain_scan, __ATOMIC_SEQ_CST);
}

/* While fills run it wakes a few times a second by itself, see tb_tick, and for a while after the last one: then misses
 * that come now and then wake it no more often. */
static bool needs_ticks(tb_engine *e)
{
    if (tb_needs_python(e))
        e->active_ms = e->now_ms;
    if (e->now_ms - e->active_ms < LINGER_MS)
        return true;
    __atomic_store_n(&e->dozing, 1, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* tb_rouse has its mirror image */
    return tb_needs_python(e); /* begun meanwhile, by somebody who did not see it doze */
}

static void submit_and_sleep(tb_engine *e, bool idle)
{
    struct io_uring_cqe *cqe;
    struct __kernel_timespec tick = {.tv_nsec = TB_TICK_MS * 1000000ll};
    if (idle && needs_ticks(e))
        io_uring_submit_and_wait_timeout(&e->ring, &cqe, 1, &tick, NULL);
    else
        io_uring_submit_and_wait(&e->ring, idle ? 1 : 0);
    __atomic_store_n(&e->dozing, 0, __ATOMIC_RELAXED);
    if (!idle)
        io_uring_get_events(&e->ring); /* DEFER_TASKRUN: completions appear only when asked for */
}

void *tb_filler_main(void *argument)
{
    tb_engine *e = argument;
    tb_thread_settle("tb-filler", NULL, 0);
    tb_wake_arm(&e->ring, e->commands.wake_fd, &e->wake_value);
    for (;;) {
        e->now_ms = tb_now_ms();
        bool busy = take_commands(e);
        tb_attend(e);
        tell_notes(e);
        if (__atomic_exchange_n(&e->drain_scan, 0, __ATOMIC_SEQ_CST))
            tb_free_leavers(e);
        if (tb_may_feed(e))
            tb_feed(e, false);
        if (e->evict_wanted)
            tb_evict_turn(e);
        tb_tick(e);
        tb_write_turn(e);
        if (__atomic_load_n(&e->events.head, __ATOMIC_ACQUIRE) != e->events.tail)
            tb_ring_kick(&e->events); /* once per turn, not per record: 8 times cheaper (core.md, 2) */
        bool quit = __atomic_load_n(&e->filler_quit, __ATOMIC_ACQUIRE);
        if (quit) {
            tb_write_flush(e, 0);
            tb_write_turn(e);
        }
        if (quit && !e->writes_inflight && !e->pending)
            break;
        bool idle = tb_ring_arm(&e->commands) && !busy && !has_work(e) && !(__atomic_load_n(&e->filler_quit, __ATOMIC_SEQ_CST) && !quit);
        submit_and_sleep(e, idle);
        take_completions(e);
    }
    return NULL;
}
