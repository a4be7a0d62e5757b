/* What Python may call. Read twice: by the C compiler (through core.h) and by cffi, so it holds nothing but
 * integer constants, plain structs and prototypes. Every function returns 0 or a count, or a negative errno. */

#define TB_PAGE_BYTES 4096
#define TB_BLOCK_BYTES 65536
#define TB_BLOCK_PAGES 16
#define TB_ROW_ENTRIES 64
#define TB_ROW_BYTES 772
#define TB_MAP_HEADER_BYTES 4096
#define TB_ROW_GONE 0x8000000000000000u /* in the number of a row that holds nothing any more */
#define TB_RECORD_ENTRY 784 /* of a record of the journal: row u64, layer u32, the row packed */
#define TB_MAX_LAYERS 4096
#define TB_MAX_TAGS 8192
#define TB_RING_RECORDS 65536

/* Events, engine to Python. */
#define TB_EV_MISS 1
#define TB_EV_FILLED 2
#define TB_EV_NEED_SPACE 3
#define TB_EV_EVICTED 4
#define TB_EV_WAITED 5
#define TB_EV_READ_ON 6
#define TB_EV_LEFT 7
#define TB_EV_FLUSH 8 /* layer: FLUSHes of it wait for the store; 0: some wait for a commit */

/* Commands, Python to engine. */
#define TB_CMD_FILL 1
#define TB_CMD_FAIL 2
#define TB_CMD_EVICT 3
#define TB_CMD_PREFETCH 4
#define TB_CMD_GIVE_UP 5

/* FILL's result: more pages of the block follow; it has all that will come; and so it has, and the window's next block
 * follows, so that both can be written together. */
#define TB_FILL_PART 0
#define TB_FILL_WHOLE 1
#define TB_FILL_WHOLE_MORE 2

/* One event or command; 32 bytes. Which fields count is said in docs/architecture.md, section Rings. */
typedef struct {
    uint16_t kind;
    uint16_t layer;
    uint32_t token;
    uint64_t block;
    uint64_t value;
    int32_t result;
    uint32_t pages;
} tb_record;

typedef struct {
    uint64_t requests, errors, hit_requests, hit_bytes, zero_requests, zero_bytes, miss_requests, miss_bytes;
    uint64_t memory_requests, slot_errors, waiting, active, enters, bounced, oldest_wait_ms;
    uint64_t write_requests, write_bytes, partial_writes, space_waits, paced, yielded, moved, flush_requests, flush_commits, flush_records, discard_requests, discard_bytes;
} tb_stats;

/* A block of a sealed epoch as it was at the seal: dirty pages, those of them that are zeros, and the slot of the others. */
typedef struct {
    uint64_t block;
    uint32_t slot;
    uint16_t dirty, zero;
} tb_sealed;

typedef struct {
    uint64_t slots, free, quarantined, bad, probation, fills, slot_write_errors, slot_writes, slot_write_calls, zero_blocks;
    uint64_t evicted, released, passed_blocks, expired, needy, flush_failed, volume_slots, dirty_slots, far_slots, pinned;
} tb_cache_stats;

/* Latencies of requests, from the turn in which they came to the one in which they were done: how many, by tier and by
 * bucket. Bucket 4 * k + i holds those of (4 + i) << k ticks up to the next one's. */
#define TB_TIER_HIT 0
#define TB_TIER_ZERO 1
#define TB_TIER_MISS 2
#define TB_TIER_MEMORY 3
#define TB_TIER_WRITE 4
#define TB_TIER_FLUSH 5
#define TB_TIERS 6
#define TB_LATENCY_BUCKETS 160

/* A request that has ended, as it is traced. began: ticks of the turn in which it came; took: ticks until it was done. offset,
 * length: bytes of the device, as it was asked for; 0 of a FLUSH. tier: TB_TIER_*, or TB_TIERS where none serves: a DISCARD, a
 * WRITE_ZEROES, what was refused. op: TB_OP_*, or TB_OP_OTHER. */
#define TB_TRACE_RECORDS 16384 /* that a queue keeps for those who read them */
#define TB_TRACE_FUA 1
typedef struct {
    uint64_t began, took, offset, length;
    uint8_t op, tier;
    uint16_t tag;
    int16_t result;
    uint16_t flags;
} tb_traced;

/* Which of them are wanted: bits 1 << op and 1 << tier; at least so slow; ranged: that touch [start, end). */
typedef struct {
    uint64_t min_ticks, start, end;
    uint32_t ops, tiers, ranged;
} tb_trace_filter;

typedef struct tb_engine tb_engine;
typedef struct tb_layer tb_layer;
typedef struct tb_queue tb_queue;
typedef struct tb_req tb_req;

uint32_t tb_crc32c(const void *data, size_t length, uint32_t crc);
void tb_crc32c_pages(const uint8_t *block, uint16_t pages, uint32_t *sums);

/* The engine: slots, staging, the filler thread. slots_fd and sums_fd stay the caller's to close, after tb_engine_free. */
int tb_engine_new(int slots_fd, uint32_t slot_count, int sums_fd, uint64_t staging_bytes, uint32_t dio_align, tb_engine **out);
int tb_engine_start(tb_engine *engine);
int tb_engine_free(tb_engine *engine);
int tb_engine_event_fd(tb_engine *engine);
uint8_t *tb_engine_staging(tb_engine *engine);
void tb_engine_trim_staging(tb_engine *engine);
void tb_engine_set_low(tb_engine *engine, uint32_t free_slots);
int tb_engine_poll(tb_engine *engine, tb_record *out, int max);
double tb_engine_tick_ns(tb_engine *engine);
uint64_t tb_ticks_now(void);
int tb_engine_push(tb_engine *engine, const tb_record *in, int count);
void tb_engine_stats(tb_engine *engine, tb_cache_stats *out);
void tb_engine_set_watchdog(tb_engine *engine, uint32_t milliseconds);
void tb_engine_beat(tb_engine *engine);

/* Slots. */
int tb_slots_finish_load(tb_engine *engine);
int tb_slots_quarantine(tb_engine *engine, uint32_t slot);
void tb_slots_commit_begin(tb_engine *engine);
void tb_slots_commit_end(tb_engine *engine, int ok);

/* The journal. */
int tb_journal_open(tb_engine *engine, int fd, uint64_t offset, uint64_t ring_bytes, uint64_t session);
uint64_t tb_commit_taken(tb_engine *engine);

/* Layers: the block map. A scratch volume need not outlive the machine, so nobody waits for its FLUSH. */
#define TB_LAYER_BASE 0
#define TB_LAYER_LOCAL 1
#define TB_LAYER_SCRATCH 2
#define TB_LAYER_WRITE_BACK 3
int tb_layer_open(tb_engine *engine, uint16_t id, int map_fd, uint64_t size_bytes, int kind, tb_layer **out);
int tb_layer_set_kind(tb_layer *layer, int kind);
int tb_layer_close(tb_layer *layer);
int tb_layer_load_row(tb_layer *layer, uint64_t row, const uint8_t *packed, uint32_t length, int drop_clean);
int tb_layer_bad_row(tb_layer *layer, uint64_t row);
int tb_epoch_seal(tb_layer *layer);
int tb_epoch_collect(tb_layer *layer, uint32_t max);
uint32_t tb_epoch_take(tb_layer *layer, tb_sealed *out, uint32_t max);
int tb_epoch_read(tb_layer *layer, const tb_sealed *items, uint32_t count, uint8_t *bytes, uint64_t bytes_max, uint32_t *sums);
void tb_epoch_check(tb_layer *layer, const tb_sealed *items, uint32_t count, const uint32_t *sums, uint16_t *bad);
void tb_epoch_clean(tb_layer *layer, const tb_sealed *items, uint32_t count, const uint32_t *sums);
void tb_epoch_end(tb_layer *layer);
int tb_layer_clear(tb_layer *layer, uint64_t *block, int pages);
int64_t tb_layer_warm_start(tb_layer *layer);
int tb_layer_take_changed(tb_layer *layer, uint64_t *rows, uint8_t *packed, int max);
int tb_layer_put_back(tb_layer *layer, uint64_t row);
int tb_layer_changed(tb_layer *layer);
int tb_layer_peek_row(tb_layer *layer, uint64_t row, uint8_t *packed);
int tb_layer_page_sums(tb_layer *layer, uint64_t block, uint32_t *sums);
uint32_t tb_sums_find(tb_layer *layer, uint64_t *from, uint32_t pages, uint64_t *out, uint32_t max);
int tb_sums_make(tb_layer *layer, uint64_t block, uint8_t *memory);
void tb_sums_save(const tb_layer *layer, uint16_t *masks);
void tb_sums_load(tb_layer *layer, const uint16_t *masks, uint32_t count);
uint64_t tb_sums_lacking(const tb_layer *layer);
int tb_layer_drop(tb_layer *layer, uint64_t block, uint16_t pages);
int tb_layer_pin(tb_layer *layer, uint64_t block, int pinned);
uint64_t tb_layer_cached_pages(tb_layer *layer);
uint64_t tb_layer_dirty_pages(tb_layer *layer);

/* A volume in object storage. */
int tb_layer_learn(tb_layer *layer, const tb_sealed *items, uint32_t count);
void tb_layer_mark_all(tb_layer *layer);
void tb_layer_refuse(tb_layer *layer, int error);
void tb_layer_flush_far(tb_layer *layer, int far);
uint64_t tb_far_count(tb_layer *layer);
void tb_far_done(tb_layer *layer, uint64_t upto, int result);
void tb_engine_set_reserve(tb_engine *engine, uint32_t slots);

/* FLUSHes that wait for a commit: a batch that the next whole cycle is for, NULL when there is none; and its end. */
tb_req *tb_flush_take(tb_engine *engine);
void tb_flush_done(tb_req *batch, int result);
void tb_flush_fail(tb_engine *engine);
int tb_flush_failed(tb_engine *engine);
void tb_no_space(tb_engine *engine, int result);
void tb_engine_set_pace(tb_engine *engine, uint64_t ns_per_block);

/* What a device shows: a volume over a base; either may be missing. */
typedef struct {
    tb_layer *volume, *base;
    uint64_t size_bytes;
} tb_stack;

/* Operations of a local call; WRITE, DISCARD and ZEROES only with a volume. */
#define TB_OP_READ 0
#define TB_OP_WRITE 1
#define TB_OP_FLUSH 2
#define TB_OP_DISCARD 3
#define TB_OP_ZEROES 4
#define TB_OP_OTHER 7 /* only in a trace: nothing that a device of ours can have announced */
#define TB_OP_FUA 0x100

/* Doors. A door's thread runs from tb_*_open to tb_door_close. */
int tb_ublk_open(tb_engine *engine, const tb_stack *stack, int cdev_fd, uint32_t dev_id, uint16_t q_id, uint16_t depth, int zero_copy,
                 uint64_t hot_bytes, const uint8_t *cpus, size_t cpus_bytes, tb_queue **out);
int tb_local_open(tb_engine *engine, const tb_stack *stack, uint16_t depth, uint64_t hot_bytes, tb_queue **out);
int tb_local_read(tb_queue *door, uint64_t offset, uint64_t length, uint8_t *out);
int tb_local_call(tb_queue *door, int op, uint64_t offset, uint64_t length, uint8_t *bytes);
int tb_door_end_fd(tb_queue *door);
int tb_door_drain(tb_queue *door);
int tb_door_leave(tb_queue *door);
void tb_door_set_patience(tb_queue *door, uint32_t milliseconds);
int tb_door_quit(tb_queue *door);
int tb_door_close(tb_queue *door);
void tb_door_stats(tb_queue *door, tb_stats *out);
void tb_door_latencies(tb_queue *door, uint64_t *counts, uint64_t *ticks);
int tb_door_trace_start(tb_queue *door);
void tb_door_trace_stop(tb_queue *door);
uint64_t tb_door_trace_end(tb_queue *door);
int tb_door_trace_read(tb_queue *door, uint64_t *position, const tb_trace_filter *filter, tb_traced *out, int max, uint64_t *lost);

/* One ublk control command, waited for. Call it from a thread that may block, never from the event loop. */
int tb_ublk_control(uint32_t cmd_op, uint32_t dev_id, uint16_t queue_id, void *payload, uint16_t length, uint64_t data, uint32_t timeout_ms);

/* Pictures of what a cache holds: pages of a cell, by who answers them. elsewhere: the volume's, but not here. over_base: pages of the
 * volume that the base has too; used: cached and used lately. */
typedef struct {
    uint64_t dirty, volume, zero, elsewhere, over_base, base, base_zero, used;
} tb_share;

/* Cell i is the blocks [bounds[i], bounds[i + 1]). hidden: a mask a block from hidden_first on, zeros at first, or NULL. */
typedef struct {
    tb_share *shares;
    const uint64_t *bounds;
    uint64_t cells;
    uint16_t *hidden;
    uint64_t hidden_first;
} tb_tally;
void tb_tally_volume(const tb_tally *tally, const uint8_t *packed, uint32_t stride, uint64_t first, uint64_t count, uint64_t pages, uint64_t base_pages);
void tb_tally_base(const tb_tally *tally, const uint8_t *packed, uint32_t stride, uint64_t first, uint64_t count, uint64_t pages);
