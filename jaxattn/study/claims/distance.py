"""Claim 13: whether attention's similarity is a distance."""

from typing import Any

import numpy as np

from jaxattn.measure import query_key_metric
from jaxattn.study import figures
from jaxattn.study.claim import Measurement, Numbers, Setting, claim, decide
from jaxattn.study.mixers import train
from jaxattn.study.seeds import UNDECIDED, difference, interval, points

NEAR, LOST = 0.95, 0.03
SHARES = (0, 25, 50, 75, 100)
TRAINED, MADE = "as it is", "made a distance"


def look(model: Any, seed: int, squared: bool) -> tuple[dict[str, float], np.ndarray]:
    """How near the heads' forms W_Q W_Kᵀ are to a distance's, and the mean of their spectra.

    Of a squared distance ‖W (x - y)‖² the form W Wᵀ is symmetric and has no negative eigenvalue, and no token is nearer
    to another than to itself; that is tried with random tokens. `squared`: the scores are -½‖q - k‖², and not q·k.
    """
    tokens = np.random.default_rng(seed).normal(size=(64, model.blocks[0].mix.layer.query.kernel.shape[0]))
    symmetry, definiteness, others, spectra = [], [], [], []
    for block in model.blocks:
        query, key = (np.asarray(m.kernel[...], np.float64) for m in (block.mix.layer.query, block.mix.layer.key))
        found = query_key_metric(query, key)
        symmetry += list(found.symmetry)
        definiteness += list(found.definiteness)
        spectra += list(found.spectrum / np.abs(found.spectrum).max(1, keepdims=True))
        q, k = (np.einsum("nf,fhd->hnd", tokens, kernel) for kernel in (query, key))
        scores = -0.5 * np.square(q[:, :, None] - k[:, None]).sum(-1) if squared else q @ k.swapaxes(1, 2)
        others += list((scores.argmax(-1) != np.arange(len(tokens))).mean(-1))
    names = ("symmetric share", "definiteness", "tokens nearer to another than to themselves")
    values = (min(symmetry), min(definiteness), max(others))
    return dict(zip(names, values, strict=True)), np.mean(spectra, axis=0)


def metric(numbers: Numbers) -> Measurement:
    is_distance = {}
    for kind in (TRAINED, MADE):
        symmetric, definite = (interval(numbers[f"{n}: {kind}"]) for n in ("symmetric share", "definiteness"))
        astray = max(numbers[f"tokens nearer to another than to themselves: {kind}"])
        is_distance[kind] = symmetric.mean >= NEAR and definite.mean >= NEAR and astray == 0
    lost = difference(numbers[f"accuracy: {TRAINED}"], numbers[f"accuracy: {MADE}"])
    beyond = lost.above(LOST)
    if is_distance[TRAINED] or not is_distance[MADE] or beyond:
        verdict = decide(is_distance[TRAINED])
    else:
        verdict = decide(True, UNDECIDED if beyond is None else "W_Q = W_K")
    notes = (
        f"Lost with scores that are distances: {points(lost)}. By hand, in one dimension with W_Q = W_K = 1: q·k says "
    )
    notes += (
        "that the token 1 is nearer to 2 (score 2) than to itself (score 1), and -½(1 - 2)² = -½ < 0 says it is not."
    )
    series = {k: [float(np.mean(numbers[f"eigenvalues, {n} %: {k}"])) for n in SHARES] for k in (TRAINED, MADE)}
    figure = figures.lines(SHARES, series, "% of the eigenvalues are below", "eigenvalue, of the largest")
    return Measurement({"lost with distances": lost.mean}, verdict, [figure], notes)


@claim(
    number=13,
    author="匿名用户",
    text="Attention is a distance metric between positions.",
    chinese="注意力是位置之间的一种距离度量。",
    about="A network of global attention is trained on the study's images, and each head's form W_Q W_Kᵀ is looked "
    "at: how much of it is symmetric, whether its eigenvalues are positive, and whether 64 random tokens are nearest "
    "to themselves, as in any metric. Beside it stands a layer that is one by construction: its scores are -½‖W (x - "
    "y)‖². The worst head of each counts.",
    hypothesis="Trained attention is no metric; one by construction does as well.",
    threshold="A distance has a symmetric share and a definiteness of at least 0.95 (of 1), and no token that is "
    "nearer to another than to itself. Holds if trained attention is one; depends on W_Q = W_K if only the layer "
    "made so is, and it loses at most 3 points of accuracy (95 % interval; depends on the seed if that has 3 points "
    "in it); fails otherwise.",
    judge=metric,
    cost=9,
)
def spectrum(setting: Setting, made: str = "distance", **size: float) -> Measurement:
    numbers = {}
    for kind, mixer in ((TRAINED, "global attention"), (MADE, made)):
        trained = train(mixer, setting, setting.data, **size)
        found, eigenvalues = look(trained.model, setting.seed, squared=mixer != "global attention")
        numbers |= {f"accuracy: {kind}": trained.accuracy} | {f"{n}: {kind}": v for n, v in found.items()}
        numbers |= {f"eigenvalues, {n} %: {kind}": float(np.percentile(eigenvalues, n)) for n in SHARES}
    return Measurement(numbers)
