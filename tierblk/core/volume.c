/* A write, from look-up to completion: whole pages go straight into the slot of their block in the volume, and only their mask
 * bits are set. It never waits for the network; a page that is written in part is read first, from wherever it is (DESIGN 5).
 * All of it runs in the queue's own thread.
 *
 * The bytes of a request that begins or ends inside a page lie in the tag's buffer as they will in the slot, from the begin of
 * their first page on; others lie where the door has them. */
#define _GNU_SOURCE
#include "core.h"

static tb_stripe_state *stripe_of(const tb_req *req)
{
    return tb_stripe_of(req->queue->volume, req->block);
}

static bool of_one_block(const tb_req *one, const tb_req *other)
{
    return one->block == other->block && one->queue->volume == other->queue->volume;
}

static uint16_t touched(const tb_req *req)
{
    return tb_pages_of(req->offset, req->length);
}

/* Under the stripe lock (R4): whether the request has to wait before it changes these pages of its block, of which it wants
 * `own` to itself. If so it comes back when the other has ended. Whole-page writes of one page may be under way together. */
bool tb_wait_for_writes(tb_req *req, uint16_t pages, uint16_t own)
{
    tb_stripe_state *stripe = stripe_of(req);
    for (tb_req *other = stripe->writing; other; other = other->next_writing)
        if (other != req && (other->owns & pages || other->writes & own) && of_one_block(other, req)) {
            tb_wait_in_block(req);
            return true;
        }
    return false;
}

/* Under the stripe lock: pages of a block whose writes are on their way to the slot. */
uint16_t tb_writes_in(const tb_layer *volume, uint64_t block)
{
    uint16_t pages = 0;
    for (const tb_req *req = tb_stripe_of(volume, block)->writing; req; req = req->next_writing)
        if (req->slot && req->block == block && req->queue->volume == volume)
            pages |= req->writes;
    return pages;
}

/* Under the stripe lock: it comes back when a write of its block has ended, or moved it, or a fill of it. */
void tb_wait_in_block(tb_req *req)
{
    tb_stripe_state *stripe = stripe_of(req);
    TB_ADD(&req->queue->stats.waiting, 1);
    req->next = stripe->waiting;
    stripe->waiting = req;
}

/* Under the stripe lock: those who wait in a block, to be handed back without the lock. */
tb_req *tb_waiters_in(const tb_layer *volume, uint64_t block)
{
    tb_req **link = &tb_stripe_of(volume, block)->waiting, *awake = NULL;
    while (*link) {
        tb_req *waiter = *link;
        if (waiter->block != block || waiter->queue->volume != volume) {
            link = &waiter->next;
            continue;
        }
        *link = waiter->next;
        waiter->next = awake; /* a stack over a stack: the first come is the first */
        awake = waiter;
    }
    return awake;
}

/* Under the stripe lock. */
static void enlist(tb_req *req, uint16_t pages, uint16_t own)
{
    tb_stripe_state *stripe = stripe_of(req);
    req->owns = own;
    req->writes = pages;
    req->next_writing = stripe->writing;
    req->writing_link = &stripe->writing;
    if (stripe->writing)
        stripe->writing->writing_link = &req->next_writing;
    stripe->writing = req;
}

/* Under the stripe lock: it changes nothing any more. Returns those who waited in its block, to be handed back without the
 * lock. */
static tb_req *delist(tb_req *req)
{
    if (!req->writes)
        return NULL;
    *req->writing_link = req->next_writing;
    if (req->next_writing)
        req->next_writing->writing_link = req->writing_link;
    req->writes = req->owns = 0;
    return tb_waiters_in(req->queue->volume, req->block);
}

static void end(tb_req *req, int result)
{
    tb_lock *lock = &stripe_of(req)->lock;
    tb_lock_take(lock);
    tb_req *awake = delist(req);
    tb_lock_give(lock);
    tb_hand_back_all(awake, 0);
    req->result = result;
    if (req->op == TB_OP_ZEROES && result == 0) /* this was one of its edges */
        tb_clear_go(req);
    else if (req->fua && result == 0)
        tb_sync(req); /* R7: a FLUSH that begins after the write */
    else
        tb_finish(req);
}

/* The request's bytes into the tag's buffer, where they are not there: they stay in the request's own pages on plane zero-copy. */
static void fetch_data(tb_req *req)
{
    struct io_uring_sqe *sqe = tb_sqe(&req->queue->ring);
    io_uring_prep_read(sqe, 1, req->buffer + req->offset % TB_PAGE_BYTES, req->length, tb_copy_pos(req));
    sqe->flags |= IOSQE_FIXED_FILE;
    sqe->user_data = tb_ud(req, UD_DATA, req->length);
    TB_COUNT(&req->queue->stats.bounced, 1);
}

static void write_slot(tb_req *req)
{
    uint32_t start = req->offset / TB_PAGE_BYTES * TB_PAGE_BYTES;
    uint32_t length = (uint32_t)tb_round_up(req->offset + req->length, TB_PAGE_BYTES) - start;
    struct io_uring_sqe *sqe = tb_sqe(&req->queue->ring);
    uint64_t at = (uint64_t)req->slot * TB_BLOCK_BYTES + start;
    if (req->direct)
        io_uring_prep_write_fixed(sqe, 0, NULL, length, at, req->tag);
    else
        io_uring_prep_write(sqe, 0, req->buffer, length, at);
    sqe->flags |= IOSQE_FIXED_FILE;
    sqe->user_data = tb_ud(req, UD_WRITE, length);
}

static void submit(tb_req *req)
{
    if (!tb_give_way(req))
        write_slot(req);
}

void tb_write_failed(tb_req *req, int result)
{
    end(req, result);
}

static void over(tb_req *req, int result, uint32_t expected);

void tb_data_done(tb_req *req, int result, uint32_t expected)
{
    req->direct = 0;
    if (result == (int)expected) {
        if (req->slot)
            submit(req);
        else
            tb_write_lookup(req);
    } else if (req->slot) /* the driver took the request back; what is in the slot is what was there */
        over(req, -EIO, 0);
    else
        end(req, -EIO);
}

/* A WRITE has come; block, offset, length; its data is in the tag's buffer from `buffer` on, or in its own pages. */
void tb_write_begin(tb_req *req)
{
    uint32_t skew = req->offset % TB_PAGE_BYTES;
    bool in_part = skew || (req->offset + req->length) % TB_PAGE_BYTES;
    req->phase = AT_WRITE;
    if (in_part)
        TB_COUNT(&req->queue->stats.partial_writes, 1);
    if (req->queue->copy_fd >= 0 && (in_part || !req->direct)) {
        fetch_data(req);
        return;
    }
    if (skew)
        memmove(req->buffer + skew, req->buffer, req->length);
    tb_write_lookup(req);
}

/* What the pages hold that are written in part. They are the request's own until it ends, so nobody changes them. */
static void read_old(tb_req *req)
{
    req->phase = AT_OLD;
    req->asked_offset = req->offset;
    req->asked_length = req->length;
    req->offset = 0;
    req->length = TB_BLOCK_BYTES;
    req->data = req->queue->olds + (size_t)req->tag * TB_BLOCK_BYTES;
    req->need = req->owns;
    tb_serve(req);
}

void tb_old_read(tb_req *req)
{
    const uint8_t *old = req->queue->olds + (size_t)req->tag * TB_BLOCK_BYTES;
    req->phase = AT_WRITE;
    req->offset = req->asked_offset;
    req->length = req->asked_length;
    req->slot_failed = req->tries = 0;
    if (req->result < 0) {
        end(req, req->result);
        return;
    }
    uint32_t skew = req->offset % TB_PAGE_BYTES, stop = req->offset + req->length, rest = (uint32_t)tb_round_up(stop, TB_PAGE_BYTES) - stop;
    memcpy(req->buffer, old + req->offset - skew, skew);
    memcpy(req->buffer + skew + req->length, old + stop, rest);
    tb_write_lookup(req);
}

/* Under the stripe lock, which it gives back. moves: any free slot will do (R14). */
void tb_wait_for_space(tb_req *req, tb_lock *stripe, bool moves)
{
    tb_engine *e = req->queue->engine;
    bool drains = __atomic_load_n(&req->queue->draining, __ATOMIC_SEQ_CST);
    if (!drains)
        tb_needy_push(e, req);
    tb_lock_give(stripe);
    if (drains) {
        end(req, -EIO);
        return;
    }
    TB_COUNT(&req->queue->stats.space_waits, 1);
    tb_rouse(e);
    if (tb_refused_leave(req->queue->volume)) /* tb_layer_refuse may have woken those who waited before this one did */
        return;
    if (moves ? TB_LOAD(&e->free_count) != 0 : tb_slot_for_all(e)) /* freed since it looked: whoever freed them may have woken nobody */
        tb_needy_wake(e, NULL, 0);
    else if (tb_need_space(e))
        tb_ring_kick(&e->events);
}

/* Looked up anew each time that it was woken: for its pages, its slot, and then the write. */
void tb_write_lookup(tb_req *req)
{
    tb_queue *queue = req->queue;
    tb_layer *volume = queue->volume;
    if (req->result < 0) {
        end(req, req->result);
        return;
    }
    int rc = tb_map_prepare(volume, req->block);
    if (rc) {
        end(req, rc);
        return;
    }
    uint16_t pages = touched(req), in_part = pages & (uint16_t)~tb_whole_pages_of(req->offset, req->length);
    tb_lock *stripe = &stripe_of(req)->lock;
    tb_lock_take(stripe);
    if (!req->writes) {
        if (tb_wait_for_writes(req, pages, in_part)) {
            tb_lock_give(stripe);
            return;
        }
        enlist(req, pages, in_part);
        if (in_part) {
            tb_lock_give(stripe);
            read_old(req);
            return;
        }
    }
    tb_entry *entry = &volume->entries[req->block];
    tb_head head = entry->head;
    if ((head.flags & TB_ENTRY_MOVING && !req->moves) || tb_epoch_touch(volume, req->block, entry, &head)) {
        tb_wait_in_block(req);
        tb_lock_give(stripe);
        return;
    }
    uint16_t filling = tb_filling(volume, entry);
    if (filling & pages || (filling && !head.slot)) { /* R5: for the SSD, and never for the network */
        tb_wait_in_block(req);
        tb_lock_give(stripe);
        return;
    }
    if (req->moves && !(head.flags & TB_ENTRY_SEALED)) {
        tb_move_end(req, entry, stripe);
        return;
    }
    if (head.flags & TB_ENTRY_SEALED) {
        tb_move_begin(req, entry, head, stripe);
        return;
    }
    if (!head.slot) { /* R2: without a slot nothing is in flight on it */
        if (tb_pace(req)) {
            tb_lock_give(stripe);
            return;
        }
        head.slot = tb_slot_take_for_write(queue->engine);
        if (!head.slot) {
            tb_wait_for_space(req, stripe, false);
            return;
        }
        tb_slot_own(queue->engine, head.slot, volume, req->block);
    }
    /* R3: dirty when it is submitted, since the page may be half of what it was from then on. */
    req->clean = pages & head.cached & (uint16_t)~head.dirty;
    head.dirty |= req->clean;
    head.flags &= (uint16_t)~TB_ENTRY_STILL;
    tb_epoch_freshen(volume, &head, pages);
    entry->writers++;
    entry->overtaken |= pages; /* a fill that runs leaves them alone (R5) */
    tb_entry_change_sums(volume, entry, head, entry->summed & (uint16_t)~pages); /* before a byte of the slot is another one */
    if (req->clean)
        tb_map_mark(volume, req->block);
    req->slot = head.slot;
    tb_lock_give(stripe);
    if (tb_want_space(queue->engine))
        tb_ring_kick(&queue->engine->events);
    submit(req);
}

/* The masks of a write that has ended; true: its row has changed. */
static bool settle(tb_head *head, uint16_t pages, uint16_t clean, bool ok)
{
    tb_head before = *head;
    if (ok) {
        head->present |= pages;
        head->cached |= pages;
        head->dirty |= pages;
        head->zero &= (uint16_t)~pages;
    } else { /* R3: of a clean page nobody knows what is in the slot now, and somebody else has it */
        clean &= head->cached; /* not what a discard has made zeros meanwhile */
        head->cached &= (uint16_t)~clean;
        head->dirty &= (uint16_t)~clean;
    }
    return memcmp(&before, head, sizeof before) != 0;
}

static void over(tb_req *req, int result, uint32_t expected)
{
    tb_queue *queue = req->queue;
    tb_layer *volume = queue->volume;
    bool ok = result == (int)expected && expected;
    if (!ok && req->tries < 4) {
        req->tries++;
        if (result == -EAGAIN || result == -EINTR) {
            submit(req);
            return;
        }
        if (req->direct && (result == -EINVAL || result == -EFAULT)) { /* the disk cannot reach memory that lies like this */
            fetch_data(req);
            return;
        }
    }
    tb_lock *stripe = &stripe_of(req)->lock;
    tb_lock_take(stripe);
    tb_entry *entry = &volume->entries[req->block];
    tb_head head = entry->head;
    bool changed = settle(&head, touched(req), req->clean, ok);
    entry->writers--;
    uint32_t dropped = tb_entry_drop_slot(volume, entry, &head);
    tb_entry_change(volume, entry, head);
    if (changed)
        tb_map_mark(volume, req->block);
    if (dropped)
        tb_slot_quarantine(queue->engine, dropped);
    tb_lock_give(stripe);
    req->slot = 0;
    if (!ok)
        TB_COUNT(&queue->stats.slot_errors, 1);
    end(req, ok ? 0 : result < 0 ? result : -EIO);
}

void tb_volume_write_done(tb_req *req, int result, uint32_t expected)
{
    tb_queue *queue = req->queue;
    tb_slot_write_ended(queue);
    over(req, result, expected);
    for (tb_req *next; (next = tb_write_may_go(queue));)
        write_slot(next);
}
