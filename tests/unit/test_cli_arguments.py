"""What the command line takes, and what its help says."""

from __future__ import annotations

import pytest

from tierblk.cli import cache
from tierblk.cli.entry import VERBS, main, make_parser
from tierblk.extent import Extent

MIB = 1 << 20


@pytest.mark.parametrize(
    "words",
    [
        ("pin", "web", "--remove", "1MiB+1MiB"),
        ("pin", "--remove", "web", "1MiB+1MiB"),
        ("pin", "web", "1MiB+1MiB", "--remove"),
        ("warm", "web", "--partition", "2", "1MiB-2MiB", "--file", "/x"),
        ("diff", "web", "--layer", "base", "1MiB-2MiB", "--json"),
    ],
)
def test_a_range_may_come_behind_an_option(words: tuple[str, ...]) -> None:
    args = make_parser().parse_args(["cache", *words])
    assert (args.target, args.range) == ("web", Extent(MIB, MIB))


def test_a_range_may_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert make_parser().parse_args(["cache", "warm", "web", "--partition", "2"]).range is None
    with pytest.raises(SystemExit) as caught:
        main(["cache", "pin", "web", "--remove"])
    assert caught.value.code == 2
    assert "--remove needs a RANGE" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("stat", "web", "--debug"), ("pin", "web", "--debug", "0+1")])
def test_debug_may_stand_at_the_end(words: tuple[str, ...]) -> None:
    assert make_parser().parse_args(["cache", *words]).debug
    assert not make_parser().parse_args(["cache", "stat", "web"]).debug


@pytest.mark.parametrize(
    ("words", "text"),
    [((verb.NAME,), verb.__doc__) for verb in VERBS]
    + [(("cache", verb.NAME), verb.__doc__) for verb in cache.VERBS],
)
def test_help_has_all_that_was_written(
    words: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Brackets too, which could be taken for names of colours."""
    with pytest.raises(SystemExit) as caught:
        main([*words, "--help"])
    assert caught.value.code == 0
    assert text.strip() in capsys.readouterr().out
