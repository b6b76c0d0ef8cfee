"""Windows and attention as loops in NumPy float64, written from their definition. No JAX, and nothing of the
library."""

import functools
import itertools
import math

import numpy as np


@functools.cache  # many tests ask for the same windows
def axis_slots(n, k, stride=1, dilation=1, block=1, causal=False, boundary="shift", offset=None):
    """For each query of an axis of n keys: where it stands, and its slots as (position, key or None, takes part)."""
    queries = (n - dilation * (k - 1) - 1) // stride + 1 if boundary == "valid" else math.ceil(n / stride)
    rows = []
    for i in range(queries):
        x = stride * i
        g, j = x % dilation, x // dilation
        members = len(range(g, n, dilation))
        first_of_block = j - j % block
        lead = first_of_block + (block - 1 if causal else block // 2)
        if boundary == "shift":
            lead = min(lead, members - 1)
            start = max(lead - k + 1, 0) if causal else min(max(lead - k // 2, 0), members - k)
            start = start * dilation + g
        elif boundary == "valid":
            start = x
        elif offset is None:
            start = (lead - k + 1 if causal else lead - k // 2) * dilation + g
        else:
            start = lead * dilation + g + offset
        slots = []
        for u in range(k):
            position = start + u * dilation
            key = stands_at(position, n, boundary)
            takes_part = (key is not None or boundary == "zero") and not (causal and position > x)
            slots.append((position, key, takes_part))
        rows.append((x, slots))
    return rows


def stands_at(position, n, boundary):
    """The key at a position, by walking there."""
    if 0 <= position < n:
        return position
    if boundary == "edge":
        return 0 if position < 0 else n - 1
    if boundary == "wrap":
        while position < 0:
            position += n
        while position >= n:
            position -= n
        return position
    if boundary == "reflect":
        while not 0 <= position < n:
            position = (-position if position < 0 else 2 * (n - 1) - position) if n > 1 else 0
        return position
    return None


def window_slots(grid, size, **options):
    """As `axis_slots`, for a grid, by query: where it stands, and its slots as

    (slot, positions, key or None, key with the position where there is none, takes part).
    """
    rank = len(size)
    per_axis = [
        axis_slots(n, k, **{name: value[a] if isinstance(value, tuple) else value for name, value in options.items()})
        for a, (n, k) in enumerate(zip(grid, size, strict=True))
    ]
    windows = {}
    for query in itertools.product(*(range(len(rows)) for rows in per_axis)):
        rows = [per_axis[a][query[a]] for a in range(rank)]
        slots = []
        for slot in itertools.product(*(range(k) for k in size)):
            picked = [rows[a][1][slot[a]] for a in range(rank)]
            positions = tuple(position for position, _, _ in picked)
            keys = tuple(key for _, key, _ in picked)
            named = tuple(p if key is None else key for p, key in zip(positions, keys, strict=True))
            slots.append((slot, positions, None if None in keys else keys, named, all(part for _, _, part in picked)))
        windows[query] = (tuple(x for x, _ in rows), slots)
    return windows


def indices_and_mask(grid, size, **options):
    """What Window.indices and Window.mask should be."""
    windows = window_slots(grid, size, **options)
    queries = tuple(max(axis) + 1 for axis in zip(*windows, strict=True))
    indices = np.full((*queries, *size, len(size)), -1)
    mask = np.zeros((*queries, *size), bool)
    for query, (_, slots) in windows.items():
        for slot, _, key, _, part in slots:
            mask[query + slot] = part
            if key is not None:
                indices[query + slot] = key
    return indices, mask


def attention(
    query,
    key,
    value,
    *,
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
    """(output, lse) of batched operands [batch, *grid, heads, dim]; without `size`, a grid of one axis and no window.

    `geometry` holds Window's other arguments. bias and slot_mask are full: [batch, *queries, heads, *slots], where
    without a window there is a slot for each key. Of extra tokens with `extra_positions`, [batch, extra, rank], a query
    sees those that are not ahead of it along a causal axis. `sink_logits`, [heads], have no value. `dropout`, [batch,
    *queries, heads, slots + extra], multiplies the weights.
    """
    batch, grid, heads, dim = query.shape[0], key.shape[1:-2], query.shape[-2], query.shape[-1]
    if size is None:
        everything = [((j,), (j,), (j,), (j,), True) for j in range(grid[0])]
        windows = {(i,): ((i,), everything) for i in range(query.shape[1])}
    else:
        windows = window_slots(grid, size, **(geometry or {}))
    dilation = (geometry or {}).get("dilation", 1)
    group = heads // key.shape[-2]
    scale = dim**-0.5 if scale is None else scale
    output, lse = np.zeros((*query.shape[:-1], value.shape[-1])), np.zeros(query.shape[:-1])
    for b, i, h in itertools.product(range(batch), windows, range(heads)):
        x, slots = windows[i]
        q, shared = query[b][i][h], h // group
        scores, mask, values = [], [], []
        for slot, positions, j, named, part in slots:
            score = 0.0 if j is None else scale * (q @ key[b][j][shared])
            if relative_bias is not None or key_embedding is not None:
                entry = relative_entry(positions, x, size, dilation)
                score += 0.0 if relative_bias is None else relative_bias[h][entry]
                score += 0.0 if key_embedding is None else q @ key_embedding[h % len(key_embedding)][entry]
            score += 0.0 if bias is None else bias[b][i][h][slot]
            part = part and score != -math.inf
            if part and logits_soft_cap is not None:
                score = logits_soft_cap * math.tanh(score / logits_soft_cap)
            if part and score_mod is not None:
                score = float(score_mod(score, h, i, named))
                part = score != -math.inf
            if j is not None and key_mask is not None:
                part = part and key_mask[b][j]
            if j is not None and segment_ids is not None:
                part = part and segment_ids[0][b][i] == segment_ids[1][b][j]
            part = part and (slot_mask is None or slot_mask[b][i][h][slot])
            scores.append(score if part else 0.0)
            mask.append(bool(part))
            values.append(np.zeros(value.shape[-1]) if j is None else value[b][j][shared])
        for e in range(0 if extra_key is None else extra_key.shape[1]):
            score = scale * (q @ extra_key[b, e, shared])
            scores.append(score if logits_soft_cap is None else logits_soft_cap * math.tanh(score / logits_soft_cap))
            ahead = extra_positions is not None and is_ahead(extra_positions[b][e], x, geometry["causal"])
            mask.append(not ahead)
            values.append(extra_value[b, e, shared])
        if sink_logits is not None:
            scores.append(sink_logits[h])
            mask.append(True)
        weights = normalized(normalize, np.array(scores), np.array(mask))[: len(values)]
        if dropout is not None:
            weights = weights * dropout[b][i][h]
        output[b][i][h] = weights @ np.array(values)
        visible = np.array(scores)[mask]
        lse[b][i][h] = np.logaddexp.reduce(visible) if len(visible) else -math.inf
    return output, lse


def is_ahead(position, x, causal):
    """Whether a token stands after a query along an axis that is causal."""
    causal = causal if isinstance(causal, tuple) else (causal,) * len(x)
    return any(ordered and p > i for p, i, ordered in zip(position, x, causal, strict=True))


def relative_entry(positions, x, size, dilation):
    steps = dilation if isinstance(dilation, tuple) else (dilation,) * len(size)
    entry = []
    for position, standing, k, d in zip(positions, x, size, steps, strict=True):
        assert (position - standing) % d == 0
        entry.append(k - 1 + (position - standing) // d)
        assert 0 <= entry[-1] < 2 * k - 1
    return tuple(entry)


def normalized(normalize, scores, mask):
    """Weights of one query."""
    weights = np.zeros(len(scores))
    visible = scores[mask]
    count = len(visible)
    if count == 0:
        return weights
    if normalize == "softmax":
        weights[mask] = np.exp(visible - visible.max()) / np.exp(visible - visible.max()).sum()
    elif normalize == "relu":
        weights[mask] = np.maximum(visible, 0) / count
    elif normalize == "sigmoid":
        weights[mask] = 1 / (1 + np.exp(math.log(count) - visible))
    elif normalize == "none":
        weights[mask] = visible
    elif normalize == "sparsemax":
        weights[mask] = sparsemax(visible)
    else:
        weights = np.where(mask, normalize(scores, mask), 0)
    return weights


def sparsemax(scores):
    """The projection onto the simplex, by trying every size of support."""
    descending = np.sort(scores)[::-1]
    for size in range(len(scores), 0, -1):
        tau = (descending[:size].sum() - 1) / size
        if descending[size - 1] > tau:
            return np.maximum(scores - tau, 0)
    raise AssertionError("a support of one always holds")


def directional(function, operands, name, direction, step=1e-6):
    """The derivative of `function(**operands)` with respect to one operand, along a direction: a central difference."""
    ahead = function(**{**operands, name: operands[name] + step * direction})
    behind = function(**{**operands, name: operands[name] - step * direction})
    return (ahead - behind) / (2 * step)
