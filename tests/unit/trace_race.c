/* The recording of requests with a ring so small that its writer is always about to write over what its reader copies, while it is
 * switched off and on. Every record that is read must be one that was written: offset and length follow from the number that is in
 * `began`. Arguments: records to write. Says how many were read and how many were lost. */
#include "trace.c"

#include <stdio.h>

static uint64_t to_write;
static uint32_t over;

void tb_queue_wake(tb_queue *queue)
{
    (void)queue;
}

static void *write_all(void *argument)
{
    tb_queue *queue = argument;
    for (uint64_t i = 1; i <= to_write; i++) {
        tb_req req = {.queue = queue, .op = TB_OP_DISCARD, .began = i, .whole_start = i * 3, .whole_length = i * 5, .tag = (uint16_t)i};
        queue->now = i + 7;
        if (tb_traces(queue))
            tb_trace_done(&req);
        if (i % 64 == 0)
            tb_trace_turn(queue);
    }
    __atomic_store_n(&over, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

static int is_whole(const tb_traced *record, uint64_t last)
{
    uint64_t i = record->began;
    return i > last && i <= to_write && record->took == 7 && record->offset == i * 3 && record->length == i * 5 &&
           record->tag == (uint16_t)i && record->tier == TB_TIERS && record->op == TB_OP_DISCARD;
}

int main(int count, char **words)
{
    static tb_queue queue;
    tb_trace_filter all = {.ops = -1u, .tiers = -1u};
    tb_traced out[TB_TRACE_RECORDS];
    uint64_t lost = 0, got = 0, last = 0, turns = 0;
    pthread_t writer;
    to_write = count > 1 ? strtoull(words[1], NULL, 10) : 0;
    pthread_create(&writer, NULL, write_all, &queue);
    while (!__atomic_load_n(&over, __ATOMIC_SEQ_CST)) {
        if (tb_door_trace_start(&queue))
            return 2;
        uint64_t begin = tb_door_trace_end(&queue), position = begin, seen = 0, gone = 0;
        for (unsigned i = 0; i < 1 + turns % 2000; i++) {
            int n = tb_door_trace_read(&queue, &position, &all, out, TB_TRACE_RECORDS, &gone);
            for (int k = 0; k < n; k++) {
                if (!is_whole(&out[k], last)) {
                    printf("record %llu behind %llu: offset %llu length %llu took %llu\n", (unsigned long long)out[k].began,
                           (unsigned long long)last, (unsigned long long)out[k].offset, (unsigned long long)out[k].length,
                           (unsigned long long)out[k].took);
                    return 1;
                }
                last = out[k].began;
            }
            seen += (uint64_t)n;
        }
        if (seen + gone != position - begin) {
            printf("%llu read and %llu lost of %llu\n", (unsigned long long)seen, (unsigned long long)gone,
                   (unsigned long long)(position - begin));
            return 1;
        }
        got += seen;
        lost += gone;
        turns++;
        tb_door_trace_stop(&queue);
    }
    pthread_join(writer, NULL);
    printf("%llu %llu %llu\n", (unsigned long long)turns, (unsigned long long)got, (unsigned long long)lost);
    return 0;
}
