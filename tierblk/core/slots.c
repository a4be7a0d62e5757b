/* Slots: who has which, which are free, which wait for a commit (I4), and which block is to leave next.
 *
 * A bit set per state costs 3 bits a slot whatever the cache holds; the owner table is touched for used slots only. */
#define _GNU_SOURCE
#include "core.h"

#define FREE_OWNER 0
#define CONDEMNED UINT64_MAX
#define KEPT (TB_ENTRY_SEALED | TB_ENTRY_MOVING | TB_ENTRY_PINNED) /* a move may outlast the epoch that it was made for */

void *tb_lazily_zeroed(size_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

static size_t bitmap_bytes(const tb_engine *e)
{
    return tb_round_up(e->slot_count, 64) / 8;
}

int tb_slots_init(tb_engine *e)
{
    e->free = tb_lazily_zeroed(bitmap_bytes(e));
    e->quarantine[0] = tb_lazily_zeroed(bitmap_bytes(e));
    e->quarantine[1] = tb_lazily_zeroed(bitmap_bytes(e));
    e->owner = tb_lazily_zeroed((size_t)e->slot_count * sizeof *e->owner);
    return e->free && e->quarantine[0] && e->quarantine[1] && e->owner ? 0 : -ENOMEM;
}

void tb_slots_exit(tb_engine *e)
{
    uint64_t *sets[] = {e->free, e->quarantine[0], e->quarantine[1]};
    for (unsigned i = 0; i < 3; i++)
        if (sets[i])
            munmap(sets[i], bitmap_bytes(e));
    if (e->owner)
        munmap(e->owner, (size_t)e->slot_count * sizeof *e->owner);
}

bool tb_slot_owned(const tb_engine *e, uint32_t slot)
{
    return e->owner[slot] != FREE_OWNER;
}

/* Block numbers fit 48 bits (2^64 bytes of 64 KiB blocks); layer ids begin at 1, so an owner is never FREE_OWNER. */
void tb_slot_own(tb_engine *e, uint32_t slot, const tb_layer *layer, uint64_t block)
{
    if (layer->is_volume)
        TB_ADD(&e->volume_slots, 1);
    __atomic_store_n(&e->owner[slot], (uint64_t)layer->id << 48 | block, __ATOMIC_RELEASE);
}

static void disown(tb_engine *e, uint32_t slot, uint64_t instead)
{
    uint64_t owner = __atomic_exchange_n(&e->owner[slot], instead, __ATOMIC_SEQ_CST);
    if (owner != FREE_OWNER && owner != CONDEMNED && e->layers[owner >> 48]->is_volume)
        TB_ADD(&e->volume_slots, -1u);
}

/* After every layer is loaded: what nobody names and nobody quarantined is free (R8). */
int tb_slots_finish_load(tb_engine *e)
{
    if (e->loaded)
        return -EALREADY;
    for (uint32_t slot = 1; slot < e->slot_count; slot++)
        if (!tb_slot_owned(e, slot) && !tb_bit_get(e->quarantine[0], slot)) {
            tb_bit_set(e->free, slot);
            e->free_count++;
        }
    e->hint = 1;
    e->loaded = true;
    return 0;
}

/* At a warm start: a slot that the index still names and the map does not. */
int tb_slots_quarantine(tb_engine *e, uint32_t slot)
{
    if (e->loaded || slot == 0 || slot >= e->slot_count)
        return -EINVAL;
    if (!tb_slot_owned(e, slot) && !tb_bit_get(e->quarantine[0], slot)) {
        tb_bit_set(e->quarantine[0], slot);
        e->quarantined++;
    }
    return 0;
}

/* Up to `want` neighbouring free slots, the first of them returned, 0 when there is none; the caller owns them until each
 * is given back, owned by a block, or condemned. The search begins behind the last one taken, so that what is fetched
 * together lies together, and takes the longest run that it meets within a few hundred words of the bitmap. */
uint32_t tb_slot_take_run(tb_engine *e, uint32_t want, bool may_take_reserve, uint32_t *got)
{
    uint32_t best = 0, best_length = 0, slot = e->hint, looked = 0;
    tb_lock_take(&e->slot_lock);
    uint32_t reserve = may_take_reserve ? 0 : TB_LOAD(&e->reserve), room = e->free_count > reserve ? e->free_count - reserve : 0;
    uint32_t most = room ? e->slot_count + 64 : 0; /* all of them if need be: one is free */
    want = want < room ? want : room;
    while (best_length < want && looked < most && !(best_length && looked > 16384)) {
        if (slot >= e->slot_count) {
            slot = 0;
            continue;
        }
        uint64_t bits = e->free[slot / 64] >> (slot & 63);
        if (!bits) {
            looked += 64 - (slot & 63);
            slot = (slot | 63) + 1;
            continue;
        }
        uint32_t skip = (uint32_t)__builtin_ctzll(bits), length = 0;
        slot += skip;
        while (length < want && slot + length < e->slot_count && tb_bit_get(e->free, slot + length))
            length++;
        if (length > best_length) {
            best = slot;
            best_length = length;
        }
        slot += length;
        looked += skip + length;
    }
    for (uint32_t i = 0; i < best_length; i++)
        e->free[(best + i) / 64] &= ~(1ull << ((best + i) & 63));
    if (best_length) {
        __atomic_store_n(&e->free_count, e->free_count - best_length, __ATOMIC_RELAXED);
        e->hint = best + best_length < e->slot_count ? best + best_length : 1;
    }
    tb_lock_give(&e->slot_lock);
    *got = best_length;
    return best;
}

uint32_t tb_slot_take_for_write(tb_engine *e)
{
    uint32_t got = 0, slot = tb_slot_take_run(e, 1, false, &got);
    return got ? slot : 0;
}

/* Whether a write may have one of the free slots. */
bool tb_slot_for_all(const tb_engine *e)
{
    return TB_LOAD(&e->free_count) > TB_LOAD(&e->reserve);
}

/* Under the stripe lock: the slot that an entry is to lose because nothing of it is cached any more and nothing is in flight on
 * it (R2); 0: none. The caller stores the head, if it has changed, and quarantines the slot. One with sealed bytes goes to the epoch
 * instead. */
uint32_t tb_entry_drop_slot(tb_layer *layer, tb_entry *entry, tb_head *head)
{
    if (!head->slot || head->cached || entry->readers || entry->writers || tb_filling(layer, entry))
        return 0;
    uint32_t slot = head->slot;
    head->slot = 0;
    if (head->flags & TB_ENTRY_SEALED) {
        head->flags &= (uint16_t)~TB_ENTRY_SEALED;
        if (!layer->sealing) /* tb_epoch_end is about to take the flag away */
            return slot;
        tb_epoch_pin(layer, slot);
        return 0;
    }
    return slot;
}

/* Nobody's for now, and not free. */
void tb_slot_give_to_epoch(tb_engine *e, uint32_t slot)
{
    disown(e, slot, CONDEMNED);
    TB_ADD(&e->pinned, 1);
}

/* It waits for a commit like any other that was freed. */
void tb_slot_take_from_epoch(tb_engine *e, uint32_t slot)
{
    TB_ADD(&e->pinned, -1u);
    tb_slot_quarantine(e, slot);
}

/* Under a stripe lock, see tb_door_drain: the write waits until slots are free, or until somebody says that none will be. */
void tb_needy_push(tb_engine *e, tb_req *req)
{
    TB_ADD(&req->queue->stats.waiting, 1);
    TB_ADD(&e->needy_count, 1);
    tb_push_req(&e->needy, req);
}

/* Any thread: those of the waiting writes that `whom` names (NULL: all) look again, or end with `result`. */
void tb_needy_wake(tb_engine *e, bool (*whom)(const tb_req *req), int result)
{
    tb_req *list = __atomic_exchange_n(&e->needy, NULL, __ATOMIC_SEQ_CST);
    bool kept = false;
    while (list) {
        tb_req *req = list;
        list = req->next;
        TB_ADD(&e->needy_count, -1u);
        if (whom && !whom(req)) {
            TB_ADD(&req->queue->stats.waiting, -1ull);
            tb_needy_push(e, req);
            kept = true;
            continue;
        }
        req->result = result;
        tb_queue_hand_back(req);
    }
    if (!kept)
        return;
    /* Who freed slots while those were off the list has woken nobody, and who was told has looked in vain. */
    if (tb_slot_for_all(e)) {
        tb_needy_wake(e, NULL, 0);
        return;
    }
    __atomic_store_n(&e->need_space_told, 0, __ATOMIC_SEQ_CST);
    if (tb_need_space(e))
        tb_ring_kick(&e->events);
}

/* Event loop: nothing can be evicted and no freed slot waits for a commit, or no commit succeeds. */
void tb_no_space(tb_engine *e, int result)
{
    __atomic_store_n(&e->need_space_told, 0, __ATOMIC_SEQ_CST); /* first: who comes too late for this tells again */
    tb_needy_wake(e, NULL, result);
}

/* For a slot that no row ever named since it was taken: free at once. */
void tb_slot_give_back(tb_engine *e, uint32_t slot)
{
    tb_lock_take(&e->slot_lock);
    tb_bit_set(e->free, slot);
    __atomic_store_n(&e->free_count, e->free_count + 1, __ATOMIC_RELAXED);
    e->hint = slot;
    tb_lock_give(&e->slot_lock);
    if (TB_LOAD(&e->needy_count))
        tb_needy_wake(e, NULL, 0);
}

/* For a slot that a block just lost: not written until the commit that unmaps it is durable (I4). The row must be
 * marked changed before, or a commit could release the slot without having written the row. */
void tb_slot_quarantine(tb_engine *e, uint32_t slot)
{
    disown(e, slot, FREE_OWNER);
    tb_lock_take(&e->slot_lock);
    tb_bit_set(e->quarantine[0], slot);
    __atomic_store_n(&e->quarantined, e->quarantined + 1, __ATOMIC_RELAXED);
    tb_lock_give(&e->slot_lock);
}

/* A bad spot is avoided until the next start. A disk that fails everywhere would leave no cache behind: what it gives back
 * when it has recovered is tried again. */
bool tb_slot_may_condemn(const tb_engine *e)
{
    return TB_LOAD(&e->bad) < e->slot_count / 64 + 8;
}

/* For a slot whose medium failed: nobody gets it before the next start. */
void tb_slot_condemn(tb_engine *e, uint32_t slot)
{
    disown(e, slot, CONDEMNED);
    TB_ADD(&e->bad, 1);
}

/* R6, step 1: slots freed from now on wait for the next commit. */
void tb_slots_commit_begin(tb_engine *e)
{
    tb_lock_take(&e->slot_lock);
    uint64_t *closed = e->quarantine[0];
    e->quarantine[0] = e->quarantine[1]; /* empty: commit_end leaves it so */
    e->quarantine[1] = closed;
    tb_lock_give(&e->slot_lock);
    tb_journal_commit_begin(e);
}

/* R6, step 4: releases what was freed before step 1; after a failed cycle it goes on waiting (R7). */
void tb_slots_commit_end(tb_engine *e, int ok)
{
    tb_lock_take(&e->slot_lock);
    uint64_t *target = ok ? e->free : e->quarantine[0];
    uint32_t released = 0;
    for (size_t word = 0; word < bitmap_bytes(e) / 8; word++)
        if (e->quarantine[1][word]) {
            target[word] |= e->quarantine[1][word];
            released += (uint32_t)__builtin_popcountll(e->quarantine[1][word]);
            e->quarantine[1][word] = 0;
        }
    if (ok) {
        __atomic_store_n(&e->free_count, e->free_count + released, __ATOMIC_RELAXED);
        __atomic_store_n(&e->quarantined, e->quarantined - released, __ATOMIC_RELAXED);
        TB_COUNT(&e->released, released);
    }
    tb_lock_give(&e->slot_lock);
    tb_journal_commit_end(e, ok);
    if (!ok)
        __atomic_fetch_add(&e->failed_cycles, 1, __ATOMIC_SEQ_CST);
    for (unsigned id = 1; id < TB_LOAD(&e->layers_end); id++) /* after a failed cycle its rows are changed again, R7 */
        if (e->layers[id])
            __atomic_store_n(&e->layers[id]->in_commit, 0, __ATOMIC_SEQ_CST);
    if (!ok)
        return;
    __atomic_store_n(&e->vain, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&e->need_space_told, 0, __ATOMIC_RELAXED);
    tb_needy_wake(e, NULL, 0);
}

/* One slot under the hand: its block leaves if nothing is in flight on it and it was not hit lately. A block on
 * probation leaves first: while there are enough of them, one scan does not wash the others out. */
static bool evict_slot(tb_engine *e, uint32_t slot, bool probation_only)
{
    uint64_t owner = __atomic_load_n(&e->owner[slot], __ATOMIC_ACQUIRE);
    if (owner == FREE_OWNER || owner == CONDEMNED)
        return false;
    tb_layer *layer = e->layers[owner >> 48];
    uint64_t block = owner & ((1ull << 48) - 1);
    tb_lock *stripe = tb_stripe(layer, block);
    bool evicted = false;
    tb_lock_take(stripe);
    tb_entry *entry = &layer->entries[block];
    tb_head head = entry->head;
    /* R2: only with nothing in flight; I3: never with a dirty page. The owner is looked up without the lock, so the
     * entry must still say the same. */
    if (head.slot == slot && !head.dirty && !(head.flags & KEPT) && !entry->readers && !entry->writers && !entry->fill) {
        if (head.flags & TB_ENTRY_REFERENCED) {
            head.flags &= (uint16_t)~TB_ENTRY_REFERENCED;
            tb_entry_store(entry, head);
        } else if (!probation_only || head.flags & TB_ENTRY_PROBATION) {
            if (head.flags & TB_ENTRY_PROBATION)
                TB_ADD(&e->probation, -1u);
            head.slot = 0;
            head.cached = 0;
            head.flags = 0;
            tb_entry_change(layer, entry, head);
            tb_map_mark(layer, block);
            evicted = true;
        }
    }
    tb_lock_give(stripe);
    if (evicted)
        tb_slot_quarantine(e, slot);
    return evicted;
}

/* A bounded piece of the eviction that Python asked for, so that fills do not wait behind a long scan. Filler only. */
void tb_evict_turn(tb_engine *e)
{
    for (int step = 0; step < 4096 && e->evict_wanted; step++) {
        uint32_t used = e->slot_count - 1 - TB_LOAD(&e->free_count) - TB_LOAD(&e->quarantined);
        bool probation_only = TB_LOAD(&e->probation) > used / 10 && e->evict_steps <= e->slot_count;
        e->hand = e->hand + 1 >= e->slot_count ? 1 : e->hand + 1;
        if (evict_slot(e, e->hand, probation_only)) {
            e->evict_done++;
            e->evict_wanted--;
        }
        if (++e->evict_steps > 3ull * e->slot_count) /* nothing more can go now */
            e->evict_wanted = 0;
    }
    if (e->evict_wanted)
        return;
    tb_say(e, (tb_record){.kind = TB_EV_EVICTED, .value = e->evict_done}); /* not said, Python would never ask again */
    TB_COUNT(&e->stats.evicted, e->evict_done);
    __atomic_store_n(&e->vain, e->evict_done == 0, __ATOMIC_RELAXED);
    e->evict_done = e->evict_steps = 0;
    __atomic_store_n(&e->need_space_told, 0, __ATOMIC_RELAXED);
}
