"""Reading a compiled program's text (HLO): what its devices say to each other, and the cycles that it should take."""

import math
import re
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all", "ragged-all-to-all")

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(calls|to_apply|body|true_computation|false_computation|branch_computations)=(\{[^}]*\}|\S+)")


class Collective(NamedTuple):
    """All collectives of a kind in one run of the program: how many, and the bytes of one device's part in them.

    The bytes of one are those of its operand or of its result, the larger: what all-gather makes of the parts, what
    reduce-scatter takes apart.
    """

    kind: str
    number: int
    bytes: int


class Text(NamedTuple):
    """What a program's text says of one run on one device.

    `loops` counts the loops whose length the text gives; their contents count as often as they run. `unknown` counts
    the others, whose contents count once, as do all the branches of a condition.
    """

    collectives: tuple[Collective, ...]
    cycles: int  # as the TPU's compiler estimates, without Pallas kernels; 0 elsewhere
    loops: int
    unknown: int
    kernels: tuple[tuple[str, int], ...] = ()  # the Pallas kernels' instructions, and how often each runs

    def runs(self, kernel: str) -> int:
        """How often a kernel runs."""
        return dict(self.kernels).get(kernel, 1)


class Instruction(NamedTuple):
    """A line of a computation."""

    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes


def read(text: str) -> Text:
    """Reads `compiled.as_text()`.

    >>> import jax, jax.numpy as jnp
    >>> read(jax.jit(lambda x: jnp.sin(x) @ x).lower(jnp.ones((4, 4))).compile().as_text())
    Text(collectives=(), cycles=0, loops=0, unknown=0, kernels=())
    """
    computations, entry = _computations(text)
    counts, sizes = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    cycles = loops = unknown = 0
    kernels: dict[str, int] = {}
    waiting = [(entry, 1)]
    while waiting:
        name, times = waiting.pop()
        instructions = computations.get(name, [])
        bytes_of = {each.name: _bytes(each.shape) for each in instructions}
        for each in instructions:
            cycles += times * sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', each.rest)))
            if 'custom_call_target="tpu_custom_call"' in each.rest:
                kernels[each.name] = kernels.get(each.name, 0) + times
            kind = each.opcode.removesuffix("-start")
            if kind in counts:
                size = _moved(each, bytes_of)
                # the TPU's compiler writes a reduce-scatter as an all-reduce and a slice, fused under this name
                kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
                counts[kind] += times
                sizes[kind] += times * size
            length = 1
            if each.opcode == "while":
                length = _length(each, computations)
                loops, unknown = loops + (length is not None), unknown + (length is None)
            waiting += [(called, times * (length or 1)) for called in _called(each)]
    found = tuple(Collective(kind, counts[kind], sizes[kind]) for kind in KINDS if counts[kind])
    return Text(found, cycles, loops, unknown, tuple(kernels.items()))


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation, and the name of the one that is run."""
    computations, entry, current = {}, "", []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            current.append(Instruction(*instruction.groups()[1:]))
    return computations, entry


def _bytes(shape: str) -> int:
    """The size of an array or a tuple of arrays."""
    total = 0
    for dtype, sides in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        total += math.prod(int(side) for side in sides.split(",") if side) * bits // 8
    return total


def _moved(each: Instruction, bytes_of: dict[str, int]) -> int:
    operands = sum(bytes_of.get(name, 0) for name in re.findall(r"%([\w.\-]+)", each.rest.partition(")")[0]))
    result = bytes_of[each.name]
    if each.opcode == "all-gather-start":  # a tuple of operands and results
        result -= operands
    elif each.opcode.endswith("-start"):
        result = operands
    return max(operands, result)


def _called(each: Instruction) -> list[str]:
    """The computations that an instruction runs, but for a loop's condition."""
    lists = [names for _, names in _CALLED.findall(each.rest)]
    return [name.strip(" %,") for names in lists for name in names.strip("{},").split(",")]


def _length(loop: Instruction, computations: dict[str, list[Instruction]]) -> int | None:
    """How often a loop runs: `lax.scan` and `fori_loop` count from 0 up to the one constant in the condition."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = re.search(r"\bcondition=%?([\w.\-]+)", loop.rest)
    inside = computations.get(condition[1], []) if condition else []
    constants = [each.rest.partition(")")[0] for each in inside if each.opcode == "constant"]
    return int(constants[0]) if len(constants) == 1 and constants[0].isdigit() else None
