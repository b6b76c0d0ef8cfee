"""Window against loops; its errors by their messages."""

import dataclasses
import itertools
import re

import hypothesis
import numpy as np
import oracle
import pytest
from windows import grids

from jaxattn.window import BOUNDARIES, Window


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


def test_clipped_is_the_largest_that_fits():
    """By trying every size, and what each query sees by loops: what fits sees the same after as before."""
    fitting = lambda n, **arguments: _raises(lambda: Window(**arguments).indices((n,))) is None
    for n, k, d, causal in itertools.product((1, 3, 4), (1, 2, 6), (1, 2, 7), (False, True)):
        for boundary, block, stride in itertools.product(BOUNDARIES, (1, min(k, 2)), (1, 2)):
            arguments = {"size": k, "dilation": d, "causal": causal, "boundary": boundary, "block": block}
            arguments["stride"] = stride
            if _raises(lambda a=arguments: Window(**a)):
                continue
            window, clipped = Window(**arguments), Window(**arguments).clipped((n,))
            assert clipped.clipped(n) == clipped
            if boundary == "mask":
                np.testing.assert_array_equal(_seen(clipped, n), _seen(window, n))
                assert block > 1 or clipped.sizes[0] <= 2 * n - 1
                continue
            if boundary not in ("shift", "valid") or fitting(n, **arguments):
                assert clipped == window
                continue
            one = {**arguments, "dilation": min(d, n) if boundary == "shift" else d}
            sizes = [size for size in range(1, k + 1) if fitting(n, **{**one, "size": size, "block": 1})]
            assert clipped == Window(**{**one, "size": max(sizes), "block": min(block, max(sizes))})
            if boundary == "shift" and d == 1 and stride == 1 and block == 1:  # all that there is
                np.testing.assert_array_equal(_seen(clipped, n), np.tri(n) if causal else np.ones((n, n)))
    assert Window((7, 7)).clipped((3, 9)) == Window((3, 7))
    with pytest.raises(ValueError, match=r"Window: size \(=\(7, 7\)\) must have as many axes as the grid \(=\(3,\)\)"):
        Window((7, 7)).clipped(3)
    with pytest.raises(ValueError, match=r"Window: grid \(=1.5\) must be an integer on axis 0"):
        Window(7).clipped(1.5)  # pyright: ignore[reportArgumentType]


def _seen(window, n):
    """How often each query sees each key."""
    keys, mask = window.indices((n,))[..., 0], window.mask((n,))
    return np.array([np.bincount(row[seen], minlength=n) for row, seen in zip(keys, mask, strict=True)])


def _raises(function):
    try:
        function()
    except ValueError as error:
        return error


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
        (dict(size=()), "size (=()) must have at least one axis"),
        (dict(size=0), "size (=0) must be an integer >= 1 on axis 0"),
        (dict(size=(3, -1)), "size (=-1) must be an integer >= 1 on axis 1"),
        (dict(size=2.5), "size (=2.5) must be an integer >= 1 on axis 0"),
        (dict(size=True), "size (=True) must be an integer >= 1 on axis 0"),
        (dict(size="7"), "size (='7') must be an integer >= 1 on axis 0"),
        (dict(size=(3, 3), stride=(1, 2, 1)), "stride (=(1, 2, 1)) must be one value or 2, as many as size has axes"),
        (dict(size=3, stride=0), "stride (=0) must be an integer >= 1 on axis 0"),
        (dict(size=3, dilation=0), "dilation (=0) must be an integer >= 1 on axis 0"),
        (dict(size=3, block=0), "block (=0) must be an integer >= 1 on axis 0"),
        (dict(size=3, block=4), "block (=4) must be at most size (=3) on axis 0"),
        (dict(size=(4, 3), block=2, stride=(1, 2)), "block (=2) must be 1 where stride (=2) is above 1 on axis 1"),
        (dict(size=3, block=2, boundary="valid"), "block (=2) must be 1 with boundary 'valid' on axis 0"),
        (dict(size=3, causal=1), "causal (=1) must be True or False on axis 0"),
        (dict(size=3, boundary="same"), "boundary (='same') must be one of 'shift', 'mask', 'zero', 'edge'"),
        (dict(size=3, boundary=None), "boundary (=None) must be one of"),
        (dict(size=3, causal=True, boundary="wrap"), "boundary (='wrap') must be one of 'shift', 'mask'"),
        (dict(size=3, causal=True, boundary="edge"), "boundary (='edge') must be one of 'shift', 'mask'"),
        (dict(size=3, causal=True, boundary="reflect"), "boundary (='reflect') must be one of 'shift', 'mask'"),
        (dict(size=3, offset=0), "offset (=0) must be None with boundary 'shift'"),
        (dict(size=3, offset=1, boundary="valid"), "offset (=1) must be None or 0 with boundary 'valid'"),
        (dict(size=3, offset=1.5, boundary="mask"), "offset (=1.5) must be an integer or None on axis 0"),
    ],
)
def test_bad_arguments_say_what_where_and_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=re.escape(f"Window: {message}")):
        Window(**arguments)


@pytest.mark.parametrize(
    ("window", "grid", "message"),
    [
        (dict(size=7), (8, 8), "write Window((7, 7))"),
        (dict(size=(7, 5)), (8,), "size (=(7, 5)) must have as many axes as the grid (=(8,))"),
        (
            dict(size=(3, 7)),
            (8, 6),
            "the grid (=6 along axis 1) must have size (=7) · dilation (=1) = 7 tokens",
        ),
        (dict(size=3, dilation=3), (8,), "the grid (=8 along axis 0) must have size (=3) · dilation (=3) = 9 tokens"),
        (
            dict(size=3, dilation=3, boundary="valid"),
            (6,),
            "the grid (=6 along axis 0) must have the 7 tokens that",
        ),
        (dict(size=3, boundary="mask"), (0,), "the grid (=0 along axis 0) must have at least one token"),
    ],
)
def test_a_grid_that_does_not_fit(window, grid, message):
    for method in (Window(**window).indices, Window(**window).mask, Window(**window).query_grid):
        with pytest.raises(ValueError, match=re.escape(message)):
            method(grid)
