"""`jaxattn.einsum` against loops in float64, over the notation's table and over equations drawn at random."""

import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle_einsum import Einsum, Misfit
from tiers import examples

import jaxattn
from jaxattn.lowerings.slices import can_slice, slices

T = 5
TABLE = {
    "conv": ("n i+r j+s c, r s c o -> n i j o", [(2, 6, 5, 3), (3, 2, 3, 4)], {}),
    "strided": ("n 2*i+r 2*j+s c, r s c o -> n i j o", [(2, 7, 6, 3), (3, 2, 3, 4)], {}),
    "dilated": ("n i+2*r j+2*s c, r s c o -> n i j o", [(2, 7, 6, 3), (3, 2, 3, 4)], {}),
    "depthwise": ("n i+r j+s c, r s c -> n i j c", [(2, 6, 5, 3), (3, 2, 3)], {}),
    "multiplier": ("n i+r j+s c, r s (c m) -> n i j (c m)", [(2, 6, 5, 3), (3, 2, 6)], {"c": 3}),
    "grouped": ("n i+r j+s (g c), r s c (g o) -> n i j (g o)", [(2, 6, 5, 4), (3, 2, 2, 6)], {"g": 2}),
    "causal": ("n i-r c, r c o -> n i o", [(2, 6, 3), (3, 3, 4)], {"i": 6, "boundary": "zero"}),
    "transposed": ("n i j c, r s c o -> n 2*i+r 2*j+s o", [(2, 3, 4, 3), (3, 2, 3, 4)], {}),
    "local scores": (
        "b i j h d, b i+u j+v h d -> b i j h u v", [(2, 4, 5, 2, 3)] * 2, {"padding": "SAME", "u": 3, "v": 2}),
    "local mix": (
        "b i j h u v, b i+u j+v h d -> b i j h d", [(2, 4, 5, 2, 3, 2), (2, 4, 5, 2, 3)], {"padding": "SAME"}),
    "relative q·r": ("b i j h d, u v h d -> b i j h u v", [(2, 3, 4, 2, 3), (3, 2, 2, 3)], {}),
    "relpos logits": (f"b i h d, j-i+{T - 1} h d -> b h j i", [(2, T, 2, 3), (2 * T - 1, 2, 3)], {"j": T}),
    "Swin bias": ("k-i+6 l-j+6 h -> h i j k l", [(13, 13, 2)], {"i": 7, "j": 7, "k": 7, "l": 7}),
    "involution": (
        "b i+r j+s (g c), b i j r s g -> b i j (g c)", [(2, 4, 5, 6), (2, 4, 5, 3, 2, 2)], {"padding": "SAME", "g": 2}),
    "halo blocks": ("b 4*i+t-1 c -> b i t c", [(2, 8, 3)], {"i": 2, "t": 6, "boundary": "zero"}),
    "patchify": ("n (i p) (j q) c -> n i j (p q c)", [(2, 6, 4, 3)], {"p": 3, "q": 2}),
    "unfold": ("n i+r j+s c -> n i j c r s", [(2, 6, 5, 3)], {"r": 3, "s": 2}),
    "plain": ("b i d, b j d -> b i j", [(2, 3, 4), (2, 5, 4)], {}),
}  # fmt: skip


def draw_arrays(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


def check(equation, arrays, options, run):
    """Values and the gradients of every operand against the loops, to rounding."""
    oracle = Einsum(equation, [x.shape for x in arrays], **options)
    want = oracle.value(*arrays)
    assert jax.eval_shape(run, *arrays).shape == want.shape
    cotangent = np.random.default_rng(1).standard_normal(want.shape)

    @jax.jit  # one compilation for both
    def value_and_gradients(*arrays):
        y, back = jax.vjp(run, *arrays)
        return y, back(jnp.asarray(cotangent))

    got, grads = value_and_gradients(*arrays)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12 * max(abs(want).max(initial=0), 1))
    for mine, grad in zip(grads, oracle.gradients(arrays, cotangent), strict=True):
        np.testing.assert_allclose(mine, grad, rtol=1e-12, atol=1e-12 * max(abs(grad).max(initial=0), 1))


@pytest.mark.core(15)
@pytest.mark.parametrize("implementation", [None, "reference", "xla"])
@pytest.mark.parametrize("name", TABLE)
def test_table_of_the_notation(name, implementation):
    equation, shapes, options = TABLE[name]
    run = functools.partial(jaxattn.einsum, equation, implementation=implementation, **options)
    check(equation, draw_arrays(shapes), options, run)


LOWERED = {
    "conv": "convolution", "strided": "convolution", "dilated": "convolution", "depthwise": "depthwise",
    "multiplier": "depthwise", "grouped": "depthwise", "causal": "convolution", "transposed": "phases",
    "local scores": "slices", "local mix": "slices", "involution": "slices",
    "Swin bias": "gather", "halo blocks": "gather", "unfold": "gather",
    "relative q·r": "plain", "patchify": "plain", "plain": "plain",
}  # fmt: skip


@pytest.mark.parametrize("name", LOWERED)
def test_lowering_of_the_notation(name):
    equation, shapes, options = TABLE[name]
    want = LOWERED[name]
    if want in ("depthwise", "phases") and jax.default_backend() != "cpu":
        want = "convolution"
    assert jaxattn.plan(equation, *shapes, **options).lowering == want


@st.composite
def sums(draw, k, convolution):
    """An affine token over its own axes: text, position, windows."""
    coefficient = st.sampled_from([1, 1, 2, 3])
    windows = [f"r{k}", f"q{k}"][: 1 if convolution else draw(st.sampled_from([0, 1, 1, 1, 2]))]
    text = draw(st.sampled_from(["", "", "2*", "3*"])) + f"i{k}"
    for axis in windows:
        text += draw(st.sampled_from("++-")) + draw(coefficient.map(lambda c: f"{c}*" if c > 1 else "")) + axis
    constant = draw(st.sampled_from([0, 0, 0, 1, -1, 2])) if windows else 1
    return text + (f"{constant:+d}" if constant else ""), f"i{k}", windows


@st.composite
def equations(draw, convolution=False):
    """An equation of one or two operands, shapes and options; not all of them fit. If `convolution`, its windows are
    a kernel's: axes of the second operand that are summed."""
    size = st.integers(1, 3)
    rarely = st.just(False) if convolution else st.sampled_from([False, False, False, True])
    count = draw(st.sampled_from([1, 1, 1, 2]))
    two = convolution or draw(st.sampled_from([True, True, True, False]))
    terms = [[], [], []]
    shape_of = {}
    scattered = draw(st.sampled_from([False, False, True]))
    given = {}
    for k in range(count):
        text, position, windows = draw(sums(k, convolution))
        to_output = scattered and (k == 0 or draw(st.booleans()))
        sizes = {position: draw(st.integers(1, 4)), **{axis: draw(size) for axis in windows}}
        shape_of |= sizes
        shape_of[text] = draw(st.integers(1, 9) | st.integers(6, 9))
        if to_output:
            terms[2].append(text)
            for axis in (position, *windows):
                homes = draw(st.sampled_from([[0], [1], [0, 1]] if two else [[0]]))
                if convolution:
                    homes = [0] if axis == position else [1]
                for home in homes:
                    terms[home].append(axis)
        else:
            terms[0].append(text)
            if not draw(rarely):
                terms[2].append(position)
            if two and draw(rarely):
                terms[1].append(position)
            elif draw(st.sampled_from([False, False, True])):
                given[position] = sizes[position]
            for axis in windows:
                if two and not draw(rarely):
                    terms[1].append(axis)
                else:
                    given[axis] = sizes[axis]
                if draw(rarely):
                    terms[2].append(axis)
    for axis in "abc"[: draw(st.integers(0, 3))]:
        shape_of[axis] = draw(size)
        homes = draw(st.sampled_from([[0], [1], [0, 1]] if two else [[0]]))
        for home in homes:
            terms[home].append(axis)
        if draw(st.booleans()):
            terms[2].append(axis)
    terms = [draw(st.permutations(term)) for term in terms]
    leading = tuple(draw(st.lists(size, max_size=2))) if draw(st.sampled_from([False, False, True])) else None
    with_dots = draw(st.sampled_from([[0], [0, 1]] if two else [[0]])) if leading is not None else []
    texts, shapes = [], []
    for t, term in enumerate(terms[: 2 if two else 1]):
        words = [([axis], math.prod([shape_of[axis]])) for axis in term]
        if len(words) > 1 and draw(st.sampled_from([False, False, True])):
            at = draw(st.integers(0, len(words) - 2))
            pair = words[at][0] + words[at + 1][0]
            if all(axis.isidentifier() for axis in pair):
                words[at : at + 2] = [(pair, words[at][1] * words[at + 1][1])]
                given |= {axis: shape_of[axis] for axis in pair[: draw(st.integers(1, 2))]}
        text = [" ".join(w) if len(w) == 1 else f"({' '.join(w)})" for w, _ in words]
        shape = [n for _, n in words]
        if t in with_dots:
            text, shape = ["...", *text], [*leading, *shape]
        texts.append(" ".join(text))
        shapes.append(tuple(shape))
    output = " ".join((["..."] if with_dots else []) + terms[2])
    written = [word for term in terms for word in term if not word.isidentifier()]
    kinds = st.sampled_from(["VALID", "VALID", "SAME", (1, 1), (2, 0), (0, 3), (-1, 1), (4, 4)])
    options = {"padding": [draw(kinds) for _ in written]}
    options["boundary"] = [draw(st.sampled_from([None, None, "zero", "edge", "reflect", "wrap"])) for _ in written]
    return f"{', '.join(texts)} -> {output}", shapes, {**options, **given}


def check_drawn(drawn, lowering):
    """Loops and library agree on the value, or on the equation's not fitting."""
    equation, shapes, options = drawn
    arrays = draw_arrays(shapes)
    run = functools.partial(jaxattn.einsum, equation, implementation=lowering, **options)
    try:
        oracle = Einsum(equation, shapes, **options)
        hypothesis.assume(math.prod(oracle.sizes.values()) <= 3000)
        list(oracle.paths())
    except Misfit:
        hypothesis.event("does not fit")
        with pytest.raises(ValueError, match="einsum: "):
            run(*arrays)
        return
    hypothesis.event(lowering or jaxattn.plan(equation, *shapes, **options).lowering)
    check(equation, arrays, options, run)


@examples(10)
@hypothesis.given(equations(), st.sampled_from([None, None, None, "reference"]))
def test_drawn_equations(drawn, implementation):
    check_drawn(drawn, implementation)


@pytest.mark.full
@examples(6)
@hypothesis.given(equations(convolution=True))
def test_drawn_convolutions(drawn):
    check_drawn(drawn, None)


@pytest.mark.full
@examples(4)
@hypothesis.given(equations())
def test_drawn_slices(drawn):
    """The lowering by slices runs wherever it can, not only where the plan prefers it."""
    equation, shapes, options = drawn
    try:
        resolved = jaxattn.plan(equation, *shapes, **options).resolved
    except ValueError:
        hypothesis.assume(False)
    hypothesis.assume(resolved.affine and can_slice(resolved) and math.prod(resolved.sizes.values()) <= 3000)
    check(equation, draw_arrays(shapes), options, lambda *arrays: slices(resolved, True, arrays, None, np.dtype(float)))


EMPTY = [
    ("n i+r j+s c, r s c o -> n i j o", dict(n=2, i=4, j=4, r=3, s=2, c=3, o=4), "nco"),
    ("n i+r c, r c -> n i c", dict(n=2, i=4, r=3, c=3), "nc"),
    ("n i c, r c o -> n 2*i+r o", dict(n=2, i=4, r=3, c=3, o=4), "nco"),
    ("n i+r h d, n i r h -> n i h d", dict(n=2, i=4, r=3, h=2, d=3), "nhd"),
    ("n i h d, n i+r h d -> n i r h", dict(n=2, i=4, r=3, h=2, d=3), "nhd"),
    ("n i+r c, r c k, k o -> n i o", dict(n=2, i=4, r=3, c=3, k=4, o=5), "ncko"),
    ("n i d, n j d -> n i j", dict(n=2, i=3, j=4, d=5), "nijd"),
    ("n i+r c -> n i r c", dict(n=2, i=4, r=3, c=3), "nc"),
]


@pytest.mark.core(1)
@pytest.mark.parametrize(("equation", "sizes", "axes"), EMPTY, ids=lambda case: case if isinstance(case, str) else "")
def test_an_empty_axis(equation, sizes, axes):
    """A sum over nothing is zero, and so is every gradient; both implementations agree on the shapes."""
    left, right = equation.split("->")
    for axis in axes:
        size = {**sizes, axis: 0}

        def length(token, size=size):
            if "+" not in token:
                return size[token]
            stride, window = token.split("+")
            return int(stride[0] if "*" in stride else 1) * (size[stride[-1]] - 1) + size[window]

        shapes = [[length(token) for token in term.split()] for term in left.split(",")]
        given = {"r": size["r"]} if "r" in size and not any(" r" in term for term in left.split(",")) else {}
        for implementation in ("xla", "reference"):
            run = functools.partial(jaxattn.einsum, equation, implementation=implementation, **given)
            y, pull = jax.vjp(run, *(jnp.ones(shape) for shape in shapes))
            assert y.shape == tuple(map(length, right.split()))
            np.testing.assert_array_equal(y, jnp.zeros_like(y))
            for found, shape in zip(pull(jnp.ones_like(y)), shapes, strict=True):
                np.testing.assert_array_equal(found, jnp.zeros(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "3"}, r"einsum: precision \(='3'\) must be None, a jax.lax.Precision, or its name"),
        ({"precision": np.ones(2)}, r"einsum: precision \(=float64\[2\]\) must be"),
        ({"preferred_element_type": "3"}, r"einsum: preferred_element_type \(='3'\) must be None or a dtype"),
        ({"preferred_element_type": 1.5}, r"einsum: preferred_element_type \(=1.5\) must be"),
        ({"padding": "SAME", "boundary": np.ones(1)}, r"boundary=array\(\[1.\]\) must be one of zero"),
    ],
)
def test_options_are_refused_by_name(options, message):
    x, w = (np.ones(shape) for shape in ((5, 2), (3, 2, 4)))
    for function in (jaxattn.einsum, jaxattn.plan):
        with pytest.raises(ValueError, match=message):
            function("i+r c, r c o -> i o", x, w, **options)
