"""Figures and reports of a run: of few classes however many there are, of names of any kind, and at no cost."""

import dataclasses
import locale

import numpy as np
import pytest

from jaxattn import plots
from jaxattn.models.resnet import tiny
from jaxattn.train import report, session
from jaxattn.train.config import Config
from jaxattn.train.data import Arrays, Dataset

RNGS = session.nnx.Rngs(0)
NAMES = ("$%$", r"\frac", "$100 bill$", "飞机", "caf\\xe9", *(f"class {n}" for n in range(5, 1000)))


def data_of(classes):
    images = np.random.default_rng(0).integers(0, 256, (classes, 8, 8, 1)).astype(np.uint8)
    part = Arrays(images, np.arange(classes, dtype=np.int32))
    one = np.ones(1, np.float32)
    return Dataset("made", NAMES[:classes], (8, 8, 1), 0 * one, one, part, part, part)


@pytest.fixture
def run(tmp_path):
    """A folder with what a run of one epoch leaves."""
    epoch = '{"epoch": 1, "train_loss": 2.0, "train_accuracy": 0.3, "validation_accuracy": 0.5}'
    for folder in (tmp_path, tmp_path / "conv", tmp_path / "attention"):
        folder.mkdir(exist_ok=True)
        (folder / "metrics.jsonl").write_text(epoch + "\n")
        results = dict.fromkeys(session.MEASURED, 1)
        session.end_run(folder, results)
    return tmp_path


@pytest.mark.full
def test_a_thousand_classes_make_a_figure_of_twelve(run, monkeypatch, capsys):
    seen = []
    real = plots.attention_maps
    monkeypatch.setattr(
        plots, "attention_maps", lambda images, *rest: seen.append((images, rest[-1])) or real(images, *rest)
    )
    data, model = data_of(1000), tiny(mix="attention", num_classes=1000, in_features=1, rngs=RNGS)
    session.draw(Config(mix="attention"), data, run, model)
    ((images, names),) = seen
    assert images.shape[0] == len(names) == 12
    assert names[:3] == list(NAMES[:3])
    assert names[3] in ("飞机", "class 3")  # with a font that has it, and without
    assert (run / "figures" / "attention_maps.png").is_file()
    assert capsys.readouterr().err == ""


def test_a_figure_that_fails_costs_nothing_else(run, monkeypatch, capsys):
    def fails(*_):
        raise ValueError("no such figure")

    monkeypatch.setattr(session, "look_inside", fails)
    config = Config(mix="both")
    session.report(config, data_of(10), run, dict.fromkeys(("conv", "attention"), session.nnx.Linear(1, 1, rngs=RNGS)))
    said = capsys.readouterr().err
    assert f"{run / 'conv'}: a figure could not be drawn: no such figure" in said
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count(report.NO_FIGURE) == 3
    assert page.count("<svg") == 1
    assert session.is_whole(run)


def test_the_report_is_utf8_whatever_the_locale_says(run, monkeypatch, tmp_path):
    monkeypatch.setattr(locale, "getpreferredencoding", lambda *_: "ascii")
    monkeypatch.setattr("io.text_encoding", lambda encoding, *_: encoding or "ascii")
    config, results = Config(mix="both"), dict.fromkeys(session.MEASURED, 1)
    data = dataclasses.replace(data_of(10), name="飞机")
    report.write_report(tmp_path / "x.html", config, data, {"conv": results, "attention": results}, {})
    assert "飞机" in (tmp_path / "x.html").read_bytes().decode("utf-8")
