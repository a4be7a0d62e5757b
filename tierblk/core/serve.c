/* A read, from look-up to completion, whichever door it came through: of the volume where it has a page, else of the base, else
 * zeros (DESIGN 5). All of it runs in the queue's own thread. */
#include "core.h"

/* The pages that [offset, offset + length) of a block touches; length > 0. */
uint16_t tb_pages_of(uint32_t offset, uint32_t length)
{
    uint32_t first = offset / TB_PAGE_BYTES, last = (offset + length - 1) / TB_PAGE_BYTES;
    return (uint16_t)((2u << last) - (1u << first));
}

/* Those that it covers from end to end; of a device that ends inside its tail page never that one. */
uint16_t tb_whole_pages_of(uint32_t offset, uint32_t length)
{
    uint32_t first = (offset + TB_PAGE_BYTES - 1) / TB_PAGE_BYTES, stop = (offset + length) / TB_PAGE_BYTES;
    return first < stop ? (uint16_t)((1u << stop) - (1u << first)) : 0;
}

/* The request's bytes that lie in pages [first, last], as a range within the block. */
static void span(const tb_req *req, uint32_t first, uint32_t last, uint32_t *start, uint32_t *end)
{
    uint32_t request_end = req->offset + req->length;
    *start = first * TB_PAGE_BYTES > req->offset ? first * TB_PAGE_BYTES : req->offset;
    *end = (last + 1) * TB_PAGE_BYTES < request_end ? (last + 1) * TB_PAGE_BYTES : request_end;
}

/* Takes the lowest run of set bits out of *mask. */
static void next_run(uint16_t *mask, uint32_t *first, uint32_t *last)
{
    *first = (uint32_t)__builtin_ctz(*mask);
    *last = *first + (uint32_t)__builtin_ctz(~((uint32_t)*mask >> *first)) - 1;
    *mask &= (uint16_t)~((2u << *last) - (1u << *first));
}

/* Where in /dev/ublkcN the bytes of a request lie that has no buffer of ours (ublk.md, 5.3). */
uint64_t tb_copy_pos(const tb_req *req)
{
    return req->queue->copy_pos + ((uint64_t)req->tag << 25);
}

/* Into the request's own pages, from any thread. It copies and waits for nothing. */
static bool write_into(const tb_req *req, const uint8_t *from, uint32_t length, uint32_t at)
{
    ssize_t written;
    do
        written = pwrite(req->queue->copy_fd, from, length, (off_t)(tb_copy_pos(req) + at));
    while (written < 0 && errno == EINTR);
    return written == (ssize_t)length;
}

/* Bytes from a staged or any other copy of the whole block, for those of `pages` that the request still needs. The
 * filler calls this too, for a request that is parked with it. */
void tb_put(tb_req *req, uint16_t pages, const uint8_t *block_bytes)
{
    uint16_t put = pages & req->need & req->of_layer, mask = put;
    while (mask) {
        uint32_t first, last, start, end;
        next_run(&mask, &first, &last);
        span(req, first, last, &start, &end);
        if (!req->direct)
            memcpy(req->data + (start - req->offset), block_bytes + start, end - start);
        else if (!write_into(req, block_bytes + start, end - start, start - req->offset)) {
            req->result = -EIO; /* the driver took the request back: nobody gets it any more */
            put = req->need;
            break;
        }
    }
    req->need &= (uint16_t)~put;
}

static const uint8_t zeros[TB_BLOCK_BYTES] __attribute__((aligned(TB_PAGE_BYTES)));

static void put_zeros(tb_req *req, uint16_t mask)
{
    while (mask) {
        uint32_t first, last, start, end;
        next_run(&mask, &first, &last);
        span(req, first, last, &start, &end);
        if (!req->direct) {
            memset(req->data + (start - req->offset), 0, end - start);
            continue;
        }
        struct io_uring_sqe *sqe = tb_sqe(&req->queue->ring);
        io_uring_prep_write(sqe, 1, zeros, end - start, tb_copy_pos(req) + (start - req->offset));
        sqe->flags |= IOSQE_FIXED_FILE;
        sqe->user_data = tb_ud(req, UD_ZEROS, end - start);
        req->inflight++;
    }
}

/* One SQE a run. Where the cache's disk wants more than sectors, the read is widened inside its own pages: the request's
 * data was laid out so that those bytes are the tag's own (begin of the request in tb_ublk, tb_local). A direct request
 * needs no widening, or it would not be one; its registered buffer has the number of its tag and begins at 0. */
static void read_slot(tb_req *req, uint32_t slot, uint16_t mask, unsigned kind)
{
    tb_queue *queue = req->queue;
    uint32_t align = queue->engine->dio_align;
    while (mask) {
        uint32_t first, last, start, end;
        next_run(&mask, &first, &last);
        span(req, first, last, &start, &end);
        struct io_uring_sqe *sqe = tb_sqe(&queue->ring);
        if (req->direct)
            io_uring_prep_read_fixed(sqe, 0, (void *)(uintptr_t)(start - req->offset), end - start,
                                     (uint64_t)slot * TB_BLOCK_BYTES + start, req->tag);
        else {
            start = start / align * align;
            end = (uint32_t)tb_round_up(end, align);
            io_uring_prep_read(sqe, 0, req->data + (int64_t)start - req->offset, end - start,
                               (uint64_t)slot * TB_BLOCK_BYTES + start);
        }
        sqe->flags |= IOSQE_FIXED_FILE;
        sqe->user_data = tb_ud(req, kind, end - start);
        req->inflight++;
    }
}

/* SIEVE's visited bit. The first hit after a fill proves little: a sequential reader touches a block many times within
 * moments. It only counts when other fills came between (the clock moved), so a scan stays on probation. */
static void note_hit(tb_engine *engine, tb_entry *entry)
{
    uint16_t flags = entry->head.flags;
    if (flags & TB_ENTRY_PROBATION) {
        if ((uint16_t)(TB_LOAD(&engine->clock) - entry->born) == 0)
            return;
        flags &= (uint16_t)~TB_ENTRY_PROBATION;
        TB_ADD(&engine->probation, -1u);
    }
    if (flags != (entry->head.flags | TB_ENTRY_REFERENCED))
        entry->head.flags = flags | TB_ENTRY_REFERENCED;
}

static void fail(tb_req *req, int result)
{
    req->result = result;
    tb_over(req);
}

/* Where the pages that a request still needs are. */
typedef struct {
    uint32_t volume_slot, base_slot;
    uint16_t in_volume, in_base, zero;
} sources;

/* Fewer reads on an entry. Whoever takes the last of them away from a block that has lost its pages meanwhile takes the slot
 * as well (R2). */
static void unpin(tb_layer *layer, uint64_t block)
{
    tb_lock *stripe = tb_stripe(layer, block);
    tb_lock_take(stripe);
    tb_entry *entry = &layer->entries[block];
    tb_head head = entry->head;
    entry->readers--;
    uint32_t dropped = tb_entry_drop_slot(layer, entry, &head);
    if (head.slot != entry->head.slot)
        tb_entry_store(entry, head);
    if (dropped)
        tb_slot_quarantine(layer->engine, dropped);
    tb_req *awake = head.flags & TB_ENTRY_MOVING && !entry->readers ? tb_waiters_in(layer, block) : NULL;
    tb_lock_give(stripe);
    tb_hand_back_all(awake, 0);
}

/* False: the request is parked or has failed. A page that the volume has and that is nowhere here is in the store; without one it is
 * in a row of the index that was damaged (R9): never the base's, which is older. */
static bool look_in_volume(tb_req *req, tb_layer *volume, sources *from)
{
    if (!tb_map_has(volume, req->block))
        return true;
    tb_lock *stripe = tb_stripe(volume, req->block);
    tb_lock_take(stripe);
    tb_entry *entry = &volume->entries[req->block];
    tb_head head = entry->head;
    if (__builtin_expect(head.flags & TB_ENTRY_MOVING && req->need & head.cached, 0)) {
        tb_wait_in_block(req); /* R2: its slot is about to be another one */
        tb_lock_give(stripe);
        return false;
    }
    uint16_t missing = req->need & tb_missing(volume, req->block, head);
    bool lost = missing && !volume->is_write_back;
    if (__builtin_expect(head.flags & TB_ENTRY_MARKED, 0))
        tb_touched(volume, req->block);
    if (missing && !lost) {
        req->of_layer = missing;
        tb_park(req, volume, stripe, missing);
        return false;
    }
    from->in_volume = lost ? 0 : req->need & head.cached;
    from->zero = req->need & head.zero;
    from->volume_slot = head.slot;
    if (from->in_volume) {
        entry->readers++; /* R2: the slot stays while it is read */
        if (volume->is_write_back)
            note_hit(volume->engine, entry);
    }
    tb_lock_give(stripe);
    req->pinned = from->in_volume ? PIN_VOLUME : 0;
    if (lost)
        fail(req, -EIO);
    return !lost;
}

/* `rest`: pages that the volume does not have. False: the request is parked, has failed, or was served out of memory. */
static bool look_in_base(tb_req *req, tb_layer *base, uint16_t rest, sources *from)
{
    int rc = tb_map_prepare(base, req->block);
    if (rc) {
        if (req->pinned)
            unpin(req->queue->volume, req->block);
        fail(req, rc);
        return false;
    }
    tb_queue *queue = req->queue;
    tb_lock *stripe = tb_stripe(base, req->block);
    tb_entry *entry = &base->entries[req->block];
    req->from_memory = queue->hot && req->phase == AT_READ && rest == tb_pages_of(req->offset, req->length) && tb_hot_serve(req);
    tb_lock_take(stripe);
    tb_head head = entry->head;
    if (__builtin_expect(head.flags & TB_ENTRY_MARKED, 0))
        tb_touched(base, req->block);
    uint16_t missing = rest & (uint16_t)~(head.cached | head.zero);
    if (req->from_memory) {
        if (!missing)
            note_hit(base->engine, entry); /* what is hot above stays hot below */
        tb_lock_give(stripe);
        req->all_zero = 0;
        req->need = 0;
        tb_finish(req);
        return false;
    }
    if (missing && req->pinned) { /* nothing is held while it waits; and then nothing is known any more */
        tb_lock_give(stripe);
        unpin(queue->volume, req->block);
        req->pinned = 0;
        tb_lock_take(stripe);
        head = entry->head;
        missing = rest & (uint16_t)~(head.cached | head.zero);
        if (!missing) {
            tb_lock_give(stripe);
            tb_serve(req);
            return false;
        }
    }
    if (missing) {
        req->of_layer = rest;
        tb_park(req, base, stripe, missing);
        return false;
    }
    from->in_base = rest & head.cached;
    from->zero |= rest & head.zero;
    from->base_slot = head.slot;
    if (from->in_base) {
        entry->readers++;
        note_hit(base->engine, entry);
        req->pinned |= PIN_BASE;
    }
    tb_lock_give(stripe);
    return true;
}

/* Looks up every page that the request still needs and serves it, or parks it. Woken requests come through here again,
 * from the start (R5). */
void tb_serve(tb_req *req)
{
    tb_queue *queue = req->queue;
    tb_layer *volume = queue->volume, *base = queue->base;
    sources from = {0};
    req->pinned = 0;
    if (volume && !look_in_volume(req, volume, &from))
        return;
    uint16_t rest = req->need & (uint16_t)~(from.in_volume | from.zero);
    if (volume) { /* the device may be larger than the base, and a base that has no page reads as zeros */
        uint16_t there = base && req->block < base->blocks ? tb_valid_pages(base, req->block) : 0;
        from.zero |= rest & (uint16_t)~there;
        rest &= there;
    }
    if (rest && !look_in_base(req, base, rest, &from))
        return;
    req->all_zero = !from.in_volume && !from.in_base;
    req->inflight = 0;
    if (queue->hot && req->phase == AT_READ && from.in_base && from.in_base == tb_pages_of(req->offset, req->length))
        tb_hot_consider(req);
    put_zeros(req, from.zero);
    if (from.in_volume)
        read_slot(req, from.volume_slot, from.in_volume, UD_VOLUME_READ);
    if (from.in_base)
        read_slot(req, from.base_slot, from.in_base, UD_SLOT_READ);
    if (!req->inflight) {
        req->need = 0;
        tb_over(req);
    }
}

/* What slot_failed remembers of a request's slot reads until the last of them is over. */
enum { AGAIN = 1, BAD_SLOT = 2, BY_BUFFER = 4, BAD_VOLUME = 8 };

/* One of a request's reads or writes is over; true when it was the last. The entries are let go of then. */
static bool last_done(tb_req *req)
{
    if (--req->inflight)
        return false;
    tb_queue *queue = req->queue;
    if (req->pinned & PIN_VOLUME) {
        if (req->slot_failed & BAD_VOLUME && tb_forget_of_volume(queue->volume, req->block))
            req->slot_failed = (req->slot_failed & ~BAD_VOLUME) | AGAIN; /* BAD_SLOT is the base's own */
        unpin(queue->volume, req->block);
    }
    if (req->pinned & PIN_BASE) {
        tb_layer *layer = queue->base;
        tb_entry *entry = &layer->entries[req->block];
        tb_lock *stripe = tb_stripe(layer, req->block);
        tb_lock_take(stripe);
        entry->readers--;
        if (req->slot_failed & BAD_SLOT && !entry->head.dirty)
            tb_forget_block(layer, entry, req->block);
        tb_lock_give(stripe);
    }
    req->pinned = 0;
    return true;
}

static void finish_or_repeat(tb_req *req)
{
    if (req->slot_failed & BY_BUFFER)
        req->direct = 0; /* through our own buffer, then: all of it, whatever is in the request's pages already */
    if (req->slot_failed & BAD_VOLUME) /* nobody else has these bytes (DESIGN 9) */
        req->result = -EIO;
    if (!req->slot_failed || req->result < 0) {
        req->need = 0;
        if (req->frame && !req->slot_failed && !req->result)
            tb_hot_keep(req);
        tb_hot_let_go(req);
        tb_over(req);
        return;
    }
    tb_hot_let_go(req);
    req->slot_failed = 0;
    if (++req->tries > 4) {
        fail(req, -EIO);
        return;
    }
    req->need = req->phase == AT_OLD ? req->owns : tb_pages_of(req->offset, req->length);
    tb_serve(req);
}

void tb_slot_read_done(tb_req *req, int result, uint32_t expected, bool of_volume)
{
    if (req->direct && (result == -EINVAL || result == -EIO)) {
        /* The disk cannot reach memory that lies like this; or a filesystem with checksums met pages that their owner
         * changes while they are read, which is no fault of the slot. */
        req->slot_failed |= BY_BUFFER;
    } else if (result != (int)expected) {
        req->slot_failed |= result == -EAGAIN || result == -EINTR ? AGAIN : of_volume ? BAD_VOLUME : BAD_SLOT;
        TB_COUNT(&req->queue->stats.slot_errors, 1);
    }
    if (last_done(req))
        finish_or_repeat(req);
}

void tb_zeros_done(tb_req *req, int result, uint32_t expected)
{
    if (result != (int)expected)
        req->result = -EIO; /* see tb_put */
    if (last_done(req))
        finish_or_repeat(req);
}
