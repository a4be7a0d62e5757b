/* Sums of pages over cells, which are ranges of blocks, out of packed entries of block maps or rows: for pictures of what a cache
 * holds. On no hot path: the entries are copies. */
#include "core.h"

#define STRETCH 4095u /* blocks whose sums a lane has room for */

/* Four masks, one a lane of 16 bits; in place of each, how many bits it has. */
static uint64_t lanes(uint64_t a, uint64_t b, uint64_t c, uint64_t d)
{
    uint64_t x = a | b << 16 | c << 32 | d << 48;
    x -= x >> 1 & 0x5555555555555555;
    x = (x & 0x3333333333333333) + (x >> 2 & 0x3333333333333333);
    x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0f;
    return (x + (x >> 8)) & 0x001f001f001f001f;
}

static uint64_t lane(uint64_t sums, int i)
{
    return sums >> (16 * i) & 0xFFFF;
}

/* Of a block, the pages that an address space of so many has. */
static unsigned valid(uint64_t block, uint64_t pages)
{
    uint64_t first = block * TB_BLOCK_PAGES;
    return first >= pages ? 0 : pages - first >= TB_BLOCK_PAGES ? 0xFFFF : (1u << (pages - first)) - 1;
}

/* What persists of an entry is the same in a row and in a map; only a map's has flags behind it. */
static tb_head head_at(const uint8_t *entry, uint32_t stride)
{
    tb_head head = {{0}};
    memcpy(&head, entry, stride < sizeof head ? TB_PACKED_ENTRY : sizeof head);
    return head;
}

/* The cell of a block that is in one of them. */
static uint64_t cell_of(const tb_tally *tally, uint64_t block)
{
    uint64_t low = 0, high = tally->cells;
    while (high - low > 1) {
        uint64_t middle = low + (high - low) / 2;
        if (tally->bounds[middle] <= block)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* Where a stretch of blocks from this one on ends: with its cell, or with what there is. */
static uint64_t stretch_end(const tb_tally *tally, uint64_t *cell, uint64_t block, uint64_t end)
{
    while (block >= tally->bounds[*cell + 1])
        ++*cell;
    uint64_t stop = tally->bounds[*cell + 1] < end ? tally->bounds[*cell + 1] : end;
    return stop - block > STRETCH ? block + STRETCH : stop;
}

/* Entries of a volume's blocks from `first` on, all of them in cells; `hidden` comes to say what the base does not answer. pages,
 * base_pages: how many the volume and what lies below it have. */
void tb_tally_volume(const tb_tally *tally, const uint8_t *packed, uint32_t stride, uint64_t first, uint64_t count, uint64_t pages,
                     uint64_t base_pages)
{
    uint64_t cell = cell_of(tally, first), block = first, end = first + count;
    while (block < end) {
        uint64_t stop = stretch_end(tally, &cell, block, end), what = 0, of_it = 0;
        for (; block < stop; block++, packed += stride) {
            tb_head head = head_at(packed, stride);
            unsigned known = (head.present | head.cached | head.zero | head.dirty) & valid(block, pages);
            if (!known)
                continue;
            unsigned clean = known & ~(unsigned)head.dirty, zero = head.zero & clean, cached = head.cached & clean & ~zero;
            what += lanes(head.dirty & known, cached, zero, clean & ~(zero | cached));
            of_it += lanes(known & valid(block, base_pages), head.flags & TB_ENTRY_REFERENCED ? head.cached & known : 0, 0, 0);
            if (tally->hidden)
                tally->hidden[block - tally->hidden_first] = (uint16_t)known;
        }
        tb_share *share = &tally->shares[cell];
        share->dirty += lane(what, 0);
        share->volume += lane(what, 1);
        share->zero += lane(what, 2);
        share->elsewhere += lane(what, 3);
        share->over_base += lane(of_it, 0);
        share->used += lane(of_it, 1);
    }
}

/* The same for the base below, after its volume. */
void tb_tally_base(const tb_tally *tally, const uint8_t *packed, uint32_t stride, uint64_t first, uint64_t count, uint64_t pages)
{
    uint64_t cell = cell_of(tally, first), block = first, end = first + count;
    while (block < end) {
        uint64_t stop = stretch_end(tally, &cell, block, end), sums = 0;
        for (; block < stop; block++, packed += stride) {
            tb_head head = head_at(packed, stride);
            if (!(head.cached | head.zero))
                continue;
            unsigned seen = valid(block, pages);
            if (tally->hidden)
                seen &= ~(unsigned)tally->hidden[block - tally->hidden_first];
            unsigned zero = head.zero & seen, cached = head.cached & seen & ~zero;
            sums += lanes(cached, zero, head.flags & TB_ENTRY_REFERENCED ? cached : 0, 0);
        }
        tb_share *share = &tally->shares[cell];
        share->base += lane(sums, 0);
        share->base_zero += lane(sums, 1);
        share->used += lane(sums, 2);
    }
}
