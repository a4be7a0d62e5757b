/* Blocks that leave although nobody needs their room: the SSD fails to give them back (DESIGN 9), or a user says so; and blocks that a user
 * wants to stay. Somebody else has all of them. */
#include "core.h"

/* Under the stripe lock: its pages are not cached any more, and the slot is lost to everybody as
 * soon as nothing uses it. The remote still has the bytes, so the reader goes there (DESIGN 9). */
void tb_forget_block(tb_layer *layer, tb_entry *entry, uint64_t block)
{
    tb_engine *engine = layer->engine;
    tb_head head = entry->head;
    if (head.flags & TB_ENTRY_PROBATION)
        TB_ADD(&engine->probation, -1u);
    head.cached = 0;
    head.flags &= TB_ENTRY_PINNED;
    uint32_t slot = head.slot;
    bool loses = slot && !entry->readers && !entry->writers && !entry->fill;
    if (loses)
        head.slot = 0;
    tb_entry_change(layer, entry, head);
    tb_map_mark(layer, block);
    if (!loses)
        return;
    if (tb_slot_may_condemn(engine))
        tb_slot_condemn(engine, slot);
    else
        tb_slot_quarantine(engine, slot);
}

/* A volume's block, which the caller has pinned. False: it has pages that nobody else has, or is being written, so nothing is done. The
 * slot goes with the last pin. */
bool tb_forget_of_volume(tb_layer *volume, uint64_t block)
{
    tb_entry *entry = &volume->entries[block];
    tb_lock *stripe = tb_stripe(volume, block);
    tb_lock_take(stripe);
    bool may = volume->is_write_back && !entry->head.dirty && !entry->writers && !(entry->head.flags & (TB_ENTRY_SEALED | TB_ENTRY_MOVING));
    if (may)
        tb_forget_block(volume, entry, block);
    tb_lock_give(stripe);
    return may;
}

/* Event loop: these pages, as far as they are cached, clean and somebody else's too, are not cached any more. How many they were; -EBUSY: the
 * block is being read, filled or written, and nothing was done. */
int tb_layer_drop(tb_layer *layer, uint64_t block, uint16_t pages)
{
    if (block >= layer->blocks)
        return -EINVAL;
    if (!tb_map_has(layer, block) || (layer->is_volume && !layer->is_write_back))
        return 0;
    tb_lock *stripe = tb_stripe(layer, block);
    tb_lock_take(stripe);
    tb_entry *entry = &layer->entries[block];
    tb_head head = entry->head;
    uint16_t gone = pages & head.cached & (uint16_t)~head.dirty;
    bool busy = entry->readers || entry->writers || entry->fill || head.flags & (TB_ENTRY_SEALED | TB_ENTRY_MOVING);
    uint32_t dropped = 0;
    if (gone && !busy) {
        head.cached &= (uint16_t)~gone;
        if (!head.cached) {
            if (head.flags & TB_ENTRY_PROBATION)
                TB_ADD(&layer->engine->probation, -1u);
            head.flags &= TB_ENTRY_PINNED;
        }
        dropped = tb_entry_drop_slot(layer, entry, &head);
        tb_entry_change(layer, entry, head);
        tb_map_mark(layer, block);
        __atomic_fetch_add(&layer->drops, 1, __ATOMIC_RELEASE);
    }
    tb_lock_give(stripe);
    if (dropped)
        tb_slot_quarantine(layer->engine, dropped);
    return gone && busy ? -EBUSY : __builtin_popcount(gone);
}

/* Event loop: eviction passes the block by, cached or not yet, until the next start or until it may have it again. -ENOSPC for a full tmpfs. */
int tb_layer_pin(tb_layer *layer, uint64_t block, int pinned)
{
    if (block >= layer->blocks)
        return -EINVAL;
    if (!pinned && !tb_map_has(layer, block))
        return 0;
    int rc = tb_map_prepare(layer, block);
    if (rc)
        return rc;
    tb_lock *stripe = tb_stripe(layer, block);
    tb_lock_take(stripe);
    uint16_t *flags = &layer->entries[block].head.flags;
    *flags = pinned ? *flags | TB_ENTRY_PINNED : *flags & (uint16_t)~TB_ENTRY_PINNED;
    tb_lock_give(stripe);
    if (!pinned)
        __atomic_store_n(&layer->engine->vain, 0, __ATOMIC_RELAXED); /* eviction is worth another try */
    return 0;
}
