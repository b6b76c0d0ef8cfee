"""The study: its runner, its cache, its report, and what goes wrong."""

import dataclasses
import json
import re

import jax
import pytest

from jaxattn import cli
from jaxattn.study import run
from jaxattn.study.claim import FAILED, NOT_YET, Claim, Measurement, decide
from jaxattn.study.claims import CLAIMS
from jaxattn.study.figures import lines
from jaxattn.train.data import load
from jaxattn.train.extras import InputError

CALLS = []


def even(setting, number=4):
    CALLS.append(setting)
    return Measurement({"half": number / 2}, decide(number % 2 == 0), lines([1, 2], {"a & b": [1, 2]}, "x", "y"))


def odd_seed(setting):
    return Measurement({"seed": setting.seed}, decide(setting.seed % 2 == 1))


def broken(setting):
    raise RuntimeError("no <luck>")


FAKE = (
    Claim(1, "a & b", "Four is <even>.", "四是偶数。", "About.", "Hypothesis.", "Threshold.", even),
    Claim(2, "c", "It breaks.", "坏了。", experiment=broken),
    Claim(3, "c", "Seeds matter.", "种子重要。", experiment=odd_seed),
    Claim(4, "c", "It waits.", "等着。"),
)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(run, "CLAIMS", FAKE)
    CALLS.clear()


def verdicts(out):
    return {claim["number"]: claim["verdict"] for claim in json.loads((out / "report.json").read_text())["claims"]}


def test_all_twenty_two_claims_are_there_in_order():
    assert [claim.number for claim in CLAIMS] == list(range(1, 23))
    for claim in CLAIMS:
        assert claim.author
        assert claim.text
        assert re.search("[一-鿿]", claim.chinese)
        if claim.experiment is not None:
            assert claim.about.count(".") >= 2
            assert claim.hypothesis
            assert claim.threshold.startswith("Holds if")


def test_a_claim_that_raises_does_not_stop_the_others(fake, tmp_path):
    run.study(None, "quick", 2, "digits", tmp_path)
    assert verdicts(tmp_path) == {1: "holds", 2: FAILED, 3: "depends on the seed", 4: NOT_YET}
    assert json.loads((tmp_path / "report.json").read_text())["claims"][1]["error"] == "RuntimeError: no <luck>"


def test_the_report_shows_everything_and_needs_nothing(fake, tmp_path):
    run.study(None, "quick", 2, "digits", tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in ("Four is &lt;even&gt;.", "四是偶数。", "a &amp; b", "Hypothesis.", "Threshold.", "no &lt;luck&gt;"):
        assert text in page
    assert "def even(setting, number=4):" in page
    assert "1 holds, 1 depends, 1 failed to run, 1 not yet run" in page
    assert '<th scope="row">seed</th><td>0.5</td><td>0 to 1</td>' in page
    for absent in ("http:", "https:", "<script", "<link", "@import", "$"):
        assert absent not in page
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', page)) <= set(ids)
    assert page.count("<svg") == page.count("</svg>") == 1


def test_an_interrupted_study_goes_on(fake, tmp_path, monkeypatch):
    def interrupted(setting):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "CLAIMS", (FAKE[0], dataclasses.replace(FAKE[1], experiment=interrupted)))
    with pytest.raises(KeyboardInterrupt):
        run.study(None, "quick", 2, "digits", tmp_path)
    monkeypatch.setattr(run, "CLAIMS", FAKE)
    run.study(None, "quick", 2, "digits", tmp_path)
    assert len(CALLS) == 2  # once a seed, before the interruption
    assert "<svg" in (tmp_path / "report.html").read_text(encoding="utf-8")  # the figure was kept as well


@pytest.mark.parametrize("change", ["seeds", "profile", "code", "data"])
def test_the_cache_knows_what_it_was_made_with(fake, tmp_path, monkeypatch, change):
    run.study("1", "quick", 1, "digits", tmp_path)
    if change == "code":
        monkeypatch.setattr(run, "code_version", lambda: "other")
    data = "relational:copy" if change == "data" else "digits"
    run.study("1", "full" if change == "profile" else "quick", 2 if change == "seeds" else 1, data, tmp_path)
    assert len(CALLS) == (3 if change == "seeds" else 2)


def test_what_failed_is_tried_again(fake, tmp_path, monkeypatch):
    run.study("2", "quick", 1, "digits", tmp_path)
    monkeypatch.setattr(run, "CLAIMS", (dataclasses.replace(FAKE[1], experiment=even),))
    run.study("2", "quick", 1, "digits", tmp_path)
    assert verdicts(tmp_path) == {2: "holds"}


def test_the_command_prints_the_verdicts(tmp_path, capsys):
    with jax.enable_x64(False):
        cli.main(["study", "--claims", "19,3", "--seeds", "1", "--out", str(tmp_path / "new" / "study")])
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["claim  3: not yet run", "claim 19: depends on the normaliser"]
    assert (tmp_path / "new" / "study" / "report.html").is_file()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"claims": "5,x"}, r"claims \(='5,x'\) must be numbers with commas"),
        ({"claims": "5,23"}, r"claims \(='5,23'\): there is no claim 23; allowed: 1 to 22"),
        ({"claims": ""}, r"claims \(=''\) must be numbers"),
        ({"seeds": 0}, r"seeds \(=0\) must be at least 1"),
        ({"data": "numpy:nowhere.npz"}, "nowhere.npz"),
        ({"data": "mnist"}, r"data \(='mnist'\) must be one of"),
    ],
)
def test_a_mistake_is_named_before_anything_runs(tmp_path, given, message):
    given = {"claims": None, "profile": "quick", "seeds": None, "data": "digits", "out": tmp_path} | given
    with pytest.raises(InputError, match=message):
        run.study(**given)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"out \(=.*file\) cannot be written to"):
        run.study("1", "quick", 1, "digits", tmp_path / "file")


def test_the_fingerprint_sees_other_images():
    assert run.fingerprint(load("digits", 0)) != run.fingerprint(load("digits", 1))
