"""`import jaxattn` brings jax, flax, optax, chex and jaxtyping, and nothing else that takes time."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys, jax, flax.nnx, optax, chex
before = set(sys.modules)
import jaxattn
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
print(*sorted(name for name in set(sys.modules) if name.startswith("jaxattn.")))
x = jax.numpy.ones((8, 1, 4))
jaxattn.attention(x, x, x, window=jaxattn.Window(3))
print("attention", *sorted(name for name in set(sys.modules) - before if "pallas" in name))
"""


@pytest.fixture(scope="module")
def imported():
    lines = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
    return [line.split() for line in lines.splitlines()]


def test_import_brings_no_extra(imported):
    assert set(imported[0]) <= {"jaxattn", "jaxtyping"}


def test_no_pallas_is_imported_but_by_its_kernels(imported):
    """Nor by a call that has none."""
    assert imported[2] == ["attention"]


def test_modules_and_training_are_imported_by_those_who_want_them(imported):
    assert "jaxattn.einsum" in imported[1]
    for name in ("nn", "models", "equivalence", "measure", "train", "plots", "cli"):
        assert f"jaxattn.{name}" not in imported[1]


def test_the_rest_is_an_attribute_away():
    import jaxattn

    assert jaxattn.nn.Conv.__module__ == "jaxattn.nn.conv"
    assert callable(jaxattn.models.resnet18)
    assert callable(jaxattn.equivalence.convert)
    assert callable(jaxattn.measure.entropy)
    assert callable(jaxattn.plots.kernels)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = jaxattn.nothing
