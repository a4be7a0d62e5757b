/* DISCARD and WRITE_ZEROES: masks change and no byte moves, but for the edges of a WRITE_ZEROES that lie inside a page. Slice by
 * slice, so that neither the queue's other requests nor a stripe wait for a large one. What nobody ever touched of a
 * volume without a base is passed over unseen. NOUNMAP changes nothing: a volume is thin, and what it keeps for zeros is no slot. */
#include "core.h"

#define SLICE_BLOCKS 512u

static bool is_edge(const tb_req *req)
{
    return req->start % TB_PAGE_BYTES || req->end - req->start < TB_PAGE_BYTES;
}

/* The pages of a block that read as zeros when the volume does not have them. */
static uint16_t zero_below(const tb_queue *queue, uint64_t block)
{
    const tb_layer *base = queue->base;
    return base && block < base->blocks ? (uint16_t)~tb_valid_pages(base, block) : 0xffff;
}

/* One block's part of it; false: it waits for an owner of one of the pages, or has failed. */
static bool clear_block(tb_req *req, uint16_t pages)
{
    tb_queue *queue = req->queue;
    tb_layer *volume = queue->volume;
    int rc = tb_map_prepare(volume, req->block);
    if (rc) {
        req->result = rc;
        tb_finish(req);
        return false;
    }
    tb_lock *stripe = tb_stripe(volume, req->block);
    tb_lock_take(stripe);
    if (tb_wait_for_writes(req, pages, 0)) {
        tb_lock_give(stripe);
        return false;
    }
    tb_entry *entry = &volume->entries[req->block];
    tb_head head = entry->head;
    if (head.flags & TB_ENTRY_MOVING || tb_filling(volume, entry) & pages || tb_epoch_touch(volume, req->block, entry, &head)) {
        tb_wait_in_block(req);
        tb_lock_give(stripe);
        return false;
    }
    tb_head before = entry->head;
    /* What the store may have stays known as zeros, or its bytes would come back. */
    uint16_t kept = volume->is_write_back ? head.present : 0;
    uint16_t absent = pages & zero_below(queue, req->block) & (uint16_t)~kept, zero = pages & (uint16_t)~absent;
    head.present = (head.present & (uint16_t)~absent) | zero;
    head.zero = (head.zero & (uint16_t)~absent) | zero;
    head.dirty = (head.dirty & (uint16_t)~absent) | zero;
    head.cached &= (uint16_t)~pages;
    head.flags &= (uint16_t)~TB_ENTRY_STILL; /* sums that are being made are not those of its dirty pages any more */
    tb_epoch_freshen(volume, &head, pages);
    entry->overtaken |= pages;
    uint32_t dropped = tb_entry_drop_slot(volume, entry, &head);
    tb_entry_change(volume, entry, head);
    if (memcmp(&before, &head, sizeof head))
        tb_map_mark(volume, req->block);
    if (dropped)
        tb_slot_quarantine(queue->engine, dropped);
    tb_lock_give(stripe);
    return true;
}

/* The part of a WRITE_ZEROES that lies inside a page is a write of zeros. */
static void write_edge(tb_req *req)
{
    uint64_t page_end = tb_round_up(req->start + 1, TB_PAGE_BYTES), stop = page_end < req->end ? page_end : req->end;
    req->block = req->start / TB_BLOCK_BYTES;
    req->offset = (uint32_t)(req->start % TB_BLOCK_BYTES);
    req->length = (uint32_t)(stop - req->start);
    req->start = stop; /* it comes back to tb_clear_go when it is written */
    req->direct = 0;
    req->since_ms = 0;
    req->phase = AT_WRITE;
    memset(req->buffer + req->offset % TB_PAGE_BYTES, 0, req->length);
    tb_write_lookup(req);
}

static void go_on_next_turn(tb_req *req)
{
    req->next = req->queue->slices;
    req->queue->slices = req;
}

void tb_clear_go(tb_req *req)
{
    tb_queue *queue = req->queue;
    tb_layer *volume = queue->volume;
    req->phase = AT_CLEAR;
    for (unsigned done = 0; req->start < req->end && !req->result && !TB_LOAD(&queue->leaving); done++) {
        if (done == SLICE_BLOCKS) {
            go_on_next_turn(req);
            return;
        }
        req->block = req->start / TB_BLOCK_BYTES;
        if (!queue->base || req->block >= queue->base->blocks) {
            uint64_t last = (req->end - 1) / TB_BLOCK_BYTES + 1, next = tb_map_next(volume, req->block, last);
            if (next > req->block) {
                uint64_t at = next * TB_BLOCK_BYTES;
                req->start = at < req->end ? at : req->end;
                continue;
            }
        }
        if (is_edge(req)) {
            write_edge(req);
            return;
        }
        uint32_t offset = (uint32_t)(req->start % TB_BLOCK_BYTES);
        uint64_t left = req->end - req->start, room = TB_BLOCK_BYTES - offset, length = left < room ? left : room;
        length -= (offset + length) % TB_PAGE_BYTES; /* the rest is an edge */
        if (!clear_block(req, tb_pages_of(offset, (uint32_t)length)))
            return;
        req->start += length;
    }
    if (!req->result && req->fua)
        tb_sync(req);
    else
        tb_finish(req);
}

/* start, end: bytes of the device. Contents after a DISCARD are the device's choice: here the whole pages in it read as zeros. */
void tb_clear_begin(tb_req *req)
{
    TB_COUNT(&req->queue->stats.discard_bytes, req->end - req->start);
    req->length = 0;
    if (req->op == TB_OP_DISCARD) {
        req->start = tb_round_up(req->start, TB_PAGE_BYTES);
        uint64_t end = req->end == req->queue->size_bytes ? tb_round_up(req->end, TB_PAGE_BYTES) : req->end / TB_PAGE_BYTES * TB_PAGE_BYTES;
        req->end = end > req->start ? end : req->start;
    }
    tb_clear_go(req);
}

/* Once a turn. */
void tb_clear_turn(tb_queue *queue)
{
    tb_req *list = queue->slices;
    queue->slices = NULL;
    while (list) {
        tb_req *req = list;
        list = req->next;
        tb_clear_go(req);
    }
}
