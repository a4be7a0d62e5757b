/* Rings between the filler and Python, and what every thread with an io_uring shares. */
#define _GNU_SOURCE
#include "core.h"

#include <sys/eventfd.h>

int tb_ring_init(tb_ring *ring)
{
    ring->head = ring->tail = 0;
    ring->armed = 1;
    ring->records = mmap(NULL, TB_RING_RECORDS * sizeof(tb_record), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (ring->records == MAP_FAILED)
        return -ENOMEM;
    ring->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return ring->wake_fd < 0 ? -errno : 0;
}

void tb_ring_free(tb_ring *ring)
{
    if (ring->records && ring->records != MAP_FAILED)
        munmap(ring->records, TB_RING_RECORDS * sizeof(tb_record));
    if (ring->wake_fd >= 0)
        close(ring->wake_fd);
}

/* All or nothing: 0, or -EAGAIN when `count` records do not fit. Producer only. Does not wake: tb_ring_kick. */
int tb_ring_push(tb_ring *ring, const tb_record *in, int count)
{
    uint32_t tail = ring->tail;
    if (tail + (uint32_t)count - __atomic_load_n(&ring->head, __ATOMIC_ACQUIRE) > TB_RING_RECORDS)
        return -EAGAIN;
    for (int i = 0; i < count; i++)
        ring->records[(tail + (uint32_t)i) % TB_RING_RECORDS] = in[i];
    __atomic_store_n(&ring->tail, tail + (uint32_t)count, __ATOMIC_RELEASE);
    return 0;
}

/* Up to `max` records, oldest first. Consumer only. */
int tb_ring_pop(tb_ring *ring, tb_record *out, int max)
{
    uint32_t head = ring->head;
    uint32_t ready = __atomic_load_n(&ring->tail, __ATOMIC_ACQUIRE) - head;
    int count = ready < (uint32_t)max ? (int)ready : max;
    for (int i = 0; i < count; i++)
        out[i] = ring->records[(head + (uint32_t)i) % TB_RING_RECORDS];
    __atomic_store_n(&ring->head, head + (uint32_t)count, __ATOMIC_RELEASE);
    return count;
}

/* Wakes the consumer if it sleeps. The exchange is a full barrier between the published tail and the look at `armed`;
 * tb_ring_arm has its mirror image. Without both, each side can miss the other and the ring sleeps for ever. */
void tb_ring_kick(tb_ring *ring)
{
    if (__atomic_exchange_n(&ring->armed, 0, __ATOMIC_SEQ_CST)) {
        uint64_t one = 1;
        ssize_t written = write(ring->wake_fd, &one, sizeof one);
        (void)written; /* EAGAIN: the counter is full, so the consumer has a wake-up already */
    }
}

/* Consumer, before it sleeps: true when it may, false when records are there. */
bool tb_ring_arm(tb_ring *ring)
{
    __atomic_exchange_n(&ring->armed, 1, __ATOMIC_SEQ_CST);
    return __atomic_load_n(&ring->tail, __ATOMIC_SEQ_CST) == ring->head;
}

/* An SQE, never NULL: a full submission queue is submitted first. */
struct io_uring_sqe *tb_sqe(struct io_uring *ring)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(ring);
    while (!sqe) {
        io_uring_submit(ring);
        sqe = io_uring_get_sqe(ring);
    }
    return sqe;
}

/* So many SQEs after this are submitted together: a chain must not be cut in two. */
void tb_sqe_room(struct io_uring *ring, unsigned count)
{
    while (io_uring_sq_space_left(ring) < count)
        io_uring_submit(ring);
}

/* To be called in the thread that uses the ring (SINGLE_ISSUER). */
int tb_uring_init(struct io_uring *ring, unsigned entries)
{
    struct io_uring_params params = {
        .flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_CQSIZE | IORING_SETUP_SUBMIT_ALL,
        .cq_entries = entries * 4,
    };
    int rc = io_uring_queue_init_params(entries, ring, &params);
    if (rc < 0)
        return rc;
    io_uring_register_ring_fd(ring); /* saves an fd look-up per enter; not having it is no error */
    return 0;
}

/* Keeps a READ of the eventfd pending: with DEFER_TASKRUN a sleeper only wakes for a completion of its own ring. */
void tb_wake_arm(struct io_uring *ring, int fd, uint64_t *value)
{
    struct io_uring_sqe *sqe = tb_sqe(ring);
    io_uring_prep_read(sqe, fd, value, sizeof *value, 0);
    sqe->user_data = UD_WAKE;
}
