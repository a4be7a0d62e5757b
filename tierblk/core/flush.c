/* FLUSH and FUA (DESIGN 6, R7). With no unflushed row of the volume all that was completed is named by the durable index or journal
 * already, and syncing the slots is enough. Else its rows go to the journal. Where that cannot be (the running commit has taken
 * some of them, or there is no room) it waits for a whole commit cycle that begins after it; all that come meanwhile share
 * one. A scratch volume is gone when the machine is, and a kill loses nothing that was completed, so there is nothing to wait
 * for. */
#include "core.h"

#include <linux/io_uring.h>

/* Python is to run a commit. */
void tb_flush_tell(tb_engine *e)
{
    if (!__atomic_exchange_n(&e->flush_told, 1, __ATOMIC_SEQ_CST)) {
        tb_say(e, (tb_record){.kind = TB_EV_FLUSH});
        tb_ring_kick(&e->events);
    }
}

/* Any queue's thread. */
void tb_flush_by_commit(tb_req *req)
{
    tb_engine *e = req->queue->engine;
    TB_ADD(&req->queue->stats.flush_commits, 1);
    TB_ADD(&req->queue->stats.waiting, 1);
    TB_ADD(&e->flushes_waiting, 1);
    tb_push_req(&e->flushes, req);
    tb_flush_tell(e);
    tb_rouse(e);
}

/* In this order. A record takes rows out when the journal is busy, and a failed one is told of before it is idle again. Rows are taken
 * into a commit after in_commit is set, and a cycle that fails gives them back before it is cleared; one that did so between the
 * two looks is counted. */
static bool is_recorded(const tb_engine *e, const tb_layer *volume)
{
    uint32_t failed = __atomic_load_n(&e->failed_cycles, __ATOMIC_SEQ_CST);
    return !__atomic_load_n(&volume->unflushed.count, __ATOMIC_SEQ_CST) && tb_journal_idle(e) &&
           !__atomic_load_n(&volume->in_commit, __ATOMIC_SEQ_CST) && __atomic_load_n(&e->failed_cycles, __ATOMIC_SEQ_CST) == failed;
}

/* A FLUSH, or a write with FUA that is through. */
void tb_sync(tb_req *req)
{
    tb_queue *queue = req->queue;
    tb_engine *e = queue->engine;
    tb_layer *volume = queue->volume;
    req->phase = AT_SYNC;
    if (!volume || volume->is_scratch) {
        tb_finish(req);
        return;
    }
    if (tb_flush_failed(e)) {
        req->result = -EIO;
        tb_finish(req);
        return;
    }
    if (TB_LOAD(&volume->flushes_far)) {
        tb_flush_by_epoch(req);
        return;
    }
    if (!is_recorded(e, volume)) {
        if (e->journal.buffer && !__atomic_load_n(&volume->in_commit, __ATOMIC_SEQ_CST))
            tb_journal_add(req);
        else
            tb_flush_by_commit(req);
        return;
    }
    if (e->in_memory) {
        tb_finish(req);
        return;
    }
    struct io_uring_sqe *sqe = tb_sqe(&queue->ring);
    io_uring_prep_fsync(sqe, 0, IORING_FSYNC_DATASYNC);
    sqe->flags |= IOSQE_FIXED_FILE;
    sqe->user_data = tb_ud(req, UD_SYNC, 0);
}

void tb_sync_done(tb_req *req, int result)
{
    if (result == -EAGAIN || result == -EINTR) {
        tb_sync(req);
        return;
    }
    if (tb_flush_failed(req->queue->engine)) /* somebody else's sync, which this one may have counted on */
        req->result = -EIO;
    if (result < 0) { /* the kernel says it once; nobody is to take the next sync's success for this one's (R7) */
        tb_flush_fail(req->queue->engine);
        req->result = -EIO;
    }
    tb_finish(req);
}

/* Event loop, at FLUSH: those that wait. A cycle that begins after this covers them. */
tb_req *tb_flush_take(tb_engine *e)
{
    __atomic_store_n(&e->flush_told, 0, __ATOMIC_SEQ_CST); /* before the list is taken: who comes later tells again */
    return __atomic_exchange_n(&e->flushes, NULL, __ATOMIC_SEQ_CST);
}

/* Any thread: that cycle is over. */
void tb_flush_done(tb_req *batch, int result)
{
    for (tb_req *req = batch; req; req = req->next)
        TB_ADD(&req->queue->engine->flushes_waiting, -1u);
    tb_hand_back_all(batch, result);
}

int tb_flush_failed(tb_engine *e)
{
    return (int)__atomic_load_n(&e->flush_failed, __ATOMIC_SEQ_CST);
}

/* A sync has failed: no FLUSH and no FUA succeeds before the next start. */
void tb_flush_fail(tb_engine *e)
{
    __atomic_store_n(&e->flush_failed, 1, __ATOMIC_SEQ_CST);
}
