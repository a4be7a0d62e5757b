/* The block map of a layer: a sparse shared file on tmpfs (R1), loaded from the index (R9) or left by a killed
 * daemon.
 *
 * A map page is touched only after its memory was allocated with fallocate: a full tmpfs is then an error code here,
 * where it would otherwise be a SIGBUS in the middle of a request. */
#define _GNU_SOURCE
#include "core.h"

#include <fcntl.h>
#include <sys/stat.h>

#define PAGE_ENTRIES (TB_PAGE_BYTES / sizeof(tb_entry))

/* -EBUSY while a door uses it. */
int tb_layer_set_kind(tb_layer *layer, int kind)
{
    if (TB_LOAD(&layer->doors))
        return -EBUSY;
    layer->is_volume = kind != TB_LAYER_BASE;
    layer->is_scratch = kind == TB_LAYER_SCRATCH;
    layer->is_write_back = kind == TB_LAYER_WRITE_BACK;
    layer->refused = 0;
    layer->flushes_far = false;
    return 0;
}

/* Maps `map_fd` (header page, then 32 bytes a block), which stays the caller's to close. Before any door is open. */
int tb_layer_open(tb_engine *e, uint16_t id, int map_fd, uint64_t size_bytes, int kind, tb_layer **out)
{
    if (id == 0 || id >= TB_MAX_LAYERS || e->layers[id] || size_bytes == 0)
        return -EINVAL;
    if (size_bytes > INT64_MAX) /* I12: a size that a server made up must not wrap the sums below */
        return -EFBIG;
    tb_layer *layer = calloc(1, sizeof *layer);
    if (!layer)
        return -ENOMEM;
    layer->engine = e;
    layer->id = id;
    tb_layer_set_kind(layer, kind);
    layer->map_fd = map_fd;
    layer->size_bytes = size_bytes;
    layer->blocks = tb_round_up(size_bytes, TB_BLOCK_BYTES) / TB_BLOCK_BYTES;
    layer->rows = tb_round_up(layer->blocks, TB_ROW_ENTRIES) / TB_ROW_ENTRIES;
    layer->map_bytes = TB_MAP_HEADER_BYTES + tb_round_up(layer->blocks * sizeof(tb_entry), TB_PAGE_BYTES);
    layer->ready = tb_bits_new(layer->map_bytes / TB_PAGE_BYTES, &layer->ready_bytes);
    int rc = tb_rows_new(&layer->changed, layer->rows) || tb_rows_new(&layer->unflushed, layer->rows) || !layer->ready ? -ENOMEM : 0;
    struct stat st;
    rc = rc ? rc : fstat(map_fd, &st) ? -errno : (uint64_t)st.st_size < layer->map_bytes ? -ENODATA : 0;
    layer->map = rc ? MAP_FAILED : mmap(NULL, layer->map_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, map_fd, 0);
    if (layer->map == MAP_FAILED) {
        rc = rc ? rc : -ENOMEM;
        tb_layer_close(layer);
        return rc;
    }
    madvise(layer->map, layer->map_bytes, MADV_DONTDUMP);
    layer->entries = (tb_entry *)(layer->map + TB_MAP_HEADER_BYTES);
    e->layers[id] = layer;
    if (e->layers_end <= id)
        __atomic_store_n(&e->layers_end, id + 1u, __ATOMIC_RELAXED);
    *out = layer;
    return 0;
}

/* -EBUSY while a door uses it. The engine must not run, or nothing may be in flight on the layer. */
int tb_layer_close(tb_layer *layer)
{
    if (TB_LOAD(&layer->doors))
        return -EBUSY;
    if (layer->map && layer->map != MAP_FAILED)
        munmap(layer->map, layer->map_bytes);
    if (layer->ready)
        munmap(layer->ready, layer->ready_bytes);
    tb_epoch_free(layer);
    tb_rows_free(&layer->changed);
    tb_rows_free(&layer->unflushed);
    if (layer->engine->layers[layer->id] == layer)
        layer->engine->layers[layer->id] = NULL;
    free(layer);
    return 0;
}

/* Makes the entry of `block` safe to touch: 0, or -ENOSPC when tmpfs is full. Costs one bit test once it is. */
int tb_map_prepare(tb_layer *layer, uint64_t block)
{
    if (tb_map_has(layer, block))
        return 0;
    off_t offset = TB_MAP_HEADER_BYTES + (off_t)(block / PAGE_ENTRIES * TB_PAGE_BYTES);
    while (fallocate(layer->map_fd, 0, offset, TB_PAGE_BYTES))
        if (errno != EINTR)
            return -errno;
    tb_bit_set(layer->ready, block / PAGE_ENTRIES);
    return 0;
}

/* The first block from `block` on whose entry has memory, `end` if there is none: what lies before it was never touched. */
uint64_t tb_map_next(const tb_layer *layer, uint64_t block, uint64_t end)
{
    uint64_t page = block / PAGE_ENTRIES, stop = tb_round_up(end, PAGE_ENTRIES) / PAGE_ENTRIES;
    while (page < stop) {
        uint64_t bits = __atomic_load_n(&layer->ready[page / 64], __ATOMIC_ACQUIRE) >> (page & 63);
        if (bits) {
            page += (uint64_t)__builtin_ctzll(bits);
            break;
        }
        page = (page | 63) + 1;
    }
    uint64_t found = page * PAGE_ENTRIES;
    return found < block ? block : found < end ? found : end;
}

static tb_head unpack(const uint8_t *p)
{
    tb_head head = {.slot = 0};
    memcpy(&head.slot, p, 4);
    memcpy(&head.present, p + 4, 8); /* present cached zero dirty, in this order in both */
    return head;
}

static bool head_valid(const tb_layer *layer, uint64_t block, tb_head head)
{
    uint16_t all = head.present | head.cached | head.zero | head.dirty;
    if (all & ~tb_valid_pages(layer, block) || head.cached & head.zero) /* R2 */
        return false;
    if (head.dirty & ~head.present || head.dirty & ~(head.cached | head.zero)) /* I3 */
        return false;
    if (layer->is_volume && (head.cached | head.zero) & ~head.present)
        return false;
    if (head.slot >= layer->engine->slot_count || (head.cached != 0) != (head.slot != 0))
        return false;
    return head.slot == 0 || !tb_slot_owned(layer->engine, head.slot); /* I4 */
}

static void adopt(tb_layer *layer, uint64_t block, tb_head head)
{
    if (head.slot)
        tb_slot_own(layer->engine, head.slot, layer, block);
    layer->cached_pages += (uint64_t)__builtin_popcount(head.cached);
    layer->dirty_pages += (uint64_t)__builtin_popcount(head.dirty);
    layer->unsummed += tb_unsummed(head, layer->entries[block].summed) != 0;
    layer->engine->dirty_slots += tb_head_holds(head);
    layer->engine->far_slots += tb_head_holds(head) && layer->is_write_back;
    tb_entry_store(&layer->entries[block], head);
}

/* One row of the index, at start. All of it or nothing: -EBADMSG for a bad checksum or length, -EINVAL for masks or
 * slots that cannot be (R2, I3, I4, R9), -ENOSPC for a full tmpfs. drop_clean: of a volume after an unclean start, whose clean
 * pages may have been written in place since (DESIGN 5). */
int tb_layer_load_row(tb_layer *layer, uint64_t row, const uint8_t *packed, uint32_t length, int drop_clean)
{
    uint32_t sum;
    if (length != TB_ROW_BYTES)
        return -EBADMSG;
    memcpy(&sum, packed + TB_ROW_ENTRIES * TB_PACKED_ENTRY, sizeof sum);
    if (sum != tb_crc32c(packed, TB_ROW_ENTRIES * TB_PACKED_ENTRY, 0))
        return -EBADMSG;
    if (row >= layer->rows)
        return -EINVAL;
    uint64_t first = row * TB_ROW_ENTRIES, end = tb_row_end(layer, row);
    for (uint64_t i = 0; i < TB_ROW_ENTRIES; i++) {
        tb_head head = unpack(packed + i * TB_PACKED_ENTRY);
        if (first + i >= end ? head.slot || head.present || head.cached || head.zero || head.dirty
                             : !head_valid(layer, first + i, head))
            return -EINVAL;
        for (uint64_t j = 0; head.slot && j < i; j++)
            if (unpack(packed + j * TB_PACKED_ENTRY).slot == head.slot)
                return -EINVAL;
    }
    int rc = tb_map_prepare(layer, first);
    if (rc)
        return rc;
    for (uint64_t block = first; block < end; block++) {
        tb_head head = unpack(packed + (block - first) * TB_PACKED_ENTRY), kept = head;
        if (drop_clean) {
            kept.cached &= head.dirty;
            kept.zero &= head.dirty;
            kept.slot = kept.cached ? head.slot : 0;
        }
        adopt(layer, block, kept);
        if (kept.cached != head.cached || kept.zero != head.zero)
            tb_map_mark(layer, block);
    }
    return 0;
}

/* A row of a volume that cannot be believed (R9): its pages are there and nobody has them, so that they are errors and never the
 * base's, until each is written anew. -ENOSPC for a full tmpfs. */
int tb_layer_bad_row(tb_layer *layer, uint64_t row)
{
    if (row >= layer->rows)
        return -EINVAL;
    int rc = tb_map_prepare(layer, row * TB_ROW_ENTRIES);
    for (uint64_t block = row * TB_ROW_ENTRIES; !rc && block < tb_row_end(layer, row); block++)
        layer->entries[block].head = (tb_head){.present = tb_valid_pages(layer, block)};
    return rc;
}

/* A warm start (R1): the map is the truth. Clears what belonged to the dead session, marks every row, and forgets a
 * clean block whose entry cannot be (its row is then written as absent). Returns the number of entries that hold
 * anything; -EILSEQ when a dirty page would be lost that way. */
int64_t tb_layer_warm_start(tb_layer *layer)
{
    int64_t kept = 0;
    off_t end = (off_t)layer->map_bytes, at = lseek(layer->map_fd, TB_MAP_HEADER_BYTES, SEEK_DATA);
    while (at >= 0 && at < end) {
        off_t hole = lseek(layer->map_fd, at, SEEK_HOLE);
        for (off_t page = at / TB_PAGE_BYTES; page < (hole + TB_PAGE_BYTES - 1) / TB_PAGE_BYTES && page * TB_PAGE_BYTES < end; page++) {
            uint64_t first = (uint64_t)(page - 1) * PAGE_ENTRIES;
            tb_bit_set(layer->ready, first / PAGE_ENTRIES);
            for (uint64_t block = first; block < first + PAGE_ENTRIES && block < layer->blocks; block++) {
                tb_entry *entry = &layer->entries[block];
                tb_head head = entry->head;
                head.fresh = head.flags = 0;
                uint16_t summed = layer->is_volume ? entry->summed : 0;
                if (!head.cached)
                    head.slot = 0; /* taken for a write that never ended */
                memset((uint8_t *)entry + sizeof(tb_head), 0, sizeof(tb_entry) - sizeof(tb_head));
                entry->summed = summed;
                if (!tb_head_persistent(head)) {
                    tb_entry_store(entry, head);
                    continue;
                }
                if (!head_valid(layer, block, head)) {
                    if (head.dirty)
                        return -EILSEQ;
                    head = (tb_head){.present = head.present};
                }
                adopt(layer, block, head);
                tb_map_mark(layer, block);
                kept++;
            }
        }
        at = lseek(layer->map_fd, hole, SEEK_DATA);
    }
    return kept;
}

/* The kept checksums of a block's cached pages into sums[16]; returns the cached mask, 0 when it has none, or what the
 * disk said. */
int tb_layer_page_sums(tb_layer *layer, uint64_t block, uint32_t *sums)
{
    if (block >= layer->blocks)
        return -EINVAL;
    if (!tb_map_has(layer, block))
        return 0;
    tb_lock *stripe = tb_stripe(layer, block);
    tb_lock_take(stripe);
    tb_entry *entry = &layer->entries[block];
    tb_head head = entry->head;
    bool holds = head.cached != 0;
    entry->readers += holds; /* R2: the slot stays this block's until its sums are read */
    tb_lock_give(stripe);
    if (!holds)
        return 0;
    ssize_t got;
    do
        got = pread(layer->engine->sums_fd, sums, 64, (off_t)head.slot * 64);
    while (got < 0 && errno == EINTR);
    int failure = got == 64 ? 0 : got < 0 ? -errno : -EIO;
    tb_lock_take(stripe);
    entry->readers--;
    tb_head now = entry->head;
    uint32_t dropped = tb_entry_drop_slot(layer, entry, &now);
    if (now.slot != entry->head.slot)
        tb_entry_store(entry, now);
    if (dropped)
        tb_slot_quarantine(layer->engine, dropped);
    tb_req *awake = now.flags & TB_ENTRY_MOVING && !entry->readers ? tb_waiters_in(layer, block) : NULL;
    tb_lock_give(stripe);
    tb_hand_back_all(awake, 0);
    return failure ? failure : head.cached;
}

/* They outlast the doors that began them, and end in the entry. */
static bool fills_run(const tb_layer *layer)
{
    const tb_engine *e = layer->engine;
    uint32_t used = __atomic_load_n(&e->fills_used, __ATOMIC_ACQUIRE);
    for (uint32_t i = 0; i < used; i++)
        if (__atomic_load_n(&e->fills[i].state, __ATOMIC_ACQUIRE) != FILL_FREE && __atomic_load_n(&e->fills[i].layer, __ATOMIC_RELAXED) == layer)
            return true;
    return false;
}

/* Takes everything from a layer that nobody shows any more, `pages` map pages from *block on, which it moves on. 0: all is gone; 1: call
 * again; -EBUSY: a door uses it, or a fill runs. The slots wait for the commit that deletes the rows (I4). Event loop. */
int tb_layer_clear(tb_layer *layer, uint64_t *block, int pages)
{
    if (TB_LOAD(&layer->doors) || fills_run(layer))
        return -EBUSY;
    for (; *block < layer->blocks && pages > 0; pages--) {
        uint64_t first = tb_map_next(layer, *block, layer->blocks), end = first / PAGE_ENTRIES * PAGE_ENTRIES + PAGE_ENTRIES;
        for (*block = first; *block < end && *block < layer->blocks; ++*block) {
            tb_entry *entry = &layer->entries[*block];
            tb_lock *stripe = tb_stripe(layer, *block);
            tb_lock_take(stripe);
            tb_head head = entry->head;
            if (head.flags & TB_ENTRY_PROBATION)
                TB_ADD(&layer->engine->probation, -1u);
            tb_entry_change(layer, entry, (tb_head){.slot = 0});
            if (tb_head_persistent(head))
                tb_map_mark(layer, *block);
            if (head.slot)
                tb_slot_quarantine(layer->engine, head.slot);
            tb_lock_give(stripe);
        }
    }
    if (*block < layer->blocks)
        return 1;
    /* Its memory goes as well: nobody looks at an entry without asking tb_map_has. */
    madvise(layer->ready, layer->ready_bytes, MADV_DONTNEED);
    fallocate(layer->map_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, TB_MAP_HEADER_BYTES, (off_t)(layer->map_bytes - TB_MAP_HEADER_BYTES));
    return 0;
}

uint64_t tb_layer_cached_pages(tb_layer *layer)
{
    return TB_LOAD(&layer->cached_pages);
}

uint64_t tb_layer_dirty_pages(tb_layer *layer)
{
    return TB_LOAD(&layer->dirty_pages);
}
