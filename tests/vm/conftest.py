"""The host's half of the VM tests: one test here for each test in `guest/` and kernel."""

from __future__ import annotations

import pytest

from tests.vm.suite import Case, Suite

# They run inside a VM, by its own pytest.
collect_ignore = ["guest"]


@pytest.fixture(scope="session")
def suite(request: pytest.FixtureRequest) -> Suite:
    """The boots of this session, for the cases that were selected on the command line."""
    selected: list[Case] = []
    for item in request.session.items:
        case = item.callspec.params.get("case") if isinstance(item, pytest.Function) else None
        if isinstance(case, Case):
            selected.append(case)
    return Suite(selected)
