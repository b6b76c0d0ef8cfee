"""Attention and convolution by torch and NATTEN, where they are installed: each in the layout that it likes best."""

import functools
from typing import Any

from jaxattn.bench.attention_ways import dense_mask, dense_offsets, windowed
from jaxattn.bench.cases import AttentionCase, ConvCase
from jaxattn.bench.ways import Function, Layout, Way, cannot_unless, optional


def device(torch: Any) -> str:
    """Where torch computes: the kind of device that JAX computes on."""
    import jax

    backend = jax.default_backend()
    cannot_unless(backend == "cpu" or (backend == "gpu" and torch.cuda.is_available()), f"torch sees no {backend}")
    return "cpu" if backend == "cpu" else "cuda"


def heads_first(case: AttentionCase) -> list[Layout]:
    """Query, key, value and output as [batch, heads, tokens, head_dim]; a table of biases as it is."""
    batch, heads, head_dim = case.shape[0], case.shape[-2], case.shape[-1]
    layout = Layout(
        lambda x: x.reshape(batch, -1, heads, head_dim).transpose(1, 2).contiguous(),
        lambda x: x.transpose(1, 2).reshape(case.query_shape if x.shape[2] == case.queries else case.shape),
    )
    return [layout, layout, layout, *([Layout()] if case.bias else []), layout]


def sdpa(case: AttentionCase) -> Function:
    """`scaled_dot_product_attention` under the dense mask, or over all keys."""
    torch = optional("torch")
    attend = torch.nn.functional.scaled_dot_product_attention
    if case.window is None:
        return Function(attend, heads_first(case))
    mask = torch.from_numpy(dense_mask(case)).to(device(torch))
    if not case.bias:
        return Function(functools.partial(attend, attn_mask=mask), heads_first(case))
    entries = (slice(None), *(torch.from_numpy(x).to(device(torch)) for x in dense_offsets(case)))
    outside = torch.zeros(mask.shape, device=device(torch)).masked_fill(~mask, -float("inf"))
    return Function(lambda q, k, v, table: attend(q, k, v, table[entries] + outside), heads_first(case))


def seen_along(axis: int, case: AttentionCase):
    """Whether a query at x sees the key at y along one axis: Window's definition in arithmetic, on tensors of ints."""
    torch = optional("torch")
    window, n = windowed(case), case.grid[axis]
    names = ("size", "stride", "dilation", "block", "causal", "boundary")
    k, stride, d, s, causal, boundary = (getattr(window, name)[axis] for name in names)
    cannot_unless(stride == 1 and boundary in ("mask", "shift"), "its mask is written for mask and shift")

    def seen(x, y):
        j, members = x // d, (n - x % d + d - 1) // d
        lead = j if s == 1 else j // s * s + (s - 1 if causal else s // 2)
        if boundary == "shift":
            lead = torch.minimum(lead, members - 1)
        start = lead - (k - 1 if causal else k // 2)
        if boundary == "shift" and not causal:
            start = torch.minimum(torch.clamp(start, min=0), members - k)
        inside = (y // d >= start) & (y // d < start + k)
        inside = inside & (y % d == x % d) if d > 1 else inside
        return inside & (y <= x) if causal else inside

    return seen


def flex(case: AttentionCase) -> Function:
    """Compiled `flex_attention` under the window's block mask."""
    torch = optional("torch")
    module = optional("torch.nn.attention.flex_attention")
    torch.compiler.reset()  # it stops compiling a function that has failed once, as the backward pass on a CPU does
    attend = torch.compile(module.flex_attention)
    if case.window is None:
        return Function(attend, heads_first(case))
    along = [seen_along(axis, case) for axis in range(len(case.grid))]

    def places(token):
        """The token's place along each axis, the first axis first."""
        found = []
        for n in reversed(case.grid):
            token, place = token // n, token % n
            found.append(place)
        return found[::-1]

    def seen(batch, head, x, y):
        axes = [f(a, b) for f, a, b in zip(along, places(x), places(y), strict=True)]
        return functools.reduce(lambda a, b: a & b, axes)

    mask = module.create_block_mask(seen, None, None, case.tokens, case.tokens, device=device(torch))

    steps = [(axis.size, axis.dilation) for axis in windowed(case).axes(case.grid)]

    def biased(q, k, v, table):
        def add(score, batch, head, x, y):
            at = zip(places(x), places(y), steps, strict=True)
            entry = [torch.clamp(size - 1 + (b - a) // d, 0, 2 * size - 2) for a, b, (size, d) in at]
            return score + table[(head, *entry)]

        return attend(q, k, v, score_mod=add, block_mask=mask)

    return Function(biased if case.bias else functools.partial(attend, block_mask=mask), heads_first(case))


def natten(case: AttentionCase) -> Function:
    """NATTEN's neighbourhood attention, whose windows move inward at the border."""
    library = optional("natten")
    window = windowed(case)
    cannot_unless(not case.bias, "it has no relative bias")
    cannot_unless(set(window.boundary) == {"shift"}, "its windows move inward at the border")
    attend = (library.na1d, library.na2d, library.na3d)[window.rank - 1]
    options: dict[str, Any] = {
        "kernel_size": window.size,
        "stride": window.block,
        "dilation": window.dilation,
        "is_causal": window.causal,
    }
    return Function(functools.partial(attend, **options))


def conv(case: ConvCase, channels_last: bool) -> Function:
    """`torch.nn.functional.conv*d`, or `conv_transpose*d`, with memory in its own order or in the case's."""
    torch = optional("torch")
    functional, rank = torch.nn.functional, case.rank
    grid = range(1, rank + 1)
    own = (lambda x: x) if channels_last else (lambda x: x.contiguous())
    features = Layout(lambda x: own(x.permute(0, rank + 1, *grid)), lambda x: x.permute(0, *range(2, rank + 2), 1))
    kernels = Layout(
        lambda w: own(w.permute(rank + 1, rank, *range(rank))), lambda w: w.permute(*range(2, rank + 2), 1, 0)
    )
    if case.transposed:
        kernels = Layout(
            lambda w: own(w.permute(rank, rank + 1, *range(rank))), lambda w: w.permute(*range(2, rank + 2), 0, 1)
        )
        spread = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[rank - 1]
        return Function(lambda x, w: spread(x, w, stride=case.stride), [features, kernels, features])
    even = all(low == high for low, high in case.pads)
    pads = [pad for low_high in reversed(case.pads) for pad in low_high]
    options = dict(stride=case.stride, groups=case.groups, padding=[low for low, _ in case.pads] if even else 0)
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]

    def call(x, w):
        return convolve(x if even else functional.pad(x, pads), w, **options)

    return Function(call, [features, kernels, features])


def mask_bytes(case: AttentionCase) -> int:
    """The dense mask and the numbers it is made from."""
    return 0 if case.window is None else case.tokens**2 + case.tokens * case.slots * 8 * (len(case.grid) + 1)


ATTENTION = [
    Way("torch SDPA", "torch", sdpa, mask_bytes),
    Way("torch flex", "torch", flex),
    Way("NATTEN", "torch", natten),
]
CONV = [
    Way("torch", "torch", functools.partial(conv, channels_last=False)),
    Way("torch, channels last", "torch", functools.partial(conv, channels_last=True)),
]
