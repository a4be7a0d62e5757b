"""States of a cache directory (cache/view.py) in words."""

from __future__ import annotations

STATE_TEXTS = {
    "served": "a daemon serves it, and its memory counts",
    "ended": "the last daemon ended in order",
    "killed": "the last daemon did not end in order; its block maps are there, so the next start is a warm "
    "one",
    "cut": "the last daemon did not end in order and its block maps are lost: the index and the journal "
    "count, without clean pages of volumes",
    "strange": "index and slots are not of the same time, as if one had been put back alone: nothing that is "
    "cached counts",
}
