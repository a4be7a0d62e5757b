/* What a volume whose truth is object storage needs of the core besides its epochs: what the store has (learn), an end to acknowledging
 * (refuse, R19), and FLUSHes that wait for the store (R14). The event loop calls all of it, but for what says otherwise. */
#include "core.h"

/* These pages of these blocks (dirty: which; zero: which of them are zeros) are in the store now, newer than what is cached and clean here;
 * pages that are dirty are newer still and stay. -ENOSPC for a full tmpfs: what came before is learned. */
int tb_layer_learn(tb_layer *layer, const tb_sealed *items, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        uint64_t block = items[i].block;
        if (block >= layer->blocks)
            return -EINVAL;
        int rc = tb_map_prepare(layer, block);
        if (rc)
            return rc;
        tb_entry *entry = &layer->entries[block];
        tb_lock *stripe = tb_stripe(layer, block);
        tb_lock_take(stripe);
        tb_head head = entry->head;
        uint16_t pages = items[i].dirty & tb_valid_pages(layer, block) & (uint16_t)~head.dirty;
        head.present |= pages;
        head.cached &= (uint16_t)~pages;
        head.zero = (head.zero & (uint16_t)~pages) | (items[i].zero & pages);
        entry->overtaken |= pages;
        uint32_t dropped = head.flags & TB_ENTRY_MOVING ? 0 : tb_entry_drop_slot(layer, entry, &head); /* R2: it is being read */
        tb_entry_change(layer, entry, head);
        tb_map_mark(layer, block);
        if (dropped)
            tb_slot_quarantine(layer->engine, dropped);
        tb_lock_give(stripe);
    }
    return 0;
}

/* Every row that holds anything counts as changed, so that the next commit makes the index exact: it may have called dirty what is clean
 * (R17). */
void tb_layer_mark_all(tb_layer *layer)
{
    for (uint64_t block = tb_map_next(layer, 0, layer->blocks); block < layer->blocks;
         block = tb_map_next(layer, (block / TB_ROW_ENTRIES + 1) * TB_ROW_ENTRIES, layer->blocks)) {
        tb_lock *stripe = tb_stripe(layer, block);
        tb_lock_take(stripe);
        tb_map_mark(layer, block);
        tb_lock_give(stripe);
    }
}

static bool is_refused(const tb_req *req)
{
    const tb_layer *volume = req->queue->volume;
    return volume && TB_LOAD(&volume->refused);
}

/* Any thread: writes that wait for space end if their volume is refused; false: this one is not. */
bool tb_refused_leave(const tb_layer *volume)
{
    int error = (int)__atomic_load_n(&volume->refused, __ATOMIC_SEQ_CST);
    if (error)
        tb_needy_wake(volume->engine, is_refused, -error);
    return error != 0;
}

/* From now on nothing that changes the volume is acknowledged, nor a FLUSH; who waits for space gets the errno now (R19, I10). 0: as
 * before. */
void tb_layer_refuse(tb_layer *layer, int error)
{
    __atomic_store_n(&layer->refused, (uint32_t)(error < 0 ? -error : error), __ATOMIC_SEQ_CST);
    tb_refused_leave(layer);
}

void tb_layer_flush_far(tb_layer *layer, int far)
{
    __atomic_store_n(&layer->flushes_far, far != 0, __ATOMIC_SEQ_CST);
}

/* A queue's thread: the FLUSH waits until the event loop says that what was written before it is in the store. It stays in a list of
 * ours, so that a door which drains needs nobody's help. */
void tb_flush_by_epoch(tb_req *req)
{
    tb_layer *volume = req->queue->volume;
    tb_engine *e = volume->engine;
    tb_lock *stripe = tb_stripe(volume, 0); /* see tb_door_drain */
    tb_lock_take(stripe);
    bool drains = __atomic_load_n(&req->queue->draining, __ATOMIC_SEQ_CST);
    if (!drains) {
        TB_ADD(&req->queue->stats.waiting, 1);
        TB_ADD(&e->flushes_waiting, 1);
        req->due = __atomic_add_fetch(&volume->far_count, 1, __ATOMIC_SEQ_CST);
        req->next = volume->far_flushes;
        __atomic_store_n(&volume->far_flushes, req, __ATOMIC_RELAXED);
    }
    tb_lock_give(stripe);
    if (drains) {
        req->result = -EIO;
        tb_finish(req);
        return;
    }
    if (!__atomic_exchange_n(&volume->far_told, 1, __ATOMIC_SEQ_CST)) {
        tb_say(e, (tb_record){.kind = TB_EV_FLUSH, .layer = volume->id});
        tb_ring_kick(&e->events);
    }
    tb_rouse(e);
}

/* At FLUSH with this layer: how many there have been. An epoch that is sealed after this call covers them; who comes later tells again. */
uint64_t tb_far_count(tb_layer *layer)
{
    __atomic_store_n(&layer->far_told, 0, __ATOMIC_SEQ_CST);
    return __atomic_load_n(&layer->far_count, __ATOMIC_SEQ_CST);
}

/* Ends those up to a count, and those of doors that drain; the others go on waiting. The event loop and the filler do so at the same
 * time: nobody is to miss those whom the other looks at, so the lock is held. */
static void wake_far(tb_layer *layer, uint64_t upto, int result)
{
    tb_req **link = &layer->far_flushes, *gone = NULL;
    tb_lock *stripe = tb_stripe(layer, 0);
    tb_lock_take(stripe);
    while (*link) {
        tb_req *req = *link;
        if (req->due > upto && !__atomic_load_n(&req->queue->draining, __ATOMIC_SEQ_CST)) {
            link = &req->next;
            continue;
        }
        *link = req->next;
        req->result = req->due > upto ? -EIO : result;
        req->next = gone;
        gone = req;
    }
    tb_lock_give(stripe);
    while (gone) {
        tb_req *req = gone;
        gone = req->next;
        TB_ADD(&layer->engine->flushes_waiting, -1u);
        tb_queue_hand_back(req);
    }
}

/* The FLUSHes up to that count: what was written before them is in the store, or never will be. */
void tb_far_done(tb_layer *layer, uint64_t upto, int result)
{
    wake_far(layer, upto, result);
}

/* Filler: doors drain. */
void tb_far_leave(tb_engine *e)
{
    for (unsigned id = 1; id < TB_LOAD(&e->layers_end); id++)
        if (e->layers[id] && TB_LOAD(&e->layers[id]->far_flushes))
            wake_far(e->layers[id], 0, 0);
}

/* Free slots that only moves of sealed blocks may take (R14). */
void tb_engine_set_reserve(tb_engine *e, uint32_t slots)
{
    __atomic_store_n(&e->reserve, slots, __ATOMIC_RELAXED);
    tb_needy_wake(e, NULL, 0);
}
