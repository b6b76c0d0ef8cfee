"""`jax.export`: a batch that is left open, and programs for machines that are not there."""

import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from calls import GRID, MODELS, NN, ZOO
from flax import nnx
from jax import export

import jaxattn
from jaxattn import attention, attention_weights, einsum, machine, mix, models, nn, zoo
from jaxattn.window import Window

INPUTS = {
    models.ViT: (8, 8, 1), models.DigitNet: (28, 28, 1), models.Swin: (16, 16, 3), models.MaxViT: (64, 64, 3),
    models.VolumeNet: (16, 16, 16, 1), models.SwinVolume: (8, 8, 8, 1), models.SAMViT: (64, 64, 3),
}  # fmt: skip
EAGER = (zoo.conv, nn.Attention)  # of the core
LAYERS = [*ZOO, *NN, *MODELS]


@pytest.fixture(autouse=True)
def as_users_have_it():
    """Without the checks of shapes that the tests add, which know no symbolic ones."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def opened(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    """An argument of any number of entries."""
    return jax.ShapeDtypeStruct(export.symbolic_shape(", ".join(["batch", *map(str, shape)])), dtype)


def drawn(n: int, *shape: int):
    return np.random.default_rng(n).normal(size=(n, *shape)).astype(np.float32)


@pytest.mark.parametrize(
    "layer",
    [pytest.param(layer, marks=[] if layer in EAGER else pytest.mark.full) for layer in LAYERS],
    ids=lambda layer: layer.__name__,
)
def test_every_layer_and_network_takes_any_batch(layer):
    """What is of the core is run; of the rest, the program alone is made."""
    shape = INPUTS.get(layer, (32, 32, 3) if layer in MODELS else (*GRID, 8))
    if layer in ZOO:
        state, call = None, lambda state, x: layer(x, **ZOO[layer])
    else:
        make = lambda: layer(**(NN | MODELS)[layer], rngs=nnx.Rngs(0))
        made = make() if layer in EAGER else nnx.eval_shape(make)
        made.eval()
        graph, state = nnx.split(made)
        call = lambda state, x: nnx.merge(graph, state)(x)
    function = jax.jit(call)
    found = export.export(function)(state, opened(*shape))
    for n in (1, 7) if layer in EAGER else ():
        x = drawn(n, *shape)
        np.testing.assert_allclose(found.call(state, x), function(state, x), rtol=1e-4, atol=1e-5)


def primitives(x):
    """All of them, with what of attention differs from entry to entry, and its gradient."""
    mask, window = x[..., 0, 0] > -1, Window((3, 3), boundary="mask")
    attend = lambda x: attention(x, x, x, mask=(mask, None), window=window, extra_key=x[:, 0], extra_value=x[:, 1])
    weights = attention_weights(x, x, window=window)
    local = einsum("n i+r j+s h d, n i j h d -> n i j h r s", x, x, padding="SAME", r=5, s=5)
    moved = einsum("n i+r j h d, n i+r h e, r -> n i j h", x, x[:, :, 0], jnp.ones(3, x.dtype))
    return attend(x), jax.grad(lambda x: (attend(x) ** 2).sum())(x), mix(weights, x, window=window), local, moved


@pytest.mark.full
def test_the_primitives_and_their_gradients_take_any_batch():
    pytest.importorskip("flatbuffers")  # which serialising needs
    function = jax.jit(primitives)
    found = export.deserialize(export.export(function)(opened(5, 6, 2, 8)).serialize())
    for n in (1, 7):
        x = drawn(n, 5, 6, 2, 8)
        for ours, theirs in zip(found.call(x), function(x), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def products(program: str) -> set[str]:
    """The dtypes that matrix products take."""
    return set(re.findall(r"dot_general.*?: \(tensor<[\dx]*x(\w+)>", program))


def test_each_platform_has_its_own_program():
    """A CPU multiplies in float32, and takes little tiles."""
    x = jax.ShapeDtypeStruct((2, 64, 2, 8), jnp.bfloat16)
    function = jax.jit(jax.grad(lambda x: attention(x, x, x, window=Window(9)).astype(jnp.float32).sum()))
    text = {
        name: export.export(function, platforms=[*name])(x).mlir_module() for name in (("cpu",), ("tpu",), ("cuda",))
    }
    assert {name: products(found) for name, found in text.items()} == {
        ("cpu",): {"f32"}, ("tpu",): {"bf16"}, ("cuda",): {"bf16"},
    }  # fmt: skip
    assert products(export.export(function, platforms=["cpu", "tpu"])(x).mlir_module()) == {"f32", "bf16"}
    with jaxattn.traced_for("tpu", jax.device_count()):
        there = export.export(function, platforms=["tpu"])(x).mlir_module()
    assert [re.sub(r" loc\(.*", "", line) for line in there.splitlines() if not line.startswith("#loc")] == [
        re.sub(r" loc\(.*", "", line) for line in text["tpu",].splitlines() if not line.startswith("#loc")
    ]


def test_what_has_been_traced_is_traced_again_for_another_machine():
    """Also inside of a function that JAX has compiled; `einsum` leaves nothing open there."""
    x = drawn(2, 6, 6, 2, 16)
    function = jax.jit(lambda x: einsum("n i+r j+s h d, n i j h d -> n i j h r s", x, x, padding="SAME", r=5, s=5))
    here = str(function.trace(x).jaxpr)
    with jaxattn.traced_for("tpu"):
        there = str(function.trace(x).jaxpr)
        assert (machine.backend(), machine.device_count()) == ("tpu", 1)
    assert "multilinear" in here
    assert "multilinear" not in there
    assert str(function.trace(x).jaxpr) == here


@pytest.mark.core(1)
@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("n i+r j+s c, r s c -> n i j c", [(2, 12, 12, 32), (3, 3, 32)]),
        ("n i+r j+s h d, n i j h r s -> n i j h d", [(2, 10, 10, 2, 16), (2, 6, 6, 2, 5, 5)]),
        ("n i+r c, r k, k c -> n i c", [(2, 40, 64), (7, 2), (2, 64)]),
        ("n i j c, r s c o -> n 2*i+r 2*j+s o", [(2, 8, 8, 16), (4, 4, 16, 16)]),
    ],
    ids=["depthwise", "bands", "by pairs", "transposed"],
)
def test_each_platform_computes_an_einsum_in_its_own_way(equation, shapes):
    """What is exported from a CPU, also with the derivatives of both orders, is what that machine itself would export,
    but for the places in the code."""
    operands = [np.random.default_rng(n).normal(size=s).astype(np.float32) for n, s in enumerate(shapes)]

    def products(text: str) -> list[str]:
        """The convolutions and products of a program, with their settings and without the names of what they take."""
        found = re.findall(r"stablehlo\.(?:convolution|dot_general).*?:", text)
        return sorted(re.sub(r"%[\w#]+", "", line) for line in found)

    def loss(*operands):
        return (einsum(equation, *operands) ** 2).sum()

    gradient = jax.grad(loss, tuple(range(len(shapes))))
    doubled = [np.stack([x, x]) for x in operands]
    for function, arguments in (
        (lambda *x: einsum(equation, *x), operands),
        (gradient, operands),
        (lambda *x: jax.jvp(gradient, x, x)[1], operands),
        (jax.vmap(gradient), doubled),
    ):
        found = {}
        for name in ("cpu", "tpu", "cuda"):
            found[name] = products(export.export(jax.jit(function), platforms=[name])(*arguments).mlir_module())
        with jaxattn.traced_for("tpu"):
            there = export.export(jax.jit(function), platforms=["tpu"])(*arguments).mlir_module()
        assert found["tpu"] == found["cuda"] == products(there) != found["cpu"]
        both = export.export(jax.jit(function), platforms=["cpu", "tpu"])(*arguments).mlir_module()
        assert set(products(both)) == {*found["cpu"], *found["tpu"]}


def test_a_grid_of_an_open_size_is_refused():
    (tokens,) = export.symbolic_shape("tokens")
    x = jax.ShapeDtypeStruct((2, tokens, 2, 4), jnp.float32)
    refused = [
        (lambda x: attention(x, x, x), r"attention: query is .* sizes that are known: symbolic .* batch axes alone"),
        (lambda x: attention(x, x, x, window=Window(3)), r"attention: query is .* sizes that are known"),
        (lambda x: einsum("n i+r h d, r -> n i h d", x, jnp.ones(3)), r"'i\+r' must have sizes that are known"),
    ]
    for function, message in refused:
        with pytest.raises(ValueError, match=message):
            export.export(jax.jit(function))(x)
