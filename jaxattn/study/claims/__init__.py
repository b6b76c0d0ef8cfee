"""The claims of the debate, in its order."""

from jaxattn.study.claim import Claim
from jaxattn.study.claims import keys, matrix, offset, reach, similarity, template, theorem, waiting

_ALL = [
    value
    for module in (keys, matrix, offset, reach, similarity, template, theorem)
    for value in vars(module).values()
    if isinstance(value, Claim)
]
CLAIMS: tuple[Claim, ...] = tuple(sorted([*_ALL, *waiting.CLAIMS], key=lambda claim: claim.number))
