"""The study: its runner, its cache, its report, and what goes wrong."""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import study_fakes
from flax import nnx
from study_fakes import CALLS

from jaxattn import cli, models
from jaxattn.errors import InputError
from jaxattn.study import animation, mixers, run, worker
from jaxattn.study.animation import moving_centers
from jaxattn.study.answer import ANSWER, SHORT, answer
from jaxattn.study.claim import FAILED, Measurement, Setting
from jaxattn.study.claims import CLAIMS
from jaxattn.study.fit import Trained, classifier, examples
from jaxattn.study.mixers import DistanceAttention
from jaxattn.study.seeds import interval
from jaxattn.train.data import load

FAKE = study_fakes.CLAIMS
NUMBERS = "1,2,3,4"  # of the fakes that end


@pytest.fixture
def here(monkeypatch):
    """The claims that cost nothing, in this process."""

    def answers(job, groups, jobs):
        runner = worker.Runner(job)
        for group in groups:
            for task in group:
                yield task, (answer := runner.answer(task))
                if "error" in answer:
                    break

    monkeypatch.setattr(run, "SOURCE", "study_fakes")
    monkeypatch.setattr(run, "answers", answers)
    CALLS.clear()


def verdicts(out):
    return {claim["number"]: claim["verdict"] for claim in json.loads((out / "report.json").read_text())["claims"]}


def test_all_twenty_two_claims_are_there_in_order():
    assert [claim.number for claim in CLAIMS] == list(range(1, 23))
    for claim in CLAIMS:
        assert claim.author
        assert claim.text
        assert re.search("[一-鿿]", claim.chinese)
        assert claim.about.count(".") >= 2
        assert claim.hypothesis
        assert "Holds if" in claim.threshold


def test_a_claim_that_raises_does_not_stop_the_others(here, tmp_path):
    run.study(NUMBERS, "quick", 2, "digits", tmp_path)
    assert verdicts(tmp_path) == {1: "holds", 2: FAILED, 3: "depends on the seed", 4: "holds"}
    assert json.loads((tmp_path / "report.json").read_text())["claims"][1]["error"] == "RuntimeError: no <luck>"


def test_the_report_shows_everything_and_needs_nothing(here, tmp_path):
    run.study(NUMBERS, "quick", 2, "digits", tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in ("Four is &lt;even&gt;.", "四是偶数。", "a &amp; b", "Hypothesis.", "Threshold.", "no &lt;luck&gt;"):
        assert text in page
    assert "def even(setting, number=4):" in page
    assert "2 hold, 1 depends, 1 failed to run" in page
    assert '<th scope="row">seed</th><td>0.5</td><td>0 to 1</td>' in page
    assert '<th scope="row">mean of &lt;all&gt;</th><td>0.75</td><td></td>' in page
    assert "Somebody &amp; others 1999" in page
    assert "def mean_above_half(numbers):" in page
    for absent in ("http:", "https:", "<script", "<link", "@import", "$"):
        assert absent not in page
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', page)) <= set(ids)
    assert page.count("<svg") == page.count("</svg>") == 2


def test_an_interrupted_study_goes_on(here, tmp_path, monkeypatch):
    def interrupted(setting):
        raise KeyboardInterrupt

    monkeypatch.setattr(study_fakes, "CLAIMS", (FAKE[0], dataclasses.replace(FAKE[1], experiment=interrupted)))
    with pytest.raises(KeyboardInterrupt):
        run.study(None, "quick", 2, "digits", tmp_path)
    monkeypatch.setattr(study_fakes, "CLAIMS", FAKE)
    run.study("1,2", "quick", 2, "digits", tmp_path)
    assert CALLS == ["even"] * 2  # once a seed, before the interruption
    assert "<svg" in (tmp_path / "report.html").read_text(encoding="utf-8")  # the figure was kept as well


@pytest.mark.core(3)
@pytest.mark.parametrize("change", ["seeds", "profile", "code", "data", "fingerprint", "versions"])
def test_the_cache_knows_what_it_was_made_with(here, tmp_path, monkeypatch, change):
    run.study("1", "quick", 1, "digits", tmp_path)
    if change == "code":
        monkeypatch.setattr(worker, "code_version", lambda: "other")
    if change == "fingerprint":  # the images changed under their name
        monkeypatch.setattr(worker, "fingerprint", lambda data: "other")
    if change == "versions":
        monkeypatch.setattr(worker, "environment", lambda: {"jax": "other"})
    data = "relational:copy" if change == "data" else "digits"
    run.study("1", "full" if change == "profile" else "quick", 2 if change == "seeds" else 1, data, tmp_path)
    assert len(CALLS) == 2  # of two seeds, the first is there already


def test_what_failed_is_tried_again(here, monkeypatch, tmp_path):
    outcomes = iter([RuntimeError("at first"), Measurement({"half": 2}, "holds")])

    def at_last(setting):
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(study_fakes, "CLAIMS", (dataclasses.replace(FAKE[1], experiment=at_last),))
    failed = run.study("2", "quick", 1, "digits", tmp_path)
    assert run.summary(failed) == "claim  2: failed to run (RuntimeError: at first)"
    run.study("2", "quick", 1, "digits", tmp_path)
    assert verdicts(tmp_path) == {2: "holds"}


def test_the_numbers_are_json_that_all_can_read(here, monkeypatch, tmp_path):
    never = lambda setting: Measurement({"first": math.inf}, "fails")
    monkeypatch.setattr(study_fakes, "CLAIMS", (dataclasses.replace(FAKE[1], experiment=never),))
    run.study("2", "quick", 1, "digits", tmp_path)
    strict = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert strict["claims"][0]["numbers"] == {"first": [None]}


def test_the_command_prints_the_verdicts(tmp_path, capsys):
    with jax.enable_x64(False):
        cli.main(["study", "--claims", "19,2", "--seeds", "1", "--out", str(tmp_path / "new" / "study")])
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["claim  2: holds", "claim 19: depends on the normaliser"]
    assert (tmp_path / "new" / "study" / "report.html").is_file()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"claims": "5,x"}, r"claims \(='5,x'\) must be numbers with commas"),
        ({"claims": "5,23"}, r"claims \(='5,23'\) must be from 1 to 22: there is no claim 23"),
        ({"claims": ""}, r"claims \(=''\) must be numbers"),
        ({"seeds": 0}, r"seeds \(=0\) must be at least 1"),
        ({"jobs": 0}, r"jobs \(=0\) must be at least 1"),
        ({"runs": 0}, r"runs \(=0\) must be at least 1"),
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
    with pytest.raises(InputError, match=r"out \(=.*file\) must be a folder that can be written to"):
        run.study("1", "quick", 1, "digits", tmp_path / "file")


def test_the_fingerprint_sees_other_images():
    assert worker.fingerprint(load("digits", 0)) != worker.fingerprint(load("digits", 1))


def test_claims_that_share_an_experiment_share_its_runs(here, monkeypatch, tmp_path):
    monkeypatch.setattr(study_fakes, "CLAIMS", (FAKE[3], dataclasses.replace(FAKE[3], number=5)))
    run.study(None, "quick", 2, "digits", tmp_path)
    assert CALLS == ["drawn"] * 2
    assert verdicts(tmp_path) == {4: "holds", 5: "holds"}


def test_a_judge_sees_all_seeds(here, tmp_path):
    run.study("4", "quick", 1, "digits", tmp_path / "one")
    assert verdicts(tmp_path / "one") == {4: "fails"}
    run.study("4", "quick", 2, "digits", tmp_path / "two")
    claim = json.loads((tmp_path / "two" / "report.json").read_text())["claims"][0]
    assert claim["numbers"] == {"value": [0.25, 1.25]}
    assert (claim["verdict"], claim["summary"], claim["notes"]) == ("holds", {"mean of <all>": 0.75}, "A note.")


def test_how_often_a_verdict_comes_out(here, tmp_path):
    """Each run has other seeds, the first those of a study without runs; what is kept of one serves the other."""
    run.study("4", "quick", 2, "digits", tmp_path)
    found = run.study(NUMBERS, "quick", 2, "digits", tmp_path, runs=3)
    assert CALLS.count("drawn") == 6
    assert found[3].numbers == {"value": [0.25, 1.25]}
    assert run.summary(found).splitlines() == [
        "claim  1: holds, 3 of 3",
        "claim  2: failed to run, 3 of 3 (RuntimeError: no <luck>)",
        "claim  3: depends on the seed, 3 of 3",
        "claim  4: holds, 3 of 3",
    ]
    found = run.study("3", "quick", 1, "digits", tmp_path, runs=3)
    assert found[0].runs == ["fails", "holds", "fails"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<td class="fail">fails, 2 of 3</td>' in page
    assert "Of 3 runs with other seeds: fails 2, holds 1." in page
    assert "| fails, 2 of 3 |" in (tmp_path / "verdicts.md").read_text(encoding="utf-8")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["claims"][0]["runs"] == ["fails", "holds", "fails"]
    assert report["settings"]["runs"] == 3


def test_an_interval_is_students():
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert interval([0.5]) == (0.5, -math.inf, math.inf)
    assert interval([0.5, 0.5]).above(0.4) is True
    assert interval([0.5, 0.5]).above(0.5) is False
    assert interval([0.4, 0.6]).above(0.5) is None


def test_the_verdicts_as_a_table(here, tmp_path):
    run.study("1,4", "quick", 2, "digits", tmp_path)
    assert (tmp_path / "verdicts.md").read_text(encoding="utf-8").splitlines() == [
        "| | claim | who | verdict |",
        "|---|---|---|---|",
        "| 1 | Four is <even>. | a & b | holds |",
        "| 4 | All together. | c | holds |",
        "",
        "- 4: A note.",
    ]
    assert not list(tmp_path.glob("*.partial"))


def test_the_answer_says_what_came_out():
    """Each outcome has its own sentence, and the short answer stands only where both halves of it hold."""
    for number, ways in ANSWER:
        assert {"hold", "fail"} <= set(ways)
        assert len({text for text, _ in (answer({number: kind})[0] for kind in ways)}) == len(ways)
    assert answer({}) == []
    assert SHORT in [text for text, _ in answer({5: "hold", 18: "hold"})]
    assert SHORT not in [text for text, _ in answer({5: "hold", 18: "fail"})]


def test_moving_centers_end_where_training_ended():
    tracks = np.zeros((3, 1, 1, 2))
    tracks[-1, 0, 0] = (1.0, -1.0)  # down a row, left a column
    svg = moving_centers(tracks, ["layer 1"])
    middle = animation.SIDE / 2
    x, y = map(float, re.search(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="4.5"', svg).groups())
    assert x < middle < y
    assert f'values="{middle};{middle};{x}"' in svg
    assert f'values="{middle};{middle};{y}"' in svg


def test_each_seed_knows_other_examples_and_is_tested_on_the_same():
    for data, total in ((load("digits"), 1200), (load("relational:match"), 20_000)):
        (one, test), (two, again), (more, _) = (examples(data, seed, n) for seed, n in ((0, 50), (1, 50), (0, 80)))
        assert one.images.shape == (50, *data.image_shape)
        assert one.images.dtype == np.float32
        assert (one.images != two.images).any()
        np.testing.assert_array_equal(more.images[:50], one.images)  # a larger share holds the smaller
        np.testing.assert_array_equal(test.images, again.images)
        everything = {image.tobytes() for image in examples(data, 0, total)[0].images}
        if not data.train.endless:
            assert {image.tobytes() for image in two.images} <= everything


def test_a_small_set_is_learned_by_heart():
    """Few images are learned by heart, batch statistics included, and the test images are counted one by one."""
    known, _ = examples(load("digits"), 0, 40)
    build = lambda rngs: models.tiny(width=8, num_heads=2, rngs=rngs)
    with jax.enable_x64(False):
        trained = classifier(build, steps=150, batch=40, rate=1e-2)(0, known, known, watch=lambda model: 1)
        assert trained.accuracy > 0.9
        trained.model.eval()
        right = (np.asarray(trained.model(jnp.asarray(known.images))).argmax(-1) == known.labels).mean()
    assert trained.accuracy == pytest.approx(right)
    assert len(trained.seen) >= 24
    assert float(trained.model.stem_norm.mean[...].std()) > 0  # running statistics moved


@pytest.mark.parametrize("tied", [True, False])
def test_distance_attention_is_softmax_of_distances(tied):
    """By loops, in float64; with one matrix no token is nearer to another than to itself."""
    layer = DistanceAttention(2, 6, tied=tied, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 3, 2, 6))
    of = lambda m: np.einsum("...f,fhd->...hd", x.reshape(2, 6, 6), np.asarray(m.kernel[...])) + np.asarray(m.bias[...])
    query, key, value = of(layer.query), of(layer.key), of(layer.value)
    wanted = np.zeros((2, 6, 6))
    for n, i, h in np.ndindex(2, 6, 2):
        scores = np.array([-0.5 * ((query[n, i, h] - key[n, j, h]) ** 2).sum() / np.sqrt(3) for j in range(6)])
        weights = np.exp(scores) / np.exp(scores).sum()
        assert not tied or weights.argmax() == i
        wanted[n, i] += weights @ value[n, :, h] @ np.asarray(layer.out.kernel[h])
    np.testing.assert_allclose(
        layer(jnp.asarray(x)).reshape(2, 6, 6), wanted + np.asarray(layer.out.bias[...]), rtol=1e-9
    )


def test_an_accuracy_is_found_by_other_experiments(tmp_path, monkeypatch):
    """In the folder of the study, by all that decides it and by no less."""
    trained = []

    def train(mixer, setting, data, **how):
        trained.append((mixer, setting.seed, how))
        return Trained(nnx.Module(), len(trained) / 10, [])

    monkeypatch.setattr(mixers, "train", train)
    setting = Setting("quick", 0, load("digits"), tmp_path)
    assert mixers.accuracy("relu", setting, setting.data) == 0.1
    assert mixers.accuracy("relu", setting, setting.data, count=1200) == 0.1  # that is all of them
    others = [
        ("sigmoid", setting, setting.data, {}),
        ("relu", dataclasses.replace(setting, seed=1), setting.data, {}),
        ("relu", dataclasses.replace(setting, profile="full"), setting.data, {}),
        ("relu", setting, mixers.search(), {}),
        ("relu", setting, setting.data, {"count": 100}),
        ("relu", setting, setting.data, {"steps": 3}),
        ("relu", setting, setting.data, {"shuffled": True}),
    ]
    for n, (mixer, how, data, size) in enumerate(others):
        assert mixers.accuracy(mixer, how, data, **size) == (n + 2) / 10
    assert len(trained) == 1 + len(others)
    assert len(list(tmp_path.iterdir())) == len(trained)  # and nothing half-written
    assert mixers.accuracy("relu", Setting("quick", 0, setting.data), setting.data) == 0.9  # no folder, so trained anew


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[3]",
        lambda text: text.replace('"verdict"', '"outcome"'),
        lambda text: text.replace("<svg", "<script>alert(1)</script><svg"),
        lambda text: text.replace("<svg", "<!--><script>alert(1)</script>--><svg onload='f()'"),
    ],
)
def test_what_is_damaged_of_the_kept_is_run_anew(tmp_path, damage):
    """The file is named by a warning, and nothing of it comes into the page."""
    from jaxattn.study.kept import kept

    claim = next(claim for claim in CLAIMS if claim.number == 1)
    claim = dataclasses.replace(
        claim, experiment=lambda setting: Measurement({"x": 1.0}, "holds", figures=["<svg><g/></svg>"])
    )
    path = tmp_path / "x.json"
    first = kept(claim, path, None)
    assert kept(claim, path, None) == dataclasses.replace(first, svg="<svg><g /></svg>")
    path.write_text(damage(path.read_text()))
    with pytest.warns(UserWarning, match=rf"{path}: .*; it is run anew"):
        again = kept(claim, path, None)
    assert again.svg == "<svg><g/></svg>"
    assert kept(claim, path, None).numbers == {"x": 1.0}
