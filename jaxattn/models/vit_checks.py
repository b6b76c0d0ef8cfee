"""What the settings of a vision transformer must be, together."""

from collections.abc import Sequence
from typing import Any

from jaxattn.models.vit_blocks import MIXES, Mix

POOLS = ("token", "mean", "attention")
POSITIONS = ("learned", "sincos2d", "none")
NORMS = ("pre", "post")


def check_settings(
    *, pool: str, position: str, norm: str, class_token: bool, registers: int, width: int, epsilon: float
):
    """Raise where one is out of its range, or does not go with another."""
    for name, value, allowed in (("pool", pool, POOLS), ("position", position, POSITIONS), ("norm", norm, NORMS)):
        if value not in allowed:
            raise ValueError(f"ViT: {name} (={value!r}) must be one of {', '.join(map(repr, allowed))}")
    if pool == "token" and not class_token:
        raise ValueError("ViT: class_token (=False) must be True with pool='token'; pool='mean' needs none")
    if pool == "attention" and class_token:
        raise ValueError("ViT: class_token (=True) must be False with pool='attention', whose query stands for it")
    if position == "sincos2d" and width % 4:
        raise ValueError(f"ViT: width (={width}) must be a multiple of 4 with position='sincos2d'")
    if registers and not class_token:
        raise ValueError(f"ViT: registers (={registers}) must be 0 without a class token")
    if epsilon <= 0:
        raise ValueError(f"ViT: epsilon (={epsilon}) must be a number > 0")


def check_mixes(mixes: Sequence[Mix], depth: int, class_token: bool, window: tuple[int, ...], grid: tuple[int, int]):
    """Raise where a block can't mix as `mixes` says."""
    if len(mixes) != depth:
        raise ValueError(f"ViT: mix (={mixes!r}) must be a string, a function, or one per block ({depth})")
    for mix in mixes:
        if not callable(mix) and not (isinstance(mix, str) and mix in MIXES):
            raise ValueError(f"ViT: mix (={mix!r}) must be one of {', '.join(map(repr, MIXES))}, or a function")
    if class_token and mixes[-1] != "global":
        raise ValueError(
            f"ViT: class_token (=True) must be False (and pool 'mean') with mix={mixes[-1]!r}, which needs a grid; or "
            "give a mix that ends in 'global', where the token then joins"
        )
    if "local" in mixes and any(w > n for w, n in zip(window, grid, strict=True)):
        raise ValueError(f"ViT: window (={window}) must fit in the grid of the patches, {grid}")


def check_split(axis_name: str | None, class_token: Any, latent_pool: Any):
    """Raise where a grid that is split over `axis_name` has one of these, which must see all of it; None where not."""
    if axis_name is not None and class_token is not None:
        raise ValueError(
            f"ViT: class_token (=True) must be False where the grid is split over {axis_name!r}: the token is "
            "on no shard"
        )
    if axis_name is not None and latent_pool is not None:
        raise ValueError(
            f"ViT: pool (='attention') must be 'mean' where the grid is split over {axis_name!r}: the query "
            "must see all of it"
        )
