"""Rotary tables against complex numbers in NumPy float64, shifted grids and other libraries; ALiBi by loops."""

import itertools
import math
from functools import partial
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from contract import quicker
from flax import nnx
from tiers import examples
from windows import grids

from jaxattn import attention, position
from jaxattn.nn import Attention
from jaxattn.window import Window

close = partial(np.testing.assert_allclose, rtol=0, atol=1e-12)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def turned(x, frequencies, positions, pairing="halves", sign=1):
    """The pairs of x [..., tokens..., heads, head_dim] as complex numbers, each turned by its angle, one at a time."""
    x, pairs = np.array(x, float), frequencies.shape[-2]
    for *at, h, p in np.ndindex(*x.shape[:-1], pairs):
        one, other = (p, p + pairs) if pairing == "halves" else (2 * p, 2 * p + 1)
        stands = positions[tuple(at[len(at) - positions.ndim + 1 :])]
        speed = frequencies[p] if frequencies.ndim == 2 else frequencies[h, p]
        z = complex(x[(*at, h, one)], x[(*at, h, other)]) * np.exp(1j * sign * (speed @ stands))
        x[(*at, h, one)], x[(*at, h, other)] = z.real, z.imag
    return x


def by_axis(base, *pairs):
    """[pairs, axes] of axes one after the other, each with frequencies from 1 down to its base's last."""
    rows = [[base ** (-m / n) * (a == b) for b in range(len(pairs))] for a, n in enumerate(pairs) for m in range(n)]
    return np.array(rows)


MIXED = draw(5, 2, 3, 2)
# the grid, head_dim, arguments, and the same as frequencies and as places
CASES = [
    ((5,), 8, {}, by_axis(1e4, 4), lambda i: i),
    ((5,), 8, {"pairing": "neighbours", "base": 7, "axes": (3,)}, by_axis(7, 3), lambda i: i),
    (
        (3, 4),
        8,
        {"stretch": (1.5, 0.5), "offset": (-2, 1.5)},
        by_axis(1e4, 2, 2),
        lambda i: (i - np.array([2, -1.5])) / [1.5, 0.5],
    ),
    ((3, 4), 12, {"axes": (4, 1), "stride": (2, 3), "base": 9.0}, by_axis(9, 4, 1), lambda i: i * [2, 3]),
    ((2, 3), 6, {"frequencies": MIXED, "pairing": "neighbours", "offset": 3}, MIXED, lambda i: i + 3),
    ((2, 1, 3), 12, {"base": 100.0}, by_axis(100, 2, 2, 2), lambda i: i),
    ((4,), 6, {"stretch": 2, "scaling": "base", "base": 50}, by_axis(50 * 2**1.5, 3), lambda i: i),
]


def test_rotary_is_a_product_of_complex_numbers():
    """Values, and gradients: what comes back is turned back, and a frequency's is by the place and the turned pair."""
    xs = [draw(n, 2, *grid, 2, head_dim) for n, (grid, head_dim, *_) in enumerate(CASES)]
    cotangents = [draw(50 + n, *x.shape) for n, x in enumerate(xs)]

    @jax.jit
    def run(xs, mixed):
        def rotate(xs, mixed):
            kwargs = [{**case[2], **({"frequencies": mixed} if "frequencies" in case[2] else {})} for case in CASES]
            tables = [position.rotary(c[0], c[1], **k, dtype=jnp.float64) for c, k in zip(CASES, kwargs, strict=True)]
            return list(map(position.rotate, xs, tables))

        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            y, pull = jax.vjp(rotate, xs, mixed)
            return y, pull(cotangents)

    found, (back, by_mixed) = run(xs, MIXED)
    for x, y, c, g, (grid, _, kwargs, frequencies, place) in zip(xs, found, cotangents, back, CASES, strict=True):
        positions = place(np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).astype(float))
        pairing = kwargs.get("pairing", "halves")
        close(y, turned(x, frequencies, positions, pairing))
        close(g, turned(c, frequencies, positions, pairing, sign=-1))
        if frequencies is MIXED:  # d Re(c̄ z e^{iθ}) / dθ = -Im(c̄ z e^{iθ}), and θ by ω is the place
            z, w = (a[..., 0::2] + 1j * a[..., 1::2] for a in (np.asarray(y), c))
            slope = -(np.conj(w) * z).imag
            close(by_mixed, np.einsum("nabhp,abr->hpr", slope, positions))


@pytest.mark.full
@examples(1, phases=[hypothesis.Phase.generate])
@hypothesis.given(data=st.data())
def test_rotary_drawn(data):
    """Any grid, and any share of the head's pairs for each axis, the rest not turned."""
    grid = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    pairs = tuple(data.draw(st.integers(1, 3)) for _ in grid)
    rest, base = data.draw(st.integers(0, 2)), data.draw(st.floats(2, 1e4))
    pairing, offset = data.draw(st.sampled_from(["halves", "neighbours"])), data.draw(st.floats(-9, 9))
    x = draw(len(grid), 2, *grid, 2, 2 * (sum(pairs) + rest))
    of = partial(position.rotary, grid, x.shape[-1], axes=pairs, base=base, pairing=pairing, dtype=jnp.float64)
    rotate = lambda x: position.rotate(x, of(offset=offset))
    places = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1) + offset
    frequencies = by_axis(base, *pairs)
    y, back = jax.jit(lambda x: (rotate(x), jax.linear_transpose(rotate, x)(x)[0]), compiler_options=quicker)(x)
    close(y, turned(x, frequencies, places, pairing))
    close(back, turned(x, frequencies, places, pairing, sign=-1))


def test_scores_depend_on_differences_alone():
    """A grid whose first token stands elsewhere, at a traced place, has the same attention; one that moves is moved."""
    q, k, v = (draw(n, 4, 5, 2, 8) for n in range(3))
    window, frequencies = Window((3, 3), boundary="mask"), position.mixed_frequencies(jax.random.key(0), 2, 8, 2)

    @jax.jit
    def run(q, k, v, offset, times):
        tables = position.rotary((4, 5), 8, frequencies=times * frequencies, offset=offset, dtype=jnp.float64)
        return attention(position.rotate(q, tables), position.rotate(k, tables), v, window=window)

    still, moved = run(q, k, v, (0, 0.0), 1.0), run(q, k, v, (-3, 12.25), 1.0)
    close(moved, still)
    assert abs(still - run(q, k, v, (0, 0.0), 0.0)).max() > 0.1  # and positions matter
    rolled = run(*(np.roll(x, (1, 1), (0, 1)) for x in (q, k, v)), (0, 0.0), 1.0)
    close(rolled[2:-1, 2:-1], still[1:-2, 1:-2])
    packed = position.rotary_at(np.array([[[0.0], [1], [2]], [[7], [8], [9]]]), position.axial_frequencies(8, 1))
    assert packed.cos.shape == (2, 3, 1, 4)  # a batch, each at its own place
    rows = position.rotate(jnp.asarray(draw(9, 2, 3, 1, 8)), packed)
    close(rows, turned(draw(9, 2, 3, 1, 8), by_axis(1e4, 4), np.arange(3.0)[None, :, None] + [[[0]], [[7]]]))


def test_a_layer_turns_its_queries_and_keys():
    """Strided, with shared key heads, learned frequencies and a module after them; and over all of a grid."""
    x = jnp.asarray(draw(1, 5, 4, 8))
    window = Window((3, 3), stride=2, boundary="mask")
    seen = []
    layers: dict[str, Any] = {
        "mixed": layer64(4, 8, 16, num_kv_heads=2, window=window, rotary="mixed", transform_qk=Scaled(seen)),
        "whole": layer64(2, 8, rank=2, rotary=partial(position.rotary, base=100.0, pairing="neighbours")),
    }
    assert layers["mixed"].rotary_frequencies.shape == (2, 2, 2)
    assert ("transform_qk", "gain") in dict(nnx.to_flat_state(nnx.state(layers["mixed"], nnx.Param)))
    places = np.stack(np.meshgrid(np.arange(5.0), np.arange(4.0), indexing="ij"), -1)

    def projected(layer, x, frequencies, places, pairing, step=1):
        state = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer)))
        q, k, v = (np.tensordot(x, state[n]["kernel"], 1) + state[n]["bias"] for n in ("query", "key", "value"))
        double = np.repeat(frequencies, 2, 0) if frequencies.ndim == 3 else frequencies
        return turned(q, double, places, pairing)[::step, ::step], turned(k, frequencies, places, pairing), v, state

    def joined(y, state):
        return np.tensordot(y, state["out"]["kernel"], 2) + state["out"]["bias"]

    @jax.jit
    def run(x):
        return {name: layer(x) for name, layer in layers.items()}

    found = run(x)
    frequencies = np.asarray(layers["mixed"].rotary_frequencies[...])
    q, k, v, state = projected(layers["mixed"], x, frequencies, places, "halves", step=2)
    geometry = {"stride": 2, "boundary": "mask"}
    y, _ = oracle.attention(q[None] * 2, k[None], v[None], size=(3, 3), geometry=geometry)
    close(found["mixed"], joined(y[0], state))
    assert seen[0] == ((3, 2, 4, 4), (5, 4, 2, 4), (0, 0))
    q, k, v, state = projected(layers["whole"], x, by_axis(100, 1, 1), places, "neighbours")
    y, _ = oracle.attention(*(a.reshape(1, 20, 2, 4) for a in (q, k, v)))
    close(found["whole"].reshape(20, 8), joined(y[0], state))


def layer64(*args, **kwargs):
    return Attention(*args, **kwargs, param_dtype=jnp.float64, rngs=nnx.Rngs(0))


class Scaled(nnx.Module):
    """Between the projections and attention; remembers what it was given."""

    def __init__(self, seen):
        self.gain, self.told = nnx.Param(jnp.asarray(2.0, jnp.float64)), seen.append

    def __call__(self, query, key, offset):
        self.told((query.shape, key.shape, offset))
        return query * self.gain[...], key


@pytest.mark.full
def test_transformations_of_a_rotary_layer():
    """vmap, remat, forward against reverse mode, bfloat16, and a grid that is split over devices."""
    kwargs = {"window": Window((3, 3), boundary="mask"), "rotary": "mixed"}
    graph, params = nnx.split(layer64(2, 8, **kwargs))
    x, tangent, cotangent = (jnp.asarray(draw(n, 2, 4, 3, 8)) for n in range(3))
    split, small = layer64(2, 8, **kwargs, axis_name="space"), layer64(2, 8, **kwargs, dtype=jnp.bfloat16)
    mesh = jax.make_mesh((4,), ("space",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    of = jax.sharding.PartitionSpec(None, "space")

    @jax.jit
    def run(params, x):
        call = lambda x: nnx.merge(graph, params)(x)
        y, moved = jax.jvp(jax.vmap(call), (x,), (tangent,))
        whole, pull = jax.vjp(jax.checkpoint(call), x)
        shards = jax.shard_map(split, mesh=mesh, in_specs=of, out_specs=of)(x)
        return y, moved, pull(cotangent)[0], whole, shards, small(x.astype(jnp.bfloat16))

    y, moved, back, whole, shards, narrow = run(params, x)
    close((moved * cotangent).sum(), (back * tangent).sum())
    close(shards, y)
    close(whole, y)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(float), y, atol=0.05)


def test_rotary_is_timms_and_transformers():
    torch, timm, llama = (pytest.importorskip(n) for n in ("torch", "timm.layers", LLAMA))
    x = draw(0, 1, 4, 6, 3, 16).astype(np.float32)  # batch, grid, heads, head_dim
    heads_first = torch.tensor(x).reshape(1, 24, 3, 16).transpose(1, 2)
    back = lambda y: y.transpose(1, 2).reshape(1, 4, 6, 3, 16).numpy()
    same = partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
    ours = lambda *args, **kwargs: position.rotate(jnp.asarray(x), position.rotary((4, 6), 16, *args, **kwargs))

    eva = timm.RotaryEmbeddingCat(16, in_pixels=False, feat_shape=[4, 6], ref_feat_shape=[2, 4]).get_embed()
    theirs = back(timm.apply_rot_embed_cat(heads_first, eva))
    same(ours(pairing="neighbours", stretch=(2, 1.5)), theirs)
    dino = timm.RotaryEmbeddingDinoV3(16, feat_shape=[4, 6]).get_embed()
    grid = np.array([4, 6])  # its coordinates are of the tokens' centres, and begin at -1 + 1/n
    theirs = back(timm.apply_rot_embed_cat(heads_first, dino, half=True))
    same(ours(base=100.0, stretch=tuple(grid / (4 * np.pi)), offset=tuple((1 - grid) / 2)), theirs)
    mixed = timm.RotaryEmbeddingMixed(48, depth=1, num_heads=3, feat_shape=[4, 6], grid_indexing="ij")
    frequencies = np.moveaxis(mixed.freqs.detach().numpy()[:, 0], 0, -1)  # [heads, pairs, axes]
    theirs = back(timm.apply_rot_embed_cat(heads_first, mixed.get_embed()[0].detach()))
    same(ours(frequencies=frequencies, pairing="neighbours"), theirs)

    row = x.reshape(1, 24, 3, 16)
    for scaling, kwargs in (
        ({"rope_type": "default"}, {"base": 500.0}),
        ({"rope_type": "linear", "factor": 4.0}, {"base": 500.0, "stretch": 4}),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **OLD}, None),
    ):
        config = llama.LlamaConfig(hidden_size=48, num_attention_heads=3, head_dim=16, rope_theta=500.0)
        config.rope_scaling = scaling
        rope = llama.LlamaRotaryEmbedding(config)
        cos, sin = rope(heads_first, torch.arange(24)[None])
        theirs = llama.apply_rotary_pos_emb(heads_first, heads_first, cos, sin)[0].transpose(1, 2).numpy()
        own: Any = kwargs or {"frequencies": rope.inv_freq.numpy()[:, None]}  # a schedule of one's own
        same(position.rotate(jnp.asarray(row), position.rotary(24, 16, **own)), theirs)


LLAMA = "transformers.models.llama.modeling_llama"
OLD = {"original_max_position_embeddings": 32}


def test_alibi_is_its_formula():
    slopes, each = draw(0, 3), draw(1, 3, 2)
    window = Window((2, 3), dilation=(1, 2))

    @jax.jit
    def run(slopes, each):
        of = partial(position.alibi, window, 3, dtype=jnp.float64)
        return of(slopes=slopes), of(slopes=each), of(slopes=slopes, distance="euclidean"), of()

    found = run(slopes, each)
    for h, a, b in itertools.product(range(3), range(3), range(5)):
        rows, columns = abs(a - 1), 2 * abs(b - 2)
        fixed = (2**-4.0, 2**-8.0, 2**-2.0)[h]
        expected = (
            -slopes[h] * (rows + columns), -each[h] @ [rows, columns], -slopes[h] * math.hypot(rows, columns),
            -fixed * (rows + columns),
        )  # fmt: skip
        close([table[h, a, b] for table in found], expected)
    weights = draw(2, 3, 3, 5)
    gradient = jax.jit(jax.grad(lambda s: (position.alibi(window, 3, slopes=s, dtype=jnp.float64) * weights).sum()))
    apart = np.add.outer(abs(np.arange(-1, 2)), 2 * abs(np.arange(-2, 3)))
    close(gradient(slopes), -(weights * apart).sum((1, 2)))
    # Press et al.: 8 heads have 1/2 .. 1/256; what is nearer weighs more, by attention itself
    close(position.alibi_slopes(8), [2.0**-n for n in range(1, 9)])


@pytest.mark.full
@examples(1, phases=[hypothesis.Phase.generate])
@hypothesis.given(drawn=grids(rank=3, most=9, widest=4), seed=st.integers(0, 9))
def test_alibi_drawn(drawn, seed):
    window = Window(**drawn[1])
    slopes = draw(seed, 2, window.rank)
    found = position.alibi(window, 2, slopes=jnp.asarray(slopes), dtype=jnp.float64)
    for h, *entry in np.ndindex(2, *(2 * k - 1 for k in window.sizes)):
        apart = [d * abs(e - k + 1) for e, k, d in zip(entry, window.sizes, window.dilation, strict=True)]
        close(found[(h, *entry)], -slopes[h] @ apart)


@pytest.mark.full
@examples(0.5, phases=[hypothesis.Phase.generate])
@hypothesis.given(data=st.data())
def test_a_window_that_is_clipped_is_what_the_smaller_one_is(data):
    """Of a layer with tables for the larger window, whose middle is what is left."""
    grid = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=2)))
    size, dilation = tuple(data.draw(st.integers(1, 7)) for _ in grid), data.draw(st.integers(1, 2))
    window = Window(size, dilation=dilation)
    layer = layer64(2, 4, window=window, relative_bias=True, clip=True)
    table = draw(3, *layer.relative_bias.shape)
    layer.relative_bias[...] = jnp.asarray(table)
    x = draw(4, 1, *grid, 4)
    state = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer)))
    q, k, v = (np.tensordot(x, state[n]["kernel"], 1) + state[n]["bias"] for n in ("query", "key", "value"))
    fits = tuple(min(n, max(length // dilation, 1)) for n, length in zip(size, grid, strict=True))
    hypothesis.assume(all(dilation <= length for length in grid))
    cut = table[(slice(None), *(slice(n - m, n + m - 1) for n, m in zip(size, fits, strict=True)))]
    y, _ = oracle.attention(q, k, v, size=fits, geometry={"dilation": dilation}, relative_bias=cut)
    found = jax.jit(lambda x: layer(x), compiler_options=quicker)(x)
    close(found, np.tensordot(y, state["out"]["kernel"], 2) + state["out"]["bias"])


def test_alibi_slopes_are_those_of_bloom():
    torch, bloom = (pytest.importorskip(n) for n in ("torch", "transformers.models.bloom.modeling_bloom"))
    for heads in (1, 2, 8, 12, 20):
        theirs = bloom.build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
        np.testing.assert_allclose(position.alibi_slopes(heads), theirs, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: position.rotary(4, 7),
            r"head_dim \(=7\) must be a multiple of 2·1, so that each .* axes=\(...\) says",
        ),
        (
            lambda: position.rotary((4, 4), 8, axes=(3, 2)),
            r"axes \(=\(3, 2\)\) must be .* 2 axes, together at most half",
        ),
        (
            lambda: position.rotary((4, 4), 8, axes=(2,)),
            r"axes \(=\(2,\)\) must be a number of pairs for each of 2 axes",
        ),
        (
            lambda: position.rotary(4, 8, stretch=0),
            r"rotary: stretch \(=0\) must be a number > 0, or one for each axis",
        ),
        (
            lambda: position.rotary(4, 8, offset=(1, 2)),
            r"rotary: offset \(=\(1, 2\)\) must be a number, or one for each",
        ),
        (
            lambda: position.rotary(4, 8, dtype=jnp.bfloat16),
            r"rotary: dtype .* must be float32 or float64; `rotate` keep",
        ),
        (
            lambda: position.rotary(4, 8, axes=(2,), frequencies=np.ones((2, 1))),
            r"rotary: axes \(=\(2,\)\) must be left out where frequencies say it all",
        ),
        (
            lambda: position.rotary(4, 4, frequencies=np.ones((3, 1))),
            r"rotary: frequencies \(of 3 pairs\) must be of at most half of head_dim \(=4\)",
        ),
        (
            lambda: position.rotary((4, 4), 8, frequencies=np.ones((4, 1))),
            r"frequencies \(=\[4, 1\]\) must be \[pairs, axes\] or .* the 2 axes of positions",
        ),
        (
            lambda: jax.eval_shape(lambda: position.rotate(jnp.ones((2, 5, 3, 8)), position.rotary(4, 8))),
            r"rotate: x \(=float64\[2, 5, 3, 8\]\) must be .*\[\*batch, 4 tokens, heads, at least 8 of head_dim\]",
        ),
        (
            lambda: position.alibi((3, 3), 2, slopes=np.ones(3)),
            r"alibi: slopes \(=\[3\]\) must be \[2\], or for each axis \[2, 2\]",
        ),
        (
            lambda: position.alibi((3, 3), 2, slopes=np.ones((2, 2)), distance="euclidean"),
            r"alibi: distance \(='euclidean'\) must be 'sum' where slopes are given for each axis",
        ),
        (lambda: position.alibi(3, 2, dtype=jnp.int32), r"alibi: dtype \(=int32\) must be of floating-point numbers"),
        (
            lambda: position.mixed_frequencies(jax.random.key(0), 2, 8, 2, dtype=jnp.complex64),
            r"mixed_frequencies: dtype \(=complex64\) must be",
        ),
        (lambda: position.rotary((3, 4), 8, frequencies=np.ones((0, 2))), r"rotary: frequencies \(=\[0, 2\]\) must be"),
        (
            lambda: jax.eval_shape(lambda s: position.rotary(4, 8, stretch=s).cos, 2.0),
            r"rotary: stretch \(=float\d+\[\]\) must be known while a program is traced",
        ),
        (
            lambda: jax.eval_shape(lambda b: position.rotary(4, 8, base=b).cos, 2.0),
            r"rotary: base \(=float\d+\[\]\) must be known while",
        ),
        (
            lambda: layer64(2, 8, window=(3, 3), transform_qk=lambda q, k, o: q)(jnp.ones((4, 5, 8))),
            r"Attention: transform_qk must return the pair \(query, key\), and not float\d+\[4, 5, 2, 4\]",
        ),
        (lambda: layer64(2, 8, rotary="axial"), r"rotary \(='axial'\) must be True or False, or one of 'mixed'"),
        (lambda: layer64(2, 8, clip=True), r"Attention: clip \(=True\) must be False without a window that may"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_learned_frequencies_in_half_precision():
    """The axial ones, turned: what a turn keeps is each one's size."""
    found = position.mixed_frequencies(jax.random.key(0), 2, 8, 2, dtype=jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    sizes = np.linalg.norm(np.asarray(found, float), axis=-1)
    np.testing.assert_allclose(sizes, np.tile([1, 10**-0.5], (2, 2)), rtol=1e-2)
    make = lambda: Attention(2, 8, window=(3, 3), rotary="mixed", param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert nnx.eval_shape(make).rotary_frequencies.dtype == jnp.bfloat16
