/* The part of the kernel's ublk interface that the core speaks (ublk.md, section 1); Debian 12's own header is of 6.1
 * and lacks it. Control payloads are packed in Python, ublk.py. */
#ifndef TB_UBLK_ABI_H
#define TB_UBLK_ABI_H

#include <stdint.h>

#define UBLK_IO_FETCH_REQ 0xc0107520u
#define UBLK_IO_COMMIT_AND_FETCH_REQ 0xc0107521u
#define UBLK_MAX_DEPTH 4096u

/* Flags of a descriptor, beside its operation. */
#define UBLK_IO_F_FUA (1u << 13)
#define UBLK_IO_F_NEED_REG_BUF (1u << 17)

/* AUTO_BUF_REG, in sqe->addr of FETCH and COMMIT: the buffer's number in bits 0-15; FALLBACK: when it cannot be
 * registered the request comes nevertheless, with NEED_REG_BUF. */
#define UBLK_AUTO_BUF_REG_FALLBACK (1ull << 16)

/* Positions in /dev/ublkcN that are bytes of requests. */
#define UBLK_COPY_BASE 0x80000000ull
#define UBLK_COPY_QUEUE_SHIFT 41

enum { UBLK_OP_READ = 0, UBLK_OP_WRITE = 1, UBLK_OP_FLUSH = 2, UBLK_OP_DISCARD = 3, UBLK_OP_WRITE_ZEROES = 5 };

struct ublk_io_desc {
    uint32_t op_flags; /* operation in bits 0-7 */
    uint32_t nr_sectors;
    uint64_t start_sector;
    uint64_t addr;
};

struct ublk_io_cmd {
    uint16_t q_id, tag;
    int32_t result;
    uint64_t addr;
};

struct ublk_ctrl_cmd {
    uint32_t dev_id;
    uint16_t queue_id, len;
    uint64_t addr, data;
    uint16_t dev_path_len, pad;
    uint32_t reserved;
};

_Static_assert(sizeof(struct ublk_io_desc) == 24, "ublk_io_desc");
_Static_assert(sizeof(struct ublk_io_cmd) == 16, "ublk_io_cmd");
_Static_assert(sizeof(struct ublk_ctrl_cmd) == 32, "ublk_ctrl_cmd");

#endif
