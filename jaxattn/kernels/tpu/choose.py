"""Which plan is taken: the cheapest of those that fit in VMEM, counted from shapes alone."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from jaxattn.kernels.operands import Options
from jaxattn.kernels.tpu.plan import LANES, MIB, SUBLANES, AxisPlan, Heads, Plan, plan_axis

SHARE = 0.8  # of the VMEM, that a kernel may plan with: the rest is the compiler's, for spills
COPY = 0.2  # cycles a query and block of heads, where queries are put in another order, there and back, about
# scores in an iteration: more of them hide latency better, and compile longer
UNROLLED = {"forward": 13 * 2**18, "backward": 2**19}
MOST_TILES = 128  # in an iteration, likewise
CUT = 1.25  # what strips cost, about: keys are fetched, and sums carried, where two meet
MOST_QUERIES = 512  # of a tile
MOST_PLACES = 64  # tiles along the last axis, each of which is written out


@functools.lru_cache(maxsize=256)
def make_plan(
    options: Options, heads: Heads, extra: int, relative: bool, masked: bool, way: str, vmem: int, wide: bool = False
) -> Plan | str:
    """The cheapest plan by `_cost` of those that fit into `vmem` bytes; or why there is none. `way` is "forward" or
    "backward", `relative` whether there is a relative_bias, `masked` whether a mask of keys or segments, `wide` whether
    matrix units are 256 numbers wide."""
    layouts, found = _layouts(options, heads, way, wide), []
    for keys_first, axes in itertools.product(layouts, itertools.product(*_choices(options, heads))):
        plan = Plan(heads, axes, extra, keys_first, 2 * LANES if wide else LANES)
        whole = plan.queries % (SUBLANES * heads.packing) == 0  # registers: otherwise compiling takes many minutes
        if options.tile or (whole and plan.queries <= MOST_QUERIES):
            count = plan.tile_rows * plan.tile_columns
            copied = COPY * math.prod(axis.places for axis in axes) * any(axis.queries is not None for axis in axes)
            found.append((count * _cost(plan, way) + copied, tuple(axis.tile for axis in axes), plan))
    found = sorted(found, key=lambda choice: choice[:2])[:256]
    whole, strips = (_first(fit, found, relative, masked, way, vmem) for fit in (_fit, _fit_strips))
    if isinstance(whole[1], Plan) and whole[0] <= CUT * strips[0]:
        return whole[1]
    return strips[1]


def _layouts(options: Options, heads: Heads, way: str, wide: bool) -> list[bool]:
    """Whether scores may have keys first: only with queries first is there lse, and then sums go round all lanes. Wide
    units are filled by all heads at once."""
    if way == "backward" or (wide and len(options.axes) > 1 and not options.residuals):
        return [True]
    if options.residuals or heads.abreast == 1:
        return [False]
    return [True] if heads.lanes < LANES else [False, True]


def _first(
    fit: Callable[..., Plan | str], found: Sequence[tuple[float, Any, Plan]], *given: Any
) -> tuple[float, Plan | str]:
    """The cost of the first plan that fits, and that plan as it fits; or why none does."""
    made = "no tile of it is small enough"
    for cost, _, plan in found:
        made = fit(plan, *given)
        if isinstance(made, Plan):
            return cost, made
    return math.inf, made


def _choices(options: Options, heads: Heads) -> list[list[AxisPlan]]:
    """Every tile of an axis that is worth a thought, for each axis."""
    axes, choices = options.axes, []
    packing, rank = heads.packing, len(axes)
    whole = SUBLANES * packing
    units = [(1, 1)] * (rank - 1) + [(whole, whole if rank == 1 else packing)]
    most = [512] if rank == 1 else [16] * (rank - 1) + [32]
    for a, (axis, (unit, align)) in enumerate(zip(axes, units, strict=True)):
        step, members = math.lcm(axis.block, align), -(-len(axis.query) // axis.dilation)
        sizes = lambda step, a=a, n=members: range(step, min(max(most[a], step), n + -n % step) + 1, step)
        tiles = list(sizes(step))
        if options.tile:
            tiles = [options.tile[a] + -options.tile[a] % step]
        choices.append([plan_axis(axis, t, unit, align) for t in tiles])
        if axis.block > 1 and a < rank - 1:  # blocks that fill no registers: tiles that do, and overlap
            choices[-1] += [plan_axis(axis, t, 2, 1, t + 1) for t in tiles if t % 2]
        elif axis.block > 1:
            choices[-1] += [plan_axis(axis, t, unit, align, t + -t % unit) for t in tiles if t % unit]
            odd = [t for t in sizes(axis.block) if t % align and rank > 1 and not options.tile]
            # which begin at whole words of 32 bits, where they don't
            choices[-1] += [
                plan_axis(axis, t, SUBLANES, align, -(-(t + packing - 1) // SUBLANES) * SUBLANES) for t in odd
            ]
    return choices


def _cost(plan: Plan, way: str) -> float:
    """Cycles of a tile for a block of heads on a v5e, whose four matrix units multiply by 128 × 128 numbers; and what
    else comes with a tile, about."""
    padded = lambda n: -(-n // LANES)
    heads, columns = plan.heads, plan.keys
    deep, stacked = max(1, heads.lanes // LANES), heads.abreast * plan.queries
    scores, mixed = columns * padded(stacked) * deep, stacked * padded(columns) * deep  # rows that pass through a unit
    if way == "forward" and plan.keys_first and plan.apart:  # in products of their own, bound likewise
        mixed = -(-heads.abreast // plan.apart) * padded(columns) * padded(plan.apart * plan.queries)
        mixed *= max(plan.apart * heads.dim, 64)
    if way == "backward":
        return (4 * scores + mixed) / 4 + 0.1 * columns + 30
    wide = padded(columns) * deep
    if plan.keys_first:
        # with heads apart units idle more: what binds is the storing of scores
        return (scores + mixed) / 4 + (0.14 if plan.apart else 0.06) * scores + 8 + 12 * plan.overlaps
    # bound by the rows of both products, or by loading their other factors
    return max(2 * stacked * wide, 56 * (1 + heads.abreast) * wide) / 4 + 12


def _fit(plan: Plan, relative: bool, masked: bool, way: str, vmem: int) -> Plan | str:
    """The plan with as many tile rows an iteration as it can have, or why it can't be."""
    heads = plan.heads
    if plan.queries % (SUBLANES * heads.packing):
        return f"a tile of {plan.queries} queries does not fill whole registers"
    if plan.tile_columns > MOST_PLACES:
        return f"its last axis makes more than {MOST_PLACES} tiles"
    scores = plan.tile_columns * heads.abreast * plan.queries * -(-plan.keys // LANES) * LANES
    most, step = max(1, min(UNROLLED[way] // scores, MOST_TILES // plan.tile_columns)), plan.step_rows
    plan = plan._replace(rows=max(n for n in range(1, step + 1) if step % n == 0 and n <= most))
    held = _held(plan, relative, masked, way)
    if held > SHARE * vmem:
        return f"a step would hold {held / MIB:.0f} MiB, and VMEM is {vmem / MIB:.0f} MiB"
    return plan._replace(vmem=held)


def _fit_strips(plan: Plan, relative: bool, masked: bool, way: str, vmem: int) -> Plan | str:
    """The plan in as few strips of its first axis as fit, or why none do. A single axis is not cut, nor one whose tiles
    overlap."""
    made, tiles = _fit(plan, relative, masked, way, vmem), plan.axes[0].tiles
    cuts = plan.static and not plan.axes[0].overlaps
    for count in [n for n in range(2, tiles + 1) if tiles % n == 0 and cuts]:
        made = _fit(plan.in_strips(count), relative, masked, way, vmem)
        if isinstance(made, Plan):
            break
    return made


def _held(plan: Plan, relative: bool, masked: bool, way: str) -> int:
    """Bytes of VMEM: blocks twice, for one is copied while another is worked on, and what is kept between phases."""
    heads, strips = plan.heads, plan.strips
    counts = [[axis.query_count, axis.key_count, axis.length] for axis in plan.axes]
    if strips is not None:
        counts[0] = [strips.queries, strips.keys, strips.keys]
    queries, keys, placed = (math.prod(x) * heads.lanes for x in zip(*counts, strict=True))
    keys, placed = keys + plan.extra_places * heads.lanes, placed + plan.extra_places * heads.lanes
    copied = 0  # numbers that are put in another order
    if any(axis.queries is not None for axis in plan.axes):
        copied += (2 if way == "forward" else 3) * math.prod(axis.places for axis in plan.axes) * heads.lanes
    if any(axis.keys is not None for axis in plan.axes):
        copied += 2 * placed
    copied = int(copied * heads.itemsize * (1 + masked * LANES / heads.lanes))
    tall = -(-heads.abreast * plan.queries // LANES) * LANES * plan.keys  # scores of a tile
    wide = heads.abreast * plan.queries * -(-plan.keys // LANES) * LANES  # with queries first
    tables = 2 * 4 * plan.patterns * (heads.members if relative else 1)
    codes = 2 * heads.itemsize * LANES * (queries + keys) // heads.lanes if masked else 0
    if way == "forward":
        scores = tall if plan.keys_first else wide
        kept = scores + heads.abreast * plan.queries * LANES
        lse = 2 * 4 * queries  # whether or not it is asked for
        blocks = 2 * 2 * (queries + keys) * heads.itemsize
        return blocks + copied + codes + lse + tables * scores + plan.at_once * 4 * kept
    of_keys = 4 if strips is None else 3  # dk and dv have one block each in strips, which `carry` sends off
    blocks = 2 * (3 * queries + of_keys * keys) * heads.itemsize + 2 * 4 * placed
    lse = 2 * 4 * max(plan.tile_columns, SUBLANES) * plan.step_rows * tall // plan.keys
    of_tiles = tables * tall * (1 + relative) + plan.at_once * tall * 2 * (4 + heads.itemsize)
    return blocks + copied + codes + lse + of_tiles
