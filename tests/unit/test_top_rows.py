"""`tierblk top` as rows of text: they fit, and no number is cut."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest
from rich.cells import cell_len

from bench.top import LOADS, sample
from tierblk.cli.top_columns import CACHES, DEVICES, REMOTES, UPLOADS
from tierblk.cli.top_detail import HELP, device_page, help_page
from tierblk.cli.top_model import Answer, Model, Picture
from tierblk.cli.top_rows import SORTS, View, footer, in_order, overview, select
from tierblk.cli.top_screen import draw, press
from tierblk.cli.top_tables import Table, _text
from tierblk.cli.top_text import count, cut, fit, latency, percent, plain_lines, size, span, spark, wrapped
from tierblk.cli.top_troubles import troubles

MAGNITUDES = [0, *(digit * 10**power for power in range(-3, 16) for digit in (1, 4.44, 9.49, 9.96, 9.999))]


def picture(rounds: int = 3) -> Picture:
    model = Model()
    for second in range(1, rounds + 1):
        said = [sample(number, float(second)) for number in range(len(LOADS))]
        answers = [
            Answer(str(n), d["daemon"]["cache_dir"], d["daemon"]["pid"], d) for n, d in enumerate(said)
        ]
        shown = model.update(answers, now_s=float(second), unix_s=1e9)
    return shown


@pytest.mark.parametrize("shown", [size, count, latency, span])
def test_a_number_is_never_wider_than_its_column(shown: Any) -> None:
    for value in MAGNITUDES:
        assert 1 <= len(shown(value)) <= 5, value
    assert shown(None) == "-"


def test_numbers_as_people_write_them() -> None:
    assert [size(n) for n in (0, 1, 512, 999, 1000, 4096, 12.3 * 2**20, 99.96 * 2**20, 1000 * 2**30)] == [
        "0",
        "1B",
        "512B",
        "999B",
        "1.0K",
        "4.0K",
        "12.3M",
        "100M",
        "1.0T",
    ]
    assert [count(n) for n in (0, 0.01, 0.4, 0.96, 99.4, 99_999, 100_000, 1.26e6)] == [
        "0",
        "0.1",
        "0.4",
        "1",
        "99",
        "99999",
        "100K",
        "1.3M",
    ]
    assert [latency(n) for n in (0.4, 81, 999.6, 1250, 9960, 21_500, 999_400, 999_600, 64e6)] == [
        "0us",
        "81us",
        "1.0ms",
        "1.2ms",
        "10ms",
        "22ms",
        "999ms",
        "1.0s",
        "64s",
    ]
    assert [span(n) for n in (0, 0.4, 9.96, 99, 100, 3600, 5980, 40_000, 1e6)] == [
        "0s",
        "0.4s",
        "10s",
        "99s",
        "2m",
        "60m",
        "1.7h",
        "11h",
        "12d",
    ]
    assert [percent(n) for n in (0.0, 99.99, 100.0, None)] == ["0.0", "99.9", "100", "-"]


def test_a_name_is_cut_in_its_middle() -> None:
    assert cut("web-frontend-eu-west-1", 15) == "web-fro…-west-1"
    assert cut("short", 15) == "short"
    assert cut("a\x1b[31m\nb", 20) == "a\\x1b[31m b"
    for width in range(1, 12):
        assert cell_len(fit("漢字かな交じり文", width)) == width
        assert cell_len(fit("abcdefghijklmnop", width, dots="~", right=True)) == width


@pytest.mark.parametrize("width", [1, 5, 20, 79])
def test_sentences_are_wrapped_and_complete(width: int) -> None:
    text = "web: degraded: https://a.very.long.example/address?with=everything has not answered 漢字"
    lines = wrapped(text, max(width, 4))
    assert all(cell_len(line) <= max(width, 4) for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_bars_stay_together_while_others_come() -> None:
    values = [float(n % 7) for n in range(200)]
    before = spark(values[:150], 20, first=0)
    assert len(before) == 20
    assert spark([0.0, 1.0, 2.0], 5) == "  ▁▅█"
    assert spark([0.0, 4.0], 4, unicode=False) == "  _@"
    # ten values share a bar; those of full bars do not change when nine more values have come
    assert spark(values[:151], 20)[:-1].strip() == before.strip()
    assert spark(values[10:151], 20, first=10)[-10:] == spark(values[:151], 20)[-10:]
    assert spark([], 3) == "   "


@pytest.mark.parametrize(
    ("width", "height"), list(itertools.product((80, 100, 132, 200, 317), (None, 24, 50)))
)
@pytest.mark.parametrize("page", ["all", "device", "help"])
def test_every_line_fits(width: int, height: int | None, page: str) -> None:
    shown = picture()
    view = select(shown, View(width=width, height=height, page=page), 0)
    lines = draw(shown, view)
    assert all(cell_len(line) <= width for line in plain_lines(lines))
    assert cell_len(footer(view).text) == width
    if height is not None:
        assert len(lines) <= height - 1


def tables(shown: Picture) -> list[tuple[Table[Any], list[Any]]]:
    uploads = [(device, device.upload) for device in shown.devices if device.upload]
    return [
        (CACHES, list(shown.caches)),
        (DEVICES, list(shown.devices)),
        (UPLOADS, uploads),
        (REMOTES, list(shown.remotes)),
    ]


@pytest.mark.parametrize("width", [80, 120, 200])
def test_no_number_is_cut(width: int) -> None:
    """Only the columns of texts may be."""
    for table, rows in tables(picture(40)):
        fitting = table.fitting(rows, width)
        assert sum(cells + 1 for _, cells in fitting) <= width
        for row in rows:
            for column, cells in fitting:
                text = _text(column.cell(row))[0]
                assert cell_len(text) <= cells or column.flexible, (column.title, text)
                assert cell_len(column.title) <= cells


def test_at_80_columns_there_is_all_that_matters() -> None:
    text = "\n".join(plain_lines(overview(picture(12), View(width=80))))
    words = "IOPS READ WRITE HIT% MISS REQS AGE FREE DIRTY QUARANT BAD PACED EPOCH LIMIT SENT RATE/s LEFT"
    words += " SINCE NEXT degraded slowed ci-runner-07 7 64s image store"
    for word in words.split():
        assert word in text, word
    assert "writes to new blocks are slowed to 20.0M a second" in text
    assert "has not answered for 30 s" in re.sub(r"\n +", " ", text)


def test_at_24_lines_every_table_is_there() -> None:
    lines = plain_lines(overview(picture(), View(width=80, height=24)))
    assert len(lines) <= 23
    for title in (" CACHE", " DEVICE", " UPLOAD", " REMOTE"):
        assert any(line.startswith(title) for line in lines)
    assert sum(" ok  " in line or "degraded" in line for line in lines) >= 5


def test_the_selected_device_is_always_seen() -> None:
    shown = picture()
    many = [replace(shown.devices[0], name=f"d{n:03}") for n in range(300)]
    shown = replace(shown, devices=tuple(many))
    view = View(width=80, height=24, sort="name")
    for step in (0, 5, 150, 1000, -30):
        view = select(shown, view, step)
        marked = [line for line in plain_lines(overview(shown, view)) if line.startswith(">")]
        assert len(marked) == 1
        assert view.selected is not None
        assert view.selected[1] in marked[0]
    assert any("more" in line for line in plain_lines(overview(shown, view)))


@pytest.mark.parametrize("height", range(4, 24))
def test_small_screens_are_never_overfilled(height: int) -> None:
    shown = picture()
    view = select(shown, View(width=80, height=height), 4)
    lines = plain_lines(overview(shown, view))
    assert len(lines) <= height - 1
    if height >= 8:
        assert any(line.startswith(">") for line in lines)


def test_orders() -> None:
    shown = picture()
    assert in_order(shown.devices, "iops")[0].name in ("db-primary", "ci-runner-07")
    assert in_order(shown.devices, "waiting")[0].name in ("ci-runner-08", "ci-runner-07")
    names = [device.name for device in in_order(shown.devices, "name")]
    assert names == sorted(names)
    assert {len(in_order(shown.devices, sort)) for sort in SORTS} == {5}


def test_keys() -> None:
    shown = picture()
    view = View()
    assert press("q", shown, view) is None
    orders = []
    for _ in SORTS:
        view = press("s", shown, view) or View()
        orders.append(view.sort)
    assert sorted(orders) == sorted(SORTS)
    detail = press("enter", shown, view)
    assert detail is not None
    assert (detail.page, detail.selected) == ("device", in_order(shown.devices, view.sort)[0].key)
    down = press("j", shown, detail)
    assert down is not None
    assert down.selected == in_order(shown.devices, view.sort)[1].key
    assert press("esc", shown, detail) == replace(detail, page="all")
    helped = press("?", shown, view)
    assert helped is not None
    assert helped.page == "help"
    assert press("x", shown, helped) == view
    assert press("x", shown, view) == view
    assert press("enter", None, View()) == View()
    assert press("enter", Picture(0.0), View()) == View()


def test_a_device_page_has_every_tier_and_what_is_uploaded() -> None:
    shown = picture(30)
    key = next(device.key for device in shown.devices if device.name == "db-primary")
    text = "\n".join(plain_lines(device_page(shown, View(width=80, height=24, selected=key))))
    for word in (
        "hit",
        "zero",
        "miss",
        "memory",
        "write",
        "flush",
        "99.9 %",
        "IOPS",
        "s3://volumes/db-primary",
    ):
        assert word in text
    assert "█" in text
    gone = plain_lines(device_page(shown, View(selected=("0", "other"))))
    assert "gone" in gone[1]


def test_the_help_fits_into_80_by_24() -> None:
    assert all(len(line) < 79 for line in HELP.splitlines())
    assert len(help_page(Picture(0.0), View())) <= 23


def test_without_unicode_nothing_else_is_drawn() -> None:
    shown = picture()
    for page in ("all", "device", "help"):
        view = select(shown, View(width=80, height=24, unicode=False, page=page), 0)
        assert "".join(plain_lines([*draw(shown, view), footer(view)])).isascii()


def test_a_trouble_is_said_once() -> None:
    shown = picture()
    sentences = [sentence for sentence, _ in troubles(shown)]
    assert len(sentences) == 2
    assert sum("has not answered for 30 s" in sentence for sentence in sentences) == 1
    silent = replace(
        shown.caches[0], state="silent", silent_s=12.0, error="its daemon (pid 7) does not answer"
    )
    said = [sentence for sentence, _ in troubles(replace(shown, caches=(silent,)))]
    assert f"{silent.cache_dir}: no numbers for 12s: its daemon (pid 7) does not answer" in said
    failing = replace(shown.caches[1], commit_failure="cannot sync: EIO", commit_failed_s=3.0)
    said = [sentence for sentence, _ in troubles(replace(shown, caches=(failing,)))]
    assert f"{failing.cache_dir}: the index cannot be written for 3.0s: cannot sync: EIO" in said


def test_nothing_at_all() -> None:
    assert "no daemon is running" in plain_lines(overview(Picture(0.0), View()))[1]
    empty = replace(picture(), devices=(), remotes=())
    assert " no device is attached" in plain_lines(overview(empty, View(height=24)))
