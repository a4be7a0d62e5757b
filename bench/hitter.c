/* Reads random pieces of a block device, so many at once, and calls hitter_start and hitter_stop around so many of the
 * answers; bench/count.c counts what the machine executes in between. fio would count with it what it does itself.
 *
 *   hitter DEVICE BYTES SIZE DEPTH WARM COUNT
 *
 * BYTES of the device are read in pieces of SIZE; the first WARM answers are not counted, then COUNT are, and at both
 * ends DEPTH requests are under way. It waits for WAIT answers at least and asks for at most BATCH pieces in one system
 * call, as bench/hits.fio does. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BATCH = 16, WAIT = 8, DEPTH_MAX = 256, ALIGN = 4096 };

/* Where the counting starts and stops: functions that are really called, so that their addresses are executed. */
__attribute__((noinline, noclone, used)) void hitter_start(void)
{
    __asm__ volatile("nop" ::: "memory");
}

__attribute__((noinline, noclone, used)) void hitter_stop(void)
{
    __asm__ volatile("nop; nop" ::: "memory");
}

static struct io_uring ring;
static uint8_t *buffers;
static int fd;
static uint64_t pieces, size;
static uint32_t free_slots[DEPTH_MAX], free_count;

static int failed(const char *what, int error)
{
    fprintf(stderr, "hitter: %s: %s\n", what, strerror(error));
    return 1;
}

/* Xorshift: the same offsets every time. */
static uint64_t random_piece(void)
{
    static uint64_t state = 0x9e3779b97f4a7c15u;

    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state % pieces;
}

static void prepare(void)
{
    for (int i = 0; i < BATCH && free_count; i++) {
        uint32_t slot = free_slots[--free_count];
        struct io_uring_sqe *sqe = io_uring_get_sqe(&ring);

        io_uring_prep_read(sqe, fd, buffers + slot * size, (unsigned)size, random_piece() * size);
        io_uring_sqe_set_data64(sqe, slot);
    }
}

/* Takes answers until `until` have come in all; the number that have, or a negative errno. What has come together is
 * taken together, so it may be a little above. */
static int64_t answers(int64_t have, int64_t until, unsigned wait)
{
    while (have < until) {
        struct io_uring_cqe *cqe;
        unsigned head, seen = 0;

        prepare();
        /* More than a batch was free: ask for the rest before waiting. */
        int rc = io_uring_submit_and_wait(&ring, free_count ? 0 : wait);
        if (rc < 0 && rc != -EINTR)
            return rc;
        io_uring_for_each_cqe(&ring, head, cqe)
        {
            if (cqe->res != (int)size)
                return cqe->res < 0 ? cqe->res : -EIO;
            free_slots[free_count++] = (uint32_t)cqe->user_data;
            seen++;
        }
        io_uring_cq_advance(&ring, seen);
        have += seen;
    }
    return have;
}

int main(int argc, char **argv)
{
    if (argc != 7)
        return failed("usage: DEVICE BYTES SIZE DEPTH WARM COUNT", EINVAL);
    size = strtoull(argv[3], NULL, 10);
    if (!size || size > INT32_MAX)
        return failed("SIZE", EINVAL);
    pieces = strtoull(argv[2], NULL, 10) / size;
    uint32_t depth = (uint32_t)strtoul(argv[4], NULL, 10);
    int64_t warm = strtoll(argv[5], NULL, 10), count = strtoll(argv[6], NULL, 10);
    if (!pieces || !depth || depth > DEPTH_MAX)
        return failed("BYTES or DEPTH", EINVAL);
    fd = open(argv[1], O_RDONLY | O_DIRECT | O_CLOEXEC);
    if (fd < 0)
        return failed(argv[1], errno);
    buffers = aligned_alloc(ALIGN, depth * size);
    if (!buffers)
        return failed("memory", ENOMEM);
    memset(buffers, 1, depth * size);
    int rc = io_uring_queue_init(depth, &ring, 0);
    if (rc < 0)
        return failed("io_uring", -rc);
    for (free_count = 0; free_count < depth; free_count++)
        free_slots[free_count] = free_count;

    unsigned wait = depth < WAIT ? depth : WAIT;
    int64_t before = answers(0, warm, wait);
    if (before < 0)
        return failed("read", (int)-before);
    hitter_start();
    int64_t after = answers(before, before + count, wait);
    hitter_stop();
    if (after < 0)
        return failed("read", (int)-after);
    printf("%lld\n", (long long)(after - before));
    return 0;
}
