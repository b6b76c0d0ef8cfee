"""`jaxattn check`: it finds what is right, and a way that is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import cli
from jaxattn.bench import check
from jaxattn.bench.check_cases import ARGUMENTS, CASES, INTERPRETED, TIMED, CheckCase
from jaxattn.kernels import backends
from jaxattn.kernels.reference import REFERENCE
from jaxattn.kernels.tpu.backend import INTERPRETED as TPU
from jaxattn.kernels.tpu.splash import INTERPRETED as SPLASH
from jaxattn.kernels.xla import XLA

SMALL = CheckCase((6, 5), dict(size=(3, 3), boundary="mask"), ("relative_bias", "mask by slot", "lse"))
TINY = CheckCase((5,), dict(size=3))


def double(way, name):
    """The way, with the gradient of an operand twice what it is."""

    def backward(operands, cotangents, options, wanted):
        found = way.backward(operands, cotangents, options, wanted)
        return found | {name: 2 * found[name]}

    return way._replace(name="double", backward=backward)


def fail(operands, options):
    raise RuntimeError("no memory\nat all")


WAYS = [XLA, double(XLA, "key"), XLA._replace(name="fails", forward=fail), TPU._replace(name="tpu")]


def test_what_is_right_wrong_broken_and_not_supported():
    right, wrong, broken, refused = check.checked([SMALL], WAYS)
    assert str(right).startswith(f"{right.difference:.0e} ")
    assert 0 < right.difference < 2e-6
    assert str(wrong) == "1e+00 dkey WRONG"
    assert (str(broken), broken.error) == ("FAILED", "RuntimeError: no memory")
    assert (str(refused), refused.wrong) == ("-", False)
    assert refused.reason == "its kernels do not take slot_mask"
    text = check.table([right, wrong, broken, refused]).splitlines()
    assert text[0].split() == ["case", "xla", "double", "fails", "tpu"]
    assert text[1].startswith("6×5 3×3, boundary mask; relative_bias; mask by slot; lse  ")
    assert text[2] == f"fails, {SMALL.name}: RuntimeError: no memory"


def test_the_command(monkeypatch, capsys):
    """The whole of it with few cases; a wrong way in place of the right one ends it with 1."""
    monkeypatch.setattr(check, "CASES", [TINY])
    monkeypatch.setattr(check, "TIMED", [TINY])
    cli.main(["check"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"jaxattn check: xla 1 of 1; {jax.device_count()} × ")
    assert f"jax {jax.__version__}; " in line
    monkeypatch.setattr(check, "TIMED", [])
    monkeypatch.setattr(backends, "BACKENDS", [double(XLA, "value"), REFERENCE])
    with pytest.raises(SystemExit, match="jaxattn: some results are wrong or missing: see the table"):
        cli.main(["check"])
    assert f"jaxattn check: double 0 of 1 but for {TINY.name}; " in capsys.readouterr().out.splitlines()[-1]


def test_the_cases_have_every_argument_and_are_what_attention_takes():
    assert 38 <= len(CASES) <= 44
    assert {name for case in CASES for name in case.arguments} == set(ARGUMENTS)
    names = [case.name for case in (*CASES, *INTERPRETED, *TIMED)]
    assert len(set(names)) == len(names)
    assert not [case.name for case in INTERPRETED if check.refusal(TPU, case) and check.refusal(SPLASH, case)]


@pytest.mark.full
def test_interpreted_kernels():
    assert not [str(x) for x in check.checked(INTERPRETED, [TPU, SPLASH]) if x.wrong]


def test_a_nan_and_an_empty_lse_that_is_not_one_differ():
    some, nan = np.array([1.0, -np.inf]), np.array([np.nan, -np.inf])
    assert np.isnan(check.difference(nan, some))
    assert check.Outcome(SMALL, "a", check.difference(nan, some), "y").wrong
    assert check.difference(np.array([1.0, -1e30]), some) == np.inf
    assert check.difference(jnp.zeros(3), np.zeros(3)) == 0
