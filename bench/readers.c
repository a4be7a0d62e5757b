/* Threads that read through a local door, with no interpreter in their way: a queue of a real device has none
 * either. Each stream is a list of pieces that `depth` threads work through together. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef int read_fn(void *door, uint64_t offset, uint64_t length, uint8_t *out);

/* One read. Out: asked_ns of CLOCK_MONOTONIC, 0 when it was not read; result: 0, a negative errno, or -EBADMSG
 * when its first eight bytes are not what the image has there. */
struct piece {
    uint64_t offset, length, asked_ns, wait_ns;
    int64_t result;
};

struct stream {
    struct piece *pieces;
    uint64_t count, next;
    read_fn *read;
    void *door;
    uint64_t until_ns, cpu_ns;
};

static uint64_t clock_ns(clockid_t clock)
{
    struct timespec now;

    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void *reader(void *argument)
{
    struct stream *stream = argument;
    uint64_t longest = 0, i;
    uint8_t *buffer;

    for (i = 0; i < stream->count; i++)
        if (stream->pieces[i].length > longest)
            longest = stream->pieces[i].length;
    buffer = malloc(longest < 8 ? 8 : longest);
    while (buffer && (i = __atomic_fetch_add(&stream->next, 1, __ATOMIC_RELAXED)) < stream->count) {
        struct piece *piece = &stream->pieces[i];
        uint64_t asked_ns = clock_ns(CLOCK_MONOTONIC), stamp;

        if (asked_ns > stream->until_ns)
            break;
        piece->result = stream->read(stream->door, piece->offset, piece->length, buffer);
        piece->wait_ns = clock_ns(CLOCK_MONOTONIC) - asked_ns;
        piece->asked_ns = asked_ns;
        memcpy(&stamp, buffer, sizeof(stamp));
        if (!piece->result && stamp != piece->offset + 1)
            piece->result = -EBADMSG;
    }
    free(buffer);
    __atomic_fetch_add(&stream->cpu_ns, clock_ns(CLOCK_THREAD_CPUTIME_ID), __ATOMIC_RELAXED);
    return NULL;
}

/* Reads streams[i], counts[i] pieces, `depth` threads each, for at most limit_ns. Out: the threads' CPU. Returns 0
 * or the errno of a thread that could not be made; the pieces have their own results. */
int bench_read(read_fn *read, void *door, struct piece **pieces, const uint64_t *counts, uint32_t streams,
               uint32_t depth, uint64_t limit_ns, uint64_t *cpu_ns)
{
    struct stream *all = calloc(streams, sizeof(*all));
    pthread_t *threads = calloc((size_t)streams * depth, sizeof(*threads));
    uint64_t until_ns = clock_ns(CLOCK_MONOTONIC) + limit_ns;
    uint32_t made = 0;
    int rc = all && threads ? 0 : ENOMEM;

    for (uint32_t i = 0; !rc && i < streams; i++) {
        all[i] = (struct stream){pieces[i], counts[i], 0, read, door, until_ns, 0};
        for (uint32_t j = 0; !rc && j < depth; j++) {
            rc = pthread_create(&threads[made], NULL, reader, &all[i]);
            made += !rc;
        }
    }
    for (uint32_t i = 0; i < made; i++)
        pthread_join(threads[i], NULL);
    *cpu_ns = 0;
    for (uint32_t i = 0; all && i < streams; i++)
        *cpu_ns += all[i].cpu_ns;
    free(threads);
    free(all);
    return rc;
}
