/* The journal: what a FLUSH made durable that the index does not say yet (DESIGN 6). A record holds the rows of the FLUSHes' volumes that
 * changed since the last one, and is written when the slots are synced, so that what it names is there (I5). It saves such a FLUSH
 * the commit cycle: one sync and one write where that has four syncs. The next commit makes the records before it old, and
 * an unclean start takes the others into the index before it believes it (journal.py has the format).
 *
 * One record is under way at a time; all FLUSHes that come meanwhile share the next. Whose thread finds the journal idle leads. */
#include "core.h"

#include <linux/io_uring.h>

/* A record's begin. Little endian, as everything that lasts. */
typedef struct {
    uint64_t magic, session, seq;
    uint32_t rows, bytes; /* bytes: with this head, without what fills its last page */
    uint32_t zero, sum;   /* crc32c of these bytes, with 0 here */
} record_head;

#define RECORD_MAGIC 0x64726f6365726274ull /* "tbrecord" */
#define RECORD_BYTES 65536u
#define ROWS_MAX ((RECORD_BYTES - sizeof(record_head)) / TB_RECORD_ENTRY)

_Static_assert(TB_RECORD_ENTRY == 12 + TB_ROW_BYTES, "layer, row, copy");

/* fd: as the slots file is opened; ring_bytes: whole pages from `offset` on, of which none counts. Before any door is open. */
int tb_journal_open(tb_engine *e, int fd, uint64_t offset, uint64_t ring_bytes, uint64_t session)
{
    tb_journal *j = &e->journal;
    if (j->buffer || ring_bytes < 4 * RECORD_BYTES || (ring_bytes | offset) % TB_PAGE_BYTES)
        return -EINVAL;
    void *p = mmap(NULL, RECORD_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        return -ENOMEM;
    madvise(p, RECORD_BYTES, MADV_DONTFORK);
    j->buffer = p;
    j->offset = offset;
    j->ring_bytes = ring_bytes;
    j->session = session;
    j->fd = fd;
    return 0;
}

void tb_journal_free(tb_engine *e)
{
    if (e->journal.buffer)
        munmap(e->journal.buffer, RECORD_BYTES);
}

/* Its SQEs use the file table of the queue's ring. */
int tb_files_register(tb_queue *queue, int door_fd)
{
    tb_journal *j = &queue->engine->journal;
    int files[] = {queue->engine->slots_fd, door_fd, j->buffer ? j->fd : -1};
    return io_uring_register_files(&queue->ring, files, 3);
}

/* R6, step 1 begins: no copy for a record is taken beside those for the index, or nobody could say which of two is newer. */
void tb_journal_commit_begin(tb_engine *e)
{
    tb_lock_take(&e->journal.lock);
    e->journal.taking = true;
    tb_lock_give(&e->journal.lock);
}

/* Step 1 is over. Returns the last record that was begun before it: with the copies that were taken, the index knows more than it. */
uint64_t tb_commit_taken(tb_engine *e)
{
    tb_journal *j = &e->journal;
    tb_lock_take(&j->lock);
    j->taking = false;
    j->taken_head = j->head;
    uint64_t seq = j->seq;
    tb_lock_give(&j->lock);
    return seq;
}

/* Step 4: where the old records lie is free. */
void tb_journal_commit_end(tb_engine *e, int ok)
{
    tb_journal *j = &e->journal;
    tb_lock_take(&j->lock);
    j->taking = false;
    if (ok) {
        j->tail = j->taken_head;
        j->told = false;
    }
    tb_lock_give(&j->lock);
}

bool tb_journal_idle(const tb_engine *e)
{
    return !__atomic_load_n(&e->journal.busy, __ATOMIC_SEQ_CST);
}

/* At the end of this turn, so that the FLUSHes of one turn share a record. */
void tb_journal_add(tb_req *req)
{
    TB_ADD(&req->queue->stats.waiting, 1);
    tb_push_req(&req->queue->engine->journal.waiting, req);
    req->queue->flushes = true;
}

/* Under the lock: makes room for a record of so many bytes; false: a commit has to come first. */
static bool make_room(tb_journal *j, uint32_t bytes)
{
    uint64_t head = j->head, left = j->ring_bytes - head % j->ring_bytes;
    if (left < bytes)
        head += left;
    if (head + bytes - j->tail > j->ring_bytes)
        return false;
    j->head = head;
    return true;
}

/* Under the lock. Moves those of the batch that this record cannot serve to `refused`, the others to j->batch. Returns the rows. */
static unsigned collect(tb_journal *j, tb_req *batch, tb_req **refused)
{
    unsigned rows = 0;
    while (batch) {
        tb_req *req = batch;
        batch = req->next;
        tb_layer *volume = req->queue->volume;
        bool covered = volume->round == j->round;
        if (!covered && !__atomic_load_n(&volume->in_commit, __ATOMIC_SEQ_CST) &&
            __atomic_load_n(&volume->unflushed.count, __ATOMIC_SEQ_CST) <= ROWS_MAX - rows) {
            unsigned room = ROWS_MAX - rows;
            unsigned taken = tb_layer_take_unflushed(volume, j->buffer + sizeof(record_head) + rows * TB_RECORD_ENTRY, room);
            rows += taken;
            covered = taken < room || !__atomic_load_n(&volume->unflushed.count, __ATOMIC_SEQ_CST);
            volume->round = covered ? j->round : volume->round;
        }
        tb_req **to = covered ? &j->batch : refused;
        req->next = *to;
        *to = req;
    }
    return rows;
}

static void submit(tb_queue *queue)
{
    tb_journal *j = &queue->engine->journal;
    tb_sqe_room(&queue->ring, 2);
    j->sync_result = 0;
    if (!queue->engine->in_memory || !j->bytes) {
        struct io_uring_sqe *sync = tb_sqe(&queue->ring);
        io_uring_prep_fsync(sync, 0, IORING_FSYNC_DATASYNC);
        sync->flags |= IOSQE_FIXED_FILE | (j->bytes ? IOSQE_IO_LINK : 0); /* no record is begun before the slots are synced (I5) */
        sync->user_data = tb_ud(queue, j->bytes ? UD_RECORD_SYNC : UD_RECORD, 0);
    }
    if (!j->bytes)
        return;
    struct io_uring_sqe *sqe = tb_sqe(&queue->ring);
    io_uring_prep_write(sqe, 2, j->buffer, j->bytes, j->offset + j->at % j->ring_bytes);
    sqe->rw_flags = RWF_DSYNC;
    sqe->flags |= IOSQE_FIXED_FILE;
    sqe->user_data = tb_ud(queue, UD_RECORD, 0);
}

static void finish_record(tb_journal *j, unsigned rows)
{
    record_head head = {.magic = RECORD_MAGIC, .session = j->session, .seq = ++j->seq, .rows = rows};
    head.bytes = (uint32_t)(sizeof head + rows * TB_RECORD_ENTRY);
    j->bytes = (uint32_t)tb_round_up(head.bytes, TB_PAGE_BYTES);
    memset(j->buffer + head.bytes, 0, j->bytes - head.bytes);
    memcpy(j->buffer, &head, sizeof head);
    head.sum = tb_crc32c(j->buffer, head.bytes, 0);
    memcpy(j->buffer, &head, sizeof head);
    j->at = j->head;
    j->head += j->bytes;
}

static void by_commit(tb_req *list)
{
    while (list) {
        tb_req *req = list;
        list = req->next;
        TB_ADD(&req->queue->stats.waiting, -1ull);
        tb_flush_by_commit(req);
    }
}

/* False: nobody waits, or the record is another's to write. */
static bool lead(tb_queue *queue)
{
    tb_engine *e = queue->engine;
    tb_journal *j = &e->journal;
    if (!TB_LOAD(&j->waiting) || __atomic_exchange_n(&j->busy, 1, __ATOMIC_SEQ_CST))
        return false;
    tb_req *batch = __atomic_exchange_n(&j->waiting, NULL, __ATOMIC_SEQ_CST), *refused = NULL;
    bool tell = false;
    /* After a failure no record is begun: it would tell the next start that all before it is there, and name bytes that a sync has
     * lost (R7). */
    if (tb_flush_failed(e)) {
        __atomic_store_n(&j->busy, 0, __ATOMIC_SEQ_CST);
        tb_hand_back_all(batch, -EIO);
        return true;
    }
    tb_lock_take(&j->lock);
    if (j->taking || j->closed || !make_room(j, RECORD_BYTES))
        refused = batch;
    else {
        j->round++;
        unsigned rows = collect(j, batch, &refused);
        j->bytes = 0; /* without rows a commit was quicker, and only the slots are to be synced */
        if (rows)
            finish_record(j, rows);
        tell = !j->told && j->head - j->tail > j->ring_bytes / 2;
        j->told |= tell;
    }
    tb_lock_give(&j->lock);
    if (tell)
        tb_flush_tell(e); /* a commit in good time: without room everybody would have to wait for it */
    by_commit(refused);
    if (!j->batch) {
        __atomic_store_n(&j->busy, 0, __ATOMIC_SEQ_CST);
        return true;
    }
    TB_COUNT(&queue->stats.flush_records, j->bytes != 0);
    queue->leads = true;
    submit(queue);
    return false;
}

/* Once a turn. */
void tb_journal_turn(tb_queue *queue)
{
    if (!queue->flushes)
        return;
    queue->flushes = false;
    while (lead(queue))
        ;
}

/* In a queue's thread that ends: those who count on it to look after its last record are not to wait for ever. */
void tb_journal_leave(tb_queue *queue)
{
    if (queue->leads)
        tb_record_done(queue, -EIO);
    if (!queue->flushes)
        return;
    by_commit(__atomic_exchange_n(&queue->engine->journal.waiting, NULL, __ATOMIC_SEQ_CST));
}

/* The rows of a record that was not written are unflushed again, before the journal is idle (R7): a FLUSH that finds none of them would
 * count on it. */
static void put_back(tb_engine *e)
{
    tb_journal *j = &e->journal;
    record_head head;
    memcpy(&head, j->buffer, sizeof head);
    const uint8_t *entry = j->buffer + sizeof head;
    for (uint32_t i = 0; i < head.rows; i++, entry += TB_RECORD_ENTRY) {
        uint64_t row;
        uint32_t id;
        memcpy(&row, entry, sizeof row);
        memcpy(&id, entry + sizeof row, sizeof id);
        tb_layer_put_back(e->layers[id], row & ~TB_ROW_GONE);
    }
}

void tb_record_synced(tb_queue *queue, int result)
{
    queue->engine->journal.sync_result = result;
}

void tb_record_done(tb_queue *queue, int result)
{
    tb_engine *e = queue->engine;
    tb_journal *j = &e->journal;
    int first = j->sync_result < 0 ? j->sync_result : result;
    if (first == -EAGAIN || first == -EINTR) {
        submit(queue);
        return;
    }
    bool no_room = !j->sync_result && j->bytes && (result == -ENOSPC || result == -EDQUOT || result == -ENOMEM);
    if (no_room) { /* no byte is lost: commits take the rows. But a record after it would leave a hole */
        j->closed = true;
        put_back(e);
    } else if (first < 0 || (j->bytes && result != (int)j->bytes))
        tb_flush_fail(e); /* R7: before anybody can find the journal idle */
    tb_req *batch = j->batch;
    j->batch = NULL;
    queue->leads = false;
    queue->flushes = true; /* those who came meanwhile */
    __atomic_store_n(&j->busy, 0, __ATOMIC_SEQ_CST);
    if (no_room)
        by_commit(batch);
    else
        tb_hand_back_all(batch, tb_flush_failed(e) ? -EIO : 0);
}
