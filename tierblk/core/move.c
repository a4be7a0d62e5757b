/* A write to a block whose slot holds sealed bytes (epoch.c): all that is cached goes to another slot first, then the entry is switched in one
 * store (R11). Meanwhile the block is the mover's: what comes waits for it, reads as well, and reads under way are waited for (R2). Of a move
 * that a kill cuts off nothing is left: the entry still names the old slot, and nobody names the new one. */
#include "core.h"

/* Under the stripe lock, which it gives back. The waiters of the block look again. */
static void wake(tb_req *req, tb_lock *stripe)
{
    tb_req *awake = tb_waiters_in(req->queue->volume, req->block);
    tb_lock_give(stripe);
    tb_hand_back_all(awake, 0);
}

/* The block is as it was. Under the stripe lock, which it gives back. */
static void give_up(tb_req *req, tb_entry *entry, tb_lock *stripe)
{
    tb_head head = entry->head;
    head.flags &= (uint16_t)~TB_ENTRY_MOVING;
    tb_entry_store(entry, head);
    req->moves = 0;
    wake(req, stripe);
}

/* The epoch has ended, or let the slot go, while it waited. In the request's queue, under the stripe lock, which it gives back. */
void tb_move_end(tb_req *req, tb_entry *entry, tb_lock *stripe)
{
    give_up(req, entry, stripe);
    tb_write_lookup(req);
}

static void transfer(tb_req *req)
{
    tb_queue *queue = req->queue;
    bool reads = req->moves == MOVE_READS;
    uint32_t start = req->move_first * TB_PAGE_BYTES, length = (req->move_last - req->move_first + 1u) * TB_PAGE_BYTES;
    uint8_t *bytes = queue->olds + (size_t)req->tag * TB_BLOCK_BYTES + start;
    struct io_uring_sqe *sqe = tb_sqe(&queue->ring);
    if (reads)
        io_uring_prep_read(sqe, 0, bytes, length, (uint64_t)req->move_from * TB_BLOCK_BYTES + start);
    else
        io_uring_prep_write(sqe, 0, bytes, length, (uint64_t)req->move_to * TB_BLOCK_BYTES + start);
    sqe->flags |= IOSQE_FIXED_FILE;
    sqe->user_data = tb_ud(req, UD_MOVE, length);
}

/* In the request's queue, under the stripe lock, which it gives back: a write met a block that is sealed, or that it moves itself and
 * whose last reader has left. */
void tb_move_begin(tb_req *req, tb_entry *entry, tb_head head, tb_lock *stripe)
{
    head.flags |= TB_ENTRY_MOVING;
    tb_entry_store(entry, head);
    req->moves = MOVE_WAITS;
    if (entry->readers || tb_filling(req->queue->volume, entry)) {
        tb_wait_in_block(req);
        tb_lock_give(stripe);
        return;
    }
    uint32_t got = 0, slot = tb_slot_take_run(req->queue->engine, 1, true, &got);
    if (!slot) {
        give_up(req, entry, stripe);
        tb_lock_take(stripe);
        tb_wait_for_space(req, stripe, true);
        return;
    }
    req->moves = MOVE_READS;
    req->move_from = head.slot;
    req->move_to = slot;
    req->move_first = (uint8_t)__builtin_ctz(head.cached);
    req->move_last = (uint8_t)(31 - __builtin_clz(head.cached));
    tb_lock_give(stripe);
    if (tb_want_space(req->queue->engine))
        tb_ring_kick(&req->queue->engine->events);
    transfer(req);
}

/* Sums go with their pages. False: of a clean page one does not fit then, and costs a refetch; dirty ones have none. */
static bool copy_sums(const tb_req *req)
{
    uint32_t sums[TB_BLOCK_PAGES];
    int fd = req->queue->engine->sums_fd;
    return pread(fd, sums, sizeof sums, (off_t)req->move_from * 64) == (ssize_t)sizeof sums &&
           pwrite(fd, sums, sizeof sums, (off_t)req->move_to * 64) == (ssize_t)sizeof sums;
}

/* The entry gets its new slot; the old one is the epoch's, which may have ended meanwhile. */
static void switch_over(tb_req *req, tb_entry *entry, tb_lock *stripe, bool with_sums)
{
    tb_layer *volume = req->queue->volume;
    tb_head head = entry->head;
    uint32_t left = head.slot;
    tb_slot_own(volume->engine, req->move_to, volume, req->block);
    head.slot = req->move_to;
    head.flags &= (uint16_t)~(TB_ENTRY_MOVING | TB_ENTRY_SEALED | TB_ENTRY_STILL);
    tb_entry_change_sums(volume, entry, head, with_sums ? entry->summed : 0);
    tb_map_mark(volume, req->block);
    if (volume->sealing)
        tb_epoch_pin(volume, left);
    else
        tb_slot_quarantine(volume->engine, left);
    req->moves = 0;
    TB_COUNT(&req->queue->stats.moved, 1);
    wake(req, stripe);
}

void tb_move_done(tb_req *req, int result, uint32_t expected)
{
    tb_layer *volume = req->queue->volume;
    if (result == -EAGAIN || result == -EINTR) {
        transfer(req);
        return;
    }
    if (result == (int)expected && req->moves == MOVE_READS) {
        req->moves = MOVE_WRITES;
        transfer(req);
        return;
    }
    tb_entry *entry = &volume->entries[req->block];
    tb_lock *stripe = tb_stripe(volume, req->block);
    if (result == (int)expected) {
        /* Nobody writes a sum of the old slot between the copy and the switch: it would not be in the new one (tb_epoch_clean). */
        pthread_mutex_lock(&volume->engine->sums_lock);
        bool with_sums = copy_sums(req);
        tb_lock_take(stripe);
        switch_over(req, entry, stripe, with_sums);
        pthread_mutex_unlock(&volume->engine->sums_lock);
        tb_write_lookup(req);
        return;
    }
    tb_lock_take(stripe);
    tb_slot_give_back(volume->engine, req->move_to);
    give_up(req, entry, stripe);
    TB_COUNT(&req->queue->stats.slot_errors, 1);
    tb_write_failed(req, result < 0 ? result : -EIO);
}
