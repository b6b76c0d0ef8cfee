"""How far a study is: a line a claim as it ends, with the time that is left, and a bar on a terminal."""

import sys
import time
from typing import Self

from jaxattn.errors import needs_extra

with needs_extra("train"):
    from tqdm import tqdm


class Progress:
    """On the standard error. The costs of what is to be done are in any unit, and guesses."""

    def __init__(self, cost: float, claims: int):
        self.cost, self.done, self.claims, self.over = cost, 0.0, claims, 0
        self.start = time.monotonic()
        form = "{percentage:3.0f}% |{bar}| {elapsed}"
        self.bar = tqdm(total=cost, bar_format=form, file=sys.stderr, leave=False, disable=None)  # None: not in a file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_):
        self.bar.close()

    def goes_on(self, cost: float):
        """So much more of the cost is done."""
        self.done += cost
        self.bar.update(min(cost, self.cost - self.bar.n))

    def ended(self, line: str):
        """A claim is over, and `line` says how."""
        self.over += 1
        so_far = time.monotonic() - self.start
        left = so_far * (self.cost - self.done) / self.done
        said = f"; about {clock(left)} left" if self.over < self.claims else ""
        with tqdm.external_write_mode(file=sys.stderr):  # the bar makes room
            print(f"{line} [{self.over} of {self.claims}, {clock(so_far)}{said}]", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """As minutes and seconds.

    >>> clock(75.3)
    '1:15'
    """
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    return f"{minutes}:{rest:02d}"
