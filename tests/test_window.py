"""Window against loops; its errors by their messages."""

import dataclasses
import re

import hypothesis
import numpy as np
import oracle
import pytest
from windows import grids

from jaxattn.window import Window


@hypothesis.settings(max_examples=300)
@hypothesis.given(grids(rank=2))
def test_indices_and_mask_are_the_definition(drawn):
    grid, arguments = drawn
    indices, mask = oracle.indices_and_mask(grid, **arguments)
    window = Window(**arguments)
    np.testing.assert_array_equal(window.indices(grid), indices)
    np.testing.assert_array_equal(window.mask(grid), mask)
    assert window.query_grid(grid) == mask.shape[: len(grid)]
    assert window.indices(grid).dtype.kind == "i"
    assert window.mask(grid).dtype == bool


@hypothesis.settings(max_examples=10)
@hypothesis.given(grids(rank=3, most=6))
def test_three_dimensions(drawn):
    grid, arguments = drawn
    indices, mask = oracle.indices_and_mask(grid, **arguments)
    np.testing.assert_array_equal(Window(**arguments).indices(grid), indices)
    np.testing.assert_array_equal(Window(**arguments).mask(grid), mask)


@pytest.mark.parametrize("mode", ["edge", "reflect", "wrap"])
@pytest.mark.parametrize(("length", "size"), [(1, 5), (2, 9), (5, 3), (4, 15)])
def test_folding_is_numpys_padding(mode, length, size):
    window = Window(size, boundary=mode)
    padded = np.pad(np.arange(length), (size // 2, size - 1 - size // 2), mode=mode)
    expected = np.lib.stride_tricks.sliding_window_view(padded, size)
    np.testing.assert_array_equal(window.indices((length,))[..., 0], expected)


def test_block_of_the_size_is_a_partition():
    indices = Window(4, block=4).indices((8,))[..., 0]
    np.testing.assert_array_equal(indices, np.repeat([[0, 1, 2, 3], [4, 5, 6, 7]], 4, axis=0))
    ragged = Window(4, block=4, boundary="mask").indices((6,))[..., 0]
    np.testing.assert_array_equal(ragged[4:], [[4, 5, -1, -1]] * 2)


def test_shift_keeps_the_window_full_and_causal_truncates_it():
    assert Window((3, 5)).mask((6, 7)).all()
    counts = Window(4, causal=True).mask((6,)).sum(-1)
    np.testing.assert_array_equal(counts, [1, 2, 3, 4, 4, 4])


def test_offset_is_minus_low():
    """A convolution's SAME with stride 2 on 6 tokens pads 0 before and 1 after."""
    indices = Window(3, stride=2, boundary="zero", offset=0).indices((6,))[..., 0]
    np.testing.assert_array_equal(indices, [[0, 1, 2], [2, 3, 4], [4, 5, -1]])


def test_a_slot_outside_along_one_axis_is_outside():
    indices = Window((3, 3), boundary=("mask", "wrap")).indices((4, 4))
    np.testing.assert_array_equal(indices[0, 0, 0], np.full((3, 2), -1))
    np.testing.assert_array_equal(indices[0, 0, 1, 0], [0, 3])


def test_it_is_hashable_comparable_and_frozen():
    window = Window((7, 7), causal=(True, False))
    assert window == Window([7, 7], causal=[True, False], stride=(1, 1))
    assert hash(window) == hash(Window((np.int64(7), 7), causal=(True, False)))
    assert window != Window((7, 7))
    assert Window(7) == Window((7,))
    assert dataclasses.replace(window, boundary="mask").boundary == ("mask", "mask")
    assert Window((7, 5), dilation=2).dilation == (2, 2)
    assert eval(repr(window), {"Window": Window}) == window
    with pytest.raises(dataclasses.FrozenInstanceError):
        window.size = (3, 3)  # pyright: ignore[reportAttributeAccessIssue]


def test_what_it_returns_is_the_callers_own():
    window = Window(3)
    window.indices((5,))[...] = 9
    window.mask((5,))[...] = False
    assert window.indices((5,)).max() == 4
    assert window.mask((5,)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(size=()), "size is empty"),
        (dict(size=0), "size is 0 on axis 0; allowed: an integer >= 1"),
        (dict(size=(3, -1)), "size is -1 on axis 1; allowed: an integer >= 1"),
        (dict(size=2.5), "size is 2.5 on axis 0; allowed: an integer >= 1"),
        (dict(size=True), "size is True on axis 0; allowed: an integer >= 1"),
        (dict(size="7"), "size is '7' on axis 0; allowed: an integer >= 1"),
        (dict(size=(3, 3), stride=(1, 2, 1)), "stride is (1, 2, 1), of length 3; size has 2 axes"),
        (dict(size=3, stride=0), "stride is 0 on axis 0; allowed: an integer >= 1"),
        (dict(size=3, dilation=0), "dilation is 0 on axis 0; allowed: an integer >= 1"),
        (dict(size=3, block=0), "block is 0 on axis 0; allowed: an integer >= 1"),
        (dict(size=3, block=4), "block is 4 and size 3; allowed: block <= size (axis 0)"),
        (dict(size=(4, 3), block=2, stride=(1, 2)), "block is 2 and stride 2; allowed: only one of them above 1"),
        (dict(size=3, block=2, boundary="valid"), "block is 2 with boundary 'valid'; allowed: block=1 (axis 0)"),
        (dict(size=3, causal=1), "causal is 1 on axis 0; allowed: True or False"),
        (dict(size=3, boundary="same"), "boundary is 'same' on axis 0; allowed: 'shift', 'mask', 'zero', 'edge'"),
        (dict(size=3, boundary=None), "boundary is None on axis 0; allowed"),
        (dict(size=3, causal=True, boundary="wrap"), "boundary is 'wrap' with causal=True; allowed: 'shift', 'mask'"),
        (dict(size=3, causal=True, boundary="edge"), "boundary is 'edge' with causal=True"),
        (dict(size=3, causal=True, boundary="reflect"), "boundary is 'reflect' with causal=True"),
        (dict(size=3, offset=0), "offset is 0 with boundary 'shift'"),
        (dict(size=3, offset=1, boundary="valid"), "offset is 1 with boundary 'valid'"),
        (dict(size=3, offset=1.5, boundary="mask"), "offset is 1.5 on axis 0; allowed: an integer or None"),
    ],
)
def test_bad_arguments_say_what_where_and_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=re.escape(f"Window: {message}")):
        Window(**arguments)


@pytest.mark.parametrize(
    ("window", "grid", "message"),
    [
        (dict(size=7), (8, 8), "write Window((7, 7))"),
        (dict(size=(7, 5)), (8,), "size (7, 5) has 2 axes and the grid (8,) has 1"),
        (dict(size=(3, 7)), (8, 6), "6 tokens along axis 1, where size is 7 and dilation 1"),
        (dict(size=3, dilation=3), (8,), "size·dilation = 9 <= 8"),
        (dict(size=3, dilation=3, boundary="valid"), (6,), "a span of 7 <= 6"),
        (dict(size=3, boundary="mask"), (0,), "a grid with at least one token"),
    ],
)
def test_a_grid_that_does_not_fit(window, grid, message):
    for method in (Window(**window).indices, Window(**window).mask, Window(**window).query_grid):
        with pytest.raises(ValueError, match=re.escape(message)):
            method(grid)
