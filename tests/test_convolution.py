"""A convolution written as an equation is the one of `jax.lax`: the same values, and the same compiled program."""

import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiers
from jax import lax

import jaxattn
from jaxattn import zoo
from jaxattn.lowerings import phases

SPATIAL = ["i", "j", "k"]
WINDOW = ["r", "s", "t"]


def arrays(*shapes, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def dimension_numbers(rank):
    return ("N" + "DHW"[3 - rank :] + "C", "DHW"[3 - rank :] + "IO", "N" + "DHW"[3 - rank :] + "C")


def compiled_convolutions(f, *args):
    """The convolutions of a compiled function: shapes, windows, labels, groups, without the names of values."""
    text = jax.jit(f).lower(*args).compile().as_text()
    found = []
    for line in text.splitlines():
        match = re.search(r"= (\S+) convolution\((.*?)\), (.*?)(, metadata=|, backend_config=|$)", line)
        if match:
            operands = re.findall(r"(\w+\[[\d,]*\]\S*) %", match[2])
            found.append((match[1], tuple(operands), match[3]))
    return sorted(found)


@st.composite
def convolutions(draw):
    rank = draw(st.integers(1, 3))
    each = lambda low, high: [draw(st.integers(low, high)) for _ in range(rank)]
    window, strides, dilation = each(1, 3), each(1, 3), each(1, 2)
    spatial = [d * (k - 1) + 1 + draw(st.integers(0, 5)) for k, d in zip(window, dilation, strict=True)]
    groups = draw(st.sampled_from([1, 1, 2]))
    padding = draw(st.sampled_from(["VALID", "SAME", 1, "pairs"]))
    if padding == "pairs":
        padding = [tuple(draw(st.integers(0, 3)) for _ in range(2)) for _ in range(rank)]
    return spatial, window, strides, dilation, groups, padding


@tiers.examples(2)
@hypothesis.given(convolutions())
def test_conv_is_lax_conv(drawn):
    spatial, window, strides, dilation, groups, padding = drawn
    x, w = arrays((2, *spatial, 2 * groups), (*window, 2, 3 * groups))
    pads = [(padding, padding)] * len(window) if isinstance(padding, int) else padding

    def peer(x, w):
        return lax.conv_general_dilated(
            x, w, strides, pads, rhs_dilation=dilation, feature_group_count=groups,
            dimension_numbers=dimension_numbers(len(window)),
        )  # fmt: skip

    def ours(x, w):
        return jaxattn.conv(x, w, strides=strides, padding=padding, dilation=dilation, groups=groups)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradients(f, x, w):
        y, back = jax.vjp(f, x, w)
        return y, *back(y)

    for mine, theirs in zip(value_and_gradients(ours, x, w), value_and_gradients(peer, x, w), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-11)


def loops(x, w, strides, padding, dilation, groups):
    """The convolution in float64: every position, every tap, every group."""
    rank, features = w.ndim - 2, w.shape[-1] // groups
    reach = [d * (k - 1) for d, k in zip(dilation, w.shape, strict=False)]
    counts = [(n + sum(p) - r - 1) // s + 1 for n, p, r, s in zip(x.shape[1:], padding, reach, strides, strict=False)]
    y = np.zeros((len(x), *counts, w.shape[-1]))
    for position in np.ndindex(*counts):
        for tap in np.ndindex(*w.shape[:rank]):
            at = [
                s * p + d * q - low
                for s, p, d, q, (low, _) in zip(strides, position, dilation, tap, padding, strict=True)
            ]
            if all(0 <= i < n for i, n in zip(at, x.shape[1:], strict=False)):
                token = np.asarray(x[(slice(None), *at)], np.float64).reshape(len(x), groups, -1)
                kernel = np.asarray(w[tap], np.float64).reshape(-1, groups, features)
                y[(slice(None), *position)] += np.einsum("ngc,cgo->ngo", token, kernel).reshape(len(x), -1)
    return y


@st.composite
def padded_anyhow(draw):
    """Paddings from -k to 2k, which crop the input, and put positions wholly outside."""
    spatial, window, strides, dilation, groups, _ = draw(convolutions())
    padding = [(draw(st.integers(-k, 2 * k)), draw(st.integers(-k, 2 * k))) for k in window]
    reach = [d * (k - 1) for d, k in zip(dilation, window, strict=True)]
    hypothesis.assume(all(n + sum(p) > r for n, p, r in zip(spatial, padding, reach, strict=True)))
    return spatial, window, strides, dilation, groups, padding


@pytest.mark.core(1)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@tiers.examples(1)
@hypothesis.given(drawn=padded_anyhow())
@hypothesis.example(drawn=((8, 9), (2, 2), (1, 1), (1, 1), 1, ((2, 0), (2, 0))))
@hypothesis.example(drawn=((8, 9), (3, 3), (1, 1), (1, 1), 1, ((-1, 1), (0, 0))))
@hypothesis.example(drawn=((8, 9), (3, 3), (1, 1), (1, 1), 1, ((3, 1), (3, 1))))
@hypothesis.example(drawn=((2,), (3,), (1,), (1,), 1, ((2, 0),)))
@hypothesis.example(drawn=((5, 5), (3, 3), (1, 1), (2**31, 2**31), 2, ((2**31, 2**31), (2**31, 2**31))))
def test_any_padding(dtype, drawn):
    """XLA:CPU reads outside an input that is padded by less than nothing: it is never asked to, nor by derivatives."""
    spatial, window, strides, dilation, groups, padding = drawn
    x, w = arrays((2, *spatial, 2 * groups), (*window, 2, 3 * groups), dtype=dtype)
    want = functools.partial(loops, strides=strides, padding=padding, dilation=dilation, groups=groups)

    @jax.jit
    def everything(x, w, dy, dx, dw):
        ours = functools.partial(jaxattn.conv, strides=strides, padding=padding, dilation=dilation, groups=groups)
        y, back = jax.vjp(ours, x, w)
        # a gradient is linear in dy and in the other argument; its own tangents are convolutions once more
        twice = jax.jvp(lambda x, w: jax.vjp(ours, x, w)[1](dy), (x, w), (dx, dw))[1]
        return y, *back(dy), *twice

    dy, dx, dw = arrays(want(x, w).shape, x.shape, w.shape, dtype=dtype, seed=3)
    y, of_x, of_w, of_x_twice, of_w_twice = everything(x, w, dy, dx, dw)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3 if dtype == "float32" else 1e-10)
    close(y, want(x, w))
    close(jnp.vdot(of_x, dx), np.vdot(dy, want(dx, w)))
    close(jnp.vdot(of_w, dw), np.vdot(dy, want(x, dw)))
    close(jnp.vdot(of_x_twice, x), np.vdot(dy, want(x, dw)))
    close(jnp.vdot(of_w_twice, w), np.vdot(dy, want(dx, w)))


@pytest.mark.parametrize(
    ("equation", "options"),
    [
        ("n i+r+1 c, r c o -> n i o", {"i": 11, "boundary": "zero"}),
        ("n i c, r c o -> n i+r o", {"padding": (-1, 1)}),
        ("n i c, r c o -> n 2*i+r+3 o", {}),
        ("n i c, r c o -> n i-2*r o", {"padding": (5, 4)}),
    ],
)
def test_an_offset_does_not_read_outside(equation, options):
    x, w = arrays((2, 12, 4), (2, 4, 6), dtype=np.float32)
    run = lambda how: jax.vjp(lambda x, w: jaxattn.einsum(equation, x, w, **options, implementation=how), x, w)
    (y, back), (want, want_back) = run(None), run("reference")
    for mine, theirs in zip((y, *back(y)), (want, *want_back(want)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("strides", "padding"), [((1, 1), ((-1, 1), (0, 0))), ((2, 1), ((1, -2), (-2, 3))), ((2,), ((-1, 1),))]
)
def test_a_transposed_convolution_is_cropped_by_negative_padding(strides, padding):
    """It is the loops over its input with zeros between: strides are of what is made."""
    rank, none = len(strides), (1,) * len(strides)
    x, w = arrays((2, *(5, 6)[:rank], 3), (*(2, 3)[:rank], 3, 4), dtype=np.float32)

    def spread(x):
        between = np.zeros((2, *(s * (n - 1) + 1 for s, n in zip(strides, x.shape[1:], strict=False)), 3))
        between[(slice(None), *(slice(None, None, s) for s in strides))] = x
        return between

    want = lambda x, w: loops(spread(x), w, none, padding, none, 1)
    dy, dx, dw = arrays(want(x, w).shape, x.shape, w.shape, dtype=np.float32, seed=3)
    ours = functools.partial(zoo.conv_transpose, strides=strides, padding=padding)
    y, of_x, of_w = jax.jit(lambda x, w: (lambda y, back: (y, *back(dy)))(*jax.vjp(ours, x, w)))(x, w)
    np.testing.assert_allclose(y, want(x, w), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jnp.vdot(of_x, dx), np.vdot(dy, want(dx, w)), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(jnp.vdot(of_w, dw), np.vdot(dy, want(x, dw)), rtol=1e-4, atol=1e-3)


@hypothesis.settings(max_examples=30)
@hypothesis.given(convolutions())
def test_transposed_is_lax_conv_transpose(drawn):
    """For kernels at least as long as the stride, with the kernel flipped and its features swapped by the caller."""
    spatial, window, strides, dilation, _, padding = drawn
    rank = len(window)
    hypothesis.assume(padding in ("VALID", "SAME"))
    hypothesis.assume(all(d * (k - 1) + 1 >= s for k, s, d in zip(window, strides, dilation, strict=True)))
    x, w = arrays((2, *spatial, 2), (*window, 2, 3))
    want = lax.conv_transpose(
        x, jnp.flip(w, range(rank)), strides, padding, rhs_dilation=dilation, dimension_numbers=dimension_numbers(rank)
    )
    sums = " ".join(f"{s}*{p}+{d}*{q}" for s, p, d, q in zip(strides, SPATIAL, dilation, WINDOW, strict=False))
    positions, taps = " ".join(SPATIAL[:rank]), " ".join(WINDOW[:rank])
    got = jaxattn.einsum(f"n {positions} c, {taps} c o -> n {sums} o", x, w, padding=padding)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.core(2)
@pytest.mark.parametrize(
    "limits", [{}, {"WORK": 0}, {"WORK": 0, "COPIED": 0}], ids=["at once", "apart, by taps", "apart"]
)
def test_phases_of_strides(monkeypatch, limits):
    """With taps that the strides divide and do not, cropped, and where one dimension has no stride. Where they do not,
    phases are convolved apart from some size on."""
    for name, value in limits.items():
        monkeypatch.setattr(phases, name, value)
    cases = [
        ("n i c, r c o -> n 3*i+r o", [(2, 5, 3), (7, 3, 4)], {}),
        ("n i c, r c o -> n 4*i+r o", [(2, 5, 3), (2, 3, 4)], {"padding": (3, -2)}),
        ("n i j c, r s c o -> n 2*i+r j+2*s o", [(2, 4, 3, 3), (3, 2, 3, 4)], {"padding": "SAME"}),
        ("n i j k c, r s t c o -> n o 2*i+r 3*j+s-1 k+t", [(1, 3, 2, 4, 2), (2, 5, 1, 2, 3)], {"boundary": "wrap"}),
        ("n i c, r c o -> n 3*i-r o", [(2, 5, 3), (4, 3, 4)], {"padding": (2, 2)}),
    ]
    for equation, shapes, options in cases:
        assert jaxattn.plan(equation, *shapes, **options).lowering == "phases"
        operands = arrays(*shapes)
        run = lambda how, e=equation, o=options: functools.partial(jaxattn.einsum, e, implementation=how, **o)
        (y, back), (want, want_back) = (jax.vjp(run(how), *operands) for how in (None, "reference"))
        dy = arrays(y.shape, seed=5)[0]
        for mine, theirs in zip((y, *back(dy)), (want, *want_back(dy)), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-10, atol=1e-11)
    dilated = jaxattn.plan("n i c, r c o -> n 2*i+3*r o", (2, 5, 3), (2, 3, 4))
    assert dilated.lowering == "convolution"


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("boundary", ["edge", "reflect", "wrap"])
def test_filled_boundaries_are_numpy_pad(rank, boundary):
    """Outside, `boundary` stands for what `numpy.pad` would put there, however far the padding reaches."""
    x, w = arrays((2, *(4, 3, 5)[:rank], 2), (3,) * rank + (2, 3))
    padding = [(5, 2), (1, 4), (7, 0)][:rank]
    padded = np.pad(x, [(0, 0), *padding, (0, 0)], mode=boundary)
    got = jaxattn.conv(x, w, padding=padding, boundary=boundary)
    np.testing.assert_allclose(got, jaxattn.conv(padded, w, padding="VALID"), rtol=1e-12)
    np.testing.assert_allclose(
        got, lax.conv_general_dilated(padded, w, (1,) * rank, "VALID", dimension_numbers=dimension_numbers(rank)),
        rtol=1e-12, atol=1e-12,
    )  # fmt: skip


EQUATIONS = {
    "NHWC": ("n i+r j+s c, r s c o -> n i j o", ("NHWC", "HWIO", "NHWC")),
    "NCHW": ("n c i+r j+s, o c r s -> n o i j", ("NCHW", "OIHW", "NCHW")),
    "HWNC": ("i+r j+s n c, r s c o -> i j n o", ("HWNC", "HWIO", "HWNC")),
}
SHAPES = {"N": 2, "H": 12, "W": 11, "C": 4}
KERNEL = {"H": 3, "W": 2, "I": 4, "O": 6}
CALLS = [
    dict(padding="VALID"),
    dict(padding="SAME"),
    dict(padding=((2, 1), (0, 1))),
    dict(padding="SAME", strides=(2, 3)),
    dict(padding="VALID", strides=(2, 2)),
    dict(padding=((1, 1), (1, 1)), dilation=(2, 3)),
]


@pytest.mark.core("each")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: "-".join(str(v) for v in call.values()))
@pytest.mark.parametrize("layout", EQUATIONS)
def test_a_dense_correlation_compiles_to_the_same_convolution(layout, call, dtype):
    equation, labels = EQUATIONS[layout]
    (s0, s1), (d0, d1) = call.get("strides", (1, 1)), call.get("dilation", (1, 1))
    equation = equation.replace("i+r", f"{s0}*i+{d0}*r").replace("j+s", f"{s1}*j+{d1}*s")
    x, w = arrays([SHAPES[a] for a in labels[0]], [KERNEL[a] for a in labels[1]], dtype=dtype)

    def peer(x, w):
        return lax.conv_general_dilated(
            x, w, (s0, s1), call["padding"], rhs_dilation=(d0, d1), dimension_numbers=labels
        )  # fmt: skip

    def ours(x, w):
        return jaxattn.einsum(equation, x, w, padding=call["padding"])

    assert ours(x, w).shape == peer(x, w).shape
    forward = compiled_convolutions(peer, x, w)
    assert len(forward) == 1, "the peer compiles to one convolution, or this test compares nothing"
    assert compiled_convolutions(ours, x, w) == forward

    def gradient(f, argument):
        return jax.grad(lambda x, w: (f(x, w) ** 2).sum(), argument)

    for argument in (0, 1):
        want = compiled_convolutions(gradient(peer, argument), x, w)
        assert len(want) == 2
        assert compiled_convolutions(gradient(ours, argument), x, w) == want


@pytest.mark.parametrize("stride", [1, 2])
def test_small_grouped_and_transposed_compile_to_one_convolution(stride):
    x, w = arrays((2, 9, 8, 10), (3, 3, 10))
    calls = [
        (
            f"n {stride}*i+r {stride}*j+s (g c), r s c (g o) -> n i j (g o)",
            (x, w[:, :, :5, None] * jnp.ones(6)),
            {"g": 2},
        ),
        (f"n i j c, r s c o -> n {stride}*i+r {stride}*j+s o", (x, w[..., None] * jnp.ones(5)), {}),
    ]
    for equation, operands, options in calls:
        run = lambda *a, e=equation, o=options: jaxattn.einsum(e, *a, **o)
        assert len(compiled_convolutions(run, *operands)) == 1, equation


def test_the_gradient_of_a_kernel_is_a_convolution_too():
    """∂/∂w of a convolution, written as an equation: the position is summed and the window is in the output."""
    x, dy = arrays((2, 9, 10, 3), (2, 4, 4, 5))
    equation = "n 2*i+r 2*j+s c, n i j o -> r s c o"
    assert jaxattn.plan(equation, x, dy, r=3, s=3).lowering == "convolution"
    w = jnp.zeros((3, 3, 3, 5))
    forward = lambda w: lax.conv_general_dilated(x, w, (2, 2), "VALID", dimension_numbers=dimension_numbers(2))
    want = jax.vjp(forward, w)[1](dy)[0]
    np.testing.assert_allclose(jaxattn.einsum(equation, x, dy, r=3, s=3), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_conv_takes_any_number_of_batch_axes(batch):
    x, w = arrays((*batch, 7, 6, 4), (3, 2, 4, 5))
    got = jaxattn.conv(x, w, strides=(1, 2))
    flat = x.reshape(-1, 7, 6, 4)
    want = lax.conv_general_dilated(flat, w, (1, 2), "SAME", dimension_numbers=dimension_numbers(2))
    np.testing.assert_allclose(got, want.reshape(*batch, *want.shape[1:]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((2, 5, 3), (3, 3)), {}, r"conv: kernel \(=\[3, 3\]\) must be \[\*window, features / groups, out_features\]"),
        (((5, 3), (3, 3, 3, 4)), {}, r"conv: x \(=\[5, 3\]\) must be .* with the kernel's 2 spatial axes"),
        (((2, 5, 3), (3, 3, 4)), {"groups": 2}, r"groups \(=2\) .* features of x \(=3\)"),
        (((2, 5, 4), (3, 2, 3)), {"groups": 2}, r"groups \(=2\) .* out_features of kernel \(=3\)"),
        (((2, 5, 4), (3, 4, 4)), {"groups": 0}, r"groups \(=0\)"),
        (((2, 5, 3), (3, 3, 4)), {"strides": 0}, r"conv: strides \(=0\) must be an int >= 1"),
        (((2, 5, 3), (3, 3, 4)), {"strides": (1, 2)}, r"conv: strides \(=\(1, 2\)\)"),
        (((2, 5, 3), (3, 3, 4)), {"dilation": -1}, r"conv: dilation \(=-1\)"),
        (((2, 5, 3), (3, 3, 4)), {"padding": [(1, 1), (1, 1)]}, r"conv: padding \(=\[\(1, 1\), \(1, 1\)\]\)"),
        (((2, 5, 3), (3, 3, 4)), {"padding": "FULL"}, r"padding \(='FULL'\) must be 'SAME', 'VALID'"),
        (
            ((2, 5, 3), (3, 2, 4)),
            {},
            r"kernel \(=\[3, 2, 4\]\) must be \[\*window, 3, out_features\] with x's features",
        ),
        (((2, 5, 3), (3, 3, 4)), {"strides": None}, r"conv: strides \(=None\) must be an int >= 1"),
        (((2, 5, 3), (3, 3, 4)), {"strides": True}, r"conv: strides \(=True\) must be an int >= 1"),
        (((2, 5, 3), (3, 3, 4)), {"groups": True}, r"groups \(=True\)"),
        (((2, 5, 3), (3, 3, 4)), {"padding": 1.5}, r"conv: padding \(=1.5\) must be"),
        (((2, 2, 3), (3, 3, 4)), {"padding": "VALID"}, r"reaches over 3 tokens, its axis has 2"),
    ],
)
def test_conv_errors(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        jaxattn.conv(*arrays(*shapes), **options)


@pytest.mark.core(8)
@pytest.mark.parametrize("boundary", ["zero", "edge", "reflect", "wrap"])
@pytest.mark.parametrize("padding", [None, "SAME", 1, (2, 0), (-1, 1)], ids=str)
@pytest.mark.parametrize("token", ["2*i+3*r", "i-r", "3*i+r"])
def test_the_adjoint(token, padding, boundary):
    """<A x, y> = <x, Aᵀ y> for an affine token moved across the arrow, with every padding and boundary."""
    check_adjoint(token, padding=padding, boundary=boundary)


@pytest.mark.parametrize("token", ["2*i+3*r", "i+r+2", "2*i-2*r+5"])
def test_the_adjoint_inside(token):
    """The same where nothing falls outside, with constants."""
    check_adjoint(token)


def check_adjoint(token, **options):
    w, y = arrays((3, 2, 4), (2, 4, 4))
    back = jaxattn.einsum(f"n i o, r c o -> n {token} c", y, w, **options)
    x = arrays(back.shape, seed=2)[0]
    forward = jaxattn.einsum(f"n {token} c, r c o -> n i o", x, w, i=4, **options)
    assert forward.shape == y.shape
    np.testing.assert_allclose(jnp.vdot(forward, y), jnp.vdot(x, back), rtol=1e-11)


@pytest.mark.parametrize(
    ("equation", "kernel", "options"),
    [
        ("n i+r j+s c, r s c -> n i j c", (3, 3, 8), {}),
        ("n i+r j+s (g c), r s c (g o) -> n i j (g o)", (3, 3, 4, 8), {"g": 2}),
        ("n i j c, r s c -> n 2*i+r 2*j+s c", (3, 3, 8), {}),
        ("n i+r j+s c, r s c o -> n i j o", (1, 1, 8, 32), {}),
    ],
)
def test_an_empty_batch(equation, kernel, options):
    x, w = jnp.zeros((0, 9, 9, 8)), jnp.ones(kernel)
    whole = jaxattn.einsum(equation, jnp.zeros((2, 9, 9, 8)), w, **options)
    y, pull = jax.vjp(lambda x, w: jaxattn.einsum(equation, x, w, **options), x, w)
    assert y.shape == (0, *whole.shape[1:])
    of_x, of_w = pull(y)
    assert of_x.shape == x.shape
    np.testing.assert_array_equal(of_w, jnp.zeros_like(w))
