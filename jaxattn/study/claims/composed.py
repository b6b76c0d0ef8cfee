"""The right half of claim 10: the same networks on images composed of several, of which there are as many as one asks.

How many images are known is swept, and so is the number of steps, which decides who of two is stopped too early.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxattn.study.claim import Numbers, Profile, Setting
from jaxattn.study.mixers import accuracy
from jaxattn.study.seeds import Interval, difference, points
from jaxattn.train.data import Dataset, load
from jaxattn.train.data.compose import compose

CONV, GLOBAL = "convolution", "global attention"
# what is asked of the objects in an image, which `jaxattn.train.data.compose` explains
TASKS = {
    "count": {"task": "count"},
    "repeat": {"task": "repeat"},
    "match": {"task": "match", "objects": "2"},
    "alone": {"task": "alone"},
}


class Sweep(NamedTuple):
    """The tasks, how many distinct images, and after how many steps."""

    tasks: Sequence[str]
    counts: Sequence[int]
    steps: Sequence[int]
    names: Sequence[str] = (CONV, "local attention", "gated attention", GLOBAL)


CONTROL = "alone"  # recognition without relation: measured beside the tasks, and no part of the verdict
ASKED, COUNTS = ("count", "repeat", "match"), (100, 1000, 10_000, 1_000_000)
# beyond as many images as the steps draw, here at most 80,000, more of them are hardly more
SWEEPS: dict[Profile, Sequence[Sweep]] = {
    "quick": [Sweep(("count",), (100, 1_000_000), (250,), (CONV, GLOBAL))],
    "full": [
        Sweep(ASKED, COUNTS, (500,)),
        Sweep(ASKED, COUNTS, (2500,), (CONV, GLOBAL)),  # the two of the verdict: four would take twice as long
        Sweep((CONTROL,), (100, 1_000_000), (500, 2500), (CONV, GLOBAL)),
    ],
}
# An object is two tokens high, so that what lies side by side says what it is. Pilots, on digits, of one seed, with
# a million images: so convolution led (repeat, after 4,000 steps: 91 % against 79 %). Where a token is as large as an
# object may be (grid 3) attention led, by what it recognised: alone, after 300 steps, 80 % against 50 %.
NETWORK = {"grid": 6, "rate": 3e-3, "width": 32, "batch": 32}


@functools.cache
def composed(source: Dataset, task: str, seed: int) -> Dataset:
    """That task, of the study's images, or where they have no end of the digits; other images for each seed."""
    source = load("digits") if source.train.endless else source
    return compose(source, TASKS[task], seed)


def accuracies(
    setting: Setting, mixers: Mapping[str, str], sweeps: Sequence[Sweep], shuffled: bool = False, **size: float
) -> dict[str, float]:
    """Test accuracy, as "task after so many steps, images: name", of the mixer that stands for each name."""
    return {
        f"{task} after {steps} steps, {count}: {name}": accuracy(
            mixers[name],
            setting,
            composed(setting.data, task, setting.seed),
            count=count,
            shuffled=shuffled,
            **{**NETWORK, **size, "steps": steps},
        )
        for sweep in sweeps
        for task in sweep.tasks
        for steps in sweep.steps
        for count in sweep.counts
        for name in sweep.names
    }


def swept(numbers: Numbers) -> dict[str, dict[str, dict[int, Sequence[float]]]]:
    """By task and steps, and then by name: how many images, and the accuracy of each seed."""
    found: dict[str, dict[str, dict[int, Sequence[float]]]] = {}
    for name, values in numbers.items():
        place, mixer = name.split(": ")
        what, count = place.split(", ")
        if " after " in what:
            found.setdefault(what, {}).setdefault(mixer, {})[int(count)] = values
    return found


class Turn(NamedTuple):
    """Convolution's lead over global attention, by how many images are known, and who leads with its 95 % interval."""

    leads: dict[int, Interval]
    leader: dict[int, str]  # of those numbers with which one does

    @property
    def crossing(self) -> tuple[int, int] | None:
        """Where attention leads with the most images: the largest number with which convolution does, and the next with
        which attention does.
        """
        if self.leader.get(max(self.leads)) != GLOBAL or CONV not in self.leader.values():
            return None
        last = max(n for n, name in self.leader.items() if name == CONV)
        return last, min(n for n in self.leader if n > last)

    def __str__(self) -> str:
        """Who leads with how many images, and by how much where the curves cross, or with the most."""
        with_images = {name: [f"{n:,}" for n, who in self.leader.items() if who == name] for name in (CONV, GLOBAL)}
        said = [f"{name} leads with {', '.join(counts)} images" for name, counts in with_images.items() if counts]
        places = self.crossing or (max(self.leads),)
        leads = " and ".join(f"{points(self.leads[n])} with {n:,}" for n in places)
        crosses = "the curves cross" if self.crossing else "no crossing"
        return f"{crosses}; {'; '.join(said) or 'neither leads'}; convolution's lead is {leads}"


def turn(curves: Mapping[str, Mapping[int, Sequence[float]]]) -> Turn:
    """Who leads where, of the curves of one task after so many steps."""
    conv, attention = curves[CONV], curves[GLOBAL]
    leads = {n: difference(conv[n], attention[n]) for n in sorted(conv)}
    leader = {n: CONV if lead.low > 0 else GLOBAL for n, lead in leads.items() if lead.low > 0 or lead.high < 0}
    return Turn(leads, leader)
