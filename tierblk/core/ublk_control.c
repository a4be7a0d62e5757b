/* Control commands of the ublk driver: one throw-away ring each, since they need 128-byte SQEs and may block long. */
#define _GNU_SOURCE
#include "core.h"

#include <fcntl.h>

#include "ublk_abi.h"

static int run(struct io_uring *ring, int fd, uint32_t cmd_op, const struct ublk_ctrl_cmd *payload, uint32_t timeout_ms)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(ring);
    io_uring_prep_rw(IORING_OP_URING_CMD, sqe, fd, NULL, 0, 0);
    sqe->cmd_op = cmd_op;
    memcpy((uint8_t *)sqe + 48, payload, sizeof *payload);
    struct __kernel_timespec wait = {.tv_sec = timeout_ms / 1000, .tv_nsec = timeout_ms % 1000 * 1000000ll};
    struct io_uring_cqe *cqe;
    int rc = io_uring_submit(ring);
    if (rc < 0)
        return rc;
    do
        rc = io_uring_wait_cqe_timeout(ring, &cqe, &wait);
    while (rc == -EINTR);
    return rc == -ETIME ? -ETIMEDOUT : rc < 0 ? rc : cqe->res;
}

/* Returns the command's own result, or -ETIMEDOUT: the command may still run. `payload` (`length` bytes) is read or
 * written by the driver, depending on the command: through a copy, since a command that outlives its time-out writes
 * when the caller's memory is long something else. That copy is then left to it for good. */
int tb_ublk_control(uint32_t cmd_op, uint32_t dev_id, uint16_t queue_id, void *payload, uint16_t length, uint64_t data, uint32_t timeout_ms)
{
    int fd = open("/dev/ublk-control", O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    void *copy = length ? malloc(length) : NULL;
    if (length && !copy) {
        close(fd);
        return -ENOMEM;
    }
    if (length)
        memcpy(copy, payload, length);
    struct io_uring ring;
    int rc = io_uring_queue_init(4, &ring, IORING_SETUP_SQE128);
    if (rc == 0) {
        struct ublk_ctrl_cmd command = {.dev_id = dev_id, .queue_id = queue_id, .len = length, .addr = (uintptr_t)copy, .data = data};
        rc = run(&ring, fd, cmd_op, &command, timeout_ms);
        io_uring_queue_exit(&ring);
    }
    close(fd);
    if (rc == -ETIMEDOUT)
        return rc;
    if (length)
        memcpy(payload, copy, length);
    free(copy);
    return rc;
}
