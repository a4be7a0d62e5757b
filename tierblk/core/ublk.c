/* Door: the kernel's ublk driver, plane `copy`. The driver copies a READ's bytes out of the tag's buffer when the
 * request is committed. Only the thread that fetched a tag may commit it, so all of this runs in the queue's thread. */
#define _GNU_SOURCE
#include "core.h"

#include "ublk_abi.h"

typedef struct {
    struct ublk_io_desc *descriptors;
    size_t mapped_bytes;
    int cdev_fd;
    uint32_t fetching; /* tags that are with the driver or with us; those that it took back for good are not */
} ublk_door;

/* FETCH or COMMIT_AND_FETCH of a tag: the one place that knows how this plane passes its buffer. */
static void command(tb_queue *queue, tb_req *req, uint32_t op, int result)
{
    struct io_uring_sqe *sqe = tb_sqe(&queue->ring);
    io_uring_prep_rw(IORING_OP_URING_CMD, sqe, 1, NULL, 0, 0);
    sqe->flags |= IOSQE_FIXED_FILE;
    sqe->cmd_op = op;
    sqe->user_data = tb_ud(req, UD_DOOR, 0);
    struct ublk_io_cmd payload = {.q_id = 0, .tag = req->tag, .result = result, .addr = (uintptr_t)req->buffer};
    memcpy((uint8_t *)sqe + 48, &payload, sizeof payload);
}

static int ublk_start(tb_queue *queue)
{
    ublk_door *door = queue->door;
    door->mapped_bytes = tb_round_up(queue->depth * sizeof *door->descriptors, TB_PAGE_BYTES);
    void *p = mmap(NULL, door->mapped_bytes, PROT_READ, MAP_SHARED | MAP_POPULATE, door->cdev_fd, 0);
    if (p == MAP_FAILED)
        return -errno;
    door->descriptors = p;
    /* The driver copies into these at commit; not being allowed to lock them costs a page fault, no correctness. */
    mlock(queue->buffers, (size_t)queue->depth * TB_BLOCK_BYTES);
    int files[2] = {queue->engine->slots_fd, door->cdev_fd};
    int rc = io_uring_register_files(&queue->ring, files, 2);
    if (rc < 0)
        return rc;
    for (uint16_t tag = 0; tag < queue->depth; tag++)
        command(queue, &queue->reqs[tag], UBLK_IO_FETCH_REQ, 0);
    door->fetching = queue->depth;
    return 0;
}

static void commit(tb_queue *queue, tb_req *req)
{
    int result = req->result < 0 ? req->result : (int)req->length; /* full length or an errno, never short */
    if (req->result >= 0 && req->data != req->buffer)
        memmove(req->buffer, req->data, req->length);
    command(queue, req, UBLK_IO_COMMIT_AND_FETCH_REQ, result);
}

/* A request has come. The device announces chunk_sectors = one block, so it never crosses a block; a driver that breaks
 * this gets an error, not a look beyond the buffer. */
static void begin(tb_queue *queue, tb_req *req)
{
    ublk_door *door = queue->door;
    struct ublk_io_desc desc = door->descriptors[req->tag];
    uint64_t start = desc.start_sector * TB_SECTOR;
    req->result = 0;
    req->tries = req->missed = req->slot_failed = req->all_zero = 0;
    req->since_ms = 0;
    req->length = 0;
    TB_COUNT(&queue->stats.active, 1);
    if ((desc.op_flags & 0xff) != UBLK_OP_READ) { /* a read-only device: nothing else carries data here */
        req->result = (desc.op_flags & 0xff) == UBLK_OP_FLUSH ? 0 : -EOPNOTSUPP;
        tb_finish(req);
        return;
    }
    req->block = start / TB_BLOCK_BYTES;
    req->offset = (uint32_t)(start % TB_BLOCK_BYTES);
    req->length = desc.nr_sectors * TB_SECTOR;
    if (desc.nr_sectors == 0 || req->length > TB_BLOCK_BYTES - req->offset || start + req->length > queue->base->size_bytes) {
        req->result = -EIO;
        tb_finish(req);
        return;
    }
    req->data = req->buffer + (queue->engine->dio_align > TB_SECTOR ? req->offset % TB_PAGE_BYTES : 0);
    req->need = tb_pages_of(req->offset, req->length);
    tb_serve(req);
}

static void ublk_event(tb_queue *queue, uint64_t user_data, int result)
{
    ublk_door *door = queue->door;
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

/* Queue 0 of a device after SET_PARAMS and before START_DEV. cdev_fd is /dev/ublkcN, opened O_NONBLOCK; it stays the
 * caller's to close, after tb_door_close. */
int tb_ublk_open(tb_engine *engine, tb_layer *base, int cdev_fd, uint16_t depth, uint32_t dev_id, tb_queue **out)
{
    ublk_door *door = calloc(1, sizeof *door);
    if (!door)
        return -ENOMEM;
    door->cdev_fd = cdev_fd;
    tb_queue *queue;
    int rc = tb_queue_new(engine, base, depth, &ops, door, &queue);
    if (rc) {
        free(door);
        return rc;
    }
    queue->id = dev_id;
    rc = tb_queue_start(queue);
    if (rc == 0)
        *out = queue;
    return rc;
}
