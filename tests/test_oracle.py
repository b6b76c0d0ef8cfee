"""The gradients that the contract holds `attention` to, held to loops themselves."""

import jax
import numpy as np
import oracle
import pytest
from contract import ARGUMENTS, dropout, problem

OF_ALL_QUERIES = [name for name in ARGUMENTS if "part of the queries" not in name]  # which are a part of these


@pytest.mark.core(14)
@pytest.mark.parametrize("arguments", OF_ALL_QUERIES)
@pytest.mark.parametrize("geometry", ["edge and reflect", "zero and valid", "block 3, dilation 2", "global, one query"])
def test_the_oracle_itself(geometry, arguments):
    """Its values against loops over queries and slots, its gradients against central differences of them."""
    if dropout in ARGUMENTS[arguments] and geometry == "edge and reflect":
        geometry = "all at once"  # where no window holds a key twice
    made = problem(geometry, arguments, batch=(1,), heads=2, key_heads=1)
    cotangents = made.cotangents()
    result, gradients = made.expected(cotangents)
    for ours, theirs in zip(result, loops(made, made.operands), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    if arguments == "large scores":
        return  # steps would have to be as small as rounding is

    def loss(**operands):
        output, lse = loops(made, operands)
        return (output * cotangents[0]).sum() + (np.where(np.isfinite(lse), lse, 0) * cotangents[1]).sum()

    for name in made.operands:
        direction = made.rng.normal(size=made.operands[name].shape)
        numeric = oracle.directional(loss, made.operands, name, direction)
        # A central difference in float64 is right to about 1e-8 of a loss of order one.
        np.testing.assert_allclose((gradients[name] * direction).sum(), numeric, rtol=1e-6, atol=1e-6, err_msg=name)


def loops(made, operands):
    """`oracle.attention`, which hands a score_mod Python's numbers."""
    given = made.given(operands)
    if "score_mod" in given:
        arrays = lambda *told: jax.tree.map(np.asarray, told)
        given["score_mod"] = lambda *told: made.told["score_mod"](*arrays(*told))
    if not isinstance(given.get("normalize", ""), str):
        given["normalize"] = given["normalize"][0]
    return oracle.attention(**given)
