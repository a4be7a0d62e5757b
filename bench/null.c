/* The null target: the server of tierblk/core with its data path cut out. The linker puts __wrap_tb_serve in the place of
 * tb_serve (see null.py), so a request goes the same way through ring, queue and driver, finds itself complete at once,
 * and goes back. What a hit costs above this is look-up, slot read and copy.
 *
 * On a USER_COPY device the driver copies nothing either; it then insists that no buffer is named. */
#include "core.h"

#include <stdlib.h>

static int no_buffers;

int __real_tb_queue_start(tb_queue *queue);

int __wrap_tb_queue_start(tb_queue *queue)
{
    for (uint16_t tag = 0; no_buffers && tag < queue->depth; tag++)
        queue->reqs[tag].buffer = NULL;
    return __real_tb_queue_start(queue);
}

void __wrap_tb_serve(tb_req *req)
{
    req->need = 0;
    req->all_zero = 1;
    tb_finish(req);
}

/* Opens a queue of a ublk device, as tb_ublk_open does. cdev_fd stays the caller's to close, after null_close. */
int null_open(int cdev_fd, uint64_t size_bytes, uint16_t depth, uint32_t dev_id, uint16_t q_id, const uint8_t *cpus,
              size_t cpus_bytes, int user_copy, tb_queue **out)
{
    tb_engine *engine = calloc(1, sizeof *engine);
    tb_layer *layer = calloc(1, sizeof *layer);
    if (!engine || !layer) {
        free(engine);
        free(layer);
        return -ENOMEM;
    }
    engine->slots_fd = cdev_fd; /* never read; the ring wants a file in every place of its table */
    engine->dio_align = TB_SECTOR;
    engine->dozing = 1; /* no misses stream */
    layer->engine = engine;
    layer->size_bytes = size_bytes;
    no_buffers = user_copy;
    tb_stack stack = {.base = layer, .size_bytes = size_bytes};
    int rc = tb_ublk_open(engine, &stack, cdev_fd, dev_id, q_id, depth, 0, 0, cpus, cpus_bytes, out);
    if (rc) {
        free(engine);
        free(layer);
    }
    return rc;
}

/* Waits for the queue's thread, which ends when the device is stopped. */
void null_close(tb_queue *queue)
{
    tb_engine *engine = queue->engine;
    tb_layer *layer = queue->base;
    tb_door_close(queue);
    free(engine);
    free(layer);
}

uint64_t null_enters(tb_queue *queue)
{
    return TB_LOAD(&queue->stats.enters);
}
