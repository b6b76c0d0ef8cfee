"""Hypothesis strategies: windows that are valid on the grid drawn with them."""

import hypothesis.strategies as st

from jaxattn.window import BOUNDARIES


@st.composite
def axes(draw, most, widest):
    """One axis: its length, and valid arguments for it."""
    boundary = draw(st.sampled_from(BOUNDARIES))
    length = draw(st.integers(1, most))
    dilation = draw(st.integers(1, 3))
    size = draw(st.integers(1, widest))
    if boundary == "shift":
        dilation = min(dilation, length)
        size = min(size, length // dilation)
    if boundary == "valid":
        size = min(size, (length - 1) // dilation + 1)
    block = draw(st.integers(1, size)) if boundary != "valid" else 1
    stride = draw(st.integers(1, 3)) if block == 1 else 1
    causal = draw(st.booleans()) if boundary in ("shift", "mask", "zero", "valid") else False
    offset = draw(st.none() | st.integers(-8, 8)) if boundary not in ("shift", "valid") else None
    return length, dict(
        size=size, stride=stride, dilation=dilation, block=block, causal=causal, boundary=boundary, offset=offset
    )


@st.composite
def grids(draw, rank, most=12, widest=6):
    """A grid, and the arguments of a window on it."""
    drawn = [draw(axes(most, widest)) for _ in range(draw(st.integers(1, rank)))]
    return tuple(length for length, _ in drawn), {name: tuple(axis[name] for _, axis in drawn) for name in drawn[0][1]}
