"""Each verdict as it is computed, and that it flips when the mechanism is sabotaged."""

import jax
import pytest

from jaxattn import zoo
from jaxattn.study.claim import Setting
from jaxattn.study.claims import CLAIMS, template
from jaxattn.train.data import load

EXPERIMENTS = {claim.number: claim.experiment for claim in CLAIMS if claim.experiment is not None}
VERDICTS = {
    1: "holds",
    2: "holds",
    4: "holds",
    5: "holds",
    7: "depends on the window",
    8: "holds",
    9: "depends on what global means",
    11: "holds",
    12: "holds",
    15: "holds",
    16: "depends on W_Q = W_K",
    17: "holds",
    18: "holds",
    19: "depends on the normaliser",
}
SABOTAGE = {
    1: {"shift": 1},
    2: {"normalize": "relu"},
    4: {"normalize": "none"},
    5: {"heads": 8},
    7: {"everything": (3, 3)},
    8: {"offset": 2, "steps": 300},
    9: {"size": 1},
    11: {"along": 0},
    12: {"layer": lambda x, kernel: template.attend(x)},
    15: {"normalize": "softmax"},
    16: {"tied": False},
    17: {"window": 3},
    18: {"content": 1.0},
    19: {"normalizers": ("softmax",)},
}


@pytest.fixture(scope="module")
def setting():
    return Setting("quick", 7, load("digits"))


def test_every_experiment_is_tested():
    assert set(EXPERIMENTS) == set(VERDICTS) == set(SABOTAGE)


@pytest.mark.parametrize("number", EXPERIMENTS)
def test_the_verdict(setting, number):
    with jax.enable_x64(False):  # as a reader has it
        assert EXPERIMENTS[number](setting).verdict == VERDICTS[number]


@pytest.mark.parametrize("number", EXPERIMENTS)
def test_the_verdict_flips_under_sabotage(setting, number):
    with jax.enable_x64(False):
        assert EXPERIMENTS[number](setting, **SABOTAGE[number]).verdict == "fails"


def test_zeros_under_every_normaliser_would_hold(setting):
    with jax.enable_x64(False):
        assert EXPERIMENTS[19](setting, normalizers=("sparsemax", "relu")).verdict == "holds"


def test_a_window_that_sees_everything_would_hold(setting, monkeypatch):
    from jaxattn.study.claims import reach

    attention = reach.nn.Attention
    monkeypatch.setattr(reach.nn, "Attention", lambda *args, window, rngs: attention(*args, window=(9, 9), rngs=rngs))
    with jax.enable_x64(False):
        assert EXPERIMENTS[7](setting).verdict == "holds"


def test_a_template_that_is_turned_round_is_another(setting):
    with jax.enable_x64(False):
        turned = EXPERIMENTS[12](setting, layer=lambda x, kernel: zoo.conv(x, kernel[::-1]))
    assert turned.verdict == "fails"
    assert turned.numbers["Jacobian moves: convolution"] < 1e-5


def test_the_bound_is_what_an_outsider_computes(setting):
    """max|x| = 1 and one tap off its centre by exp(-α): the bound is above the error, and falls as exp(-α) does."""
    with jax.enable_x64(False):
        numbers = EXPERIMENTS[5](setting).numbers
    assert 40 < numbers["bound at α = 4"] / numbers["bound at α = 8"] < 70  # exp(4) = 54.6
    assert numbers["error at α = 8"] <= numbers["bound at α = 8"]
    assert numbers["error in the limit"] == 0
