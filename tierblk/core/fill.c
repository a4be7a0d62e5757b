/* Fills: from the first request that misses a block until its bytes are in a slot, or the attempt failed. A fill begins in
 * any queue's thread, under the stripe lock of its block; everything after that happens in the filler (filler.c).
 *
 * Staged bytes are put into waiting requests before and apart from the write to the SSD, so that a reader waits for its
 * own pages only. */
#define _GNU_SOURCE
#include "core.h"

/* Does not wake the event loop: tb_ring_kick, once a turn. */
void tb_say(tb_engine *e, tb_record event)
{
    /* One MISS and one FILLED per fill and a few more fit the ring by construction; losing one would hang a reader. */
    tb_lock_take(&e->event_lock);
    if (tb_ring_push(&e->events, &event, 1))
        abort();
    tb_lock_give(&e->event_lock);
}

int tb_fills_init(tb_engine *e)
{
    size_t bytes = TB_MAX_FILLS * sizeof *e->fills;
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        return -ENOMEM;
    e->fills = p;
    return 0;
}

/* Under the block's stripe lock. NULL when all are in use: there are more of them than tags, but a fill may outlast its
 * readers' patience. */
tb_fill *tb_fill_begin(tb_layer *layer, uint64_t block, uint16_t want)
{
    tb_engine *e = layer->engine;
    tb_lock_take(&e->fill_lock);
    tb_fill *fill = e->fill_free;
    if (fill)
        e->fill_free = fill->next;
    else if (e->fills_used < TB_MAX_FILLS) {
        fill = &e->fills[e->fills_used];
        fill->token = e->fills_used;
        __atomic_store_n(&e->fills_used, e->fills_used + 1, __ATOMIC_RELEASE);
    }
    tb_lock_give(&e->fill_lock);
    if (!fill)
        return NULL;
    fill->token += TB_MAX_FILLS; /* a new generation over the same index: an old token never matches (R5) */
    fill->layer = layer;
    fill->block = block;
    fill->want = want;
    fill->staged = fill->zeros = fill->writing = fill->inflight = 0;
    fill->slot = fill->new_slot = 0;
    fill->result = fill->gave_up = 0;
    fill->told = fill->ahead = 0;
    __atomic_store_n(&fill->waited, 0, __ATOMIC_RELAXED);
    fill->parked = NULL;
    fill->parked_end = &fill->parked;
    TB_ADD(&e->fills_active, 1);
    layer->entries[block].fill = (uint32_t)(fill - e->fills) + 1;
    layer->entries[block].overtaken = layer->is_volume ? tb_writes_in(layer, block) : 0;
    __atomic_store_n(&fill->state, FILL_ASKED, __ATOMIC_RELEASE);
    return fill;
}

/* *stale: pages that were written or discarded since the fill began. Who parked on one of them looks again when it ends. */
static tb_req *take_parked(tb_fill *fill, uint16_t *stale)
{
    tb_lock *stripe = tb_stripe(fill->layer, fill->block);
    tb_lock_take(stripe);
    tb_req *list = fill->parked;
    *stale = fill->layer->entries[fill->block].overtaken;
    fill->parked = NULL;
    fill->parked_end = &fill->parked;
    tb_lock_give(stripe);
    return list;
}

/* Gives every parked request what is staged of it; the complete ones go back to their owners. The list is taken off
 * while bytes are copied, since no lock is held that long; who parks meanwhile is seen by the next call or the end. */
void tb_fill_put(tb_engine *e, tb_fill *fill)
{
    const uint8_t *staged = e->staging + fill->staging_offset;
    uint16_t stale;
    tb_req *list = take_parked(fill, &stale), *keep = NULL, **keep_end = &keep;
    while (list) {
        tb_req *req = list;
        list = req->next;
        tb_put(req, fill->staged & (uint16_t)~stale, staged);
        if (!req->need)
            tb_queue_hand_back(req);
        else {
            *keep_end = req;
            keep_end = &req->next;
        }
    }
    if (!keep)
        return;
    tb_lock *stripe = tb_stripe(fill->layer, fill->block);
    tb_lock_take(stripe);
    *keep_end = fill->parked;
    if (!fill->parked)
        fill->parked_end = keep_end;
    fill->parked = keep;
    tb_lock_give(stripe);
}

void tb_hand_back_all(tb_req *list, int result)
{
    while (list) {
        tb_req *req = list;
        list = req->next;
        req->result = result;
        tb_queue_hand_back(req);
    }
}

/* The end of a fill, after its bytes are in the slot or nowhere: masks and slot in one store, then everybody who waits
 * looks again. `result` is what Python is told: 0 kept, 1 not kept, or a negative errno. */
void tb_fill_end(tb_engine *e, tb_fill *fill, int result, uint16_t cached, uint16_t zero)
{
    tb_layer *layer = fill->layer;
    tb_entry *entry = &layer->entries[fill->block];
    tb_lock *stripe = tb_stripe(layer, fill->block);
    int waiters_result = result < 0 && !fill->staged ? result : 0;
    if (cached && fill->new_slot)
        tb_slot_own(e, fill->slot, layer, fill->block);
    tb_lock_take(stripe);
    tb_head head = entry->head;
    uint16_t known = layer->is_volume ? entry->overtaken : 0; /* not by writes and discards, which have waited: learned, see far.c */
    if (cached) {
        if (!head.slot)
            head.slot = fill->slot;
        if (fill->new_slot && !layer->is_volume) {
            head.flags = (head.flags & (TB_ENTRY_MARKED | TB_ENTRY_PINNED)) | TB_ENTRY_PROBATION;
            entry->born = e->clock;
            TB_ADD(&e->probation, 1);
        }
        cached &= (uint16_t)~known;
        head.cached |= cached;
    }
    zero &= (uint16_t)~known;
    head.zero |= zero;
    entry->fill = 0;
    uint32_t dropped = layer->is_volume ? tb_entry_drop_slot(layer, entry, &head) : 0;
    bool changed = cached || zero || head.slot != entry->head.slot;
    tb_entry_change(layer, entry, head);
    if (changed)
        tb_map_mark(layer, fill->block);
    if (dropped)
        tb_slot_quarantine(e, dropped);
    tb_req *awake = layer->is_volume ? tb_waiters_in(layer, fill->block) : NULL; /* writes of its pages, see volume.c */
    tb_req *list = fill->parked;
    fill->parked = NULL;
    __atomic_store_n(&fill->state, FILL_FREE, __ATOMIC_RELEASE);
    /* Under the lock, so that it is said before the MISS of whoever finds no fill here any more (I7). */
    tb_say(e, (tb_record){.kind = TB_EV_FILLED, .layer = layer->id, .token = fill->token, .block = fill->block,
                       .value = fill->staging_offset, .result = result, .pages = cached | zero});
    tb_lock_give(stripe);
    tb_hand_back_all(list, waiters_result);
    tb_hand_back_all(awake, 0);
    tb_lock_take(&e->fill_lock);
    fill->next = e->fill_free;
    e->fill_free = fill;
    tb_lock_give(&e->fill_lock);
    TB_ADD(&e->fills_active, -1u);
}

/* Everything that will come has come; see tb_write_add for `more`. A block of nothing but zeros needs no slot. */
void tb_fill_keep(tb_engine *e, tb_fill *fill, bool more)
{
    tb_layer *layer = fill->layer;
    uint16_t valid = tb_valid_pages(layer, fill->block);
    tb_lock *stripe = tb_stripe(layer, fill->block);
    tb_lock_take(stripe);
    tb_entry *entry = &layer->entries[fill->block];
    tb_head head = entry->head;
    fill->writing = fill->staged & tb_missing(layer, fill->block, head) & (uint16_t)~entry->overtaken; /* I7 */
    if (head.flags & TB_ENTRY_MOVING) /* its slot is about to be another one (R2) */
        fill->writing = 0;
    fill->slot = head.slot; /* from here on nobody else gives the block one, or takes it away (R2, I7) */
    tb_lock_give(stripe);
    if (fill->writing != (uint16_t)((1u << TB_BLOCK_PAGES) - 1) || fill->zeros == valid || head.slot)
        tb_write_gap(e, fill->staging_offset);
    if (fill->zeros == valid && !head.slot && fill->writing == valid) {
        TB_COUNT(&e->stats.zero_blocks, 1);
        tb_fill_end(e, fill, 0, 0, valid);
        return;
    }
    if (!fill->writing) {
        tb_fill_end(e, fill, 0, 0, 0);
        return;
    }
    tb_write_add(e, fill, more);
}

static bool all_zero(const uint8_t *page)
{
    return page[0] == 0 && memcmp(page, page + 1, TB_PAGE_BYTES - 1) == 0;
}

void tb_fill_stage(tb_engine *e, tb_fill *fill, uint16_t pages)
{
    uint8_t *block = e->staging + fill->staging_offset;
    uint64_t left = fill->layer->size_bytes - fill->block * TB_BLOCK_BYTES;
    if (left < TB_BLOCK_BYTES && left % TB_PAGE_BYTES) /* the tail page's missing sectors read as zeros (DESIGN 5) */
        memset(block + left, 0, TB_PAGE_BYTES - left % TB_PAGE_BYTES);
    for (unsigned page = 0; page < TB_BLOCK_PAGES; page++)
        if (pages >> page & 1 && all_zero(block + page * TB_PAGE_BYTES))
            fill->zeros |= (uint16_t)(1u << page);
    __atomic_store_n(&fill->staged, fill->staged | pages, __ATOMIC_RELAXED); /* tb_park looks at it */
}
