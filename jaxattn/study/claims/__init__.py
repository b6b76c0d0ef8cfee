"""The claims of the debate, in its order."""

from jaxattn.study.claim import Claim
from jaxattn.study.claims import (
    ablation,
    curves,
    distance,
    keys,
    matrix,
    offset,
    reach,
    replacement,
    selection,
    similarity,
    template,
    theorem,
)

_MODULES = (
    ablation, curves, distance, keys, matrix, offset, reach, replacement, selection, similarity, template, theorem,
)  # fmt: skip
_ALL = [value for module in _MODULES for value in vars(module).values() if isinstance(value, Claim)]
CLAIMS: tuple[Claim, ...] = tuple(sorted(_ALL, key=lambda claim: claim.number))
