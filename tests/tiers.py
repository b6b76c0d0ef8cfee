"""The two tiers: `pytest` runs the core, `pytest --full` everything.

`@pytest.mark.full`: not of the core. `@pytest.mark.core(...)` on a test of many cases: the core has some of them.

- `core(3)`: that many, spread evenly.
- `core("each")`: so many that each value of each parameter is there.
- `core("each", parts=function)`: so many that each part is there that `function(**parameters)` finds in some case.

Hypothesis draws a third as many examples in the core. `--part 1/2` takes one half of whatever is asked for.
"""

import zlib
from collections.abc import Hashable, Sequence
from itertools import groupby

import hypothesis
import pytest

PROFILES = {"core": 6, "full": 16, "explore": 300}  # examples that are drawn of a property


def mark(items: Sequence[pytest.Item]):
    """Marks as `full` what the core leaves out."""
    for _, cases in groupby(items, key=lambda item: item.nodeid.partition("[")[0]):
        cases = list(cases)
        if (marker := cases[0].get_closest_marker("core")) is None:
            continue
        core = chosen(cases, *marker.args, **marker.kwargs)
        for n, item in enumerate(cases):
            if n not in core:
                item.add_marker(pytest.mark.full)


def chosen(cases: Sequence[pytest.Item], how: int | str, parts=lambda **given: tuple(given.values())) -> set[int]:
    """The indices of the cases that are of the core."""
    if isinstance(how, int):
        return {n * len(cases) // how for n in range(how)}
    assert how == "each", f"core({how!r}): a number, or 'each'"
    return covering([set(enumerate(map(name, parts(**case.callspec.params)))) for case in cases])


def is_of(part: str, nodeid: str) -> bool:
    """Whether a test is of the K-th of N parts, which are of about one size; `part` is "K/N"."""
    k, n = map(int, part.split("/"))
    return zlib.crc32(nodeid.encode()) % n == k - 1


def name(part: object) -> Hashable:
    """What tells a parameter's values apart: arrays and dictionaries cannot stand in sets."""
    return getattr(part, "__qualname__", None) or repr(part)


def covering(sets: Sequence[set]) -> set[int]:
    """The indices of some of the sets, whose union is that of all: each time the first that adds the most."""
    missing, taken = set().union(*sets), set()
    while missing:
        best = max(range(len(sets)), key=lambda n: (len(sets[n] & missing), -n))
        taken.add(best)
        missing -= sets[best]
    return taken


def examples(times: float, **settings) -> hypothesis.settings:
    """So many times the tier's number of examples."""
    return hypothesis.settings(max_examples=round(times * hypothesis.settings.default.max_examples), **settings)
