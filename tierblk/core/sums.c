/* Checksums of what was written. When a write comes nobody looks at its bytes (on plane zero-copy they go from the request's pages to
 * the SSD), so their sums are made behind it: of blocks that nobody has written to for a while, out of their slots.
 *
 * Two flags of an entry say how far that is. STILL: no write or discard came since tb_sums_find met the block. SUMMED: all of its dirty
 * pages have their sums. A write takes both away when it is submitted, in the store that makes its pages dirty (R3), so before a byte of
 * the slot is another one: a sum of a SUMMED block never is of other bytes than those that were there when it was made. */
#include "core.h"

#define PAGE_ENTRIES (TB_PAGE_BYTES / sizeof(tb_entry))
#define BUSY (TB_ENTRY_SEALED | TB_ENTRY_MOVING) /* an upload makes the sums, or the slot is about to be another one */

static bool may_be_summed(const tb_entry *entry)
{
    return tb_head_lacks_sums(entry->head) && !(entry->head.flags & BUSY) && !entry->writers;
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
            if (!tb_head_lacks_sums(entry->head)) /* most of them, and what it misses now it meets the next time */
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

/* Under the stripe lock. */
static bool is_still(tb_layer *layer, const tb_entry *entry, uint64_t block)
{
    tb_lock *stripe = tb_stripe(layer, block);
    tb_lock_take(stripe);
    bool still = entry->head.flags & TB_ENTRY_STILL;
    tb_lock_give(stripe);
    return still;
}

/* Any thread that may block, and not beside tb_layer_clear of the layer. 1: all dirty pages of the block have their sums now; 0: they have not,
 * since somebody was at it; or what the SSD said. `memory`: one block, aligned as direct I/O wants it. One read of the SSD. */
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
    uint16_t pages = entry->head.dirty & entry->head.cached;
    bool may = may_be_summed(entry) && entry->head.flags & TB_ENTRY_STILL;
    entry->readers += may; /* R2: the slot stays this block's */
    tb_lock_give(stripe);
    if (!may)
        return 0;
    uint32_t sums[TB_BLOCK_PAGES];
    int rc = read_pages(e, slot, pages, memory);
    if (!rc)
        tb_crc32c_pages(memory, pages, sums);
    /* No page of a volume becomes clean while this is held (tb_epoch_clean), and so none is fetched anew: nobody else writes the sum of one of
     * these pages between the look and the write. */
    pthread_mutex_lock(&e->sums_lock);
    if (!rc && is_still(layer, entry, block))
        rc = tb_sums_write(e, slot, pages, sums);
    tb_lock_take(stripe);
    tb_head head = entry->head;
    bool made = !rc && head.flags & TB_ENTRY_STILL;
    if (made)
        head.flags |= TB_ENTRY_SUMMED;
    head.flags &= (uint16_t)~TB_ENTRY_STILL;
    entry->readers--;
    uint32_t dropped = tb_entry_drop_slot(layer, entry, &head);
    tb_entry_change(layer, entry, head);
    if (dropped)
        tb_slot_quarantine(e, dropped);
    tb_req *awake = head.flags & TB_ENTRY_MOVING && !entry->readers ? tb_waiters_in(layer, block) : NULL;
    tb_lock_give(stripe);
    pthread_mutex_unlock(&e->sums_lock);
    tb_hand_back_all(awake, 0);
    return rc ? rc : made;
}

/* A bit a slot: those of blocks whose dirty pages have their sums. No door is open. */
void tb_sums_save(const tb_layer *layer, uint8_t *bits)
{
    for (uint64_t block = tb_map_next(layer, 0, layer->blocks); block < layer->blocks;
         block = tb_map_next(layer, block + 1, layer->blocks)) {
        tb_head head = layer->entries[block].head;
        if (head.slot && head.flags & TB_ENTRY_SUMMED && head.dirty & head.cached)
            bits[head.slot / 8] |= (uint8_t)(1u << head.slot % 8);
    }
}

/* The same at the next start, behind a clean end: `count` slots have a bit. */
void tb_sums_load(tb_layer *layer, const uint8_t *bits, uint32_t count)
{
    for (uint64_t block = tb_map_next(layer, 0, layer->blocks); block < layer->blocks;
         block = tb_map_next(layer, block + 1, layer->blocks)) {
        tb_entry *entry = &layer->entries[block];
        tb_head head = entry->head;
        if (!tb_head_lacks_sums(head) || head.slot >= count || !(bits[head.slot / 8] >> head.slot % 8 & 1))
            continue;
        head.flags |= TB_ENTRY_SUMMED;
        tb_entry_change(layer, entry, head);
    }
}

/* Blocks with dirty pages that have none. */
uint64_t tb_sums_lacking(const tb_layer *layer)
{
    return TB_LOAD(&layer->unsummed);
}
