/* Blocks that the SSD fails to give back and that somebody else has too (DESIGN 9). */
#include "core.h"

/* Under the stripe lock: its pages are not cached any more, and the slot is lost to everybody as
 * soon as nothing uses it. The remote still has the bytes, so the reader goes there (DESIGN 9). */
void tb_forget_block(tb_layer *layer, tb_entry *entry, uint64_t block)
{
    tb_engine *engine = layer->engine;
    tb_head head = entry->head;
    if (head.flags & TB_ENTRY_PROBATION)
        TB_ADD(&engine->probation, -1u);
    head.cached = head.flags = 0;
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
