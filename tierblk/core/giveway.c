/* Writes give way to reads. A read that comes between many writes waits for all that the disk has before it, and for all that this
 * thread hands to the kernel in one turn: while reads come, a queue has only a few slot writes under way, and the others wait for
 * their end. A queue that only writes has as many as it is sent. */
#include "core.h"

#define WRITES_BESIDE_READS 4u
#define NEAR_WRITES 256u /* so many writes after a read, another one is expected no more */

static bool is_crowded(const tb_queue *queue)
{
    return queue->reads_near && queue->slot_writes >= WRITES_BESIDE_READS;
}

void tb_read_came(tb_queue *queue)
{
    queue->reads_near = NEAR_WRITES;
}

/* Before a slot write is handed to the kernel. True: not yet, tb_write_may_go names it later. It keeps its pages and its slot, so what
 * it waits for is disk time only. */
bool tb_give_way(tb_req *req)
{
    tb_queue *queue = req->queue;
    if (queue->reads_near)
        queue->reads_near--;
    if (!queue->yielding && !is_crowded(queue)) {
        queue->slot_writes++;
        return false;
    }
    req->next = NULL;
    *(queue->yielding ? &queue->yielding_last->next : &queue->yielding) = req;
    queue->yielding_last = req;
    TB_COUNT(&queue->stats.yielded, 1);
    return true;
}

/* A slot write of the queue has ended. */
void tb_slot_write_ended(tb_queue *queue)
{
    queue->slot_writes--;
}

/* The next that may be handed to the kernel, first come first; NULL for none. As long as one waits, one is under way. */
tb_req *tb_write_may_go(tb_queue *queue)
{
    tb_req *req = queue->yielding;
    if (!req || is_crowded(queue))
        return NULL;
    queue->yielding = req->next;
    queue->slot_writes++;
    return req;
}
