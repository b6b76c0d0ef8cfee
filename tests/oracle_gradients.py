"""Attention's gradients in NumPy float64, derived by hand, a step back for each step forward. No JAX.

The steps are those of `oracle.attention`, over whole arrays, so that grids of hundreds of tokens take no time;
test_oracle.py holds them against its loops, and their gradients against central differences of those.
"""

import math
from typing import NamedTuple

import numpy as np
import oracle


class Slots(NamedTuple):
    """The slots of n queries, w each. Keys are numbered row-major; one more is what stands outside: zeros."""

    key: np.ndarray  # [n, w]
    takes_part: np.ndarray  # [n, w]
    query: tuple[np.ndarray, ...]  # an axis each, [n, 1]
    named: tuple[np.ndarray, ...]  # an axis each, [n, w]: the key, or the position where there is none
    entry: np.ndarray | None  # [n, w], in a relative table; None where one of them holds no such offset


def slots(grid, size=None, **options):
    """`oracle.axis_slots` along each axis, combined."""
    if size is None:
        raise TypeError("slots of no window: see everything()")
    rank, axes = len(size), []
    for a, (n, k) in enumerate(zip(grid, size, strict=True)):
        here = {name: value[a] if isinstance(value, tuple) else value for name, value in options.items()}
        rows = oracle.axis_slots(n, k, **here)
        position = np.array([[p for p, _, _ in row] for _, row in rows])
        key = np.array([[-1 if j is None else j for _, j, _ in row] for _, row in rows])
        part = np.array([[part for _, _, part in row] for _, row in rows])
        offset = position - np.array([[x] for x, _ in rows])
        first, rest = np.divmod(offset, here.get("dilation", 1))
        axes.append((position, key, part, np.where((rest == 0) & (abs(first) < k), k - 1 + first, -1)))
    queries = tuple(len(axis[0]) for axis in axes)
    rows = (math.prod(queries), math.prod(size))

    def spread(table, a):
        shape = [1] * (2 * rank)
        shape[a], shape[rank + a] = table.shape
        return np.broadcast_to(table.reshape(shape), (*queries, *size)).reshape(rows)

    keys, entries, takes_part, named = np.zeros(rows, int), np.zeros(rows, int), np.ones(rows, bool), []
    outside, beyond = np.zeros(rows, bool), False
    for a, (position, key, part, entry) in enumerate(axes):
        keys = keys * grid[a] + spread(key, a)
        entries = entries * (2 * size[a] - 1) + spread(entry, a)
        takes_part &= spread(part, a)
        outside |= spread(key, a) < 0
        beyond |= (entry < 0).any()
        named.append(spread(np.where(key < 0, position, key), a))
    query = tuple(i.reshape(-1, 1) for i in np.indices(queries))
    return Slots(np.where(outside, math.prod(grid), keys), takes_part, query, tuple(named), None if beyond else entries)


def everything(queries, keys):
    """The slots of attention without a window."""
    key = np.broadcast_to(np.arange(keys), (queries, keys))
    return Slots(key, np.ones((queries, keys), bool), (np.arange(queries)[:, None],), (key,), None)


def attention(
    query,
    key,
    value,
    *,
    cotangents,
    size=None,
    geometry=None,
    bias=None,
    key_mask=None,
    slot_mask=None,
    scale=None,
    relative_bias=None,
    key_embedding=None,
    score_mod=None,
    logits_soft_cap=None,
    normalize="softmax",
    segment_ids=None,
    extra_key=None,
    extra_value=None,
    extra_positions=None,
    sink_logits=None,
    dropout=None,
):
    """(output, lse), and the gradients, by name, of (output · cotangents[0]).sum() + (lse · cotangents[1]).sum().

    Arguments are those of `oracle.attention`; `normalize` may also be a pair of functions: (scores, mask) -> weights,
    and (scores, mask, weights, gradient of the weights) -> gradient of the scores. `score_mod` is arithmetic, such as
    complex numbers pass through. Below, b n h w d are batch, query, head, slot and feature.
    """
    batch, heads, dim = query.shape[0], query.shape[-2], query.shape[-1]
    grid, queries, key_heads = key.shape[1:-2], query.shape[1:-2], key.shape[-2]
    seen = everything(queries[0], grid[0]) if size is None else slots(grid, size, **(geometry or {}))
    (n, w), extras = seen.key.shape, 0 if extra_key is None else extra_key.shape[1]
    scale = dim**-0.5 if scale is None else scale
    rows = lambda x: x.reshape(batch, n, heads, -1)
    more = extras + (sink_logits is not None)  # a sink comes last, with the key of zeros
    widen = lambda x: np.concatenate([x, np.zeros((*x.shape[:-1], more), x.dtype)], -1)  # [..., w] to w + more

    # every key there is: the grid's, one of zeros for what stands outside, the extra tokens
    others = [*range(math.prod(grid) + 1, math.prod(grid) + 1 + extras), *[math.prod(grid)] * (more - extras)]
    reached = np.concatenate([seen.key, np.broadcast_to(np.array(others, int), (n, more))], 1)
    keys, values = (_table(x, extra, heads) for x, extra in ((key, extra_key), (value, extra_value)))
    k, v, q = keys[:, reached], values[:, reached], rows(query)  # [b, n, w, h, d]
    products = np.einsum("bnhd,bnwhd->bnhw", q, k)
    scores = scale * products
    if relative_bias is not None:
        scores = scores + widen(np.moveaxis(relative_bias.reshape(heads, -1)[:, seen.entry], 0, 1))
    if key_embedding is not None:
        embedded = key_embedding.reshape(len(key_embedding), -1, dim)[:, seen.entry]
        embedded = np.broadcast_to(embedded, (heads, n, w, dim))
        scores = scores + widen(np.einsum("bnhd,hnwd->bnhw", q, embedded))
    if bias is not None:
        scores = scores + widen(rows(bias))

    mask = _mask(seen, batch, heads, key_mask, slot_mask, segment_ids)
    always = np.ones((*mask.shape[:-1], more), bool)
    if extra_positions is not None:
        always[..., :extras] = ~_ahead(seen, extra_positions, geometry)[:, :, None]
    mask = np.concatenate([mask, always], -1) & (scores != -math.inf)
    scores = plain = np.where(mask, scores, 0)
    if logits_soft_cap is not None:
        scores = logits_soft_cap * np.tanh(plain / logits_soft_cap)
    slope = np.ones_like(scores)
    if score_mod is not None:
        told = np.arange(heads)[:, None], tuple(i[:, None] for i in seen.query), tuple(j[:, None] for j in seen.named)
        modified = score_mod(scores[..., :w], *told)
        slope[..., :w] = np.imag(score_mod(scores[..., :w] + 1e-30j, *told)) / 1e-30  # exact: no difference is taken
        scores = np.concatenate([modified, scores[..., w:]], -1)
        mask = mask & (scores != -math.inf)
        scores = np.where(mask, scores, 0)
    if sink_logits is not None:
        sinks = np.broadcast_to(sink_logits[:, None], (batch, n, heads, 1))
        scores = np.concatenate([scores[..., :-1], sinks], -1)

    forward, backward = NORMALIZERS[normalize] if isinstance(normalize, str) else normalize
    weights = np.where(mask, forward(scores, mask), 0)
    kept = 1.0 if dropout is None else np.concatenate([rows(dropout), always[..., extras:]], -1)
    output = np.einsum("bnhw,bnwhv->bnhv", kept * weights, v)
    exponentials, largest = _exponentials(scores, mask)
    total = exponentials.sum(-1)
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, np.log(total) + largest[..., 0], -math.inf)

    d_output, d_lse = rows(cotangents[0]), cotangents[1].reshape(batch, n, heads)
    d_weights = np.where(mask, kept * np.einsum("bnhv,bnwhv->bnhw", d_output, v), 0)
    d_scores = backward(scores, mask, weights, d_weights) + softmax(scores, mask) * d_lse[..., None]
    d_scores = np.where(mask, d_scores, 0) * slope
    gradients = {} if sink_logits is None else {"sink_logits": d_scores[..., -1].sum((0, 1))}
    if logits_soft_cap is not None:
        tanh = np.tanh(plain / logits_soft_cap)
        gradients["logits_soft_cap"] = (d_scores * (tanh - plain / logits_soft_cap * (1 - tanh**2))).sum()
        d_scores = d_scores * (1 - tanh**2)
    of_slots = d_scores[..., :w]
    d_query = scale * np.einsum("bnhw,bnwhd->bnhd", d_scores, k)
    if relative_bias is not None:
        gradients["relative_bias"] = _scattered(np.moveaxis(of_slots.sum(0), 1, 0), seen.entry, relative_bias.shape)
    if key_embedding is not None:
        d_query = d_query + np.einsum("bnhw,hnwd->bnhd", of_slots, embedded)
        each = np.einsum("bnhw,bnhd->hnwd", of_slots, q)
        each = each if len(key_embedding) > 1 else each.sum(0, keepdims=True)
        gradients["key_embedding"] = _scattered(each, seen.entry, key_embedding.shape)
    if bias is not None:
        gradients["bias"] = of_slots.reshape(bias.shape)
    gradients |= {"query": d_query.reshape(query.shape), "scale": (d_scores * products).sum()}
    for name, d, like in (
        ("key", scale * np.einsum("bnhw,bnhd->bnwhd", d_scores, q), key),
        ("value", np.einsum("bnhw,bnhv->bnwhv", kept * weights, d_output), value),
    ):
        d = d.reshape(*d.shape[:3], key_heads, heads // key_heads, d.shape[-1]).sum(4)  # query heads share a key head
        d = _scattered(d, reached, (batch, math.prod(grid) + 1 + extras, *d.shape[3:]))
        gradients[name] = d[:, : math.prod(grid)].reshape(like.shape)
        if extras:
            gradients[f"extra_{name}"] = d[:, math.prod(grid) + 1 :]
    return (output.reshape(*query.shape[:-1], -1), lse.reshape(query.shape[:-1])), gradients


def _table(x, extra, heads):
    """[batch, *grid, key_heads, d] as [batch, keys, heads, d]; after the grid's a key of zeros, and the extra ones."""
    x = x.reshape(len(x), math.prod(x.shape[1:-2]), *x.shape[-2:])
    extra = x[:, :0] if extra is None else extra
    x = np.concatenate([x, np.zeros((len(x), 1, *x.shape[2:])), extra], 1)
    return np.repeat(x, heads // x.shape[-2], axis=2)


def _mask(seen, batch, heads, key_mask, slot_mask, segment_ids):
    """[b, n, h, w]. What stands outside has no key, so no mask of keys and no segment."""
    n, w = seen.key.shape
    mask = np.broadcast_to(seen.takes_part[None, :, None], (batch, n, heads, w))
    outside = np.ones((batch, 1), bool)
    if key_mask is not None:
        mask = mask & np.concatenate([key_mask.reshape(batch, -1), outside], 1)[:, seen.key][:, :, None]
    if segment_ids is not None:
        query, key = (ids.reshape(batch, -1) for ids in segment_ids)
        nowhere = seen.key == key.shape[1]
        same = query[..., None] == np.concatenate([key, 0 * key[:, :1]], 1)[:, seen.key]
        mask = mask & (same | nowhere)[:, :, None]
    if slot_mask is not None:
        mask = mask & slot_mask.reshape(batch, n, heads, w)
    return mask


def _ahead(seen, positions, geometry):
    """[b, n, extras]: which extra tokens stand after a query along an axis that is causal."""
    rank = len(seen.query)
    spread = lambda name, default: np.broadcast_to(geometry.get(name, default), rank)
    standing = np.stack([i[:, 0] for i in seen.query], -1) * spread("stride", 1)
    ahead = positions[:, None] > standing[None, :, None]
    return (ahead & spread("causal", False)).any(-1)


def _scattered(x, index, shape):
    """Add x, [a, n, w, ...], into the rows index, [n, w], of zeros [a, rows, ...], given `shape`."""
    x = np.moveaxis(x, 0, 2).reshape(index.size, -1)
    total = np.zeros((math.prod(shape) // x.shape[1], x.shape[1]))
    np.add.at(total, index.ravel(), x)
    lead = shape[0]
    return np.moveaxis(total.reshape(len(total), lead, -1), 0, 1).reshape(shape)


def _exponentials(scores, mask):
    largest = np.where(mask, scores, -math.inf).max(-1, initial=-math.inf, keepdims=True)
    largest = np.where(np.isfinite(largest), largest, 0)
    return np.where(mask, np.exp(np.where(mask, scores - largest, 0)), 0), largest


def softmax(scores, mask):
    """Zeros where nothing is visible."""
    exponentials, _ = _exponentials(scores, mask)
    total = exponentials.sum(-1, keepdims=True)
    return exponentials / np.where(total > 0, total, 1)


def _softmax_back(scores, mask, weights, d):
    return weights * (d - (weights * d).sum(-1, keepdims=True))


def _count(mask):
    return np.maximum(mask.sum(-1, keepdims=True), 1)


def _sparsemax(scores, mask):
    """The threshold under which the rest sums to one, of every size of support that could be."""
    descending = -np.sort(-np.where(mask, scores, -math.inf), axis=-1)
    visible = np.isfinite(descending)
    size = np.arange(1, scores.shape[-1] + 1)
    tau = (np.cumsum(np.where(visible, descending, 0), -1) - 1) / size
    largest = np.maximum((visible & (descending > tau)).sum(-1, keepdims=True), 1)
    return np.where(mask, np.maximum(scores - np.take_along_axis(tau, largest - 1, -1), 0), 0)


def _sparsemax_back(scores, mask, weights, d):
    support = weights > 0
    return support * (d - (support * d).sum(-1, keepdims=True) / _count(support))


NORMALIZERS = {
    "softmax": (softmax, _softmax_back),
    "relu": (
        lambda scores, mask: np.maximum(scores, 0) / _count(mask),
        lambda scores, mask, weights, d: (scores > 0) * d / _count(mask),
    ),
    "sigmoid": (
        lambda scores, mask: 1 / (1 + np.exp(np.log(_count(mask)) - scores)),
        lambda scores, mask, weights, d: weights * (1 - weights) * d,
    ),
    "none": (lambda scores, mask: scores, lambda scores, mask, weights, d: d),
    "sparsemax": (_sparsemax, _sparsemax_back),
}
