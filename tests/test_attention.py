"""`attention` against loops in NumPy float64: values and the gradient of every argument, in combination."""

import contextlib
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from windows import grids

from jaxattn.attention import attention
from jaxattn.kernels import tiles
from jaxattn.window import Window

# Compilation is most of what these tests take, and float64 results do not depend on how hard LLVM tries.
quick = {"xla_backend_optimization_level": 0}
TILINGS = {"few": tiles.BUDGET, "many": 1}
NORMALIZERS = ["softmax", "relu", "sigmoid", "sparsemax", "none", lambda s, m: m * s * (0.5 + np.arange(s.shape[-1]))]
DIFFERENTIABLE = ["query", "key", "value", "bias", "relative_bias", "key_embedding", "extra_key", "extra_value"]


@contextlib.contextmanager
def tiling(name):
    """Cut small problems into many tiles, without what was compiled for others: shapes do not tell them apart."""
    if name == "few":
        yield
        return
    with mock.patch.object(tiles, "BUDGET", TILINGS[name]):
        jax.clear_caches()
        yield
    jax.clear_caches()


def score_mod(score, head, query, key):
    return 1.1 * score + 0.1 * head * (query[0] - key[-1])


def make(grid, arguments, *, features, seed, heads=4, key_heads=2, batch=2, dim=3):
    """Operands for a window's problem: what `attention` takes, and what the oracle takes."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape)
    size = arguments["size"] if arguments else grid
    window = Window(**arguments) if arguments else None
    queries = window.query_grid(grid) if window else (grid[0] + 2,)
    operands = dict(
        query=normal(batch, *queries, heads, dim),
        key=normal(batch, *grid, key_heads, dim),
        value=normal(batch, *grid, key_heads, dim - 1),
    )
    full = (batch, *queries, heads, *size)
    tables = (heads, *(2 * k - 1 for k in size))
    if "bias" in features:
        operands["bias"] = normal(*full)
    if arguments and relative_fits(grid, arguments):
        operands |= {"relative_bias": normal(*tables)} if "relative_bias" in features else {}
        if "embedding" in features:
            operands["key_embedding"] = normal(*tables, dim)[: 1 if "shared" in features else None]
    if "extra" in features:
        operands |= dict(extra_key=normal(batch, 2, key_heads, dim), extra_value=normal(batch, 2, key_heads, dim - 1))
    ours, theirs = dict(window=window), dict(size=arguments["size"] if arguments else None)
    theirs["geometry"] = {name: value for name, value in arguments.items() if name != "size"} if arguments else None
    if "mask" in features and arguments:
        ours["mask"] = theirs["key_mask"] = rng.random((batch, *grid)) < 0.6
    elif "slot_mask" in features:
        theirs["slot_mask"] = rng.random(full) < 0.6
        ours["mask"] = theirs["slot_mask"] if arguments else np.swapaxes(theirs["slot_mask"], 1, 2)
    if "segments" in features:
        ids = rng.integers(0, 2, (batch, *queries)), rng.integers(0, 2, (batch, *grid))
        ours["segment_ids"] = theirs["segment_ids"] = ids
    for name, given in (("logits_soft_cap", 2.0), ("score_mod", score_mod), ("scale", 0.7)):
        if name in features:
            ours[name] = theirs[name] = given
    return operands, ours, theirs


def relative_fits(grid, arguments):
    """Whether every offset of the window is one that a relative table holds."""
    try:
        for x, slots in oracle.window_slots(grid, **arguments).values():
            for _, positions, *_ in slots:
                oracle.relative_entry(positions, x, arguments["size"], arguments["dilation"])
    except AssertionError:
        return False
    return True


def check(operands, ours, theirs, *, implementation, normalize="softmax", seed=0):
    """Values to 1e-10, and each argument's gradient along a random direction."""
    rng = np.random.default_rng(seed)
    residuals = normalize == "softmax"

    def run(operands):
        operands = dict(operands)
        if "bias" in operands and ours["window"] is None:
            operands["bias"] = jnp.swapaxes(operands["bias"], 1, 2)  # [batch, heads, T, S]
        result = attention(
            **operands, **ours, normalize=normalize, implementation=implementation, return_residuals=residuals
        )
        return result if residuals else (result, jnp.zeros(result.shape[:-1]))

    expected = oracle.attention(**operands, **theirs, normalize=normalize)
    if not residuals:
        expected = expected[0], np.zeros_like(expected[1])
    finite = np.isfinite(expected[1])
    weights = rng.normal(size=expected[0].shape), rng.normal(size=expected[1].shape)

    def loss(operands):
        output, lse = run(operands)
        return (output * weights[0]).sum() + (jnp.where(finite, lse, 0) * weights[1]).sum(), (output, lse)

    def expected_loss(**operands):
        output, lse = oracle.attention(**operands, **theirs, normalize=normalize)
        lse = np.where(finite, lse, 0) if residuals else 0
        return (output * weights[0]).sum() + (lse * weights[1]).sum()

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=quick)
    (_, result), gradients = gradient(operands)
    for ours_is, theirs_is in zip(result, expected, strict=True):
        np.testing.assert_allclose(ours_is, theirs_is, rtol=1e-10, atol=1e-11)
    for name in operands:
        direction = rng.normal(size=operands[name].shape)
        numeric = oracle.directional(expected_loss, operands, name, direction)
        # A central difference in float64 is right to about 1e-8 of a loss of order one.
        np.testing.assert_allclose((gradients[name] * direction).sum(), numeric, rtol=1e-6, atol=1e-6, err_msg=name)


FEATURES = [
    *("bias", "relative_bias", "embedding", "shared", "extra", "mask", "slot_mask", "segments"),
    *("logits_soft_cap", "score_mod", "scale"),
]


@pytest.mark.parametrize("tiled", TILINGS)
@hypothesis.settings(max_examples=10, phases=[hypothesis.Phase.generate])
@hypothesis.given(data=st.data())
def test_xla_is_the_definition(tiled, data):
    drawn(data, "xla", tiled)


@hypothesis.settings(max_examples=10, phases=[hypothesis.Phase.generate])
@hypothesis.given(data=st.data())
def test_reference_is_the_definition(data):
    drawn(data, "reference", "few")


def drawn(data, implementation, tiled):
    rank = data.draw(st.sampled_from([1, 2]))
    grid, arguments = data.draw(grids(rank=rank, most=14 if rank == 1 else 7, widest=5 if rank == 1 else 3))
    seed = data.draw(st.integers(0, 99))
    operands, ours, theirs = make(grid, arguments, features=data.draw(st.sets(st.sampled_from(FEATURES))), seed=seed)
    normalize = data.draw(st.sampled_from(NORMALIZERS))
    with tiling(tiled):
        check(operands, ours, theirs, implementation=implementation, normalize=normalize, seed=seed)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
    "features", [{"bias", "slot_mask", "extra", "scale"}, {"segments", "score_mod", "logits_soft_cap"}]
)
def test_without_a_window(implementation, features):
    operands, ours, theirs = make((9,), None, features=features, seed=1)
    check(operands, ours, theirs, implementation=implementation)


def test_without_a_window_in_many_tiles():
    operands, ours, theirs = make((40,), None, features={"bias", "slot_mask", "extra"}, seed=1)
    with tiling("many"):
        check(operands, ours, theirs, implementation="xla", normalize="sigmoid")


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_three_dimensions(implementation):
    arguments = dict(
        size=(2, 3, 2), dilation=(1, 1, 2), boundary=("zero", "shift", "wrap"), causal=(True, False, False)
    )
    arguments |= dict(stride=(1, 1, 1), block=(1, 2, 1), offset=(None, None, None))
    features = {"relative_bias", "embedding", "bias", "mask", "extra"}
    operands, ours, theirs = make((3, 5, 4), arguments, features=features, seed=2, heads=2, key_heads=1, batch=1)
    check(operands, ours, theirs, implementation=implementation)
