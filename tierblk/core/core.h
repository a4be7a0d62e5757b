/* What the C files share. Ownership and locking, in one place:
 *
 *   entries of a block map   under the stripe lock of their row; no lock is held across I/O
 *   a fill's parked list     under the stripe lock of the fill's block
 *   a fill's other fields    the filler thread, from the MISS to the end of the fill
 *   a request                its queue's thread, except between park and wake, when the filler may put bytes into it
 *   the list of writes       of a stripe, and who waits for one of them (R4): under the stripe lock
 *   the journal              its leader's, but for what says otherwise; journal->lock comes before stripes
 *   sums of volumes' pages   in the file: engine->sums_lock, but for those of a fill; it comes before stripes
 *   slot bitmaps             under engine->slot_lock, the innermost lock
 *   a queue's trace          written by its thread alone, read by the event loop, see trace.c
 *   rings to and from Python events: any thread of ours, under engine->event_lock, to the event loop; commands: from the
 *                            loop to the filler
 */
#ifndef TB_CORE_H
#define TB_CORE_H

#include <errno.h>
#include <liburing.h>
#include <pthread.h>
#include <semaphore.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "cdef.h"
#include "prim.h"

#define TB_SECTOR 512u
#define TB_STRIPES 1024u
#define TB_MAX_FILLS 16384u /* a power of two, so that tokens wrap; more than tags and TB_MAX_AHEAD together */
#define TB_MAX_AHEAD 4096u /* fills that PREFETCH may have running: the others are for those that wait, one a tag */
#define TB_NOTES 256u
#define TB_RUN_BLOCKS 16u /* 1 MiB: what one write to the slots file holds at most */
#define TB_OPEN_RUNS 16u
#define TB_TICK_MS 250u
#define TB_PACKED_ENTRY 12u

/* Transient flags of an entry, meaningless to the next session. */
#define TB_ENTRY_REFERENCED 1u /* hit since the eviction hand last passed */
#define TB_ENTRY_PROBATION 2u  /* filled, not yet hit a second time */
#define TB_ENTRY_MARKED 4u     /* the first request that touches it is to be told (READ_ON) */
#define TB_ENTRY_SEALED 8u     /* its slot holds bytes of the sealed epoch: a write moves it first (R11) */
#define TB_ENTRY_MOVING 16u    /* a write does so: all others wait */
#define TB_ENTRY_PINNED 32u    /* never evicted */
#define TB_ENTRY_STILL 64u     /* lacks sums, and nobody has written to it since it was met (sums.c) */

/* The half of an entry that must change as one: slot, masks, flags (R1). */
typedef union {
    struct {
        uint32_t slot; /* 0: none, since slot 0 is the superblock */
        uint16_t present, cached, zero, dirty, fresh, flags;
    };
    uint8_t bytes __attribute__((vector_size(16)));
} tb_head;

typedef struct {
    tb_head head;
    uint32_t fill; /* index + 1 of the running fill; 0: none (I7) */
    uint16_t readers, writers;
    uint16_t overtaken; /* pages written or discarded since the fill's MISS (R5) */
    union {
        uint16_t born;   /* of a base's block: the engine's fill clock when it was cached */
        uint16_t summed; /* of a volume's: pages that have their sums although they are dirty, if they are (sums.c); the next session
                          * believes it with the map */
    };
    uint32_t generation;
} tb_entry;

_Static_assert(sizeof(tb_entry) == 32, "a map entry is 32 bytes");
_Static_assert(sizeof(tb_record) == 32, "a record is 32 bytes");

/* What a stripe of blocks shares, entries aside. */
typedef struct {
    tb_lock lock;
    tb_req *writing; /* writes under way, a list by next_writing */
    tb_req *waiting; /* who has to wait for one of them, see volume.c; a stack */
} __attribute__((aligned(64))) tb_stripe_state;

/* A set of rows of a layer, cheap to go through however large the layer is. */
typedef struct {
    uint64_t *bits;    /* a bit per row */
    uint64_t *summary; /* a bit per word of `bits` */
    size_t bits_bytes, summary_bytes;
    uint64_t count; /* set bits; behind them for a moment, see tb_map_mark */
} tb_rows;

struct tb_layer {
    tb_engine *engine;
    tb_entry *entries;
    uint64_t *ready;          /* a bit per map page: its memory on tmpfs is allocated */
    tb_rows changed;          /* differ from the last copy taken for the index */
    tb_rows unflushed;        /* of a volume that keeps its promises: and from the last taken for a FLUSH */
    uint8_t *map;
    size_t map_bytes, ready_bytes;
    uint64_t blocks, rows, size_bytes;
    uint64_t cached_pages, dirty_pages, unsummed; /* the last: blocks whose dirty pages have no sums */
    uint64_t round; /* of the journal: the last one in which its rows were taken, under the journal's lock */
    tb_sealed *saved; /* of the sealed epoch, see epoch.c: what its blocks were, each once */
    uint32_t *pinned; /* and slots that only it has */
    uint64_t saved_count, taken_count, pinned_count, collected;
    uint32_t generation; /* of the last seal */
    bool sealing;
    uint32_t doors;
    uint32_t drops; /* of pages by hand, so far: copies in memory are older, see hot.c */
    uint32_t in_commit; /* the running commit has taken unflushed rows of it */
    int map_fd;
    uint16_t id;
    bool is_volume, is_scratch, is_write_back;
    bool flushes_far; /* a FLUSH waits until its epoch is in the store (R14) */
    uint32_t refused; /* an errno: nothing that changes it is acknowledged any more (R19) */
    tb_req *far_flushes; /* that wait for an epoch; a stack, under the lock of its first stripe */
    uint64_t far_count;  /* how many there have been */
    uint32_t far_told;
};

static inline bool tb_head_persistent(tb_head head)
{
    return head.present || head.cached || head.zero || head.dirty;
}

static inline uint64_t tb_row_end(const tb_layer *layer, uint64_t row)
{
    uint64_t end = (row + 1) * TB_ROW_ENTRIES;
    return end < layer->blocks ? end : layer->blocks;
}

typedef struct tb_hot tb_hot;
typedef struct tb_fill tb_fill;
struct tb_req {
    tb_req *next; /* in an inbox or a parked list */
    tb_queue *queue;
    uint8_t *buffer; /* the tag's own memory: one block, page-aligned */
    uint8_t *data;   /* where the request's first byte goes, in `buffer`; not for a direct one */
    void *cookie;    /* the door's */
    uint64_t block;
    uint32_t offset, length; /* bytes, within the block */
    int32_t result;          /* 0 so far, or a negative errno */
    uint16_t tag, need;      /* need: pages of the block that are still to be put into it */
    uint16_t of_layer;       /* those of them that a fill may give, while it is parked on one */
    uint16_t inflight;
    uint8_t op, phase; /* see below */
    uint8_t fua;
    uint8_t tries, missed, slot_failed, all_zero;
    uint8_t direct; /* plane zero-copy: bytes go into the request's own pages, `buffer` stays unused */
    uint8_t pinned; /* PIN_*: it counts among these entries' readers */
    uint8_t from_memory;
    uint8_t paced; /* it has had its ticket, see pace.c */
    uint16_t owns;         /* pages that are its own until it ends (R4) */
    uint16_t writes;       /* pages that it is about to change; it is in its stripe's list then */
    uint16_t clean;        /* pages of its block that were cached and clean when it was submitted (R3) */
    uint32_t slot;         /* where it writes; 0: not yet */
    uint32_t asked_offset, asked_length; /* of a sub-page write, while it reads what is there */
    uint64_t start, end;   /* what a discard has still to do, bytes of the device */
    tb_req *next_writing, **writing_link;
    uint32_t frame; /* index + 1 of the frame of the memory tier that it holds, see hot.c; 0: none */
    uint32_t since_ms; /* when it began to wait for a fill; 0: it has not */
    uint32_t move_from, move_to; /* slots, while it moves its block, see move.c */
    uint8_t moves, move_first, move_last; /* MOVE_*, and the pages that are copied */
    uint64_t began;    /* ticks of the turn in which it came */
    uint64_t whole_start, whole_length; /* of a discard, bytes of the device, as it was asked for */
    uint64_t due;      /* ticks: until then it waits for its turn to take a slot */
} __attribute__((aligned(64)));

/* What a request is at, and so what follows when it comes back. AT_OLD: a sub-page write reads the pages that it changes in
 * part, to its tag's block in `olds`. */
enum { AT_READ, AT_OLD, AT_WRITE, AT_CLEAR, AT_SYNC };

enum { MOVE_WAITS = 1, MOVE_READS, MOVE_WRITES };

enum { PIN_VOLUME = 1, PIN_BASE = 2 };

typedef struct {
    int (*start)(tb_queue *queue);                                /* issue what brings the first requests */
    void (*event)(tb_queue *queue, uint64_t user_data, int result); /* a completion that is the door's own */
    void (*complete)(tb_queue *queue, tb_req *req);               /* req->result is final: hand it back, once (I11) */
    void (*turn)(tb_queue *queue);                                /* once a turn: new work of the door's own */
    bool (*waiting)(tb_queue *queue);                             /* is there such work? asked before sleeping and leaving */
    void (*stop)(tb_queue *queue);                                /* on the way out, in the thread */
    void (*release)(tb_queue *queue);                             /* after join: free the door's own */
    bool may_drop; /* whoever sent the requests sends those that are dropped again, to the next daemon */
} tb_door_ops;

struct tb_queue {
    struct io_uring ring;
    tb_engine *engine;
    tb_layer *volume, *base; /* the stack that it serves; NULL where there is none */
    uint64_t size_bytes;     /* of the device */
    const tb_door_ops *ops;
    void *door;
    tb_req *reqs;
    uint8_t *buffers;
    uint8_t *olds;   /* a block a tag, for sub-page writes; NULL without a volume */
    tb_req *slices;  /* discards that go on in the next turn */
    tb_req *paced, *paced_last; /* writes that wait for their time, the first come first */
    tb_req *yielding, *yielding_last; /* writes that let reads go first, likewise, see giveway.c */
    uint32_t slot_writes, reads_near; /* under way; how many more count as beside reads */
    struct __kernel_timespec clock;
    bool clock_set; /* a timeout is under way, */
    uint64_t clock_due; /* the earliest for this time */
    tb_hot *hot; /* NULL: no memory tier */
    tb_fill *begun, **begun_end; /* fills of this turn's misses, of which Python is not told yet */
    tb_req *inbox;    /* stack: requests that the filler hands back */
    uint32_t armed;   /* 1: asleep, or about to be: a producer must write to wake_fd */
    uint32_t draining, quitting, done, leaving;
    uint32_t patience_ms; /* how long a request may wait for a fill; UINT32_MAX: for ever; 0: until GIVE_UP */
    uint32_t visitors; /* threads inside tb_queue_hand_back: the memory stays until they are out */
    uint16_t depth;
    int copy_fd;       /* plane zero-copy: /dev/ublkcN, through which any thread writes into requests; else -1 */
    uint64_t copy_pos; /* where in it this queue's requests begin */
    int wake_fd, end_fd, failure;
    uint64_t wake_value;
    uint32_t id;
    uint16_t number; /* among the queues of its device */
    const uint8_t *cpus; /* the opener's, until the thread is ready */
    size_t cpus_bytes;
    pthread_t thread;
    bool started, ring_made, hurries;
    bool leads, flushes; /* of the journal: its record is this thread's; it has to look for those who wait */
    pthread_mutex_t ready_lock;
    pthread_cond_t ready_cond;
    bool ready;
    tb_stats stats;
    uint64_t now; /* ticks of this turn */
    tb_traced *trace; /* NULL: nobody reads a trace; see trace.c */
    tb_traced *trace_ring;
    uint64_t trace_end, trace_kept; /* records that there have been; and when its memory was last given back */
    uint64_t latencies[TB_TIERS][TB_LATENCY_BUCKETS];
    uint64_t latency_ticks[TB_TIERS]; /* all of them together */
};

_Static_assert(sizeof(tb_traced) == 40, "a traced request is 40 bytes");

typedef enum { FILL_FREE = 0, FILL_ASKED, FILL_WRITING } tb_fill_state;

struct tb_fill {
    tb_fill *next;           /* in its queue's list of those begun in this turn, or in the free list */
    tb_fill *next_attention; /* in the attention inbox */
    tb_fill *next_written;   /* in its run of slot writes */
    tb_layer *layer;
    tb_req *parked, **parked_end;
    uint64_t block, staging_offset;
    uint32_t token, slot;
    uint16_t want, staged, zeros, writing, inflight;
    uint8_t state, new_slot;
    uint8_t told;      /* under the stripe lock: MISS was said, `want` is final */
    uint8_t ahead;     /* under the stripe lock: nobody waits yet */
    uint8_t attention; /* atomic: it is in the attention inbox */
    uint8_t waited;    /* atomic: somebody began to wait for a fill that was ahead */
    int32_t result;
    int32_t gave_up; /* under the stripe lock: what fail-fast doors get, 0: nothing yet */
    uint32_t run_blocks, ready_ms; /* ready_ms: when it began to wait for the disk */
    uint32_t sums[TB_BLOCK_PAGES];
} __attribute__((aligned(16)));

/* A block that a marked entry's first request touched, on its way to Python. */
typedef struct tb_note tb_note;
struct tb_note {
    tb_note *next;
    uint64_t block;
    uint16_t layer;
};

/* Neighbouring blocks of one window, whole and staged, that will go to neighbouring slots in one write. */
typedef struct {
    tb_fill *first, **end;
    uint64_t next_staging; /* where the block would lie that continues it */
    uint32_t blocks, opened_ms;
} tb_run;

/* One-way ring of records between two threads, and the eventfd that wakes its consumer. */
typedef struct {
    tb_record *records;
    uint32_t head __attribute__((aligned(64))); /* consumer's */
    uint32_t armed;
    uint32_t tail __attribute__((aligned(64))); /* producer's */
    int wake_fd;
} tb_ring;

/* Rows that FLUSHes have made durable and the index has not, see journal.c. Positions count up for ever; where they lie is their rest
 * by ring_bytes. */
typedef struct {
    tb_lock lock;   /* copies for records against those for the index; inside it come stripes */
    bool taking;    /* step 1 of a commit is under way */
    bool closed;    /* the filesystem has no room for a record: commits are for every FLUSH until the next start */
    bool told;      /* Python has been asked for a commit that makes room */
    uint32_t busy;  /* a queue leads: it has a record under way, and all below is its own */
    uint64_t session, seq, round, head, tail, taken_head; /* seq: of the last record that was begun; round: of leading */
    uint64_t offset, ring_bytes;
    tb_req *waiting; /* FLUSHes for the next record; a stack */
    tb_req *batch;   /* those of the record under way */
    uint8_t *buffer; /* NULL: there is no journal */
    uint64_t at;
    uint32_t bytes; /* of the record; 0: no row has changed, only the slots are synced */
    int sync_result, fd;
} tb_journal;

struct tb_engine {
    int slots_fd;
    uint32_t slot_count, dio_align, low;
    bool in_memory; /* the cache directory is on tmpfs, where a sync does nothing, and costs a worker thread's turn */
    tb_stripe_state stripes[TB_STRIPES];

    tb_lock slot_lock;
    uint64_t *free, *quarantine[2]; /* bit per slot; [0] open for freed slots, [1] closed by the running commit */
    uint64_t *owner;                /* per slot: layer << 48 | block, while a block has it; else UINT64_MAX or 0 */
    uint64_t released; /* slots that commits have made free, so far */
    uint32_t free_count, quarantined, hint, bad, hand, probation;
    bool loaded;

    int sums_fd;
    pthread_mutex_t sums_lock; /* of those who write sums of volumes' pages, but for fills; see sums.c */
    uint8_t *staging;
    uint64_t staging_bytes;

    tb_layer *layers[TB_MAX_LAYERS];
    unsigned layers_end; /* no id from here on was ever used */
    uint32_t tags, next_door;

    tb_fill *fills, *fill_free;
    tb_lock fill_lock;
    uint32_t fills_used, fills_active;
    uint16_t clock; /* ticks once per 1/64 of the slots filled */
    uint32_t clock_fills;

    tb_ring events, commands;
    tb_lock event_lock; /* producers of events: the filler, and queues that tell of misses */
    tb_fill *attention_inbox;
    tb_note notes[TB_NOTES], *note_free, *note_inbox;
    tb_req *starved, *hungry, **hungry_end; /* requests that found no fill: a stack for all, the filler's list */
    tb_req *needy;       /* writes that found no slot; a stack */
    uint32_t needy_count, volume_slots; /* volume_slots: that blocks of volumes have */
    tb_req *flushes;     /* that wait for a commit of which Python has not been told; a stack */
    tb_journal journal;
    uint32_t flush_told, flush_failed, failed_cycles, flushes_waiting; /* the last: also those that Python has taken, and those for the store */
    uint32_t drain_scan, filler_quit, need_space_told;
    uint64_t pace_ticks, pace_next, pace_longest, pace_shortest, pace_ns_per_tick; /* see pace.c; the last in 1/1024 */
    uint32_t pinned; /* slots that only a sealed epoch has */
    uint32_t dirty_slots; /* of blocks with pages that are nowhere else, */
    uint32_t far_slots;   /* and those of them that an upload makes clean */
    uint32_t reserve; /* free slots that are kept for moves (R14) */
    uint32_t vain; /* nothing could be evicted: not asked again, but by a write that waits, before a commit */
    uint32_t impatient; /* doors whose patience ends some time */
    uint32_t now_ms, tick_ms, watchdog_ms, beat_ms;
    uint32_t dozing, active_ms; /* dozing: the filler sleeps until it is woken; active_ms: when it last saw a fill */
    uint64_t made_ticks, made_ns;
    tb_run runs[TB_OPEN_RUNS];
    tb_fill *pending, **pending_end; /* whole runs one after the other, until the disk may have them */
    uint32_t write_failures, paused_ms, pause_ms, oldest_write_ms;
    uint32_t unwritten, writing_blocks; /* blocks that wait for the disk; and those of them that it has been given */
    uint64_t evict_wanted, evict_done, evict_steps;
    uint32_t writes_inflight;
    struct io_uring ring;
    uint64_t wake_value;
    pthread_t filler;
    sem_t filler_ready;
    int filler_failure;
    bool filler_running, ring_made;
    tb_cache_stats stats;
};

/* user_data of every SQE: a pointer (48 bits), what it is (low 4 bits), and the length expected in sectors (top byte).
 * UD_WRITE: of a request's bytes to its volume's slot; UD_DATA: of a request's bytes into its tag's buffer. */
enum { UD_WAKE, UD_DOOR, UD_SLOT_READ, UD_SLOT_WRITE, UD_RUN_WRITE, UD_ZEROS, UD_DOOR_COPY, UD_HOT, UD_VOLUME_READ, UD_WRITE, UD_DATA, UD_SYNC,
       UD_RECORD_SYNC, UD_RECORD, UD_CLOCK, UD_MOVE };

static inline uint64_t tb_ud(const void *pointer, unsigned kind, uint32_t bytes)
{
    return (uint64_t)(uintptr_t)pointer | kind | (uint64_t)(bytes / TB_SECTOR) << 56;
}

static inline unsigned tb_ud_kind(uint64_t ud)
{
    return ud & 15;
}

static inline void *tb_ud_pointer(uint64_t ud)
{
    return (void *)(uintptr_t)(ud & 0x00fffffffffffff0ull);
}

static inline uint32_t tb_ud_bytes(uint64_t ud)
{
    return (uint32_t)(ud >> 56) * TB_SECTOR;
}

/* Whether a request can only go on when the event loop does something. */
static inline bool tb_needs_python(const tb_engine *e)
{
    return TB_LOAD(&e->fills_active) || TB_LOAD(&e->needy_count) || TB_LOAD(&e->flushes_waiting);
}

/* Onto a stack that any thread may push to. */
static inline void tb_push_req(tb_req **stack, tb_req *req)
{
    tb_req *head = TB_LOAD(stack);
    do
        req->next = head;
    while (!__atomic_compare_exchange_n(stack, &head, req, true, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
}

static inline tb_stripe_state *tb_stripe_of(const tb_layer *layer, uint64_t block)
{
    uint64_t key = (block / TB_ROW_ENTRIES + (uint64_t)layer->id * 0x9e3779b97f4a7c15ull) * 0xff51afd7ed558ccdull;
    return &layer->engine->stripes[key >> 54];
}

static inline tb_lock *tb_stripe(const tb_layer *layer, uint64_t block)
{
    return &tb_stripe_of(layer, block)->lock;
}

/* Its memory on tmpfs is allocated: it may be read, and a page whose memory is not was never written. */
static inline bool tb_map_has(const tb_layer *layer, uint64_t block)
{
    return tb_bit_get(layer->ready, block / (TB_PAGE_BYTES / sizeof(tb_entry)));
}

static inline void tb_entry_store(tb_entry *entry, tb_head head)
{
    entry->head.bytes = head.bytes; /* one aligned 16-byte store: a kill leaves the old entry or the new one (R1) */
}

/* Its slot cannot be had by evicting it. */
static inline bool tb_head_holds(tb_head head)
{
    return head.slot && head.dirty & head.cached;
}

/* Dirty pages in its slot without sums. */
static inline uint16_t tb_unsummed(tb_head head, uint16_t summed)
{
    return head.dirty & head.cached & (uint16_t)~summed;
}

/* Under the stripe lock: the same, counted; and which pages of a volume's block have sums from now on. */
static inline void tb_entry_change_sums(tb_layer *layer, tb_entry *entry, tb_head head, uint16_t summed)
{
    int holds = (int)tb_head_holds(head) - (int)tb_head_holds(entry->head);
    if (holds)
        TB_ADD(&layer->engine->dirty_slots, (uint32_t)holds);
    if (holds && layer->is_write_back)
        TB_ADD(&layer->engine->far_slots, (uint32_t)holds);
    int cached = __builtin_popcount(head.cached) - __builtin_popcount(entry->head.cached);
    int dirty = __builtin_popcount(head.dirty) - __builtin_popcount(entry->head.dirty);
    if (cached)
        TB_ADD(&layer->cached_pages, (uint64_t)(int64_t)cached);
    if (dirty)
        TB_ADD(&layer->dirty_pages, (uint64_t)(int64_t)dirty);
    int unsummed = (tb_unsummed(head, summed) != 0) - (tb_unsummed(entry->head, entry->summed) != 0);
    if (unsummed)
        TB_ADD(&layer->unsummed, (uint64_t)(int64_t)unsummed);
    entry->summed = summed; /* first: who looks from outside, or after a kill, may find it less than it is */
    __atomic_signal_fence(__ATOMIC_RELEASE);
    tb_entry_store(entry, head);
}

static inline void tb_entry_change(tb_layer *layer, tb_entry *entry, tb_head head)
{
    tb_entry_change_sums(layer, entry, head, entry->summed);
}

static inline uint16_t tb_valid_pages(const tb_layer *layer, uint64_t block)
{
    uint64_t left = layer->size_bytes - block * TB_BLOCK_BYTES;
    uint64_t pages = left >= TB_BLOCK_BYTES ? TB_BLOCK_PAGES : tb_round_up(left, TB_PAGE_BYTES) / TB_PAGE_BYTES;
    return (uint16_t)((1u << pages) - 1);
}

/* Pages that only the layer's remote has: of a base what is not cached, of a volume in object storage what it has and is not cached. */
static inline uint16_t tb_missing(const tb_layer *layer, uint64_t block, tb_head head)
{
    uint16_t has = layer->is_volume ? head.present : tb_valid_pages(layer, block);
    return has & (uint16_t)~(head.cached | head.zero);
}

/* Under the stripe lock: pages that the block's fill is about to write to the slot, or to one that the block gets with them (R5). */
static inline uint16_t tb_filling(const tb_layer *layer, const tb_entry *entry)
{
    return entry->fill ? layer->engine->fills[entry->fill - 1].writing : 0;
}

#include "calls.h"

#endif
