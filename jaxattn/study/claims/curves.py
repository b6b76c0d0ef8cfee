"""Claims 10 and 21: learning curves, of one network with four kinds of mixing, over how much data it is given."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from jaxattn.study import figures
from jaxattn.study.claim import Measurement, Numbers, Published, Setting, claim, decide
from jaxattn.study.claims import composed
from jaxattn.study.claims.composed import CONV, GLOBAL
from jaxattn.study.mixers import accuracy, search
from jaxattn.study.seeds import UNDECIDED, difference, interval, points, together

CURVES = ("convolution", "local attention", "gated attention", "global attention")
SHARES = {"quick": (0.04, 1.0), "full": (0.002, 0.02, 0.2, 1.0)}
COUNTS = {"quick": (500, 20_000), "full": (500, 2000, 20_000)}
SEARCHING = {"quick": (CONV, GLOBAL), "full": (CONV, "gated attention", GLOBAL)}


def learning_curves(setting: Setting, mixers: Sequence[str] = CURVES, shuffled: bool = False, **size: float):
    """Test accuracy, as "task, images: mixer", after the same steps on few and on many training images, and of composed
    images, after other numbers of steps too."""
    total = len(setting.data.train)
    names: dict[str, str] = dict(zip(CURVES, mixers, strict=True))
    elsewhere = {name: names[name] for name in SEARCHING[setting.profile]}
    shares = sorted({math.ceil(total * share) for share in SHARES[setting.profile]})
    tasks = (("images", setting.data, shares, names), ("search", search(), COUNTS[setting.profile], elsewhere))
    return Measurement(
        {
            f"{task}, {count}: {name}": accuracy(mixer, setting, data, count=count, shuffled=shuffled, **size)
            for task, data, counts, trained in tasks
            for count in counts
            for name, mixer in trained.items()
        }
        | composed.accuracies(setting, names, composed.SWEEPS[setting.profile], shuffled, **size)
    )


def curves(numbers: Numbers, task: str) -> dict[str, dict[int, Sequence[float]]]:
    """Of each mixer on that task: how many images, and the accuracy of each seed."""
    found: dict[str, dict[int, Sequence[float]]] = {}
    for name, values in numbers.items():
        place, mixer = name.split(": ")
        of, count = place.split(", ")
        if of == task:
            found.setdefault(mixer, {})[int(count)] = values
    return found


def crossing(counts: Sequence[int], leads: Sequence[float]) -> float:
    """Where a lead that begins above zero first falls to it, on a straight line over log(count); NaN if nowhere."""
    for (a, b), (high, low) in zip(pairwise(counts), pairwise(leads), strict=True):
        if high > 0 >= low:
            return math.exp(math.log(a) + math.log(b / a) * high / (high - low))
    return math.nan


def little_and_much(numbers: Numbers) -> Measurement:
    images = curves(numbers, "images")
    leads = {n: difference(images[CONV][n], images[GLOBAL][n]) for n in images[CONV]}
    counts = list(leads)
    least, most = leads[counts[0]], leads[counts[-1]]
    each = [[a - b for a, b in zip(images[CONV][n], images[GLOBAL][n], strict=True)] for n in counts]
    by_seed = list(zip(*each, strict=True))
    shrinks = interval([lead[0] - lead[-1] for lead in by_seed]).above(0)
    overtaken = interval([-lead[-1] for lead in by_seed]).above(0)
    crossings = [c for lead in by_seed if not math.isnan(c := crossing(counts, lead))]
    turns = {what: composed.turn(mixers) for what, mixers in composed.swept(numbers).items()}
    tasks = [turn for what, turn in turns.items() if not what.startswith(composed.CONTROL)]
    crossed = [overtaken or False, *(turn.crossing is not None for turn in tasks)]
    if least.above(0) is False or (shrinks is False and not any(crossed)):
        verdict = decide(False)
    elif None in (least.above(0), shrinks) and not any(crossed):
        verdict = decide(True, UNDECIDED)
    elif any(crossed):
        verdict = decide(True, None if all(crossed) else "the task and the steps")
    else:
        verdict = decide(True, "how much data is much")
    extra = {f"convolution's lead with {n} images": lead.mean for n, lead in leads.items()}
    extra |= {"seeds whose curves cross": len(crossings)}
    extra |= {f"convolution's lead, {w}, {n}": lead.mean for w, turn in turns.items() for n, lead in turn.leads.items()}
    notes = f"Convolution leads global attention by {points(least)} with {counts[0]} images and by {points(most)} with "
    notes += f"{counts[-1]}. The curves cross with {len(crossings)} of {len(by_seed)} seeds"
    notes += f", at {min(crossings):,.0f} to {max(crossings):,.0f} images." if crossings else "."
    notes += "".join(f" Composed images, {what}: {turn}." for what, turn in turns.items())
    return Measurement(extra, verdict, [_figure(numbers), *_composed_figures(numbers)], notes)


def stronger_prior(numbers: Numbers) -> Measurement:
    ahead = {}
    for task in ("images", "search"):
        curve = curves(numbers, task)
        mean = {m: [sum(v) / len(v) for v in zip(*curve[m].values(), strict=True)] for m in (CONV, GLOBAL)}
        ahead[task] = difference(mean[GLOBAL], mean[CONV])
    verdict = together([value.above(0) for value in ahead.values()], "the task")
    notes = (
        "Attention minus convolution: " + "; ".join(f"{task} {points(value)}" for task, value in ahead.items()) + "."
    )
    return Measurement(
        {f"attention minus convolution, on {t}": v.mean for t, v in ahead.items()}, verdict, [_figure(numbers)], notes
    )


def _figure(numbers: Numbers):
    titles = {"images": "images", "search": "search for what a marked token holds"}
    return figures.curves({title: curves(numbers, task) for task, title in titles.items()}, "training images")


def _composed_figures(numbers: Numbers):
    """A figure for each number of steps, with a panel for each task."""
    panels: dict[str, dict[str, Any]] = {}
    for what, mixers in composed.swept(numbers).items():
        task, steps = what.split(" after ")
        panels.setdefault(steps, {})[f"{task}, {steps}"] = mixers
    return [figures.curves(made, "composed images", CURVES) for made in panels.values()]


ABOUT = (
    "One network is trained with convolution, local attention, ConViT's gated attention or global attention, of as "
    "many parameters, for as many steps, on shares of the training images, cut into about 4 × 4 patches. It is also "
    "trained on a search, does any token hold what a marked one holds, of which there are as many images as one asks "
    "for; its grid is 3 × 3, so that there a local window is the whole, and local attention stands for itself on "
    "images only. The test accuracies are families of curves."
)
COMPOSED = (
    " For the right half of the claim it is trained on up to a million distinct images, composed of several of the "
    "training images at drawn sizes and places, with clutter, and tested on those composed of test images, cut into "
    "about 6 × 6 patches, which pilots of one seed suggested: how many are of one class (count), which class is there "
    "twice (repeat), are two of one class (match). As a control it recognises a single object (alone). The steps, of "
    "32 images, are swept too, since they decide who is stopped too early; after the most convolution and global "
    "attention are compared alone. The quick profile has these two, one task and 250 steps."
)

small_data = claim(
    number=10,
    author="吼吼",
    text="Little data favours the CNN, much data favours attention.",
    chinese="数据少时 CNN 占优，数据多时注意力占优。",
    about=ABOUT + COMPOSED,
    hypothesis="On images convolution leads with little data, and attention only catches up; where a relation is asked "
    "for, of many images, attention overtakes it.",
    threshold="The curves of a task cross, after so many steps, if convolution leads with some number of images and "
    "global attention with the most, each with its 95 % interval over the seeds. Holds if on images convolution leads "
    "with the least data, and the curves cross on images and on every composed task after every number of steps; "
    "depends on the task and the steps if they cross on some; depends on how much data is much if on none, but on "
    "images convolution's lead shrinks; fails if convolution does not lead with the least images, or they cross "
    "nowhere and the lead does not shrink; depends on the seed if an interval decides neither.",
    judge=little_and_much,
    published=[
        Published(
            "ImageNet, top-1, d'Ascoli et al. 2021 (arXiv 2103.10697)",
            ("share of the images", "DeiT-S (global)", "ConViT-S (gated)"),
            [
                ("5 %", "34.8", "47.8"),
                ("10 %", "48.0", "59.6"),
                ("30 %", "66.1", "73.7"),
                ("50 %", "74.6", "78.2"),
                ("100 %", "79.9", "81.4"),
            ],
        ),
        Published(
            "JFT, Dosovitskiy et al. 2021 (arXiv 2010.11929)",
            ("images", "ViT-B/32 against ResNet-50"),
            [("9 M", "far below"), ("90 M and more", "above")],
        ),
    ],
    cost=71,
)(learning_curves)

inductive_bias = claim(
    number=21,
    author="aluea",
    text="Self-attention has the stronger inductive bias.",
    chinese="自注意力的归纳偏置更强。",
    about=ABOUT,
    hypothesis="The stronger bias is the one that fits: convolution's for images, attention's for a search.",
    threshold="A bias is stronger if it needs less data: a higher accuracy, in the mean of the curve. Holds if global "
    "attention is ahead of convolution on both tasks, depends on the task if on one, fails if on neither; depends on "
    "the seed if a 95 % interval has zero in it.",
    judge=stronger_prior,
    cost=71,
)(learning_curves)
