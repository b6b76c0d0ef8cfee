"""Numbers for readers."""

import math
from collections.abc import Sequence


def si(number: float) -> str:
    """A number with three digits and the prefix of its power of a thousand.

    >>> si(3072), si(17)
    ('3.07 k', '17 ')
    """
    power = min(int(math.log10(max(number, 1))) // 3, 4)
    return f"{number / 1000**power:.3g} {('', 'k', 'M', 'G', 'T')[power]}"


def rows(title: str, pairs: Sequence[tuple[str, str]]) -> str:
    """A title, and below it names with what is said of each, side by side.

    >>> print(rows("plan", [("cost", "much"), ("to", "you")]))
    plan
      cost  much
      to    you
    """
    width = max(len(name) for name, _ in pairs)
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in pairs)])
