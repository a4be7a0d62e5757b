/* The memory tier: a queue's own copies of hot blocks, in locked memory above the SSD. A hit in it is one system call
 * instead of two and no read of the disk.
 *
 * All of it belongs to the queue's thread, so it needs no lock. Only bases have copies here: the bytes of a base never change (I1), so
 * what was right stays right, whatever becomes of the slot. What was read from a slot that had gone bad is wrong: who drops pages by
 * hand, as a repair does, makes all copies of before worth nothing.
 *
 * Frames are looked up by sets of eight. A block gets one when it is asked for more often than the least used of its set:
 * the candidates are counted as in Misra and Gries, "Finding repeated elements" (1982), so that a scan of blocks that are
 * asked for once drives nobody out. */
#define _GNU_SOURCE
#include "core.h"

#define WAYS 8u
#define USES_MAX 64u /* so that a block that cooled down gives way after so many challenges */
#define USES_MIN 2u
#define HELD_MAX 4u /* frames of a set that tags may hold: an idle tag keeps its last one, which then gives way to nobody */

typedef struct {
    uint64_t block;
    uint16_t pages; /* which of them are in the frame */
    uint16_t pins;  /* requests whose bytes come from it, or go into it */
    uint16_t uses;  /* 0: nobody's */
} frame;

typedef struct {
    uint64_t block;
    uint16_t uses;
} candidate;

struct tb_hot {
    uint8_t *memory;
    frame *frames;
    candidate *candidates; /* as many */
    uint8_t *held;         /* by set: how many of its frames have pins */
    size_t bytes;
    uint32_t sets;
    uint32_t drops; /* of the layer's, when that was last looked at */
};

/* bytes: what it may take; below a set of frames there is none. Memory is taken as it is used. */
int tb_hot_new(uint64_t bytes, tb_hot **out)
{
    *out = NULL;
    uint64_t sets = bytes / TB_BLOCK_BYTES / WAYS;
    if (!sets)
        return 0;
    if (sets > UINT32_MAX / WAYS)
        return -ENOMEM;
    tb_hot *hot = calloc(1, sizeof *hot);
    if (!hot)
        return -ENOMEM;
    hot->sets = (uint32_t)sets;
    hot->bytes = sets * WAYS * TB_BLOCK_BYTES;
    hot->frames = calloc(sets * WAYS, sizeof *hot->frames);
    hot->candidates = calloc(sets * WAYS, sizeof *hot->candidates);
    hot->held = calloc(sets, 1);
    hot->memory = mmap(NULL, hot->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (!hot->frames || !hot->candidates || !hot->held || hot->memory == MAP_FAILED) {
        tb_hot_free(hot);
        return -ENOMEM;
    }
    madvise(hot->memory, hot->bytes, MADV_DONTFORK);
    mlock2(hot->memory, hot->bytes, MLOCK_ONFAULT); /* not being allowed to costs page faults, no correctness */
    *out = hot;
    return 0;
}

void tb_hot_free(tb_hot *hot)
{
    if (!hot)
        return;
    if (hot->memory && hot->memory != MAP_FAILED)
        munmap(hot->memory, hot->bytes);
    free(hot->frames);
    free(hot->candidates);
    free(hot->held);
    free(hot);
}

/* The first of the eight places of a block's set. Neighbours are spread, whatever the number of sets. */
static uint32_t place_of(const tb_hot *hot, uint64_t block)
{
    uint64_t mixed = block * 0x9e3779b97f4a7c15ull;
    return (uint32_t)((mixed >> 32) * hot->sets >> 32) * WAYS;
}

static frame *find(tb_hot *hot, uint64_t block)
{
    frame *set = &hot->frames[place_of(hot, block)];
    for (unsigned i = 0; i < WAYS; i++)
        if (set[i].block == block && set[i].uses)
            return &set[i];
    return NULL;
}

static void use(frame *found)
{
    if (found->uses < USES_MAX)
        found->uses++;
}

static uint8_t *held_of(tb_hot *hot, const frame *of)
{
    return &hot->held[(size_t)(of - hot->frames) / WAYS];
}

static void pin(tb_req *req, frame *taken)
{
    if (taken->pins++ == 0)
        (*held_of(req->queue->hot, taken))++;
    req->frame = (uint32_t)(taken - req->queue->hot->frames) + 1;
}

static frame *frame_of(const tb_req *req)
{
    return &req->queue->hot->frames[req->frame - 1];
}

static uint8_t *bytes_of(const tb_req *req, const frame *of)
{
    const tb_hot *hot = req->queue->hot;
    return hot->memory + (size_t)(of - hot->frames) * TB_BLOCK_BYTES + req->offset;
}

/* Requests that bring their bytes at this moment have their blocks pinned, which are not dropped then. */
static void forget_dropped(tb_hot *hot, const tb_layer *base)
{
    uint32_t drops = __atomic_load_n(&base->drops, __ATOMIC_ACQUIRE);
    if (__builtin_expect(drops == hot->drops, 1))
        return;
    hot->drops = drops;
    for (size_t i = 0; i < (size_t)hot->sets * WAYS; i++)
        hot->frames[i].pages = 0;
}

/* Whether all of a request is in memory. If so its bytes are in its buffer; those of a direct one are where
 * tb_hot_bytes says, until tb_hot_let_go. */
bool tb_hot_serve(tb_req *req)
{
    forget_dropped(req->queue->hot, req->queue->base);
    frame *found = find(req->queue->hot, req->block);
    if (!found || tb_pages_of(req->offset, req->length) & (uint16_t)~found->pages)
        return false;
    use(found);
    if (req->direct && (found->pins || *held_of(req->queue->hot, found) < HELD_MAX)) {
        pin(req, found);
        return true;
    }
    req->direct = 0;
    memcpy(req->data, bytes_of(req, found), req->length);
    return true;
}

const uint8_t *tb_hot_bytes(const tb_req *req)
{
    return bytes_of(req, frame_of(req));
}

/* Counts a block that has no frame; how often it was asked for of late. */
static candidate *count(tb_hot *hot, uint64_t block)
{
    candidate *set = &hot->candidates[place_of(hot, block)], *free_one = NULL;
    for (unsigned i = 0; i < WAYS; i++) {
        if (!set[i].uses)
            free_one = &set[i];
        else if (set[i].block == block) {
            if (set[i].uses <= USES_MAX)
                set[i].uses++;
            return &set[i];
        }
    }
    for (unsigned i = 0; !free_one && i < WAYS; i++)
        set[i].uses--;
    if (free_one)
        *free_one = (candidate){.block = block, .uses = 1};
    return free_one;
}

/* The least used frame of a block's set, if the block is used more. All that are challenged in vain grow older, so that
 * those that cooled down become the least. */
static frame *win(tb_hot *hot, uint64_t block)
{
    candidate *challenger = count(hot, block);
    if (!challenger || challenger->uses < USES_MIN)
        return NULL;
    frame *set = &hot->frames[place_of(hot, block)], *least = NULL;
    for (unsigned i = 0; i < WAYS; i++)
        if (!set[i].pins && (!least || set[i].uses < least->uses))
            least = &set[i];
    if (!least)
        return NULL;
    if (challenger->uses <= least->uses) {
        for (unsigned i = 0; i < WAYS; i++)
            set[i].uses -= set[i].uses > 1;
        return NULL;
    }
    *least = (frame){.block = block, .uses = challenger->uses};
    challenger->uses = 0;
    return least;
}

/* A request is about to be read from its slot: whether its block belongs into memory, and it shall bring its bytes there.
 * It is no direct one then, since what goes straight into its pages is seen by nobody else. */
void tb_hot_consider(tb_req *req)
{
    tb_hot *hot = req->queue->hot;
    if (!tb_whole_pages_of(req->offset, req->length))
        return;
    frame *taken = find(hot, req->block);
    if (taken)
        use(taken);
    else
        taken = win(hot, req->block);
    if (!taken)
        return;
    pin(req, taken);
    req->direct = 0;
}

/* It has been read: its whole pages are in memory from now on. */
void tb_hot_keep(tb_req *req)
{
    uint16_t pages = tb_whole_pages_of(req->offset, req->length);
    uint32_t skipped = (uint32_t)__builtin_ctz(pages) * TB_PAGE_BYTES - req->offset; /* a part of a page before them */
    frame *taken = frame_of(req);
    memcpy(bytes_of(req, taken) + skipped, req->data + skipped, (size_t)__builtin_popcount(pages) * TB_PAGE_BYTES);
    taken->pages |= pages;
}

/* See tb_hot_let_go. */
void tb_hot_release(tb_req *req)
{
    frame *taken = frame_of(req);
    if (--taken->pins == 0)
        (*held_of(req->queue->hot, taken))--;
    req->frame = 0;
}
