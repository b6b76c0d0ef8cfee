"""Derivatives of `attention` in every mode and order, of every operand at once."""

import functools

import jax
import numpy as np
import pytest
from contract import IMPLEMENTATIONS, SMALL, agree, problem, quicker, scalar

compiled = functools.partial(jax.jit, compiler_options=quicker)
few = dict(heads=2, key_heads=1)
NORMALIZERS = ["relu", "sigmoid", "none", "sparsemax", "a function normalizes"]


def random_direction(made, seed=1):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=np.shape(x)) for name, x in made.operands.items()}


def inner(a, b):
    return sum(jax.tree.leaves(jax.tree.map(lambda x, y: (x * y).sum(), a, b)))


@pytest.mark.full
@pytest.mark.parametrize(
    ("implementation", "geometry", "arguments"),
    [
        *((SMALL, geometry, "everything") for geometry in ("dilated", "halo", "129 of 300", "global, more keys")),
        *((SMALL, "5 x 5, mask", arguments) for arguments in (*NORMALIZERS, "dropout, extra", "bias of -inf")),
        *((name, "5 x 5, mask", "everything") for name in IMPLEMENTATIONS if name != SMALL),
        (SMALL, "halo", "everything, embedded by axis"),
        ("xla", "global, 700", "the first keys"),
    ],
)
def test_forward_mode_is_a_difference(implementation, geometry, arguments):
    """A central difference of what the oracle gives."""
    made = problem(geometry, arguments, **few)
    direction, step = random_direction(made), 1e-5
    along = compiled(lambda x: jax.jvp(functools.partial(made.call, implementation), (x,), (direction,))[1])
    tangents = along(made.operands)
    moved = lambda step: made.at({name: x + step * direction[name] for name, x in made.operands.items()})
    (ahead, _), (behind, _) = (moved(s).expected(made.cotangents()) for s in (step, -step))
    for tangent, after, before in zip(jax.tree.leaves(tangents), ahead, behind, strict=False):
        with np.errstate(invalid="ignore"):
            numeric = np.where(np.isfinite(after), after - before, 0) / (2 * step)
        # The step squared is 1e-10, and rounding over the step 1e-11.
        assert np.linalg.norm(tangent - numeric) <= 1e-8 * np.linalg.norm(numeric)


@pytest.mark.core(1)
@pytest.mark.parametrize(
    ("implementation", "geometry", "arguments"),
    [
        (SMALL, "dilated", "dropout, extra"),
        (SMALL, "5 x 5, mask", "everything"),
        (SMALL, "causal and not", "everything"),
        (SMALL, "129 of 300, causal, mask", "residuals"),
        (SMALL, "global, more keys", "everything"),
        (SMALL, "Swin, ragged", "bias of -inf, capped, extra"),
        ("xla", "3-D, all at once", "everything, embedded by axis"),
        ("xla", "global, 700", "the first keys"),
        *((SMALL, "edge and reflect", arguments) for arguments in (*NORMALIZERS, "nothing but extra tokens")),
    ],
)
def test_second_derivatives(implementation, geometry, arguments):
    """The Hessian times a direction, three ways, is what the reference gives by forward over reverse."""
    made = problem(geometry, arguments, **few)
    direction, loss = random_direction(made), scalar(made, implementation)

    def forward_over_reverse(loss, x):
        return jax.jvp(jax.grad(loss), (x,), (direction,))[1]

    @compiled
    def ways(x):
        return dict(
            forward_over_reverse=forward_over_reverse(loss, x),
            reverse_over_forward=jax.grad(lambda x: jax.jvp(loss, (x,), (direction,))[1])(x),
            reverse_over_reverse=jax.grad(lambda x: inner(jax.grad(loss)(x), direction))(x),
        )

    expected = compiled(functools.partial(forward_over_reverse, scalar(made, "reference")))(made.operands)
    for way, product in ways(made.operands).items():
        agree(product, expected, way)


@pytest.mark.full
def test_forward_over_forward_and_third_derivatives():
    made = problem("causal and not", "everything", **few)
    a, b, c = (random_direction(made, seed) for seed in (1, 2, 3))

    def derivatives(loss, x):
        first = lambda x: jax.jvp(loss, (x,), (a,))[1]
        second = lambda x: jax.jvp(first, (x,), (b,))[1]
        third = lambda x: jax.jvp(jax.grad(first), (x,), (c,))[1]
        return second(x), third(x)

    ours, theirs = (
        compiled(functools.partial(derivatives, scalar(made, name)))(made.operands) for name in (SMALL, "reference")
    )
    agree(ours, theirs, "second and third")


@pytest.mark.core(1)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("geometry", ["longer than the grid, mask", "offset behind, wrap"])
def test_jacobians_of_both_modes(geometry, implementation):
    made = problem(geometry, "everything", **few)
    run = functools.partial(made.call, implementation)
    agree(*compiled(lambda x: (jax.jacfwd(run)(x), jax.jacrev(run)(x)))(made.operands), "jacobian")


@pytest.mark.full
def test_the_whole_hessian():
    made = problem("as large as the grid", "one extra token", head_dim=2, **few)
    ours, theirs = (compiled(jax.hessian(scalar(made, name)))(made.operands) for name in (SMALL, "reference"))
    agree(ours, theirs, "hessian")


@pytest.mark.core(1)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_linearized_once_for_many_directions(implementation):
    made = problem("5 x 5, mask", "residuals", **few)
    run = functools.partial(made.call, implementation)
    direction = random_direction(made)
    along = compiled(jax.linearize(run, made.operands)[1])
    agree(along(direction), jax.jvp(run, (made.operands,), (direction,))[1], "linearized")
    agree(along(jax.tree.map(lambda x: -2 * x, direction)), jax.tree.map(lambda x: -2 * x, along(direction)), "scaled")


@pytest.mark.full
def test_a_derivative_of_one_operand_alone():
    """Each is what it is among all; what is not asked for is not needed."""
    made = problem("halo", "everything", **few)
    cotangents = made.cotangents()
    expected = made.expected(cotangents)[1]

    @compiled
    def each(operands):
        return {
            name: jax.vjp(lambda x, name=name: made.call(SMALL, operands | {name: x}), x)[1](cotangents)[0]
            for name, x in operands.items()
        }

    agree(each(made.operands), expected, "alone")
