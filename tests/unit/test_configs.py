"""The example configs load, and the reference lists every key with its default."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from tests.conftest import ROOT
from tierblk import config

EXAMPLES = sorted((ROOT / "configs").glob("*.toml"))
REFERENCE = ROOT / "configs" / "reference.toml"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_loads(path: Path) -> None:
    assert config.load(path).path == path


def test_there_are_examples() -> None:
    assert {path.name for path in EXAMPLES} >= {"minimal.toml", "reference.toml", "https.toml"}


def tables() -> dict[str, type[BaseModel]]:
    found = {}
    for name, field in config.Config.model_fields.items():
        kinds = get_args(field.annotation) or (field.annotation,)  # "table or none"
        (found[name],) = (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    return found


@pytest.mark.parametrize("table", tables())
def test_the_reference_lists_every_key_with_its_default(table: str) -> None:
    text = REFERENCE.read_text()
    document = tomllib.loads(text)[table]
    loaded = getattr(config.load(REFERENCE), table)
    expected = set()
    for key, field in tables()[table].model_fields.items():
        default = field.get_default(call_default_factory=True, validated_data={})
        if re.search(rf'(?m)^# Required with mode "write-back".*\n{key} = ', text):  # which the reference has
            expected.add(key)
            continue
        if default is None:  # TOML has no null: listed as a comment that says what the default is
            assert re.search(rf"(?m)^# .*Default: .*\n# {key} = ", text)
            continue
        expected.add(key)
        if not field.is_required():
            assert getattr(loaded, key) == default, key
    assert set(document) == expected


def test_the_reference_marks_what_is_required() -> None:
    required = re.findall(r"# Required\.(?:.*\n)(?:#.*\n)*(\w+) = ", REFERENCE.read_text())
    assert required == [
        key for model in tables().values() for key, field in model.model_fields.items() if field.is_required()
    ]
