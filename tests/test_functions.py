"""Which functions are told apart by what they compute, and that none is taken for another that computes otherwise."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.attention import attention
from jaxattn.functions import known
from jaxattn.window import Window

module = importlib.import_module("jaxattn.attention")
SLOPE = 1.0


class Bias:
    def __init__(self, slope):
        self.slope = slope

    def __call__(self, score, head, query, key):
        return score - self.slope * abs(query[0] - key[0])

    def method(self, *arguments):
        return self(*arguments)


def sloped(slope):
    return lambda score, head, query, key: score - slope * jnp.abs(query[0] - key[0])


def of_a_global(score, head, query, key):
    return score - SLOPE * jnp.abs(query[0] - key[0])


def twice(function):
    return lambda *arguments: function(*arguments) + function(*arguments)


def test_alike():
    assert known(sloped(2.0)) == known(sloped(2.0))
    assert hash(known(sloped(2.0))) == hash(known(sloped(2.0)))
    assert known(twice(sloped(2.0))) == known(twice(sloped(2.0)))
    assert known(functools.partial(of_a_global, head=1)) == known(functools.partial(of_a_global, head=1))
    assert known(jax.nn.relu) is not None
    assert known(jnp.maximum) == known(jnp.maximum)


def test_not_alike(monkeypatch):
    for one, other in [(2.0, 3.0), (2, 2.0), (0.0, -0.0), (True, 1), ("a", "b"), ((1, 2), (2, 1))]:
        assert known(sloped(one)) != known(sloped(other))
    before = known(of_a_global)
    monkeypatch.setitem(globals(), "SLOPE", 2.0)
    assert known(of_a_global) != before
    assert known(sloped(sloped(1))) != known(sloped(sloped(2)))
    assert known(functools.partial(of_a_global, head=1)) != known(functools.partial(of_a_global, head=2))


def test_not_known():
    """What may change, or be traced."""
    bias = Bias(1.0)
    for value in (np.ones(2), jnp.ones(()), [1], {}, bias, bias.method, importlib.import_module("test_functions")):
        assert known(sloped(value)) is None
        assert known(functools.partial(of_a_global, value)) is None
    assert known(bias) is None
    assert known(bias.method) is None
    jax.jit(lambda x: [known(sloped(x))] == [None] or pytest.fail("a tracer is known"))(1.0)

    def empty(*arguments):
        return later(*arguments)

    assert known(empty) is None

    def later(*arguments):
        return empty(*arguments)

    assert known(empty) is not None  # functions that call each other


@pytest.mark.parametrize("name", ["score_mod", "normalize"])
def test_a_call_with_a_function_is_compiled_once(name):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 1, 4)))

    def run(slope):
        function = {
            "score_mod": lambda score, head, query, key: score - slope * jnp.abs(query[0] - key[0]),
            "normalize": lambda scores, mask: jnp.where(mask, slope * scores, 0),
        }[name]
        return attention(x, x, x, window=Window(3), **{name: function})

    first = run(2.0)
    size = module._attend_compiled._cache_size()
    np.testing.assert_array_equal(run(2.0), first)
    assert module._attend_compiled._cache_size() == size
    assert not np.allclose(run(3.0), first)


@pytest.mark.full
def test_state_is_read_at_every_call():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 1, 4)))
    bias = Bias(1.0)
    run = lambda: attention(x, x, x, window=Window(3), score_mod=bias.method)
    first = run()
    bias.slope = 2.0
    want = attention(x, x, x, window=Window(3), score_mod=sloped(2.0))
    assert not np.allclose(first, want)
    np.testing.assert_allclose(run(), want, rtol=1e-12)
    # and what it closes over is differentiated
    slope = jax.grad(lambda s: attention(x, x, x, window=Window(3), score_mod=sloped(s)).sum())(2.0)
    step = 1e-6
    ends = [attention(x, x, x, window=Window(3), score_mod=sloped(2.0 + s)).sum() for s in (-step, step)]
    np.testing.assert_allclose(slope, (ends[1] - ends[0]) / (2 * step), rtol=1e-5)
