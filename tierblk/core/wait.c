/* Waiting: requests parked on a fill, and what may end their wait besides its bytes: a door that drains or leaves, a
 * patience that ends, a remote that was given up. Parked lists are changed under the stripe lock of the fill's block;
 * whatever copies or ends a request does so after it was taken off the list. */
#define _GNU_SOURCE
#include "core.h"

#include <stdio.h>
#include <time.h>

/* Never 0, which means "not waiting". Wraps after 49 days: only differences count. */
uint32_t tb_now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    uint32_t ms = (uint32_t)(now.tv_sec * 1000 + now.tv_nsec / 1000000);
    return ms ? ms : 1;
}

void tb_wait_init(tb_engine *e)
{
    for (unsigned i = 0; i < TB_NOTES; i++) {
        e->notes[i].next = e->note_free;
        e->note_free = &e->notes[i];
    }
    e->hungry_end = &e->hungry;
    e->beat_ms = e->tick_ms = e->now_ms = tb_now_ms();
}

/* Under the stripe lock of the fill's block. */
static void append(tb_fill *fill, tb_req *req)
{
    req->next = NULL;
    *fill->parked_end = req;
    fill->parked_end = &req->next;
}

/* Under the stripe lock: the filler is to look at a running fill. A fill is in the inbox once, and only the filler ends
 * fills, so what it finds there is this fill or, with nothing staged, a later one. */
static void call_attention(tb_engine *e, tb_fill *fill)
{
    if (__atomic_exchange_n(&fill->attention, 1, __ATOMIC_SEQ_CST))
        return;
    tb_fill *head = TB_LOAD(&e->attention_inbox);
    do
        fill->next_attention = head;
    while (!__atomic_compare_exchange_n(&e->attention_inbox, &head, fill, true, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
}

static bool is_out_of_patience(const tb_req *req, uint32_t now_ms)
{
    uint32_t patience_ms = TB_LOAD(&req->queue->patience_ms);
    return patience_ms != 0 && patience_ms != UINT32_MAX && (int32_t)(now_ms - req->since_ms) >= 0 && now_ms - req->since_ms >= patience_ms;
}

static void begin_wait(tb_req *req)
{
    req->missed = 1;
    if (!req->since_ms)
        __atomic_store_n(&req->since_ms, tb_now_ms(), __ATOMIC_RELAXED); /* tb_door_stats looks */
    TB_ADD(&req->queue->stats.waiting, 1);
}

/* All fills are in use, by blocks that nobody waits for any more: their fetches end soon, and then this looks again. */
static void starve(tb_engine *e, tb_req *req)
{
    begin_wait(req);
    tb_push_req(&e->starved, req);
    tb_filler_wake(e);
}

/* Filler: whether somebody starves and there is a fill for him. */
bool tb_may_feed(tb_engine *e)
{
    return (e->hungry || __atomic_load_n(&e->starved, __ATOMIC_SEQ_CST)) && TB_LOAD(&e->fills_active) < TB_MAX_FILLS;
}

/* Filler: as many as there are fills look again, the first come first; or all, whatever there is. */
void tb_feed(tb_engine *e, bool all)
{
    tb_req *stack = __atomic_exchange_n(&e->starved, NULL, __ATOMIC_SEQ_CST), *oldest = NULL;
    while (stack) {
        tb_req *next = stack->next;
        stack->next = oldest;
        oldest = stack;
        stack = next;
    }
    *e->hungry_end = oldest;
    while (*e->hungry_end)
        e->hungry_end = &(*e->hungry_end)->next;
    for (uint32_t room = all ? UINT32_MAX : TB_MAX_FILLS - TB_LOAD(&e->fills_active); e->hungry && room; room--) {
        tb_req *req = e->hungry;
        e->hungry = req->next;
        tb_queue_hand_back(req);
    }
    if (!e->hungry)
        e->hungry_end = &e->hungry;
}

/* Under the stripe lock, which it gives back: the request waits for a fill of its block (I7: the one that runs, or a
 * new one). Draining and leaving are looked at under the lock, see tb_door_drain. */
void tb_park(tb_req *req, tb_layer *layer, tb_lock *stripe, uint16_t missing)
{
    tb_queue *queue = req->queue;
    tb_engine *e = layer->engine;
    tb_entry *entry = &layer->entries[req->block];
    bool first = !entry->fill, look = false, drains = __atomic_load_n(&queue->draining, __ATOMIC_SEQ_CST);
    tb_fill *fill = NULL;
    int failure = -EIO;
    if (!drains)
        fill = first ? tb_fill_begin(layer, req->block, missing) : &e->fills[entry->fill - 1];
    if (!drains && !fill && !(req->since_ms && is_out_of_patience(req, tb_now_ms()))) {
        tb_lock_give(stripe);
        starve(e, req);
        return;
    }
    /* What is staged already is given out whatever the remote does. */
    if (fill && fill->gave_up && TB_LOAD(&queue->patience_ms) == 0 &&
        (missing & (uint16_t)~__atomic_load_n(&fill->staged, __ATOMIC_RELAXED))) {
        failure = fill->gave_up;
        fill = NULL;
    }
    if (!fill) {
        tb_lock_give(stripe);
        req->result = failure;
        tb_over(req);
        return;
    }
    if (!first) {
        if (!fill->told)
            fill->want |= missing;
        if (fill->ahead) {
            fill->ahead = 0;
            __atomic_store_n(&fill->waited, 1, __ATOMIC_SEQ_CST);
            look = true;
        }
        /* The filler gives out what is staged when it comes; who parks later than that is not to wait for the SSD. */
        look |= (__atomic_load_n(&fill->staged, __ATOMIC_RELAXED) & req->need) != 0;
        if (look)
            call_attention(e, fill);
    }
    begin_wait(req);
    append(fill, req); /* from here to the hand-back the request is the filler's */
    tb_lock_give(stripe);
    if (first) {
        fill->next = NULL;
        *queue->begun_end = fill;
        queue->begun_end = &fill->next;
    } else if (look)
        tb_filler_wake(e);
}

/* Whether somebody waits (else he has left again) for a fill of which Python knows (else its MISS says it). */
static bool is_worth_telling(tb_fill *fill)
{
    tb_lock *stripe = tb_stripe(fill->layer, fill->block);
    tb_lock_take(stripe);
    bool worth = fill->told && !fill->ahead;
    tb_lock_give(stripe);
    return worth;
}

/* Filler: fills that somebody parked on after their bytes came, or after they were begun for nobody. */
void tb_attend(tb_engine *e)
{
    tb_fill *list = __atomic_exchange_n(&e->attention_inbox, NULL, __ATOMIC_SEQ_CST);
    while (list) {
        tb_fill *fill = list;
        list = fill->next_attention;
        __atomic_store_n(&fill->attention, 0, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&fill->state, __ATOMIC_ACQUIRE) == FILL_FREE)
            continue;
        if (__atomic_exchange_n(&fill->waited, 0, __ATOMIC_SEQ_CST) && is_worth_telling(fill))
            tb_say(e, (tb_record){.kind = TB_EV_WAITED, .layer = fill->layer->id, .token = fill->token, .block = fill->block});
        if (fill->staged)
            tb_fill_put(e, fill);
    }
}

/* In a queue's thread, at the end of a turn: a MISS for each fill that a request began in it. What others parked for
 * meanwhile is in it. Straight to the event loop: the filler has nothing to do before the bytes come, but to look at the
 * clock now and then, for which it is woken only if it does not do so already. */
void tb_tell_misses(tb_queue *queue)
{
    tb_engine *e = queue->engine;
    tb_fill *fill = queue->begun;
    if (!fill)
        return;
    queue->begun = NULL;
    queue->begun_end = &queue->begun;
    while (fill) {
        tb_fill *next = fill->next; /* told, it may end and be another's */
        tb_lock *stripe = tb_stripe(fill->layer, fill->block);
        tb_lock_take(stripe);
        tb_head head = fill->layer->entries[fill->block].head;
        uint16_t missing = tb_missing(fill->layer, fill->block, head);
        /* ahead: everybody has left again. Said under the lock, so before whatever else is said of this fill. */
        tb_say(e, (tb_record){.kind = TB_EV_MISS, .layer = fill->layer->id, .token = fill->token, .block = fill->block,
                              .value = missing, .result = fill->ahead, .pages = fill->want});
        fill->told = 1;
        tb_lock_give(stripe);
        fill = next;
    }
    tb_ring_kick(&e->events);
    tb_rouse(e);
}

/* Under the stripe lock, in a queue's thread: a marked entry was touched. Without a free note the mark is lost, and the
 * reader's next miss begins its stream anew. */
void tb_touched(tb_layer *layer, uint64_t block)
{
    tb_engine *e = layer->engine;
    layer->entries[block].head.flags &= (uint16_t)~TB_ENTRY_MARKED;
    tb_lock_take(&e->fill_lock);
    tb_note *note = e->note_free;
    if (note)
        e->note_free = note->next;
    tb_lock_give(&e->fill_lock);
    if (!note)
        return;
    note->layer = layer->id;
    note->block = block;
    tb_note *head = TB_LOAD(&e->note_inbox);
    do
        note->next = head;
    while (!__atomic_compare_exchange_n(&e->note_inbox, &head, note, true, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
    tb_filler_wake(e);
}

typedef bool (*parting)(const tb_req *req, const tb_fill *fill, uint32_t now_ms, int *result);

/* Readers may come and go while Python says nothing. What is not said is as if somebody still waited; the ring keeps room
 * for what must be: a MISS, a FILLED and a WAITED of each fill. */
static bool may_say_left(const tb_engine *e)
{
    return TB_LOAD(&e->events.tail) - __atomic_load_n(&e->events.head, __ATOMIC_RELAXED) < TB_RING_RECORDS / 8;
}

/* Takes those off a fill's list whom `leaves` names, and hands them back with its result, counted in *counter before. */
static void part(tb_engine *e, tb_fill *fill, parting leaves, uint64_t *counter)
{
    tb_req *gone = NULL, **gone_end = &gone;
    tb_lock *stripe = tb_stripe(fill->layer, fill->block);
    tb_lock_take(stripe);
    tb_req **link = &fill->parked;
    while (*link) {
        tb_req *req = *link;
        int result = 0;
        if (!leaves(req, fill, e->now_ms, &result)) {
            link = &req->next;
            continue;
        }
        *link = req->next;
        req->next = NULL;
        req->result = result;
        *gone_end = req;
        gone_end = &req->next;
        if (counter)
            TB_COUNT(counter, 1);
    }
    fill->parked_end = link;
    bool left = gone && !fill->parked && !fill->ahead && TB_LOAD(&fill->state) == FILL_ASKED && may_say_left(e);
    if (left)
        fill->ahead = 1; /* until somebody comes again */
    bool told = fill->told; /* else its MISS says it */
    tb_lock_give(stripe);
    if (left && told)
        tb_say(e, (tb_record){.kind = TB_EV_LEFT, .layer = fill->layer->id, .token = fill->token, .block = fill->block});
    while (gone) {
        tb_req *req = gone;
        gone = req->next;
        tb_queue_hand_back(req);
    }
}

static void part_everywhere(tb_engine *e, parting leaves, uint64_t *counter)
{
    uint32_t used = __atomic_load_n(&e->fills_used, __ATOMIC_ACQUIRE);
    for (uint32_t i = 0; i < used; i++)
        if (__atomic_load_n(&e->fills[i].state, __ATOMIC_ACQUIRE) != FILL_FREE)
            part(e, &e->fills[i], leaves, counter);
}

static bool door_drains(const tb_req *req)
{
    return TB_LOAD(&req->queue->draining) != 0;
}

static bool door_leaves(const tb_req *req, const tb_fill *fill, uint32_t now_ms, int *result)
{
    (void)fill, (void)now_ms;
    *result = -EIO;
    return door_drains(req);
}

/* Filler: ends every parked request of a draining or leaving door. Their fills go on, others may wait for the blocks. */
void tb_free_leavers(tb_engine *e)
{
    part_everywhere(e, door_leaves, NULL);
    tb_feed(e, true);
    tb_needy_wake(e, door_drains, -EIO);
    tb_far_leave(e);
}

static bool patience_ends(const tb_req *req, const tb_fill *fill, uint32_t now_ms, int *result)
{
    (void)fill;
    *result = -EIO;
    return is_out_of_patience(req, now_ms);
}

static bool is_fail_fast(const tb_req *req, const tb_fill *fill, uint32_t now_ms, int *result)
{
    (void)now_ms;
    *result = fill->gave_up;
    return TB_LOAD(&req->queue->patience_ms) == 0;
}

/* Filler: the retries of a fill are used up. Fail-fast doors get the error, now and as long as this fill lasts. */
void tb_give_up(tb_engine *e, tb_fill *fill, int result)
{
    tb_lock *stripe = tb_stripe(fill->layer, fill->block);
    tb_lock_take(stripe);
    fill->gave_up = result < 0 ? result : -EIO;
    tb_lock_give(stripe);
    part(e, fill, is_fail_fast, NULL);
}

/* The event loop has answered nothing for too long although requests wait. It cannot be mended from here; with the
 * process gone, the next daemon takes the device over and the requests are issued again. */
static void bark(uint32_t silent_ms)
{
    char line[160];
    int length = snprintf(line, sizeof line, "tierblk: the event loop has not answered for %u s while requests wait: ending the daemon\n",
                          silent_ms / 1000);
    ssize_t written = write(STDERR_FILENO, line, (size_t)length);
    (void)written;
    abort();
}

/* Filler, several times a second while fills run. */
void tb_tick(tb_engine *e)
{
    if (e->now_ms - e->tick_ms < TB_TICK_MS)
        return;
    /* Nobody ran for a while (SIGSTOP, a suspended machine): that was not the loop's fault. */
    if (e->now_ms - e->tick_ms > 4 * TB_TICK_MS)
        __atomic_store_n(&e->beat_ms, e->now_ms, __ATOMIC_RELAXED);
    e->tick_ms = e->now_ms;
    if (TB_LOAD(&e->impatient)) {
        part_everywhere(e, patience_ends, &e->stats.expired);
        tb_feed(e, true);
    }
    tb_write_flush(e, 4 * TB_TICK_MS);
    uint32_t limit_ms = TB_LOAD(&e->watchdog_ms), silent_ms = e->now_ms - TB_LOAD(&e->beat_ms);
    if (limit_ms && tb_needs_python(e) && (int32_t)silent_ms > 0 && silent_ms > limit_ms)
        bark(silent_ms);
}
