/* Door: calls from this process, for tests, tools and export. A read or write is split at block borders as the kernel would
 * split it, goes through the same engine, and is copied through the tags' buffers. */
#define _GNU_SOURCE
#include "core.h"

typedef struct local_call local_call;
struct local_call {
    local_call *next;
    uint8_t *bytes;
    uint64_t offset, length, issued; /* issued: bytes from the start that tags have taken */
    uint32_t pending;                /* tags at work on it */
    uint8_t op;
    bool fua;
    int result;
    pthread_mutex_t lock;
    pthread_cond_t done_cond;
    bool done;
};

typedef struct {
    local_call *inbox;               /* stack, any thread */
    local_call *first, **end;        /* the queue thread's, in order of arrival */
    tb_req *idle;
} local_door;

static void call_done(local_call *call)
{
    pthread_mutex_lock(&call->lock);
    call->done = true;
    pthread_cond_signal(&call->done_cond);
    pthread_mutex_unlock(&call->lock); /* the caller may free `call` from here */
}

static int local_start(tb_queue *queue)
{
    local_door *door = queue->door;
    for (uint16_t tag = 0; tag < queue->depth; tag++) {
        queue->reqs[tag].next = door->idle;
        door->idle = &queue->reqs[tag];
    }
    return tb_files_register(queue, -1);
}

static void local_complete(tb_queue *queue, tb_req *req)
{
    local_door *door = queue->door;
    local_call *call = req->cookie;
    if (req->result < 0 && call->result == 0)
        call->result = req->result;
    else if (req->result >= 0 && req->op == TB_OP_READ)
        memcpy(call->bytes + (req->block * TB_BLOCK_BYTES + req->offset - call->offset), req->data, req->length);
    req->next = door->idle;
    door->idle = req;
    call->pending--;
    if (call->pending == 0 && call->issued == call->length)
        call_done(call);
}

static void issue(tb_queue *queue, local_door *door, local_call *call)
{
    tb_req *req = door->idle;
    door->idle = req->next;
    req->op = call->op;
    req->fua = call->fua;
    req->direct = 0;
    req->cookie = call;
    req->data = req->buffer;
    req->length = 0;
    call->pending++;
    if (call->op == TB_OP_READ || call->op == TB_OP_WRITE) {
        uint64_t at = call->offset + call->issued, left = call->length - call->issued;
        req->block = at / TB_BLOCK_BYTES;
        req->offset = (uint32_t)(at % TB_BLOCK_BYTES);
        req->length = (uint32_t)(left < TB_BLOCK_BYTES - req->offset ? left : TB_BLOCK_BYTES - req->offset);
        if (call->op == TB_OP_READ && queue->engine->dio_align > TB_SECTOR)
            req->data += req->offset % TB_PAGE_BYTES;
        if (call->op == TB_OP_WRITE)
            memcpy(req->buffer, call->bytes + call->issued, req->length);
        call->issued += req->length;
    } else {
        req->start = req->whole_start = call->offset;
        req->whole_length = call->length;
        req->end = call->offset + call->length;
        call->issued = call->length;
    }
    tb_begin(req);
}

static void local_turn(tb_queue *queue)
{
    local_door *door = queue->door;
    local_call *stack = __atomic_exchange_n(&door->inbox, NULL, __ATOMIC_SEQ_CST), *oldest = NULL;
    while (stack) {
        local_call *next = stack->next;
        stack->next = oldest;
        oldest = stack;
        stack = next;
    }
    while (oldest) {
        local_call *next = oldest->next;
        oldest->next = NULL;
        *door->end = oldest;
        door->end = &oldest->next;
        oldest = next;
    }
    while (door->first && door->idle) {
        local_call *call = door->first;
        bool last = (call->op != TB_OP_READ && call->op != TB_OP_WRITE) ||
                    call->length - call->issued <= TB_BLOCK_BYTES - (call->offset + call->issued) % TB_BLOCK_BYTES;
        if (last) { /* off the list before its last piece, whose completion may end and free it */
            door->first = call->next;
            if (!door->first)
                door->end = &door->first;
        }
        issue(queue, door, call);
    }
}

static bool local_waiting(tb_queue *queue)
{
    local_door *door = queue->door;
    return __atomic_load_n(&door->inbox, __ATOMIC_SEQ_CST) != NULL || (door->first && door->idle);
}

static void local_event(tb_queue *queue, uint64_t user_data, int result)
{
    (void)queue, (void)user_data, (void)result; /* this door submits nothing of its own */
}

static void local_release(tb_queue *queue)
{
    free(queue->door);
}

static const tb_door_ops ops = {
    .start = local_start, .event = local_event, .complete = local_complete, 
    .turn = local_turn, .waiting = local_waiting, .release = local_release,
};

int tb_local_open(tb_engine *engine, const tb_stack *stack, uint16_t depth, uint64_t hot_bytes, tb_queue **out)
{
    local_door *door = calloc(1, sizeof *door);
    if (!door)
        return -ENOMEM;
    door->end = &door->first;
    tb_queue *queue;
    int rc = tb_queue_new(engine, stack, depth, hot_bytes, &ops, door, &queue);
    if (rc) {
        free(door);
        return rc;
    }
    rc = tb_queue_start(queue);
    if (rc == 0)
        *out = queue;
    return rc;
}

/* Any thread, without the GIL; waits for the answer. op: TB_OP_*. offset and length in bytes, multiples of 512, inside the device;
 * of a FLUSH both are 0. `bytes`: what is written, or where what is read goes. Returns 0 or the first error met; what was read is
 * then undefined. A call under way at tb_door_quit is finished; none may begin after it. */
int tb_local_call(tb_queue *queue, int op, uint64_t offset, uint64_t length, uint8_t *bytes)
{
    int what = op & 0xff;
    if (what > TB_OP_ZEROES || (what == TB_OP_FLUSH ? offset || length : !length) || offset % TB_SECTOR || length % TB_SECTOR)
        return -EINVAL;
    if (offset > queue->size_bytes || length > queue->size_bytes - offset)
        return -EINVAL;
    if (!queue->volume && what != TB_OP_READ && what != TB_OP_FLUSH)
        return -EROFS;
    local_door *door = queue->door;
    local_call call = {.bytes = bytes, .offset = offset, .length = length, .op = (uint8_t)what,
                       .fua = (op & TB_OP_FUA) != 0};
    pthread_mutex_init(&call.lock, NULL);
    pthread_cond_init(&call.done_cond, NULL);
    local_call *head = TB_LOAD(&door->inbox);
    do
        call.next = head;
    while (!__atomic_compare_exchange_n(&door->inbox, &head, &call, true, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
    tb_queue_wake(queue);
    pthread_mutex_lock(&call.lock);
    while (!call.done)
        pthread_cond_wait(&call.done_cond, &call.lock);
    pthread_mutex_unlock(&call.lock);
    pthread_mutex_destroy(&call.lock);
    pthread_cond_destroy(&call.done_cond);
    return call.result;
}

int tb_local_read(tb_queue *queue, uint64_t offset, uint64_t length, uint8_t *out)
{
    return tb_local_call(queue, TB_OP_READ, offset, length, out);
}
