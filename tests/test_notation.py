"""What `einsum` says when an equation can't be read or doesn't fit, and that it reads each equation once."""

import numpy as np
import pytest

import jaxattn
from jaxattn.boundary import fold
from jaxattn.notation import EquationError, ExtentError, IndexRangeError, NotationError, parse


def zeros(*shapes):
    return [np.zeros(shape, np.float32) for shape in shapes]


def test_the_message_of_the_specification():
    with pytest.raises(ExtentError) as caught:
        jaxattn.einsum("n i+r j+s c, r s c o -> n i j o", *zeros((2, 9, 10, 4), (3, 3, 8, 6)))
    assert str(caught.value) == (
        "einsum: axis 'c' has size 4 in operand 0 but 8 in operand 1\n"
        "    n i+r j+s c, r s c o -> n i j o\n"
        "              ^      ^\n"
        "    operand 0: float32[2,9,10,4]; operand 1: float32[3,3,8,6]"
    )


MALFORMED = [
    ("i j", "one '->', this one has 0"),
    ("i -> j -> i", "one '->', this one has 2"),
    ("i -> i, i", "one output"),
    ("i + r, r -> i", r"can't read '\+': a sum is written without spaces"),
    ("i+ r, r -> i", r"can't read 'i\+': a sum is written without spaces"),
    ("i*2+r, r -> i", r"can't read 'i\*2\+r': a coefficient comes first"),
    ("2i+r, r -> i", "can't read '2i.r': a coefficient comes first"),
    ("0*i+r, r -> i", "a coefficient of 0"),
    ("-i+r, r -> i", "first axis is the position, and its coefficient must be positive, not -1"),
    ("i+i, i -> i", "an axis stands at most once in a sum"),
    ("3 i -> i", "a sum names at least one axis"),
    ("i.j -> i", r"can't read 'i\.j'"),
    ("(i+r) c -> c", r"'i\+r' inside '\(i\+r\)': a sum can't be composed"),
    ("(i 2) c -> c", "only names can be composed"),
    ("() c -> c", "composes no axes"),
    ("(i (j k)) -> i", r"unbalanced '\('"),
    ("i) -> i", r"unbalanced '\)'"),
    ("i j -> i i", "axis 'i' is repeated in the output"),
    ("i j -> (i j) i", "axis 'i' is repeated in the output"),
    ("i j -> i k", "axis 'k' of the output appears in no operand"),
    ("... i -> i", r"'\.\.\.' must be kept"),
    ("i -> ... i", r"'\.\.\.' of the output appears in no operand"),
    ("... i ... -> ... i", r"'\.\.\.' stands at most once"),
]


@pytest.mark.parametrize(("equation", "message"), MALFORMED)
def test_malformed_equations(equation, message):
    with pytest.raises(NotationError, match=message) as caught:
        parse(equation)
    assert str(caught.value).startswith("einsum: ")
    assert f"\n    {equation}" in str(caught.value)


MISFITS = [
    ("i, j -> i j", [(2,)], {}, ExtentError, "the number of operands is 2, 1 were given"),
    ("i j -> i", [(2, 3, 4)], {}, ExtentError, "operand 0 has 3 dimensions but its term names 2"),
    ("... i j -> ... i", [(2,)], {}, ExtentError, "operand 0 has 1 dimensions but its term names at least 2"),
    ("... i, ... j -> ... i j", [(2, 3), (4, 3)], {}, ExtentError,
     r"'...' is \[2\] in operand 0 but \[4\] in operand 1"),
    ("i j, j k -> i k", [(2, 3), (4, 5)], {}, ExtentError, "axis 'j' has size 3 in operand 0 but 4 in operand 1"),
    ("i i -> i", [(2, 3)], {}, ExtentError, "axis 'i' has size 2 in operand 0 but 3 in operand 0"),
    ("i j -> i", [(2, 3)], {"j": 4}, ExtentError, "axis 'j' has size 4 by keyword but 3 in operand 0"),
    ("i j -> i", [(2, 3)], {"k": 4}, NotationError, "keyword k=4 names no axis of the equation"),
    ("i j -> i", [(2, 3)], {"j": 3.0}, ExtentError, "keyword j=3.0 must be a positive int"),
    ("i j -> i", [(2, 3)], {"j": True}, ExtentError, "keyword j=True must be a positive int"),
    ("i j -> i", [(2, 3)], {"j": 0}, ExtentError, "keyword j=0 must be a positive int"),
    ("(g c) -> g c", [(6,)], {}, ExtentError, "nothing gives the extent of 'g', 'c': give g=, c="),
    ("(g c) -> g c", [(6,)], {"g": 4}, ExtentError, r"'\(g c\)' has size 6 in operand 0, which is not g=4 c=\?"),
    ("(g c), g c -> g", [(6,), (2, 4)], {}, ExtentError, r"'\(g c\)' has size 6 in operand 0, which is not g=2 c=4"),
    ("i+r -> i r", [(6,)], {}, ExtentError, "nothing gives the extent of 'r': give r="),
    ("i+r-1 -> i r", [(6,)], {"r": 2}, ExtentError, r"extent of 'i' can't be read from 'i\+r-1', which has a constant"),
    ("i+r, r -> i", [(2,), (3,)], {}, ExtentError, "window of 'i.r' reaches over 3 tokens, its axis has 2"),
    ("i+2*r, r -> i", [(2,), (3,)], {"padding": 1}, ExtentError, r"reaches over 5 tokens, its axis has 2 and padding"),
    ("i+r, i+s, r, s -> i", [(5,), (6,), (2,), (2,)], {}, ExtentError, "axis 'i' has size 4 by 'i.r' but 5 by 'i.s'"),
    ("i+r, i -> i r", [(9,), (8,)], {"r": 3, "padding": "SAME"}, ExtentError, "but padding='SAME' over 9 tokens"),
    ("i+r-1, r -> i", [(6,), (3,)], {"i": 6, "padding": 1}, NotationError, "has a constant, and padding=.1, 1. shifts"),
    ("i+r, r -> i", [(6,), (3,)], {"i": 6}, IndexRangeError,
     r"axis 'i' of extent 6, 'r' of extent 3, 'i\+r' reaches index 7, outside 0..5 of operand 0"),
    ("i-r, r -> i", [(6,), (3,)], {}, IndexRangeError, "reaches index -2, outside 0..5 of operand 0"),
    ("i, r -> i-r", [(6,), (3,)], {}, IndexRangeError, "reaches index -2, outside 0..5 of the output"),
    ("i, r -> i+r", [(2,), (2,)], {"padding": 2}, IndexRangeError, "an axis of -1 tokens: its padding crops"),
]  # fmt: skip


@pytest.mark.parametrize(("equation", "shapes", "options", "kind", "message"), MISFITS)
def test_misfits(equation, shapes, options, kind, message):
    with pytest.raises(kind, match=message) as caught:
        jaxattn.einsum(equation, *zeros(*shapes), **options)
    assert str(caught.value).startswith("einsum: ")
    assert f"\n    {equation}" in str(caught.value)
    assert isinstance(caught.value, EquationError)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(kind, match=message):
        jaxattn.plan(equation, *shapes, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "FULL"}, "padding='FULL' must be 'VALID', 'SAME'"),
        ({"padding": 1.5}, "padding=1.5 must be 'VALID', 'SAME'"),
        ({"padding": [(1, 1)]}, r"padding has 1 entries, but the equation has 2 affine tokens \(i\+r, j\+s\)"),
        ({"padding": [(1, 1), (1, 2, 3)]}, r"padding=\[\(1, 1\), \(1, 2, 3\)\] must be"),
        ({"boundary": "mirror"}, "boundary='mirror' must be one of zero, edge, reflect, wrap"),
        ({"boundary": ["zero"]}, "boundary has 1 entries, but the equation has 2 affine tokens"),
        ({"boundary": 3}, "boundary=3 must be one of zero, edge"),
        ({"implementation": "cuda"}, r"implementation \(='cuda'\) must be one of"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        jaxattn.einsum("i+r j+s, r s -> i j", *zeros((6, 6), (3, 3)), **options)
    if "implementation" not in options:
        lines = ["    i+r j+s, r s -> i j", "    ^^^ ^^^", "    operand 0: float32[6,6]; operand 1: float32[3,3]"]
        assert str(caught.value).splitlines()[1:] == lines


def test_the_equation_must_be_a_string():
    with pytest.raises(ValueError, match="the equation must be a string, got ndarray"):
        jaxattn.einsum(*zeros((3,), (3,)))


@pytest.mark.parametrize(
    ("padding", "want"),
    [
        (None, (4, 5)),
        ("SAME", (6, 7)),
        ("same", (6, 7)),
        (1, (6, 7)),
        ((1, 0), (5, 6)),
        ([(1, 0), (2, 2)], (5, 9)),
        (["SAME", 0], (6, 5)),
        (np.int64(1), (6, 7)),
    ],
)
def test_every_way_to_write_padding(padding, want):
    assert jaxattn.einsum("i+r j+s, r s -> i j", *zeros((6, 7), (3, 3)), padding=padding).shape == want


@pytest.mark.parametrize(
    ("equation", "shapes", "options", "want"),
    [
        ("n i j c, r s c o -> n 2*i+r 2*j+s o", [(1, 4, 5, 2), (3, 3, 2, 3)], {}, (1, 9, 11, 3)),
        ("n i j c, r s c o -> n 2*i+r 2*j+s o", [(1, 4, 5, 2), (3, 3, 2, 3)], {"padding": "SAME"}, (1, 8, 10, 3)),
        ("n i j c, r s c o -> n 2*i+r 2*j+s o", [(1, 4, 5, 2), (3, 3, 2, 3)], {"padding": (1, 2)}, (1, 6, 8, 3)),
        ("i, r -> i+r+2", [(4,), (3,)], {}, (8,)),
        ("i, r -> i+r", [(4,), (3,)], {"padding": (0, -2)}, (8,)),
        ("i, r -> i-r", [(4,), (3,)], {"boundary": "zero"}, (4,)),
        ("i, j -> i j", [(0,), (3,)], {}, (0, 3)),
        ("i -> ", [(4,)], {}, ()),
        (", i -> i", [(), (4,)], {}, (4,)),
        ("n i+r+s, r s -> n i", [(1, 9), (3, 2)], {}, (1, 6)),
    ],
)
def test_extents(equation, shapes, options, want):
    assert jaxattn.plan(equation, *shapes, **options).shape == want
    assert jaxattn.einsum(equation, *zeros(*shapes), **options).shape == want


def test_an_equation_is_read_once(monkeypatch):
    import jaxattn.notation as notation

    calls = []
    monkeypatch.setattr(notation, "_tokens", lambda *a, f=notation._tokens: (calls.append(a), f(*a))[1])
    equation = "n i+r read_once, r read_once o -> n i o"
    for _ in range(3):
        jaxattn.einsum(equation, *zeros((2, 5, 3), (3, 3, 4)))
        jaxattn.einsum(equation, *zeros((2, 6, 3), (3, 3, 4)))
    assert len(calls) == 3  # two operands and the output, of one parse
    assert jaxattn.plan(equation, (2, 5, 3), (3, 3, 4)) is jaxattn.plan(equation, (2, 5, 3), (3, 3, 4))


def test_a_plan_prints_what_will_be_done():
    text = str(jaxattn.plan("n 2*i+r c, r c o -> n i o", (2, 10, 4), (3, 4, 8), padding="SAME"))
    assert "convolution: lax.conv_general_dilated, strides (2,), padding ((0, 1),), dilation (1,), groups 1" in text
    assert "index 0..10 of 10 in operand 0, outside: zero" in text
    assert f"{2 * 2 * 5 * 3 * 4 * 8 / 1000:.3g} kFLOP" in text
    moved = 4 * (2 * 10 * 4 + 3 * 4 * 8 + 2 * 5 * 8)
    assert f"{moved / 1000:.3g} kB in and out" in text


def test_shapes_of_a_plan_may_be_arrays():
    a, b = zeros((2, 5, 3), (3, 3, 4))
    equation = "n i+r c, r c o -> n i o"
    assert str(jaxattn.plan(equation, a, b)) == str(jaxattn.plan(equation, a.shape, b.shape))


@pytest.mark.parametrize(("boundary", "mode"), [("edge", "edge"), ("reflect", "reflect"), ("wrap", "wrap")])
@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_fold_is_numpy_pad(boundary, mode, length):
    padded = np.pad(np.arange(length), 9, mode=mode)
    np.testing.assert_array_equal(fold(np.arange(-9, length + 9), length, boundary), padded)


def test_resolve_takes_what_operands_say_before_what_padding_implies():
    """`(i p)` gives i, though `i+r` is written first and would give more."""
    assert jaxattn.plan("i+r, (i p), r -> i p", (20,), (12,), (3,), p=2).resolved.sizes["i"] == 6


def test_what_was_allowed_before_does_not_let_its_equals_in():
    """1 == 1.0 == True, also as keys of a cache."""
    operands = zeros((6, 6), (3, 3))
    for one in (1.0, True, np.float32(1), [1.0, 1.0], {"i": 1}):
        jaxattn.einsum("i+r j+s, r s -> i j", *operands, padding=1)
        with pytest.raises(NotationError, match=r"padding=.* must be 'VALID', 'SAME'|affine tokens"):
            jaxattn.einsum("i+r j+s, r s -> i j", *operands, padding=one)
    assert jaxattn.einsum("i+r j+s, r s -> i j", *operands, padding=np.array([1, 1])).shape == (6, 6)
    with pytest.raises(ExtentError, match=r"keyword r=\[3\] must be a positive int"):
        jaxattn.einsum("i+r j -> i j r", operands[0], r=[3])


def test_a_window_of_no_taps():
    with pytest.raises(ExtentError, match=r"the window 'r' of 'i.r' has extent 0"):
        jaxattn.einsum("i+r, r -> i", *zeros((6,), (0,)))


def test_an_axis_may_have_any_name():
    assert jaxattn.einsum("equation+r -> equation", *zeros((6,)), r=2, equation=3).shape == (3,)
