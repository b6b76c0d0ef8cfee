"""Positions of tokens: rotary tables, ALiBi's biases by distance, and relative tables cut to a smaller window."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Real, Shaped

from jaxattn.checked import checked, has_dtype, shown
from jaxattn.promotion import broadcasting
from jaxattn.sizes import Size, ints, is_sequence, per_axis
from jaxattn.window import Window

Pairing = Literal["halves", "neighbours"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotary:
    """By how much `rotate` turns each pair of a token's dimensions, and which dimensions are a pair."""

    cos: Shaped[Array, "*tokens heads pairs"]  # heads is 1 where they share the angles
    sin: Shaped[Array, "*tokens heads pairs"]
    pairing: str = dataclasses.field(metadata={"static": True})


@checked
def rotary(
    grid: Size,
    head_dim: int,
    *,
    base: float = 10000.0,
    axes: Sequence[int] | None = None,
    frequencies: Real[ArrayLike, "... pairs axes"] | None = None,
    pairing: Pairing = "halves",
    stretch: float | Sequence[float] = 1.0,
    scaling: Literal["positions", "base"] = "positions",
    stride: Size = 1,
    offset: float | Sequence[float] = 0.0,
    dtype: DTypeLike = jnp.float32,
) -> Rotary:
    """The tables by which `rotate` turns the queries, or the keys, of a grid.

    Pair p of the token at x is turned by the angle Σ_a ω[p, a]·x_a. So what a turned query makes with a turned key
    depends on the difference of their places alone: with pairs as complex numbers,

        score(x, y) = Re Σ_p q_p · conj(k_p) · exp(i Σ_a ω[p, a]·(x_a - y_a)).

    Along an axis to which n pairs belong, the m-th of them has ω = base^(-m/n). A key is turned once, where it stands;
    so one that a boundary folds ("wrap", "edge", "reflect") counts as if it were seen there.

    Args:
        grid: the tokens along each axis; an int is one axis.
        head_dim: of the queries and keys.
        base: 10000 in the paper and in EVA-02, 500000 in Llama 3, 100 in DINOv3.
        axes: how many pairs belong to each axis, one axis after the other. None: all of head_dim, as many to each.
            Where they are fewer than head_dim / 2, the dimensions after the first 2·pairs stay as they are.
        frequencies: ω itself, in place of `base` and `axes`: [pairs, axes], or [heads, pairs, axes]. It may be learned;
            `mixed_frequencies` is where that begins.
        pairing: "halves": the dimensions p and p + pairs (Llama, GPT-NeoX, DINOv3); "neighbours": 2p and 2p + 1 (the
            paper, GPT-J, EVA-02).
        stretch: how many times more tokens the grid has than what the network was trained with; one number, or one for
            each axis. DINOv3, whose coordinates go from -1 to 1 on every grid, is ``stretch=n / (4 * pi)``.
        scaling: what is stretched. "positions": they are divided by it (Chen et al.; EVA-02). "base": an axis's slowest
            frequency is divided by it, and its fastest is kept: base·stretch^(n/(n-1)) is its base ("NTK-aware").
        stride: token i stands at stride·i, as the queries of a strided window do; an int, or one for each axis.
        offset: where the first token stands: one number, also a traced one, or one for each axis.
        dtype: of the angles and the tables.

    Raises:
        ValueError: for an argument that is none of these, by name.

    References:
        Su et al. 2021 (arXiv 2104.09864); along several axes, Fang et al. 2023, EVA-02 (2303.11331); along mixed ones,
        Heo et al. 2024 (2403.13298); stretched, Chen et al. 2023 (2306.15595).

    Example:
        >>> q = k = v = jnp.ones((2, 14, 14, 6, 64))  # batch, *grid, heads, head_dim
        >>> tables = rotary((14, 14), 64, base=100.0)
        >>> jaxattn.attention(rotate(q, tables), rotate(k, tables), v, window=jaxattn.Window((7, 7))).shape
        (2, 14, 14, 6, 64)
    """
    _check_known("rotary", base=base, stretch=stretch)
    grid = ints("rotary", "grid", grid)
    rank = len(grid)
    strides = per_axis("rotary", "stride", stride, rank)
    stretches, offsets = _each("rotary", "stretch", stretch, rank), _each("rotary", "offset", offset, rank)
    if np.dtype(dtype) not in (np.float32, np.float64):
        raise ValueError(f"rotary: dtype (={dtype}) must be float32 or float64; `rotate` keeps that of x")
    if any(s <= 0 for s in stretches):
        raise ValueError(f"rotary: stretch (={stretch}) must be a number > 0, or one for each axis")
    if frequencies is None:
        slower = stretches if scaling == "base" else (1.0,) * rank
        frequencies = axial_frequencies(head_dim, rank, base=base, axes=axes, slower=slower)
    elif axes is not None or scaling == "base":
        other = "scaling (='base')" if axes is None else f"axes (={axes})"
        raise ValueError(f"rotary: {other} must be left out where frequencies say it all")
    _check_frequencies("rotary", np.shape(frequencies), rank)
    if 2 * (pairs := np.shape(frequencies)[-2]) > head_dim:
        raise ValueError(f"rotary: frequencies (of {pairs} pairs) must be of at most half of head_dim (={head_dim})")
    if scaling == "base":
        stretches = (1.0,) * rank
    along = [
        (jnp.asarray(o, dtype) + s * jnp.arange(n, dtype=dtype)) / by
        for n, s, o, by in zip(grid, strides, offsets, stretches, strict=True)
    ]
    positions = jnp.stack(jnp.meshgrid(*along, indexing="ij"), axis=-1)
    return rotary_at(positions, frequencies, pairing=pairing)


@checked
@broadcasting
def rotary_at(
    positions: Real[ArrayLike, "*tokens axes"],
    frequencies: Real[ArrayLike, "... pairs axes"],
    *,
    pairing: Pairing = "halves",
) -> Rotary:
    """The tables of `rotary` for tokens anywhere: of a packed batch, or of one whose caches are not equally full.

    The angles are computed in the dtype of `positions`, or float32 where that is narrower or of integers.

    >>> rotary_at(jnp.array([[5.0], [6.0]]), axial_frequencies(4, 1)).cos.shape  # tokens, heads, pairs
    (2, 1, 2)
    """
    rank, shape = np.shape(positions)[-1], np.shape(frequencies)
    _check_frequencies("rotary_at", shape, rank)
    positions = jnp.asarray(positions)
    dtype = jnp.float64 if positions.dtype == jnp.float64 else jnp.float32
    positions, frequencies = positions.astype(dtype), jnp.asarray(frequencies).astype(dtype)
    frequencies = frequencies.reshape((-1, *shape[-2:]))
    angles = sum(positions[..., a, None, None] * frequencies[..., a] for a in range(rank))
    angles = jnp.asarray(angles)
    return Rotary(jnp.cos(angles), jnp.sin(angles), pairing)


@checked
@broadcasting
def rotate(x: Float[Array, "*batch_and_tokens heads head_dim"], tables: Rotary) -> Array:
    """The queries or keys, each pair of whose dimensions is turned by its angle, in their own dtype.

    `x` is [*batch, *grid, heads, head_dim], and the tables are `rotary`'s for that grid. A key head that several query
    heads share takes one head's angles.

    >>> rotate(jnp.array([[[1.0, 0.0]]]), rotary_at([[jnp.pi / 2]], [[1.0]])).round(3)  # a quarter turn
    Array([[[-0.,  1.]]], dtype=float...)
    """
    if not isinstance(tables, Rotary):
        raise ValueError(f"rotate: tables (={shown(tables)}) must be what `rotary` or `rotary_at` returns")
    x = jnp.asarray(x)
    tokens, (heads, pairs) = tables.cos.shape[:-2], tables.cos.shape[-2:]
    fits = x.ndim >= len(tokens) + 2 and jnp.issubdtype(x.dtype, jnp.floating)
    fits = fits and x.shape[x.ndim - 2 - len(tokens) : -2] == tokens and heads in (1, x.shape[-2])
    if not fits or 2 * pairs > x.shape[-1]:
        raise ValueError(
            f"rotate: x (={shown(x)}) must be floating point, [*batch, {', '.join(map(str, tokens))} tokens, "
            f"{'heads' if heads == 1 else f'{heads} heads'}, at least {2 * pairs} of head_dim], as the tables are"
        )
    turned, rest = jnp.split(x, [2 * pairs], axis=-1)
    axis = -2 if tables.pairing == "halves" else -1  # of the pair, in [2, pairs] or [pairs, 2]
    pair = turned.reshape((*x.shape[:-1], 2, pairs) if axis == -2 else (*x.shape[:-1], pairs, 2))
    wide = pair.astype(jnp.promote_types(x.dtype, tables.cos.dtype))
    first, second = jnp.take(wide, 0, axis), jnp.take(wide, 1, axis)
    cos, sin = tables.cos.astype(wide.dtype), tables.sin.astype(wide.dtype)
    moved = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis)
    return jnp.concatenate([moved.reshape(turned.shape).astype(x.dtype), rest], axis=-1)


@checked
def axial_frequencies(
    head_dim: int,
    rank: int,
    *,
    base: float = 10000.0,
    axes: Sequence[int] | None = None,
    slower: float | Sequence[float] = 1.0,
) -> np.ndarray:
    """The ω of `rotary`, float64 [pairs, rank]: each pair belongs to one axis, on which alone its angle depends.

    `slower` is by how much each axis's slowest frequency is divided. What a network has beyond that (as Llama 3.1's
    and YaRN's, which depend on the wavelength) is made of these and given to `rotary` as `frequencies`.

    >>> axial_frequencies(8, 2, base=100.0)
    array([[1. , 0. ],
           [0.1, 0. ],
           [0. , 1. ],
           [0. , 0.1]])
    """
    _check_known("axial_frequencies", base=base, slower=slower)
    slowness = _each("axial_frequencies", "slower", slower, rank)
    for name, value, numbers in (("base", base, [base]), ("slower", slower, slowness)):
        if any(number <= 0 for number in numbers):
            raise ValueError(f"axial_frequencies: {name} (={value}) must be > 0")
    if axes is None and head_dim % (2 * rank):
        raise ValueError(
            f"axial_frequencies: head_dim (={head_dim}) must be a multiple of 2·{rank}, so that each axis has as many "
            "pairs; axes=(...) says how many each has"
        )
    pairs = (head_dim // (2 * rank),) * rank if axes is None else tuple(axes)
    if len(pairs) != rank or 2 * sum(pairs) > head_dim:
        raise ValueError(
            f"axial_frequencies: axes (={axes}) must be a number of pairs for each of {rank} axes, together at most "
            f"half of head_dim (={head_dim})"
        )
    frequencies = np.zeros((sum(pairs), rank))
    for a, (n, by) in enumerate(zip(pairs, slowness, strict=True)):
        first = sum(pairs[:a])
        along = base * by ** (n / max(n - 1, 1))
        frequencies[first : first + n, a] = along ** (-np.arange(n) / n)
    return frequencies


@checked
def mixed_frequencies(
    key: Any, num_heads: int, head_dim: int, rank: int, *, base: float = 10.0, dtype: DTypeLike = jnp.float32
) -> Array:
    """Where learned `frequencies` of `rotary` begin: the axial ones, in axes turned at random in each head.

    [num_heads, head_dim / 2, rank]. (Heo et al. 2024, RoPE-Mixed, arXiv 2403.13298, for two axes.)

    >>> mixed_frequencies(jax.random.key(0), 4, 16, 2).shape
    (4, 8, 2)
    """
    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0):
        raise ValueError(f"mixed_frequencies: key (={shown(key)}) must be a jax.random.key")
    if base <= 0:
        raise ValueError(f"mixed_frequencies: base (={base}) must be a number > 0")
    _check_floating("mixed_frequencies", dtype)
    wide = jnp.promote_types(dtype, jnp.float32)  # half a precision has no orthogonal matrices
    turns = jax.random.orthogonal(key, rank, (num_heads,), wide)
    return (jnp.asarray(axial_frequencies(head_dim, rank, base=base), wide) @ turns).astype(dtype)


@checked
@broadcasting
def alibi(
    window: Window | Size,
    num_heads: int,
    *,
    slopes: Real[ArrayLike, "heads ..."] | None = None,
    distance: Literal["sum", "euclidean"] = "sum",
    dtype: DTypeLike = jnp.float32,
) -> Array:
    """A `relative_bias` that falls with the distance: [num_heads, *(2k-1)],

        b_h[δ] = -slope_h · Σ_a |δ_a|,  or -Σ_a slope_ha · |δ_a|,  or -slope_h · √Σ_a δ_a² ("euclidean").

    Distances are in tokens: along a dilated axis a slot is `dilation` of them. Slopes may be learned.

    Args:
        window: whose slots the table is looked up by, or its size.
        num_heads: heads.
        slopes: [num_heads], or one for each axis as well, [num_heads, axes]. None: 2^(-8·(h+1)/num_heads), and where
            the heads are no power of two, the slopes of the next lower one and every second one of the next higher.
        distance: how the axes' distances make one.
        dtype: of the table.

    References:
        Press et al. 2022 (arXiv 2108.12409); in two dimensions, Fuller et al. 2023, CROMA (2311.00566).

    >>> alibi(3, 2)
    Array([[-0.125     , -0.0625    , -0.        , -0.0625    , -0.125     ],
           [-0.0078125 , -0.00390625, -0.        , -0.00390625, -0.0078125 ]],      dtype=float32)
    """
    _check_floating("alibi", dtype)
    window = window if isinstance(window, Window) else Window(ints("alibi", "window", window))
    slopes = jnp.asarray(alibi_slopes(num_heads) if slopes is None else slopes).astype(dtype)
    if slopes.shape not in ((num_heads,), (num_heads, window.rank)):
        raise ValueError(
            f"alibi: slopes (={list(slopes.shape)}) must be [{num_heads}], or for each axis "
            f"[{num_heads}, {window.rank}]"
        )
    if distance == "euclidean" and slopes.ndim == 2:
        raise ValueError("alibi: distance (='euclidean') must be 'sum' where slopes are given for each axis")
    along = [a.dilation * np.abs(np.arange(1 - a.size, a.size)) for a in window.along]
    apart = np.stack(np.meshgrid(*along, indexing="ij"), axis=-1)  # [*(2k-1), rank]
    if slopes.ndim == 2:
        return -jnp.tensordot(slopes, jnp.asarray(apart, dtype), axes=(1, -1))
    apart = apart.sum(-1) if distance == "sum" else np.sqrt((apart**2).sum(-1))
    return -jnp.tensordot(slopes, jnp.asarray(apart, dtype), axes=0)


@checked
def alibi_slopes(num_heads: int) -> np.ndarray:
    """The slopes of Press et al., [num_heads].

    >>> alibi_slopes(3)
    array([0.0625    , 0.00390625, 0.25      ])
    """
    power = 2 ** int(math.log2(num_heads))
    of = lambda n: 2.0 ** (-8 * np.arange(1, n + 1) / n)
    return np.concatenate([of(power), of(2 * power)[::2][: num_heads - power]])


@checked
def crop(table: Any, window: Window, clipped: Window) -> Any:
    """A `relative_bias` or `key_embedding` of a window, or its tuple of one for each axis, cut to a smaller window's.

    The offsets -(k-1) .. k-1 of the smaller one stand in the middle of the table.

    >>> window = Window(5)
    >>> crop(jnp.arange(9.0)[None], window, window.clipped(3))
    Array([[2., 3., 4., 5., 6.]], dtype=float32)
    """
    sizes = list(zip(window.sizes, clipped.sizes, strict=False))
    if window.rank != clipped.rank or any(k < c for k, c in sizes):
        raise ValueError(f"crop: clipped (={clipped.sizes}) must be of at most window's sizes (={window.sizes})")
    cuts, full = [slice(k - c, k + c - 1) for k, c in sizes], [2 * k - 1 for k, _ in sizes]
    several = isinstance(table, tuple | list)
    parts: list[Any] = list(table) if several else [table]
    expected = [[n] for n in full] if several else [full]
    fits = [list(np.shape(part)[1:][: len(n)]) for part, n in zip(parts, expected, strict=False)] == expected
    if not fits or not all(has_dtype(part) and jnp.issubdtype(part.dtype, jnp.floating) for part in parts):
        raise ValueError(
            f"crop: table (={', '.join(map(shown, parts))}) must be floating point, [heads, *{full}, ...], or a tuple "
            f"of one [heads, 2k-1, ...] for each axis, of window's sizes (={window.sizes})"
        )
    if several:
        return tuple(part[:, cut] for part, cut in zip(parts, cuts, strict=True))
    return table[(slice(None), *cuts)]


def _check_floating(where: str, dtype: Any) -> None:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{where}: dtype (={np.dtype(dtype).name}) must be of floating-point numbers")


def _check_known(where: str, **values: Any) -> None:
    for name, value in values.items():
        for one in value if is_sequence(value) else (value,):
            if isinstance(one, Tracer):
                raise ValueError(f"{where}: {name} (={shown(one)}) must be known while a program is traced")


def _check_frequencies(where: str, shape: tuple[int, ...], rank: int) -> None:
    if len(shape) not in (2, 3) or shape[-1] != rank or 0 in shape:
        raise ValueError(
            f"{where}: frequencies (={list(shape)}) must be [pairs, axes] or [heads, pairs, axes], with the {rank} "
            "axes of positions"
        )


def _each(where: str, name: str, value: Any, rank: int) -> tuple[Any, ...]:
    """A number for each axis; one serves all."""
    values = tuple(value) if is_sequence(value) else (value,) * rank
    if len(values) != rank:
        raise ValueError(f"{where}: {name} (={value}) must be a number, or one for each of the {rank} axes")
    return values
