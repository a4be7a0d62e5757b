/* Door: one hardware queue of the kernel's ublk driver. Only the thread that fetched a tag may commit it, so all of this
 * runs in the queue's thread. Two planes:
 *
 *   copy       the tag has a buffer of ours; the driver copies a READ's bytes out of it at the commit
 *   zero-copy  the driver registers the request's own pages as a fixed buffer of this thread's ring (AUTO_BUF_REG), into
 *              which the slot is read; bytes out of memory are written through /dev/ublkcN (USER_COPY). A request whose
 *              pages could not be registered, or that the cache's disk cannot read into, takes the tag's buffer and one
 *              such write. */
#define _GNU_SOURCE
#include "core.h"

#include "ublk_abi.h"

typedef struct {
    struct ublk_io_desc *descriptors;
    size_t mapped_bytes;
    int cdev_fd;
    uint16_t q_id;
    bool zero_copy;
    uint32_t fetching; /* tags that are with the driver or with us; those that it took back for good are not */
} ublk_door;

/* FETCH or COMMIT_AND_FETCH of a tag: the one place that knows how a plane passes its buffer. */
static void command(tb_queue *queue, tb_req *req, uint32_t op, int result)
{
    ublk_door *door = queue->door;
    struct io_uring_sqe *sqe = tb_sqe(&queue->ring);
    uint64_t registered = door->zero_copy ? req->tag | UBLK_AUTO_BUF_REG_FALLBACK : 0;
    io_uring_prep_rw(IORING_OP_URING_CMD, sqe, 1, (void *)(uintptr_t)registered, 0, 0);
    sqe->flags |= IOSQE_FIXED_FILE;
    sqe->cmd_op = op;
    sqe->user_data = tb_ud(req, UD_DOOR, 0);
    struct ublk_io_cmd payload = {
        .q_id = door->q_id, .tag = req->tag, .result = result, .addr = door->zero_copy ? 0 : (uintptr_t)req->buffer};
    memcpy((uint8_t *)sqe + 48, &payload, sizeof payload);
}

static int ublk_start(tb_queue *queue)
{
    ublk_door *door = queue->door;
    size_t stride = tb_round_up(UBLK_MAX_DEPTH * sizeof *door->descriptors, TB_PAGE_BYTES);
    door->mapped_bytes = tb_round_up(queue->depth * sizeof *door->descriptors, TB_PAGE_BYTES);
    void *p = mmap(NULL, door->mapped_bytes, PROT_READ, MAP_SHARED | MAP_POPULATE, door->cdev_fd, (off_t)(door->q_id * stride));
    if (p == MAP_FAILED)
        return -errno;
    door->descriptors = p;
    int rc = tb_files_register(queue, door->cdev_fd);
    if (rc == 0 && door->zero_copy)
        rc = io_uring_register_buffers_sparse(&queue->ring, queue->depth);
    else if (rc == 0)
        /* The driver copies into these at commit; not being allowed to lock them costs a page fault, no correctness. */
        mlock(queue->buffers, (size_t)queue->depth * TB_BLOCK_BYTES);
    if (rc < 0)
        return rc;
    for (uint16_t tag = 0; tag < queue->depth; tag++)
        command(queue, &queue->reqs[tag], UBLK_IO_FETCH_REQ, 0);
    door->fetching = queue->depth;
    return 0;
}

/* Out of a frame into the request's pages, and the commit behind it, in one go: the driver copies while the chain is
 * submitted. Only a failure has a completion of its own, and takes the one of the commit away: one answer in either case (I11).
 * The frame is held until the tag is heard of again, when the copy is certainly over (I1). */
static void commit_from_memory(tb_queue *queue, tb_req *req)
{
    tb_sqe_room(&queue->ring, 2);
    struct io_uring_sqe *sqe = tb_sqe(&queue->ring);
    io_uring_prep_write(sqe, 1, tb_hot_bytes(req), req->length, tb_copy_pos(req));
    sqe->flags |= IOSQE_FIXED_FILE | IOSQE_IO_LINK | IOSQE_CQE_SKIP_SUCCESS;
    sqe->user_data = tb_ud(req, UD_HOT, 0);
    command(queue, req, UBLK_IO_COMMIT_AND_FETCH_REQ, (int)req->length);
}

static void commit(tb_queue *queue, tb_req *req)
{
    ublk_door *door = queue->door;
    int result = req->result < 0 ? req->result : (int)req->length; /* full length or an errno, never short */
    if (req->op != TB_OP_READ) {
        command(queue, req, UBLK_IO_COMMIT_AND_FETCH_REQ, result);
        return;
    }
    if (req->frame) {
        commit_from_memory(queue, req);
        return;
    }
    if (result <= 0 || req->direct) {
        command(queue, req, UBLK_IO_COMMIT_AND_FETCH_REQ, result);
        return;
    }
    if (!door->zero_copy) {
        if (req->data != req->buffer)
            memmove(req->buffer, req->data, req->length);
        command(queue, req, UBLK_IO_COMMIT_AND_FETCH_REQ, result);
        return;
    }
    struct io_uring_sqe *sqe = tb_sqe(&queue->ring);
    io_uring_prep_write(sqe, 1, req->data, req->length, tb_copy_pos(req));
    sqe->flags |= IOSQE_FIXED_FILE;
    sqe->user_data = tb_ud(req, UD_DOOR_COPY, req->length);
    TB_COUNT(&queue->stats.bounced, 1);
}

static void copied(tb_queue *queue, tb_req *req, int result)
{
    if (result != (int)req->length)
        TB_COUNT(&queue->stats.errors, 1); /* the driver took it back; it was counted as answered before */
    command(queue, req, UBLK_IO_COMMIT_AND_FETCH_REQ, result == (int)req->length ? result : -EIO);
}

/* What the driver calls it; -1: nothing that a device of ours can have announced. */
static int operation(const tb_queue *queue, uint32_t op_flags)
{
    switch (op_flags & 0xff) {
    case UBLK_OP_READ:
        return TB_OP_READ;
    case UBLK_OP_FLUSH:
        return TB_OP_FLUSH;
    case UBLK_OP_WRITE:
        return queue->volume ? TB_OP_WRITE : -1;
    case UBLK_OP_DISCARD:
        return queue->volume ? TB_OP_DISCARD : -1;
    case UBLK_OP_WRITE_ZEROES:
        return queue->volume ? TB_OP_ZEROES : -1;
    default:
        return -1;
    }
}

/* Answered before it was begun. */
static void refuse(tb_queue *queue, tb_req *req, int result, uint64_t start, uint64_t length)
{
    TB_COUNT(&queue->stats.requests, 1);
    TB_COUNT(&queue->stats.errors, 1);
    req->result = result;
    if (tb_traces(queue))
        tb_trace_refused(req, start, length);
    commit(queue, req);
}

/* A request has come. The device announces chunk_sectors = one block, so data never crosses a block; a driver that breaks
 * this gets an error, not a look beyond the buffer. */
static void begin(tb_queue *queue, tb_req *req)
{
    ublk_door *door = queue->door;
    struct ublk_io_desc desc = door->descriptors[req->tag];
    uint64_t start = desc.start_sector * TB_SECTOR, length = (uint64_t)desc.nr_sectors * TB_SECTOR;
    uint32_t align = queue->engine->dio_align;
    int op = operation(queue, desc.op_flags);
    req->op = (uint8_t)op;
    req->fua = (desc.op_flags & UBLK_IO_F_FUA) != 0;
    req->length = 0;
    req->direct = 0;
    if (op < 0) {
        refuse(queue, req, -EOPNOTSUPP, start, length);
        return;
    }
    if (op != TB_OP_FLUSH && (!length || start > queue->size_bytes || length > queue->size_bytes - start)) {
        refuse(queue, req, -EIO, start, length);
        return;
    }
    if (op == TB_OP_READ || op == TB_OP_WRITE) {
        req->block = start / TB_BLOCK_BYTES;
        req->offset = (uint32_t)(start % TB_BLOCK_BYTES);
        if (length > TB_BLOCK_BYTES - req->offset) {
            refuse(queue, req, -EIO, start, length);
            return;
        }
        req->length = (uint32_t)length;
        req->direct = door->zero_copy && !(desc.op_flags & UBLK_IO_F_NEED_REG_BUF) && (req->offset | req->length) % align == 0;
        req->data = req->buffer + (op == TB_OP_READ && align > TB_SECTOR ? req->offset % TB_PAGE_BYTES : 0);
    } else {
        req->start = req->whole_start = start;
        req->end = start + length;
        req->whole_length = length;
    }
    tb_begin(req);
}

static void ublk_event(tb_queue *queue, uint64_t user_data, int result)
{
    ublk_door *door = queue->door;
    if (tb_ud_kind(user_data) == UD_DOOR_COPY) {
        copied(queue, tb_ud_pointer(user_data), result);
        return;
    }
    tb_hot_let_go(tb_ud_pointer(user_data));
    if (tb_ud_kind(user_data) == UD_HOT) {
        copied(queue, tb_ud_pointer(user_data), -EIO);
        return;
    }
    if (result == 0 && TB_LOAD(&queue->leaving))
        return; /* the driver has it again as soon as we are gone */
    if (result == 0) {
        begin(queue, tb_ud_pointer(user_data));
        return;
    }
    /* -ENODEV: the device is being stopped and this tag will bring nothing any more. Anything else: the driver refused
     * the command, which ends the tag the same way. */
    if (result != -ENODEV && !queue->failure)
        queue->failure = result;
    if (--door->fetching == 0)
        queue->done = 1;
}

static void ublk_stop(tb_queue *queue)
{
    ublk_door *door = queue->door;
    if (door->descriptors)
        munmap(door->descriptors, door->mapped_bytes); /* DEL_DEV waits as long as this mapping exists */
    door->descriptors = NULL;
}

static void ublk_release(tb_queue *queue)
{
    free(queue->door);
}

static const tb_door_ops ops = {
    .start = ublk_start, .event = ublk_event, .complete = commit, .stop = ublk_stop, .release = ublk_release,
    .may_drop = true,
};

/* Hardware queue q_id of a device after SET_PARAMS and before START_DEV. cdev_fd is /dev/ublkcN, opened O_NONBLOCK; it
 * stays the caller's to close, after tb_door_close. zero_copy: what ADD_DEV granted, AUTO_BUF_REG with USER_COPY. cpus: a bit
 * a processor, where its thread shall run; none for anywhere. */
int tb_ublk_open(tb_engine *engine, const tb_stack *stack, int cdev_fd, uint32_t dev_id, uint16_t q_id, uint16_t depth, int zero_copy,
                 uint64_t hot_bytes, const uint8_t *cpus, size_t cpus_bytes, tb_queue **out)
{
    ublk_door *door = calloc(1, sizeof *door);
    if (!door)
        return -ENOMEM;
    door->cdev_fd = cdev_fd;
    door->q_id = q_id;
    door->zero_copy = zero_copy != 0;
    tb_queue *queue;
    int rc = tb_queue_new(engine, stack, depth, hot_bytes, &ops, door, &queue);
    if (rc) {
        free(door);
        return rc;
    }
    queue->id = dev_id;
    queue->number = q_id;
    queue->cpus = cpus;
    queue->cpus_bytes = cpus_bytes;
    queue->copy_fd = zero_copy ? cdev_fd : -1;
    queue->copy_pos = UBLK_COPY_BASE + ((uint64_t)q_id << UBLK_COPY_QUEUE_SHIFT);
    rc = tb_queue_start(queue);
    if (rc == 0)
        *out = queue;
    return rc;
}
