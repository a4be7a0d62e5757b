/* FLUSH and FUA (DESIGN 6, R7). With no changed row of the volume, and none that the running commit has taken, all that was
 * completed is named by the durable index already, and syncing the slots is enough. Else it waits for a whole commit cycle that
 * begins after it; all that come meanwhile share one. A scratch volume is gone when the machine is, and a kill loses nothing that
 * was completed, so there is nothing to wait for. */
#include "core.h"

#include <linux/io_uring.h>

static void wait_for_commit(tb_req *req)
{
    tb_engine *e = req->queue->engine;
    TB_COUNT(&req->queue->stats.flush_commits, 1);
    TB_ADD(&req->queue->stats.waiting, 1);
    tb_push_req(&e->flushes, req);
    if (!__atomic_exchange_n(&e->flush_told, 1, __ATOMIC_SEQ_CST)) {
        tb_say(e, (tb_record){.kind = TB_EV_FLUSH});
        tb_ring_kick(&e->events);
    }
}

/* A FLUSH, or a write with FUA that is through. */
void tb_sync(tb_req *req)
{
    tb_queue *queue = req->queue;
    tb_layer *volume = queue->volume;
    req->phase = AT_SYNC;
    if (!volume || volume->is_scratch) {
        tb_finish(req);
        return;
    }
    if (__atomic_load_n(&queue->engine->flush_failed, __ATOMIC_SEQ_CST)) {
        req->result = -EIO;
        tb_finish(req);
        return;
    }
    /* In this order: rows are taken into a commit after in_commit is set, and a cycle that fails gives them back before it is
     * cleared; one that did so between the two looks is counted. */
    uint32_t failed = __atomic_load_n(&queue->engine->failed_cycles, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&volume->changed_rows, __ATOMIC_SEQ_CST) || __atomic_load_n(&volume->in_commit, __ATOMIC_SEQ_CST) ||
        __atomic_load_n(&queue->engine->failed_cycles, __ATOMIC_SEQ_CST) != failed) {
        wait_for_commit(req);
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
