"""How much the property tests do: short and the same every time by default, long on request.

TIERBLK_PROPERTY_STEPS=N: so many steps a machine instead, from another seed each time. A trace that fails is
printed; it becomes a directed test (test_traces.py), so that it is run for ever.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

STEPS_VARIABLE = "TIERBLK_PROPERTY_STEPS"


def effort(examples: int, steps: int, *, shrink: bool = True) -> settings:
    """For a machine: that many traces of at most `steps` steps, or as many as the environment asks for."""
    asked = int(os.environ.get(STEPS_VARIABLE, "0"))
    return settings(
        max_examples=max(1, asked // steps) if asked else examples,
        stateful_step_count=steps,
        derandomize=not asked,
        database=None,
        deadline=None,
        print_blob=bool(asked),
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if shrink else [])],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
