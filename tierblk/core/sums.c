/* Checksums of what was written. When a write comes nobody looks at its bytes (on plane zero-copy they go from the request's pages to
 * the SSD), so their sums are made behind it, out of the slots of blocks that nobody has written to for a while.
 *
 * An entry says how far that is. Its flag STILL: no write or discard came since tb_sums_find met the block. Its mask `summed`: pages that have
 * their sums, which counts where they are dirty (R9: of clean pages all count). A write takes away STILL and the bits of its pages when it is
 * submitted, with the store that makes them dirty (R3), so before a byte of the slot is another one. A page that has its sum keeps it whatever
 * is written beside it: nobody makes it a second time, out of bytes that may have flipped since. */
#include "core.h"

#define PAGE_ENTRIES (TB_PAGE_BYTES / sizeof(tb_entry))
#define BUSY (TB_ENTRY_SEALED | TB_ENTRY_MOVING) /* an upload makes the sums, or the slot is about to be another one */

static uint16_t unsummed(const tb_entry *entry)
{
    return tb_unsummed(entry->head, entry->summed);
}

static bool may_be_summed(const tb_entry *entry)
{
    return unsummed(entry) && !(entry->head.flags & BUSY) && !entry->writers;
}

/* Event loop. Goes over some `pages` map pages from *from on, which moves on to the block to go on from, in the end the layer's end.
 * Blocks that lack sums get STILL; those that had it already, at most `max`, are in `out`. How many. */
uint32_t tb_sums_find(tb_layer *layer, uint64_t *from, uint32_t pages, uint64_t *out, uint32_t max)
{
    uint32_t found = 0;
    for (; *from < layer->blocks && pages; pages--) {
        uint64_t block = tb_map_next(layer, *from, layer->blocks), end = block / PAGE_ENTRIES * PAGE_ENTRIES + PAGE_ENTRIES;
        for (*from = block; *from < end && *from < layer->blocks; ++*from) {
            tb_entry *entry = &layer->entries[*from];
            if (!unsummed(entry)) /* most of them, and what it misses now it meets the next time */
                continue;
            if (found == max)
                return found;
            tb_lock *stripe = tb_stripe(layer, *from);
            tb_lock_take(stripe);
            if (may_be_summed(entry)) {
                if (entry->head.flags & TB_ENTRY_STILL)
                    out[found++] = *from;
                entry->head.flags |= TB_ENTRY_STILL;
            }
            tb_lock_give(stripe);
        }
    }
    return found;
}

static int read_pages(const tb_engine *e, uint32_t slot, uint16_t pages, uint8_t *block)
{
    uint32_t first = (uint32_t)__builtin_ctz(pages), count = 32u - (uint32_t)__builtin_clz(pages) - first;
    ssize_t want = (ssize_t)count * TB_PAGE_BYTES, got;
    do
        got = pread(e->slots_fd, block + (size_t)first * TB_PAGE_BYTES, (size_t)want, (off_t)slot * TB_BLOCK_BYTES + (off_t)first * TB_PAGE_BYTES);
    while (got < 0 && (errno == EINTR || errno == EAGAIN));
    return got == want ? 0 : got < 0 ? -errno : -EIO;
}

/* Those of these pages into the file; the others of the slot may be somebody else's to write at this moment. */
int tb_sums_write(const tb_engine *e, uint32_t slot, uint16_t pages, const uint32_t *sums)
{
    while (pages) {
        uint32_t first = (uint32_t)__builtin_ctz(pages), count = (uint32_t)__builtin_ctz(~((uint32_t)pages >> first));
        pages &= (uint16_t)~(((1u << count) - 1) << first);
        ssize_t want = (ssize_t)(count * sizeof *sums), got;
        do
            got = pwrite(e->sums_fd, sums + first, (size_t)want, (off_t)slot * 64 + (off_t)(first * sizeof *sums));
        while (got < 0 && errno == EINTR);
        if (got != want)
            return got < 0 ? -errno : -EIO;
    }
    return 0;
}

/* Those of these pages that are still what they were when the block was found: dirty, and not written to. */
static uint16_t as_found(tb_layer *layer, const tb_entry *entry, uint64_t block, uint16_t pages)
{
    tb_lock *stripe = tb_stripe(layer, block);
    tb_lock_take(stripe);
    tb_head head = entry->head;
    tb_lock_give(stripe);
    return head.flags & TB_ENTRY_STILL ? pages & head.dirty & head.cached : 0;
}

/* Any thread that may block; not beside tb_layer_clear of the layer, nor beside tb_sums_find of it, which would give STILL again to a block
 * that was written to since it was found. 1: all dirty pages of the block have their sums now; 0: they have not, since somebody was at it;
 * or what the SSD said. `memory`: one block, aligned as direct I/O wants it. One read of the SSD. */
int tb_sums_make(tb_layer *layer, uint64_t block, uint8_t *memory)
{
    if (block >= layer->blocks)
        return -EINVAL;
    if (!tb_map_has(layer, block))
        return 0;
    tb_engine *e = layer->engine;
    tb_entry *entry = &layer->entries[block];
    tb_lock *stripe = tb_stripe(layer, block);
    tb_lock_take(stripe);
    uint32_t slot = entry->head.slot;
    uint16_t pages = unsummed(entry);
    bool may = may_be_summed(entry) && entry->head.flags & TB_ENTRY_STILL;
    entry->readers += may; /* R2: the slot stays this block's */
    tb_lock_give(stripe);
    if (!may)
        return 0;
    uint32_t sums[TB_BLOCK_PAGES];
    int rc = read_pages(e, slot, pages, memory);
    if (!rc)
        tb_crc32c_pages(memory, pages, sums);
    /* No page of a volume becomes clean while this is held (tb_epoch_clean), so those that are dirty now are not dropped and fetched anew:
     * nobody else writes the sum of one of them between the look and the write. */
    pthread_mutex_lock(&e->sums_lock);
    if (!rc) {
        pages = as_found(layer, entry, block, pages);
        rc = tb_sums_write(e, slot, pages, sums);
    }
    tb_lock_take(stripe);
    tb_head head = entry->head;
    bool made = !rc && head.flags & TB_ENTRY_STILL;
    head.flags &= (uint16_t)~TB_ENTRY_STILL;
    entry->readers--;
    uint32_t dropped = tb_entry_drop_slot(layer, entry, &head);
    tb_entry_change_sums(layer, entry, head, made ? entry->summed | pages : entry->summed);
    made = made && !unsummed(entry);
    if (dropped)
        tb_slot_quarantine(e, dropped);
    tb_req *awake = head.flags & TB_ENTRY_MOVING && !entry->readers ? tb_waiters_in(layer, block) : NULL;
    tb_lock_give(stripe);
    pthread_mutex_unlock(&e->sums_lock);
    tb_hand_back_all(awake, 0);
    return rc ? rc : made;
}

/* A mask a slot: its dirty pages that have sums. No call is under way. */
void tb_sums_save(const tb_layer *layer, uint16_t *masks)
{
    for (uint64_t block = tb_map_next(layer, 0, layer->blocks); block < layer->blocks && layer->is_volume;
         block = tb_map_next(layer, block + 1, layer->blocks)) {
        const tb_entry *entry = &layer->entries[block];
        if (entry->head.slot)
            masks[entry->head.slot] = entry->summed & entry->head.dirty & entry->head.cached;
    }
}

/* The same at the next start, behind a clean end: so many slots have a mask. */
void tb_sums_load(tb_layer *layer, const uint16_t *masks, uint32_t count)
{
    for (uint64_t block = tb_map_next(layer, 0, layer->blocks); block < layer->blocks && layer->is_volume;
         block = tb_map_next(layer, block + 1, layer->blocks)) {
        tb_entry *entry = &layer->entries[block];
        tb_head head = entry->head;
        if (head.slot && head.slot < count)
            tb_entry_change_sums(layer, entry, head, entry->summed | (masks[head.slot] & head.dirty & head.cached));
    }
}

/* Blocks with dirty pages that have no sums. */
uint64_t tb_sums_lacking(const tb_layer *layer)
{
    return TB_LOAD(&layer->unsummed);
}
