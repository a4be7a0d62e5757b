/* Rows: 64 entries of a block map as the index and the journal keep them, and which of them differ from the copies there (R6). */
#include "core.h"

uint64_t *tb_bits_new(uint64_t bits, size_t *bytes)
{
    *bytes = tb_round_up(bits, 64) / 8;
    void *p = mmap(NULL, *bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED)
        return NULL;
    madvise(p, *bytes, MADV_NOHUGEPAGE); /* a bit here and there of a large volume is not to cost 2 MiB each */
    return p;
}

int tb_rows_new(tb_rows *set, uint64_t rows)
{
    set->bits = tb_bits_new(rows, &set->bits_bytes);
    set->summary = tb_bits_new(tb_round_up(rows, 64) / 64, &set->summary_bytes);
    return set->bits && set->summary ? 0 : -ENOMEM;
}

void tb_rows_free(tb_rows *set)
{
    if (set->bits)
        munmap(set->bits, set->bits_bytes);
    if (set->summary)
        munmap(set->summary, set->summary_bytes);
}

static void add(tb_rows *set, uint64_t row)
{
    uint64_t bit = 1ull << (row & 63);
    if (!(__atomic_fetch_or(&set->bits[row >> 6], bit, __ATOMIC_SEQ_CST) & bit))
        __atomic_fetch_add(&set->count, 1, __ATOMIC_SEQ_CST);
    tb_bit_set(set->summary, row / 64);
}

static bool take_out(tb_rows *set, uint64_t row)
{
    uint64_t bit = 1ull << (row & 63);
    if (!(__atomic_fetch_and(&set->bits[row >> 6], ~bit, __ATOMIC_SEQ_CST) & bit))
        return false;
    __atomic_fetch_sub(&set->count, 1, __ATOMIC_SEQ_CST);
    return true;
}

/* Takes one row out, from the summary's word *at on, which it moves on; false: none is left. */
static bool pop(tb_rows *set, uint64_t *at, uint64_t *row)
{
    for (; *at < set->summary_bytes / sizeof *set->summary; ++*at) {
        uint64_t pending;
        while ((pending = __atomic_load_n(&set->summary[*at], __ATOMIC_ACQUIRE))) {
            uint64_t word = *at * 64 + (uint64_t)__builtin_ctzll(pending);
            __atomic_fetch_and(&set->summary[*at], ~(pending & -pending), __ATOMIC_SEQ_CST); /* who adds a row sets it after this */
            uint64_t bits = __atomic_load_n(&set->bits[word], __ATOMIC_SEQ_CST);
            if (!bits)
                continue;
            *row = word * 64 + (uint64_t)__builtin_ctzll(bits);
            if (bits & (bits - 1))
                tb_bit_set(set->summary, word);
            if (take_out(set, *row))
                return true;
        }
    }
    return false;
}

/* Under the stripe lock, after the entry's store: its row differs from the copies that were taken. The counts are behind the bits for
 * a moment, but never once the request that made the change is completed, and so a FLUSH that comes after it sees it (R7). */
void tb_map_mark(tb_layer *layer, uint64_t block)
{
    uint64_t row = block / TB_ROW_ENTRIES;
    if (!tb_bit_get(layer->changed.bits, row))
        add(&layer->changed, row);
    if (layer->is_volume && !layer->is_scratch && !tb_bit_get(layer->unflushed.bits, row))
        add(&layer->unflushed, row);
}

/* One row as it is at one instant; false: it holds nothing. */
static bool pack_row(tb_layer *layer, uint64_t row, uint8_t *packed)
{
    bool any = false;
    uint64_t first = row * TB_ROW_ENTRIES, end = tb_row_end(layer, row);
    memset(packed, 0, TB_ROW_BYTES);
    if (!tb_map_has(layer, first))
        return false;
    tb_lock *stripe = tb_stripe(layer, first); /* one row, one stripe */
    tb_lock_take(stripe);
    for (uint64_t block = first; block < end; block++) {
        tb_head head = layer->entries[block].head;
        any |= tb_head_persistent(head);
        if (!head.cached)
            head.slot = 0; /* taken for a write that has not ended: it is in no row before its bytes are in the file (I5) */
        memcpy(packed + (block - first) * TB_PACKED_ENTRY, &head.slot, 4);
        memcpy(packed + (block - first) * TB_PACKED_ENTRY + 4, &head.present, 8);
    }
    tb_lock_give(stripe);
    uint32_t sum = tb_crc32c(packed, TB_ROW_ENTRIES * TB_PACKED_ENTRY, 0);
    memcpy(packed + TB_ROW_ENTRIES * TB_PACKED_ENTRY, &sum, sizeof sum);
    return any;
}

/* R6, step 1: takes up to `max` changed rows, each out of the set before it is copied. rows[i] has bit 63 set when the row holds
 * nothing any more and is to be deleted. Returns how many; fewer than `max` when none is left. Event loop only. */
int tb_layer_take_changed(tb_layer *layer, uint64_t *rows, uint8_t *packed, int max)
{
    int count = 0;
    for (uint64_t at = 0, row; count < max && pop(&layer->changed, &at, &row); count++) {
        if (tb_bit_get(layer->unflushed.bits, row)) {
            __atomic_store_n(&layer->in_commit, 1, __ATOMIC_SEQ_CST); /* before the count falls: a FLUSH sees one of both (R7) */
            take_out(&layer->unflushed, row);
        }
        bool any = pack_row(layer, row, packed + (size_t)count * TB_ROW_BYTES);
        rows[count] = any ? row : row | TB_ROW_GONE;
    }
    return count;
}

/* For a record of the journal: takes up to `max` unflushed rows, each out of the set before it is copied, to entries of
 * TB_RECORD_ENTRY bytes. They stay changed. Returns how many; fewer than `max` when none is left. Under the journal's lock. */
unsigned tb_layer_take_unflushed(tb_layer *layer, uint8_t *entries, unsigned max)
{
    unsigned count = 0;
    uint32_t id = layer->id;
    for (uint64_t at = 0, row; count < max && pop(&layer->unflushed, &at, &row); count++, entries += TB_RECORD_ENTRY) {
        bool any = pack_row(layer, row, entries + 12);
        row |= any ? 0 : TB_ROW_GONE;
        memcpy(entries, &row, 8);
        memcpy(entries + 8, &id, 4);
    }
    return count;
}

/* R7: a failed cycle's row is changed again. */
int tb_layer_put_back(tb_layer *layer, uint64_t row)
{
    if (row >= layer->rows)
        return -EINVAL;
    tb_lock *stripe = tb_stripe(layer, row * TB_ROW_ENTRIES);
    tb_lock_take(stripe);
    tb_map_mark(layer, row * TB_ROW_ENTRIES);
    tb_lock_give(stripe);
    return 0;
}

int tb_layer_changed(tb_layer *layer)
{
    return __atomic_load_n(&layer->changed.count, __ATOMIC_SEQ_CST) != 0;
}

/* The row as it is now: 1 when it holds anything. */
int tb_layer_peek_row(tb_layer *layer, uint64_t row, uint8_t *packed)
{
    return row >= layer->rows ? -EINVAL : pack_row(layer, row, packed);
}
