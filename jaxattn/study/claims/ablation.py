"""Claims 3, 6 and 14: attention without the similarity, without softmax, and with its weights frozen."""

from collections.abc import Mapping
from typing import Any

from jaxattn.study import figures
from jaxattn.study.claim import Measurement, Numbers, Published, Setting, claim
from jaxattn.study.mixers import accuracy, search
from jaxattn.study.seeds import Interval, difference, interval, negated, points, together

TASKS = ("images", "search")
FULL, BY_QUERY, BY_PLACE = "q·k and q·r", "q·r alone", "quadratic heads"
NORMALIZERS = {"softmax": "global attention"} | {name: name for name in ("relu", "sigmoid", "sparsemax", "none")}
LOST, AS_WELL, SOLVED, CHANCE = 0.05, 0.02, 0.8, 0.65


def by_task(setting: Setting, mixers: Mapping[str, str], tasks=TASKS, **size: Any) -> dict[str, float]:
    """Test accuracy of each mixer, as "task: name", on the study's images, and on a search."""
    data = {"images": setting.data, "search": search()}
    return {
        f"{task}: {name}": accuracy(mixer, setting, data[task], **size)
        for task in tasks
        for name, mixer in mixers.items()
    }


def judged(numbers: Numbers, lost: Mapping[str, Interval], most: float, what: str, *, holds_if_lost: bool):
    """Holds, fails, or depends on the task, by whether more than `most` is lost on each."""
    outcomes = [value.above(most) for value in lost.values()]
    outcomes = outcomes if holds_if_lost else list(map(negated, outcomes))
    series = {
        task: {name.split(": ")[1]: values for name, values in numbers.items() if name.startswith(task)}
        for task in TASKS
    }
    return Measurement(
        {f"{what}, on {task}": value.mean for task, value in lost.items()},
        together(outcomes, "the task"),
        [figures.dots(series, "test accuracy")],
        f"{what[0].upper()}{what[1:]}: " + "; ".join(f"{task} {points(value)}" for task, value in lost.items()) + ".",
    )


def needed(numbers: Numbers) -> Measurement:
    lost = {}
    for task in TASKS:
        without = [difference(numbers[f"{task}: {FULL}"], numbers[f"{task}: {name}"]) for name in (BY_QUERY, BY_PLACE)]
        lost[task] = min(without, key=lambda value: value.mean)
    return judged(numbers, lost, LOST, "lost without q·k", holds_if_lost=True)


@claim(
    number=3,
    author="吼吼",
    text="The essence of attention is the similarity of query and key.",
    chinese="注意力的本质是 Q 与 K 的相似度。",
    about="One network is trained on images, cut into about 4 × 4 patches, and on a search: does any token hold what "
    "a marked one holds? Its heads have q·k and relative positions, or positions alone, which the query weighs (q·r) "
    "or which are a centre that is learned (quadratic heads). What is lost without q·k is measured against the "
    "better of the two.",
    hypothesis="On images positions do nearly all; a search needs the similarity.",
    threshold="Holds if without q·k more than 5 points of accuracy are lost on both tasks, depends on the task if on "
    "one, fails if on neither; depends on the seed if a 95 % interval has 5 points in it.",
    judge=needed,
    published=[
        Published(
            "CIFAR-10, Cordonnier et al. 2020 (arXiv 1911.03584)",
            ("network", "accuracy"),
            [
                ("ResNet-18", "93.8 %"),
                ("quadratic heads, positions alone", "93.8 %"),
                ("learned positions, without content", "91.8 %"),
                ("learned positions and content", "87.1 %"),
            ],
        )
    ],
    cost=48,
)
def similarity(setting: Setting, full: str = FULL, **size: float) -> Measurement:
    return Measurement(by_task(setting, {FULL: full, BY_QUERY: BY_QUERY, BY_PLACE: BY_PLACE}, **size))


def optional(numbers: Numbers) -> Measurement:
    lost = {task: difference(numbers[f"{task}: softmax"], numbers[f"{task}: relu"]) for task in TASKS}
    return judged(numbers, lost, AS_WELL, "lost with ReLU", holds_if_lost=False)


@claim(
    number=6,
    author="吼吼",
    text="Softmax is optional; ReLU does as well.",
    chinese="softmax 不是必需的，换成 ReLU 也可以。",
    about="One network of global attention is trained with each normaliser, on images; with softmax and ReLU on a "
    "search too: does any token hold what a marked one holds? ReLU's weights are max(s, 0) over the number of tokens "
    "(Wortsman et al. 2023, arXiv 2309.08586). What is lost with ReLU is measured, seed by seed.",
    hypothesis="ReLU does as well.",
    threshold="Holds if with ReLU no more than 2 points of accuracy are lost on both tasks, depends on the task if on "
    "one, fails if on neither; depends on the seed if a 95 % interval has 2 points in it.",
    judge=optional,
    cost=47,
)
def normalizers(setting: Setting, relu: str = "relu", **size: float) -> Measurement:
    images = by_task(setting, NORMALIZERS | {"relu": relu}, TASKS[:1], **size)
    both = {"softmax": NORMALIZERS["softmax"], "relu": relu}
    return Measurement(images | by_task(setting, both, TASKS[1:], **size))


MOVING = "weights from the data"
FROZEN = ("weights frozen", "convolution 3 × 3")


def relational(numbers: Numbers) -> Measurement:
    solves = interval(numbers[MOVING]).above(SOLVED)
    fixed = [interval(values) for name, values in numbers.items() if name != MOVING]
    verdict = together([solves and negated(value.above(CHANCE)) for value in fixed], "which weights are fixed")
    return Measurement({}, verdict, [figures.dots({"search": numbers}, "test accuracy")])


@claim(
    number=14,
    author="匿名用户",
    text="Convolution is local, attention relational; convolution is degenerate attention.",
    chinese="卷积是局部的，注意力是关系性的；卷积是退化的注意力。",
    about="One network is trained to say whether any of 8 tokens holds what a marked one holds: same or different, a "
    "relation at no fixed offset. Its attention's weights come from the data; or they are frozen, for q·k is "
    "multiplied by zero, and a learned weight for each offset is left, positive and of sum one, which sees "
    "the whole grid as a large convolution does. Beside it stand convolutions of 3 × 3 taps.",
    hypothesis="Whoever cannot move its weights with the data cannot compare, in reach or not.",
    threshold="Holds if attention is right in more than 80 % and no network with fixed weights in more than 65 % (a "
    "coin: 50 %), each with its 95 % interval; depends on which weights are fixed if some are; fails if attention is "
    "not, or all are; depends on the seed if an interval has its threshold in it.",
    judge=relational,
    cost=10,
)
def same_or_different(setting: Setting, frozen: str = "frozen", **size: float) -> Measurement:
    fixed = dict(zip(FROZEN, (frozen, "convolution"), strict=True))
    made = by_task(setting, {MOVING: "global attention", **fixed}, TASKS[1:], **size)
    return Measurement({name.removeprefix("search: "): value for name, value in made.items()})
