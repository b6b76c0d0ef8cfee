"""Claims that cost nothing, for the study's runner. Real workers import this module by its name."""

import os
import signal
import time

from jaxattn.study.claim import Claim, Measurement, Published, decide
from jaxattn.study.figures import lines

CALLS = []  # of this process


def even(setting, number=4):
    CALLS.append("even")
    return Measurement({"half": number / 2}, decide(number % 2 == 0), [lines([1, 2], {"a & b": [1, 2]}, "x", "y")])


def broken(setting):
    raise RuntimeError("no <luck>")


def odd_seed(setting):
    print("what an experiment prints")
    return Measurement({"seed": setting.seed}, decide(setting.seed % 2 == 1))


def drawn(setting):
    CALLS.append("drawn")
    return Measurement({"value": 0.25 + setting.seed})


def mean_above_half(numbers):
    mean = sum(numbers["value"]) / len(numbers["value"])
    return Measurement({"mean of <all>": mean}, decide(mean > 0.5), ["<svg><text>judged</text></svg>"], "A note.")


def killed(setting):
    """The second seed's process is killed, the first time: what FRAGILE names is then there."""
    mark = os.environ.get("FRAGILE")
    if mark is not None and setting.seed == 1 and not os.path.exists(mark):
        open(mark, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return Measurement({"process": os.getpid()}, "holds")


def endless(setting):
    """Says where it runs, and stays there."""
    with open(os.environ["STARTED"], "a") as file:
        print(os.getpid(), file=file, flush=True)
    time.sleep(600)


def endless_too(setting):
    endless(setting)


def slow_first(setting):
    """The first seed ends after the second."""
    time.sleep(3 if setting.seed == 0 else 1)
    return Measurement({"seed": setting.seed, "process": os.getpid()}, "holds")


WORDS = {"about": "About.", "hypothesis": "Hypothesis.", "threshold": "Threshold."}
TABLE = Published("Somebody & others 1999", ("network", "top-1"), [("large", "99 %")])
CLAIMS = (
    Claim(1, "a & b", "Four is <even>.", "四是偶数。", **WORDS, experiment=even),
    Claim(2, "c", "It breaks.", "坏了。", **WORDS, experiment=broken),
    Claim(3, "c", "Seeds matter.", "种子重要。", **WORDS, experiment=odd_seed),
    Claim(4, "c", "All together.", "一起。", **WORDS, experiment=drawn, judge=mean_above_half, published=[TABLE]),
    Claim(5, "c", "It is killed.", "被杀。", **WORDS, experiment=killed, cost=2),
    Claim(6, "c", "It is killed too.", "也被杀。", **WORDS, experiment=killed, cost=2),
    Claim(7, "c", "It never ends.", "没完。", **WORDS, experiment=endless),
    Claim(8, "c", "Nor does this.", "也没完。", **WORDS, experiment=endless_too),
    Claim(9, "c", "It takes long.", "很久。", **WORDS, experiment=slow_first),
)
