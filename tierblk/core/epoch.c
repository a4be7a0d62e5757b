/* Epochs (R10 to R13, I9): a seal is one instant, and what the volume was then can be read until the epoch ends.
 *
 * The seal raises the layer's generation while every stripe lock is held. An entry whose own generation is older has not changed since.
 * Before its first change (tb_epoch_touch) what it was, slot and masks, is saved in the epoch's list; a slot with sealed bytes is not
 * written to any more: a write moves the block to another one first (move.c). Whatever lets go of such a slot leaves it to the epoch, which
 * gives it back at its end.
 *
 * The event loop seals, collects, cleans and ends; queues touch. One epoch at a time is sealed. */
#include "core.h"

#define PAGE_ENTRIES (TB_PAGE_BYTES / sizeof(tb_entry))

static size_t saved_bytes(const tb_layer *layer)
{
    return (size_t)layer->blocks * sizeof(tb_sealed);
}

static size_t pinned_bytes(const tb_layer *layer)
{
    return (size_t)layer->engine->slot_count * sizeof(uint32_t);
}

void tb_epoch_free(tb_layer *layer)
{
    if (layer->saved)
        munmap(layer->saved, saved_bytes(layer));
    if (layer->pinned)
        munmap(layer->pinned, pinned_bytes(layer));
}

/* Event loop. -EBUSY while an epoch is sealed. */
int tb_epoch_seal(tb_layer *layer)
{
    tb_engine *e = layer->engine;
    if (layer->sealing)
        return -EBUSY;
    if (!layer->saved) { /* of each only what is used costs memory */
        layer->saved = tb_lazily_zeroed(saved_bytes(layer));
        layer->pinned = tb_lazily_zeroed(pinned_bytes(layer));
        if (!layer->saved || !layer->pinned)
            return -ENOMEM;
    }
    layer->saved_count = layer->taken_count = layer->pinned_count = 0;
    layer->collected = 0;
    for (unsigned i = 0; i < TB_STRIPES; i++)
        tb_lock_take(&e->stripes[i].lock);
    layer->generation++;
    layer->sealing = true;
    for (unsigned i = 0; i < TB_STRIPES; i++)
        tb_lock_give(&e->stripes[i].lock);
    return 0;
}

/* Under the stripe lock. */
static void save(tb_layer *layer, uint64_t block, tb_head head)
{
    uint64_t at = __atomic_fetch_add(&layer->saved_count, 1, __ATOMIC_RELAXED);
    layer->saved[at] = (tb_sealed){.block = block, .slot = head.dirty & head.cached ? head.slot : 0, .dirty = head.dirty,
                                   .zero = head.dirty & head.zero};
}

/* Under the stripe lock: the entry is of this seal from now on. */
static void enter(tb_layer *layer, uint64_t block, tb_entry *entry, tb_head *head)
{
    entry->generation = layer->generation;
    head->fresh = 0;
    if (!head->dirty) {
        tb_entry_store(entry, *head);
        return;
    }
    save(layer, block, *head);
    if (head->dirty & head->cached)
        head->flags |= TB_ENTRY_SEALED;
    tb_entry_store(entry, *head);
}

/* Under the stripe lock, before a write or discard changes the block; *head is what it is then. True: it has to wait for the writes that
 * took their slot before the seal, which belong to the epoch (R11). */
bool tb_epoch_touch(tb_layer *layer, uint64_t block, tb_entry *entry, tb_head *head)
{
    if (!layer->sealing || entry->generation == layer->generation)
        return false;
    if (entry->writers)
        return true;
    enter(layer, block, entry, head);
    return false;
}

/* Under the stripe lock: these pages are newer than the sealed epoch. */
void tb_epoch_freshen(const tb_layer *layer, tb_head *head, uint16_t pages)
{
    if (layer->sealing)
        head->fresh |= pages;
}

/* Under the stripe lock, instead of quarantine, for a slot that a block lets go of: its bytes are the epoch's until that ends. */
void tb_epoch_pin(tb_layer *layer, uint32_t slot)
{
    tb_slot_give_to_epoch(layer->engine, slot);
    layer->pinned[__atomic_fetch_add(&layer->pinned_count, 1, __ATOMIC_RELAXED)] = slot;
}

/* Event loop: what the epoch consists of, some `max` map pages further. 1: call again; 0: all of it is known; -EAGAIN: call again
 * later, a write of before the seal is under way. */
int tb_epoch_collect(tb_layer *layer, uint32_t max)
{
    if (!layer->sealing)
        return -EINVAL;
    for (; layer->collected < layer->blocks && max; max--) {
        uint64_t block = tb_map_next(layer, layer->collected, layer->blocks);
        uint64_t end = block / PAGE_ENTRIES * PAGE_ENTRIES + PAGE_ENTRIES;
        for (; block < end && block < layer->blocks; block++) {
            tb_entry *entry = &layer->entries[block];
            tb_lock *stripe = tb_stripe(layer, block);
            tb_lock_take(stripe);
            bool waits = entry->generation != layer->generation && entry->writers;
            if (!waits && entry->generation != layer->generation && entry->head.dirty) {
                tb_head head = entry->head;
                enter(layer, block, entry, &head);
            }
            tb_lock_give(stripe);
            layer->collected = block;
            if (waits)
                return -EAGAIN;
        }
        layer->collected = block;
    }
    return layer->collected < layer->blocks;
}

/* Event loop: up to `max` of what was collected or touched, each once, in no order. All of them when tb_epoch_collect has said 0. */
uint32_t tb_epoch_take(tb_layer *layer, tb_sealed *out, uint32_t max)
{
    uint32_t count = 0;
    /* Entries are written under stripe locks, which the collection has taken since; before its end the last may be half. */
    while (count < max && layer->collected >= layer->blocks && layer->taken_count < layer->saved_count)
        out[count++] = layer->saved[layer->taken_count++];
    return count;
}

/* Any thread, between the collection and the epoch's end: the bytes of the dirty pages of these blocks that are no zeros, one behind the
 * other, and their sums, likewise. Nobody writes to a sealed slot, so no lock is needed. `bytes` and its end are aligned as direct
 * I/O wants it. How many pages, or -errno. */
int tb_epoch_read(tb_layer *layer, const tb_sealed *items, uint32_t count, uint8_t *bytes, uint64_t bytes_max, uint32_t *sums)
{
    int pages = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint16_t mask = items[i].dirty & (uint16_t)~items[i].zero;
        if (mask && (!items[i].slot || items[i].slot >= layer->engine->slot_count))
            return -EINVAL;
        while (mask) {
            uint32_t first = (uint32_t)__builtin_ctz(mask), length = (uint32_t)__builtin_ctz(~((uint32_t)mask >> first));
            mask &= (uint16_t)~(((1u << length) - 1) << first);
            uint8_t *to = bytes + (uint64_t)pages * TB_PAGE_BYTES;
            if ((uint64_t)(pages + (int)length) * TB_PAGE_BYTES > bytes_max)
                return -ENOBUFS;
            ssize_t want = (ssize_t)length * TB_PAGE_BYTES, got;
            do
                got = pread(layer->engine->slots_fd, to, (size_t)want, (off_t)items[i].slot * TB_BLOCK_BYTES + (off_t)first * TB_PAGE_BYTES);
            while (got < 0 && (errno == EINTR || errno == EAGAIN));
            if (got != want)
                return got < 0 ? -errno : -EIO;
            for (uint32_t page = 0; page < length; page++)
                sums[pages + (int)page] = tb_crc32c(to + page * TB_PAGE_BYTES, TB_PAGE_BYTES, 0);
            pages += (int)length;
        }
    }
    return pages;
}

/* Any thread, behind tb_epoch_read and with its sums, while the epoch is open: bad[i] is the mask of the pages of items[i] that had a sum
 * (sums.c) which they do not fit: the SSD has not given back what was written. A sum that cannot be read says nothing. */
void tb_epoch_check(tb_layer *layer, const tb_sealed *items, uint32_t count, const uint32_t *sums, uint16_t *bad)
{
    for (uint32_t i = 0; i < count; i++) {
        uint16_t stored = items[i].dirty & (uint16_t)~items[i].zero, summed = 0;
        if (items[i].block < layer->blocks) {
            const tb_entry *entry = &layer->entries[items[i].block];
            tb_lock *stripe = tb_stripe(layer, items[i].block);
            tb_lock_take(stripe);
            summed = entry->head.slot == items[i].slot ? stored & entry->summed : 0; /* else it has moved, and its sums with it */
            tb_lock_give(stripe);
        }
        uint32_t kept[TB_BLOCK_PAGES] = {0};
        if (summed && pread(layer->engine->sums_fd, kept, sizeof kept, (off_t)items[i].slot * 64) != (ssize_t)sizeof kept)
            summed = 0;
        bad[i] = 0;
        for (unsigned page = 0; page < TB_BLOCK_PAGES; page++) {
            if (summed >> page & 1 && *sums != kept[page])
                bad[i] |= (uint16_t)(1u << page);
            sums += stored >> page & 1;
        }
    }
}

/* Writes the sums of these pages to those of a slot; `sums` are of all pages of `all`, one behind the other. A sum that could not be
 * written is one that does not fit, and costs a refetch. */
static void keep_sums(const tb_engine *e, uint32_t slot, uint16_t pages, uint16_t all, const uint32_t *sums)
{
    uint32_t placed[TB_BLOCK_PAGES];
    for (unsigned page = 0; page < TB_BLOCK_PAGES; page++)
        if (all >> page & 1)
            placed[page] = *sums++;
    (void)tb_sums_write(e, slot, pages, placed);
}

/* Event loop, after the record exists and its extents are known (R13): these pages of these blocks are in the store, as long as nobody
 * changed them since (I8). The index may go on calling them dirty. sums: as of tb_epoch_read for the same blocks, or NULL. */
void tb_epoch_clean(tb_layer *layer, const tb_sealed *items, uint32_t count, const uint32_t *sums)
{
    for (uint32_t i = 0; i < count; i++) {
        uint16_t stored = items[i].dirty & (uint16_t)~items[i].zero;
        if (items[i].block >= layer->blocks)
            continue;
        tb_entry *entry = &layer->entries[items[i].block];
        tb_lock *stripe = tb_stripe(layer, items[i].block);
        pthread_mutex_lock(&layer->engine->sums_lock); /* see tb_sums_make */
        tb_lock_take(stripe);
        uint32_t slot = entry->head.slot;
        uint16_t same = items[i].dirty & (uint16_t)~entry->head.fresh;
        bool sums_first = sums && slot && same & stored;
        entry->readers += sums_first; /* R2: the slot stays while its sums are written, which no lock is held for */
        tb_lock_give(stripe);
        if (sums_first) {
            keep_sums(layer->engine, slot, same & stored, stored, sums);
            tb_lock_take(stripe);
            entry->readers--;
            tb_lock_give(stripe);
        }
        if (sums)
            sums += __builtin_popcount(stored);
        tb_lock_take(stripe);
        tb_head head = entry->head;
        if (entry->generation == layer->generation)
            head.dirty &= (uint16_t)~(items[i].dirty & (uint16_t)~head.fresh);
        uint32_t dropped = tb_entry_drop_slot(layer, entry, &head);
        tb_entry_change(layer, entry, head);
        if (dropped)
            tb_slot_quarantine(layer->engine, dropped);
        tb_req *awake = sums_first && head.flags & TB_ENTRY_MOVING && !entry->readers ? tb_waiters_in(layer, items[i].block) : NULL;
        tb_lock_give(stripe);
        pthread_mutex_unlock(&layer->engine->sums_lock);
        tb_hand_back_all(awake, 0);
    }
}

/* Event loop: the epoch is over, with its record or without one. Slots that only it had wait for a commit, since the index may name them. */
void tb_epoch_end(tb_layer *layer)
{
    if (!layer->sealing)
        return;
    /* First: from here on no block is saved and no slot pinned, also when not all was collected. */
    for (unsigned i = 0; i < TB_STRIPES; i++)
        tb_lock_take(&layer->engine->stripes[i].lock);
    layer->sealing = false;
    for (unsigned i = 0; i < TB_STRIPES; i++)
        tb_lock_give(&layer->engine->stripes[i].lock);
    for (uint64_t i = 0; i < layer->saved_count; i++) {
        uint64_t block = layer->saved[i].block;
        tb_entry *entry = &layer->entries[block];
        tb_lock *stripe = tb_stripe(layer, block);
        tb_lock_take(stripe);
        tb_head head = entry->head;
        head.flags &= (uint16_t)~TB_ENTRY_SEALED;
        tb_entry_store(entry, head);
        tb_lock_give(stripe);
    }
    for (uint64_t i = 0; i < layer->pinned_count; i++)
        tb_slot_take_from_epoch(layer->engine, layer->pinned[i]);
    madvise(layer->saved, saved_bytes(layer), MADV_DONTNEED);
    madvise(layer->pinned, pinned_bytes(layer), MADV_DONTNEED);
}
