"""A heat map drawn: in the terminal with colours and without, at several widths, as SVG and as PNG."""

from __future__ import annotations

import builtins
import io
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from tierblk.cache.heat import Heat
from tierblk.cache.view import State
from tierblk.cli import map_picture, map_png, map_svg, map_text
from tierblk.cli.heatmap import HeatMap, Part
from tierblk.contents import Contents
from tierblk.errors import TierblkError
from tierblk.extent import Extent
from tierblk.partition import Partition

MIB = 1 << 20
CELLS = [
    Heat(dirty=MIB),
    Heat(dirty=4096, absent=MIB - 4096),
    Heat(base=MIB, used=MIB),
    Heat(base=MIB // 4, absent=MIB - MIB // 4),
    Heat(volume=MIB),
    Heat(zero=MIB),
    Heat(stored=MIB),
    Heat(lost=4096, zero=MIB - 4096),
]
CELLS += [Heat(absent=MIB)] * 300
ROOT = Partition(1, MIB, 200 * MIB, "0fc63daf-8483-4772-8e79-3d69d8477de4", "root\x1b[31m<&\n")
SWAP = Partition(12, 201 * MIB, 20 * MIB, "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f")
PARTS = [
    Part(
        ROOT,
        Heat(dirty=MIB, absent=199 * MIB),
        Contents("ext4", "a label of some length", "u-u-i-d", 9, 4),
        False,
    ),
    Part(SWAP, Heat(absent=20 * MIB), None, True),
]
MAP = HeatMap(
    name="web",
    layers=("local volume web", "http://h/<b>&c"),
    state=State.SERVED,
    size_bytes=len(CELLS) * MIB,
    range=Extent(0, len(CELLS) * MIB),
    cell_bytes=MIB,
    cells=CELLS,
    knows_use=True,
    table="gpt",
    parts=PARTS,
)
WHEN = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)


def text_of(drawn: HeatMap, *, width: int, colours: bool, system: Any = "truecolor") -> str:
    file = io.StringIO()
    console = Console(
        file=file, width=width, force_terminal=colours, color_system=system if colours else None,
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    map_text.put_map(drawn, console, colours=colours, columns=map_text.columns_of(width))
    return file.getvalue()


def test_letters_are_plain_ascii_and_say_what_is_most() -> None:
    text = text_of(MAP, width=80, colours=False)
    assert text.isascii()
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[0] == "web: 308 MiB, beside its daemon"
    assert lines[3] == "       0 B " + "DdBbVZSx".ljust(64, ".")
    assert lines[4] == " " * 13 + "^"
    assert lines[5] == " " * 12 + "\\1" + "_" * 61
    assert "D  dirty, only here" in text
    assert "a letter is 1 MiB; small letters: less of it" in lines
    assert re.search(r"^1   Linux .* ext4 ", text, re.M)
    assert re.search(r"^12  Linux swap .* not cached ", text, re.M)


@pytest.mark.parametrize("colours", [False, True])
@pytest.mark.parametrize(("width", "columns"), [(80, 64), (200, 160), (40, 16)])
def test_it_fits(width: int, columns: int, colours: bool) -> None:
    assert map_text.columns_of(width) == columns
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text_of(MAP, width=width, colours=colours))
    lines = plain.splitlines()
    table = next(n for n, line in enumerate(lines) if line.startswith("#"))
    assert max(map(len, lines[:table])) <= max(width, 80)
    assert max(map(len, lines[table:])) <= max(width, 80)
    assert ("u-u-i-d" in plain) == (width == 200)


@pytest.mark.parametrize("system", ["truecolor", "256", "standard"])
def test_colours_have_two_cells_a_character(system: str) -> None:
    text = text_of(MAP, width=80, colours=True, system=system)
    row = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()[3]
    assert row == "       0 B " + "▌" * 64
    assert "\x1b[31m" not in text.split("#", 1)[1], "a partition's name does not steer the terminal"


def test_a_partition_is_a_bracket_over_its_rows() -> None:
    lines = text_of(MAP, width=80, colours=False).splitlines()
    brackets = [line[11:] for line in lines if re.fullmatch(r" {11}[ \\_/0-9]+", line)]
    assert brackets == [
        " \\1" + "_" * 61,
        "_1" + "_" * 62,
        "_1" + "_" * 62,
        "_1______/\\12________________/",
    ]  # the last row's partitions end before it does


def test_notes_say_what_is_not_known() -> None:
    bare = replace(MAP, parts=[], table=None)
    assert bare.notes == ["There is no partition table."]
    assert "first sectors are not cached" in replace(bare, table_unread=True).notes[0]
    held = replace(bare, device_contents=Contents("ext4", "data"), knows_use=False)
    assert held.notes[0] == 'There is no partition table: the device holds ext4 "data".'
    assert "What was used lately is not known" in text_of(held, width=80, colours=False)


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0.0 %"), (1, "< 0.1 %"), (10**6, "100.0 %"), (10**6 - 1, "> 99.9 %"), (123456, "12.3 %")],
)
def test_percents_never_claim_nothing_or_all(amount: int, text: str) -> None:
    assert map_text.percent(amount, 10**6) == text


def test_the_svg_needs_nothing_else_and_says_what_it_shows() -> None:
    data = map_svg.render(map_picture.layout(MAP, 128, WHEN))
    root = ET.fromstring(data)
    names = {element.tag.removeprefix("{http://www.w3.org/2000/svg}") for element in root.iter()}
    assert names == {"svg", "title", "desc", "style", "rect", "path", "text"}
    for element in root.iter():
        for name, value in element.attrib.items():
            assert not name.lower().startswith("on"), name
            assert "href" not in name
            assert "url(" not in value
    style = next(element.text or "" for element in root.iter() if element.tag.endswith("style"))
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    title, description = (element.text or "" for element in list(root)[:2])
    assert title == "What is cached of web"
    assert description.startswith("dirty, only here: 1 MiB (0.3 %), cached, of the volume: 1 MiB")
    texts = [element.text or "" for element in root.iter() if element.tag.endswith("text")]
    assert any("http://h/<b>&c" in text for text in texts), "as text, not as elements"
    assert "2026-01-02 03:04 UTC · beside its daemon" in texts
    assert "1 ext4 a label of some length" in texts
    classes = {element.get("class") for element in root.iter() if element.tag.endswith("path")}
    assert classes >= {
        "dirty",
        "volume",
        "base",
        "zero",
        "stored",
        "lost",
        "absent",
        "used",
        "part0",
        "part1",
    }
    assert classes <= set(map_svg.LIGHT) == set(map_svg.DARK)


def test_a_cell_is_a_stack_of_its_shares_and_a_little_can_be_seen() -> None:
    picture = map_picture.layout(replace(MAP, cells=CELLS[:8]), 128, WHEN)
    left = map_picture.MARGIN + map_picture.LABEL_WIDTH
    cell = map_picture.CELL_WIDTH

    def heights(colour: str) -> dict[int, float]:
        rects = (rect for shape in picture.shapes for rect in shape.rects if shape.colour == colour)
        return {round((rect.x - left) / cell): rect.height for rect in rects if rect.x >= left}

    full = map_picture.CELL_HEIGHT
    assert heights("dirty") | {0: full, 1: 2.0} == heights("dirty")
    assert heights("base")[3] == full / 4
    assert heights("lost")[7] == 2.0
    assert heights("zero")[7] == full - 2.0


def test_the_png_is_the_same_picture_at_twice_the_size() -> None:
    picture = map_picture.layout(MAP, 128, WHEN)
    image = Image.open(io.BytesIO(map_png.render(picture)))
    assert image.format == "PNG"
    assert image.size == (round(picture.width * 2), round(picture.height * 2))
    colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20) or ()}
    for name in ("dirty", "volume", "base", "zero", "stored", "lost", "absent"):
        assert tuple(bytes.fromhex(map_svg.LIGHT[name][1:])) in colours


def test_without_pillow_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "PIL":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(TierblkError, match="need Pillow, which is not installed") as caught:
        map_png.render(map_picture.layout(MAP, 128, WHEN))
    assert caught.value.hint == "pip install 'tierblk[png]', or use --svg"
