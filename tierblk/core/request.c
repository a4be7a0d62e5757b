/* A request's way: begun by its door, looked up, perhaps parked and resumed, finished once (I11). */
#define _GNU_SOURCE
#include "core.h"

/* An errno, when what the request does to its volume is not acknowledged any more (R19). */
static int refusal(const tb_req *req)
{
    return req->queue->volume ? (int)TB_LOAD(&req->queue->volume->refused) : 0;
}

/* The door has set op and fua, block, offset and length or start and end, data and direct. */
void tb_begin(tb_req *req)
{
    req->result = 0;
    req->tries = req->missed = req->slot_failed = req->all_zero = req->pinned = req->from_memory = req->paced = req->moves = 0;
    req->owns = req->writes = req->clean = req->inflight = 0;
    req->slot = req->since_ms = 0;
    req->began = req->queue->now;
    TB_COUNT(&req->queue->stats.active, 1);
    int refused = req->op == TB_OP_READ ? 0 : refusal(req);
    if (refused) { /* said here: at its end it may be refused no more, and nothing of it was done */
        req->result = -refused;
        tb_finish(req);
        return;
    }
    switch (req->op) {
    case TB_OP_READ:
        req->phase = AT_READ;
        tb_read_came(req->queue);
        req->need = tb_pages_of(req->offset, req->length);
        tb_serve(req);
        break;
    case TB_OP_WRITE:
        tb_write_begin(req);
        break;
    case TB_OP_FLUSH:
        tb_sync(req);
        break;
    default:
        tb_clear_begin(req);
    }
}

/* tb_serve is through with it: req->need is all there, or req->result says why not. */
void tb_over(tb_req *req)
{
    if (req->phase == AT_OLD)
        tb_old_read(req);
    else
        tb_finish(req);
}

/* It was parked and is its queue's again. */
void tb_resume(tb_req *req)
{
    switch (req->phase) {
    case AT_READ:
    case AT_OLD:
        if (req->result || !req->need)
            tb_over(req);
        else
            tb_serve(req);
        break;
    case AT_WRITE:
        tb_write_lookup(req);
        break;
    case AT_CLEAR:
        tb_clear_go(req);
        break;
    default:
        tb_finish(req);
    }
}

/* For a door that leaves: not completed here. The driver issues it again to whoever serves the device next (I11). */
void tb_drop(tb_req *req)
{
    TB_COUNT(&req->queue->stats.active, -1ull);
}

/* One clock reading a turn serves all requests that come or end in it, so this costs a few instructions. */
static void note_latency(tb_queue *queue, const tb_req *req, unsigned tier)
{
    uint64_t ticks = queue->now - req->began;
    unsigned octave = ticks < 4 ? 0 : 61 - (unsigned)__builtin_clzll(ticks);
    unsigned bucket = ticks < 4 ? 0 : 4 * octave + (unsigned)(ticks >> octave & 3);
    TB_COUNT(&queue->latencies[tier][bucket < TB_LATENCY_BUCKETS ? bucket : TB_LATENCY_BUCKETS - 1], 1);
    TB_COUNT(&queue->latency_ticks[tier], ticks);
}

static void count_read(tb_req *req)
{
    tb_stats *stats = &req->queue->stats;
    if (req->missed) {
        TB_COUNT(&stats->miss_requests, 1);
        TB_COUNT(&stats->miss_bytes, req->length);
        note_latency(req->queue, req, TB_TIER_MISS);
    } else if (req->all_zero) {
        TB_COUNT(&stats->zero_requests, 1);
        TB_COUNT(&stats->zero_bytes, req->length);
        note_latency(req->queue, req, TB_TIER_ZERO);
    } else {
        TB_COUNT(&stats->hit_requests, 1);
        TB_COUNT(&stats->hit_bytes, req->length);
        if (req->from_memory) {
            TB_COUNT(&stats->memory_requests, 1);
            req->queue->now = tb_ticks(); /* it is done in the turn in which it came, of which there is one reading */
        }
        note_latency(req->queue, req, req->from_memory ? TB_TIER_MEMORY : TB_TIER_HIT);
    }
}

static void count_done(tb_req *req)
{
    tb_stats *stats = &req->queue->stats;
    switch (req->op) {
    case TB_OP_READ:
        count_read(req);
        break;
    case TB_OP_WRITE:
        TB_COUNT(&stats->write_requests, 1);
        TB_COUNT(&stats->write_bytes, req->length);
        note_latency(req->queue, req, TB_TIER_WRITE);
        break;
    case TB_OP_FLUSH:
        TB_COUNT(&stats->flush_requests, 1);
        note_latency(req->queue, req, TB_TIER_FLUSH);
        break;
    default:
        TB_COUNT(&stats->discard_requests, 1);
    }
}

/* Counts the request and hands it to its door, once (I11). */
void tb_finish(tb_req *req)
{
    tb_stats *stats = &req->queue->stats;
    req->since_ms = 0;
    if (TB_LOAD(&req->queue->leaving)) {
        tb_drop(req);
        return;
    }
    TB_COUNT(&stats->requests, 1);
    if (req->op != TB_OP_READ && req->result >= 0)
        req->result = -refusal(req);
    if (req->result < 0)
        TB_COUNT(&stats->errors, 1);
    else
        count_done(req);
    if (tb_traces(req->queue))
        tb_trace_done(req);
    TB_COUNT(&stats->active, -1ull);
    req->queue->ops->complete(req->queue, req);
}
