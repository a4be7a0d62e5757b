/* What the C files call of each other. */
#ifndef TB_CALLS_H
#define TB_CALLS_H

#include "core.h"

/* ring.c */
int tb_ring_init(tb_ring *ring);
void tb_ring_free(tb_ring *ring);
int tb_ring_push(tb_ring *ring, const tb_record *in, int count);
int tb_ring_pop(tb_ring *ring, tb_record *out, int max);
void tb_ring_kick(tb_ring *ring);
bool tb_ring_arm(tb_ring *ring);
struct io_uring_sqe *tb_sqe(struct io_uring *ring);
void tb_sqe_room(struct io_uring *ring, unsigned count);
int tb_uring_init(struct io_uring *ring, unsigned entries);
void tb_wake_arm(struct io_uring *ring, int fd, uint64_t *value);

/* thread.c */
int tb_thread_start(pthread_t *thread, void *(*main)(void *), void *argument);
void tb_thread_nice(int nice);
void tb_thread_settle(const char *name, const uint8_t *cpus, size_t cpus_bytes);

/* rows.c */
uint64_t *tb_bits_new(uint64_t bits, size_t *bytes);
int tb_rows_new(tb_rows *set, uint64_t rows);
void tb_rows_free(tb_rows *set);
void tb_map_mark(tb_layer *layer, uint64_t block);
unsigned tb_layer_take_unflushed(tb_layer *layer, uint8_t *entries, unsigned max);

/* journal.c */
void tb_journal_free(tb_engine *engine);
int tb_files_register(tb_queue *queue, int door_fd);
void tb_journal_commit_begin(tb_engine *engine);
void tb_journal_commit_end(tb_engine *engine, int ok);
bool tb_journal_idle(const tb_engine *engine);
void tb_journal_add(tb_req *req);
void tb_journal_turn(tb_queue *queue);
void tb_journal_leave(tb_queue *queue);
void tb_record_synced(tb_queue *queue, int result);
void tb_record_done(tb_queue *queue, int result);

/* map.c */
int tb_map_prepare(tb_layer *layer, uint64_t block);
uint64_t tb_map_next(const tb_layer *layer, uint64_t block, uint64_t end);

/* slots.c */
void *tb_lazily_zeroed(size_t bytes);
uint32_t tb_slot_take_for_write(tb_engine *engine);
uint32_t tb_entry_drop_slot(tb_layer *layer, tb_entry *entry, tb_head *head);
void tb_slot_give_to_epoch(tb_engine *engine, uint32_t slot);
void tb_slot_take_from_epoch(tb_engine *engine, uint32_t slot);
void tb_needy_push(tb_engine *engine, tb_req *req);
void tb_needy_wake(tb_engine *engine, bool (*whom)(const tb_req *req), int result);
int tb_slots_init(tb_engine *engine);
void tb_slots_exit(tb_engine *engine);
uint32_t tb_slot_take_run(tb_engine *engine, uint32_t want, bool may_take_reserve, uint32_t *got);
bool tb_slot_for_all(const tb_engine *engine);
void tb_slot_give_back(tb_engine *engine, uint32_t slot);
void tb_slot_quarantine(tb_engine *engine, uint32_t slot);
bool tb_slot_may_condemn(const tb_engine *engine);
void tb_slot_condemn(tb_engine *engine, uint32_t slot);
void tb_slot_own(tb_engine *engine, uint32_t slot, const tb_layer *layer, uint64_t block);
bool tb_slot_owned(const tb_engine *engine, uint32_t slot);
void tb_evict_turn(tb_engine *engine);

/* fill.c */
int tb_fills_init(tb_engine *engine);
tb_fill *tb_fill_begin(tb_layer *layer, uint64_t block, uint16_t want);
void tb_fill_stage(tb_engine *engine, tb_fill *fill, uint16_t pages);
void tb_fill_put(tb_engine *engine, tb_fill *fill);
void tb_fill_keep(tb_engine *engine, tb_fill *fill, bool more);
void tb_fill_end(tb_engine *engine, tb_fill *fill, int result, uint16_t cached, uint16_t zero);
void tb_hand_back_all(tb_req *list, int result);
void tb_say(tb_engine *engine, tb_record event);

/* wait.c */
void tb_wait_init(tb_engine *engine);
void tb_park(tb_req *req, tb_layer *layer, tb_lock *stripe, uint16_t missing);
void tb_touched(tb_layer *layer, uint64_t block);
void tb_attend(tb_engine *engine);
void tb_tell_misses(tb_queue *queue);
void tb_free_leavers(tb_engine *engine);
void tb_give_up(tb_engine *engine, tb_fill *fill, int result);
void tb_tick(tb_engine *engine);
bool tb_may_feed(tb_engine *engine);
void tb_feed(tb_engine *engine, bool all);
uint32_t tb_now_ms(void);

/* write.c */
bool tb_need_space(tb_engine *engine);
bool tb_want_space(tb_engine *engine);
void tb_write_add(tb_engine *engine, tb_fill *fill, bool more);
void tb_write_gap(tb_engine *engine, uint64_t staging_offset);
void tb_write_flush(tb_engine *engine, uint32_t age_ms);
void tb_write_turn(tb_engine *engine);
void tb_write_done(tb_engine *engine, tb_fill *fill, int result, uint32_t expected);
void tb_run_done(tb_engine *engine, tb_fill *first, int result);

/* volume.c */
void tb_write_begin(tb_req *req);
void tb_write_lookup(tb_req *req);
void tb_old_read(tb_req *req);
void tb_data_done(tb_req *req, int result, uint32_t expected);
void tb_volume_write_done(tb_req *req, int result, uint32_t expected);
bool tb_wait_for_writes(tb_req *req, uint16_t pages, uint16_t own);
void tb_wait_in_block(tb_req *req);
uint16_t tb_writes_in(const tb_layer *volume, uint64_t block);
tb_req *tb_waiters_in(const tb_layer *volume, uint64_t block);
void tb_wait_for_space(tb_req *req, tb_lock *stripe, bool moves);
void tb_write_failed(tb_req *req, int result);

/* clear.c */
void tb_clear_begin(tb_req *req);
void tb_clear_go(tb_req *req);
void tb_clear_turn(tb_queue *queue);

/* epoch.c */
void tb_epoch_free(tb_layer *layer);
bool tb_epoch_touch(tb_layer *layer, uint64_t block, tb_entry *entry, tb_head *head);
void tb_epoch_freshen(const tb_layer *layer, tb_head *head, uint16_t pages);
void tb_epoch_pin(tb_layer *layer, uint32_t slot);

/* sums.c */
int tb_sums_write(const tb_engine *engine, uint32_t slot, uint16_t pages, const uint32_t *sums);

/* far.c */
void tb_flush_by_epoch(tb_req *req);
void tb_far_leave(tb_engine *engine);
bool tb_refused_leave(const tb_layer *volume);

/* move.c */
void tb_move_begin(tb_req *req, tb_entry *entry, tb_head head, tb_lock *stripe);
void tb_move_end(tb_req *req, tb_entry *entry, tb_lock *stripe);
void tb_move_done(tb_req *req, int result, uint32_t expected);

/* giveway.c */
void tb_read_came(tb_queue *queue);
bool tb_give_way(tb_req *req);
void tb_slot_write_ended(tb_queue *queue);
tb_req *tb_write_may_go(tb_queue *queue);

/* pace.c */
bool tb_pace(tb_req *req);
void tb_pace_turn(tb_queue *queue);

/* flush.c */
void tb_flush_tell(tb_engine *engine);
void tb_flush_by_commit(tb_req *req);
void tb_sync(tb_req *req);
void tb_sync_done(tb_req *req, int result);

/* filler.c */
void tb_filler_wake(tb_engine *engine);
void tb_rouse(tb_engine *engine);
void *tb_filler_main(void *argument);

/* serve.c */
void tb_serve(tb_req *req);
void tb_slot_read_done(tb_req *req, int result, uint32_t expected, bool of_volume);
void tb_zeros_done(tb_req *req, int result, uint32_t expected);
uint64_t tb_copy_pos(const tb_req *req);
void tb_put(tb_req *req, uint16_t pages, const uint8_t *block_bytes);
uint16_t tb_pages_of(uint32_t offset, uint32_t length);
uint16_t tb_whole_pages_of(uint32_t offset, uint32_t length);

/* forget.c */
void tb_forget_block(tb_layer *layer, tb_entry *entry, uint64_t block);
bool tb_forget_of_volume(tb_layer *volume, uint64_t block);

/* hot.c */
int tb_hot_new(uint64_t bytes, tb_hot **out);
void tb_hot_free(tb_hot *hot);
bool tb_hot_serve(tb_req *req);
const uint8_t *tb_hot_bytes(const tb_req *req);
void tb_hot_consider(tb_req *req);
void tb_hot_keep(tb_req *req);
void tb_hot_release(tb_req *req);

/* Nothing of the request touches its frame any more. */
static inline void tb_hot_let_go(tb_req *req)
{
    if (req->frame)
        tb_hot_release(req);
}

/* request.c */
void tb_begin(tb_req *req);
void tb_over(tb_req *req);
void tb_resume(tb_req *req);
void tb_finish(tb_req *req);
void tb_drop(tb_req *req);

/* trace.c */
void tb_trace_done(const tb_req *req);
void tb_trace_refused(const tb_req *req, uint64_t start, uint64_t length);
void tb_trace_turn(tb_queue *queue);
void tb_trace_free(tb_queue *queue);

static inline bool tb_traces(const tb_queue *queue)
{
    return __builtin_expect(__atomic_load_n(&queue->trace, __ATOMIC_RELAXED) != NULL, 0);
}

/* queue.c */
int tb_queue_new(tb_engine *engine, const tb_stack *stack, uint16_t depth, uint64_t hot_bytes, const tb_door_ops *ops, void *door, tb_queue **out);
int tb_queue_start(tb_queue *queue);
void tb_queue_free(tb_queue *queue);
void tb_queue_hand_back(tb_req *req);
void tb_queue_wake(tb_queue *queue);

#endif
