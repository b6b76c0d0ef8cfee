"""`attention` under vmap, scan, checkpoint and ahead-of-time compilation: what it gives without them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import IMPLEMENTATIONS, SMALL, agree, bias, extra_tokens, problem, quicker, scalar
from jax.experimental import jet

from jaxattn.attention import attention
from jaxattn.window import Window

compiled = functools.partial(jax.jit, compiler_options=quicker)
few = dict(heads=2, key_heads=1)
# Each operand of the problem that has everything, and the options that are arrays.
MAPPED = [
    *("query", "key", "value", "bias", "relative_bias", "key_embedding", "extra_key", "extra_value"),
    *("scale", "logits_soft_cap", "sink_logits", "mask", "segment_ids", "dropout_key"),
]
GEOMETRY = "dilation 3, mask"


@functools.cache
def everything(name=None):
    """The problem with every operand, and, for the derivative with respect to all of them, one compiled function of all
    that could be mapped over."""
    made = problem(GEOMETRY, "everything", **few)
    given = made.operands | {option: made.options[option] for option in ("mask", "segment_ids")}
    if name == "dropout_key":
        given["dropout_key"], made.options["dropout_rate"] = jax.random.key(3), 0.3
    weights = made.cotangents()

    def values_and_gradients(given):
        differentiated = {name: given[name] for name in made.operands}
        result, pullback = jax.vjp(lambda x: made.call(SMALL, given | x), differentiated)
        return result, pullback(weights)[0]

    return given, values_and_gradients, compiled(values_and_gradients)


def two_of(name, x):
    """Two values of what may be mapped over."""
    if name == "dropout_key":
        return jax.random.split(x)
    if name == "segment_ids":
        return tuple(np.stack([ids, np.roll(ids, 3, axis=-1)]) for ids in x)
    return np.stack([x, ~x if x.dtype == bool else 0.7 * x[..., ::-1] if x.ndim else 1.3 * x])


@pytest.mark.core(1)
@pytest.mark.parametrize("name", MAPPED)
def test_vmap_over_one_argument_alone(name):
    """Values and gradients; and the gradient of a vmap, in which what is not mapped adds up."""
    given, function, single = everything(name if name == "dropout_key" else None)
    two = two_of(name, given[name])
    axes = {other: 0 if other == name else None for other in given}
    together = compiled(jax.vmap(function, in_axes=(axes,)))(given | {name: two})
    apart = [single(given | {name: jax.tree.map(lambda x, n=n: x[n], two)}) for n in range(2)]
    agree(together, jax.tree.map(lambda *x: np.stack(x), *apart), f"vmap over {name}")


@pytest.mark.full
@pytest.mark.parametrize("name", ["query", "key", "relative_bias"])
def test_the_gradient_of_a_vmap(name):
    """What is not mapped over adds up."""
    made = problem("causal and not", "everything", **few)
    loss, two = scalar(made, SMALL), two_of(name, made.operands[name])
    axes = {other: 0 if other == name else None for other in made.operands}
    mapped = lambda operands: jax.vmap(loss, in_axes=(axes,))(operands).sum()
    together = compiled(jax.grad(mapped))(made.operands | {name: two})
    gradient = compiled(jax.grad(loss))
    apart = [gradient(made.operands | {name: two[n]}) for n in range(2)]
    expected = {other: (np.stack if other == name else sum)([x[other] for x in apart]) for other in made.operands}
    agree(together, expected, f"gradient of vmap over {name}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nested_vmaps_over_axes_anywhere(implementation):
    """The heads and two batch axes, mapped one by one, are what they are together."""
    made = problem("5 x 5, mask", batch=(2, 3), heads=2, key_heads=2)
    query, key, value = (made.operands[name] for name in ("query", "key", "value"))
    one_head = lambda *x: made.call(implementation, {n: x[..., None, :] for n, x in zip(made.operands, x, strict=True)})
    heads = jax.vmap(lambda *x: one_head(*x)[..., 0, :], in_axes=-2, out_axes=-2)
    inner = jax.vmap(heads, in_axes=(0, -1, 2), out_axes=-1)  # the second batch axis: first, last, in the middle
    outer = compiled(jax.vmap(inner, out_axes=1))
    output = outer(query, np.moveaxis(key, 1, -1), np.moveaxis(value, 1, 3))
    agree(jnp.moveaxis(output, (1, -1), (0, 1)), made.expected(made.cotangents())[0][0], "nested")


@pytest.mark.full
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scan_and_checkpoint(implementation):
    """Through a loop, with and without recomputation, derivatives are those of layers written out."""
    made = problem("5 x 3", [bias, extra_tokens], value_dim=3, key_heads=4, batch=(1,))
    weights = made.cotangents()[0]
    keep = jax.checkpoint_policies.dots_saveable

    def loss(operands, wrap, scanned):
        rest = {name: operands[name] for name in ("bias", "extra_key", "extra_value")}
        layer = wrap(lambda x: x + made.call(implementation, rest | dict(query=x, key=x, value=x)))
        x = operands["query"]
        looped = lambda x: jax.lax.scan(lambda x, _: (layer(x), None), x, length=3)[0]
        return ((looped(x) if scanned else layer(layer(layer(x)))) * weights).sum()

    gradient = lambda wrap, scanned: compiled(jax.value_and_grad(lambda x: loss(x, wrap, scanned)))(made.operands)
    expected = gradient(lambda f: f, False)
    agree(gradient(lambda f: f, True), expected, "scan")
    agree(gradient(jax.checkpoint, True), expected, "checkpoint in a scan")
    agree(gradient(functools.partial(jax.checkpoint, policy=keep), False), expected, "checkpoint with a policy")


@pytest.mark.full
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inside_while_and_cond(implementation):
    """Forward mode through a loop without a known end, reverse mode through a branch."""
    made = problem("causal", value_dim=3, key_heads=4, batch=())
    layer = lambda x: made.call(implementation, dict(query=x, key=x, value=x))
    x, direction = made.operands["query"], made.operands["key"]

    def loop(x):
        return jax.lax.while_loop(lambda state: state[0] < 2, lambda state: (state[0] + 1, layer(state[1])), (0, x))[1]

    twice = lambda x: layer(layer(x))
    along = lambda f: compiled(lambda x: jax.jvp(f, (x,), (direction,)))(x)
    agree(along(loop), along(twice), "while")
    branch = lambda x: (jax.lax.cond(x[0, 0, 0] < 9, twice, lambda x: x, x) ** 2).sum()
    agree(compiled(jax.grad(branch))(x), compiled(jax.grad(lambda x: (twice(x) ** 2).sum()))(x), "cond")


@pytest.mark.core(1)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_shapes_before_values_and_compiled_ahead(implementation):
    made = problem("halo", "everything")
    run = functools.partial(made.call, implementation)
    shapes = jax.eval_shape(run, made.operands)
    ahead = jax.jit(run).lower(made.operands).compile(quicker)(made.operands)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), ahead) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    agree(ahead, made.expected(made.cotangents())[0], "compiled ahead")


@pytest.mark.core(1)
@pytest.mark.parametrize(
    ("implementation", "geometry"), [("reference", "halo"), ("xla", "129 of 300"), (SMALL, "wrap and mask")]
)
def test_the_same_bits_every_time(geometry, implementation):
    """Run twice, and compiled twice, in float32."""
    made = problem(geometry, "residuals").cast(np.float32)

    def run(operands):
        result, pullback = jax.vjp(functools.partial(made.call, implementation), operands)
        return result, pullback(jax.tree.map(jnp.ones_like, result))[0]

    once, again = (jax.jit(functools.partial(run)).lower(made.operands).compile() for _ in range(2))
    first = once(made.operands)
    for other in (once(made.operands), again(made.operands)):
        jax.tree.map(np.testing.assert_array_equal, first, other)


def test_a_donated_query():
    made = problem("5 x 5, mask", value_dim=3)
    rest = {name: x for name, x in made.operands.items() if name != "query"}
    run = lambda query: made.call(SMALL, rest | dict(query=query))
    query = jnp.array(made.operands["query"])
    output = jax.jit(run, donate_argnums=0, compiler_options=quicker)(query)
    assert query.is_deleted()
    agree(output, made.expected(made.cotangents())[0][0], "donated")


@pytest.mark.core(1)
@pytest.mark.parametrize(("implementation", "sinks"), [("xla", False), ("xla", True), ("reference", True)])
def test_it_is_linear_in_its_values(implementation, sinks):
    rng = np.random.default_rng(0)
    q, k, v, y, extra = (jnp.asarray(rng.normal(size=(2, n, 2, 3))) for n in (7, 7, 7, 7, 2))

    given = {"sink_logits": jnp.asarray([0.5, -1.0])} if sinks else {}
    run = functools.partial(attention, window=Window(3), implementation=implementation, extra_key=extra, **given)
    one = lambda v, extra_value: run(q, k, v, extra_value=extra_value)
    found = jax.linear_transpose(one, v, extra)(y)
    np.testing.assert_allclose(sum(map(jnp.vdot, found, (v, extra))), jnp.vdot(y, one(v, extra)), rtol=1e-9)
    mapped = jax.vmap(one, (0, None))
    both = jax.linear_transpose(mapped, jnp.stack([v, v]), extra)(jnp.stack([y, 2 * y]))
    np.testing.assert_allclose(both[0], jnp.stack([found[0], 2 * found[0]]), rtol=1e-9)
    np.testing.assert_allclose(both[1], 3 * found[1], rtol=1e-9)
    if implementation == "xla":
        with pytest.raises(ValueError, match=r"return_residuals \(=True\) must be False where it is transposed"):
            jax.linear_transpose(lambda v: run(q, k, v, extra_value=extra, return_residuals=True)[0], v)(y)


def test_jet_has_no_rule_for_xla_and_reference_needs_none():
    x, y = (jnp.asarray(np.random.default_rng(n).normal(size=(5, 1, 2))) for n in range(2))
    run = lambda how: lambda v: attention(x, x, v, window=Window(3), implementation=how)
    value, (first, second) = jet.jet(run("reference"), (x,), ((y, 0 * y),))
    np.testing.assert_allclose(value, run("reference")(x), rtol=1e-9)
    np.testing.assert_allclose(first, run("reference")(y), rtol=1e-9)
    np.testing.assert_allclose(second, 0 * y, atol=1e-12)
    with pytest.raises(KeyError, match="windowed_attention"):
        jet.jet(run("xla"), (x,), ((y, 0 * y),))


@pytest.mark.full
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_the_derivative_of_dropout_is_no_second_use_of_its_key(implementation):
    x = jnp.ones((1, 6, 2, 4))
    run = lambda x, key: attention(
        x, x, x, window=Window(3), dropout_rate=0.5, dropout_key=key, implementation=implementation
    ).sum()
    with jax.debug_key_reuse(True):
        key = jax.random.key(1)
        assert jnp.isfinite(jax.grad(run)(x, key)).all()
        with pytest.raises(jax.errors.KeyReuseError):
            run(x, key)
    raw = jax.random.PRNGKey(1)
    np.testing.assert_array_equal(run(x, raw), run(x, jax.random.key(1)))
    rbg = jax.random.key(1, impl="rbg")
    np.testing.assert_allclose(run(x, rbg), jax.jit(run)(x, rbg), rtol=1e-12)


@pytest.mark.full
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ranks_may_be_kept_apart_outside(implementation):
    """The library broadcasts on purpose, also in what is traced later: derivatives, and what is lowered."""
    made = problem("5 x 5, mask", "everything")
    with jax.numpy_rank_promotion("raise"):
        jax.jit(jax.value_and_grad(scalar(made, implementation))).lower(made.operands)
        hessian = jax.jvp(jax.grad(scalar(made, implementation)), (made.operands,), (made.operands,))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(hessian))
