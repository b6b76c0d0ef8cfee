"""Head centres through training, as an SVG that moves by itself."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from jaxattn.plots import COLORS

SIDE, GAP, SECONDS = 220, 24, 8


def moving_centers(tracks: Float[np.ndarray, "frames layers heads 2"], titles: Sequence[str]) -> str:
    """Where each head looks from the query (the cross), in tokens, a panel a layer: a dot that moves, and its path.

    What does not play animations shows the end of training.

    >>> svg = moving_centers(np.zeros((3, 1, 2, 2)), ["layer 1"])
    >>> svg.count("<polyline"), svg.count("<animate ")
    (2, 4)
    """
    layers = tracks.shape[1]
    reach = max(1.5, float(np.ceil(np.abs(tracks).max() + 0.5)))
    width, height = layers * (SIDE + GAP) - GAP, SIDE + 22
    panels = [_panel(tracks[:, n], title, n * (SIDE + GAP), reach) for n, title in enumerate(titles)]
    label = "Head centres through training: a dot for each head that moves along its path, a panel for each layer"
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(panels)}</svg>'


def _panel(tracks: np.ndarray, title: str, left: int, reach: float) -> str:
    place = lambda value: np.round(SIDE / 2 * (1 + value / reach), 1)
    inside = int(np.ceil(reach)) - 1
    ticks = [float(place(offset)) for offset in range(-inside, inside + 1)]
    parts = [f'<circle cx="{x}" cy="{y}" r="1" fill="currentColor" opacity=".45"/>' for x in ticks for y in ticks]
    middle = SIDE / 2
    parts += [f'<rect x=".5" y=".5" width="{SIDE - 1}" height="{SIDE - 1}" rx="4" fill="none" stroke="currentColor"/>']
    parts += [
        f'<path d="M{middle - 5} {middle}h10M{middle} {middle - 5}v10" stroke="currentColor" stroke-width="1.5"/>'
    ]
    for head in range(tracks.shape[1]):
        y, x = place(tracks[:, head]).T  # rows, columns
        color = COLORS[head % len(COLORS)]
        path = " ".join(f"{a},{b}" for a, b in zip(x, y, strict=True))
        parts += [f'<polyline points="{path}" fill="none" stroke="{color}" opacity=".5"/>']
        moves = "".join(
            f'<animate attributeName="{name}" dur="{SECONDS}s" repeatCount="indefinite" '
            f'values="{";".join(map(str, values))}"/>'
            for name, values in (("cx", x), ("cy", y))
        )
        parts += [f'<circle cx="{x[-1]}" cy="{y[-1]}" r="4.5" fill="{color}">{moves}</circle>']
    caption = (
        f'<text x="{middle}" y="{SIDE + 16}" text-anchor="middle" font-size="12" fill="currentColor">{title}</text>'
    )
    return f'<g transform="translate({left} 0)">{"".join(parts)}{caption}</g>'
