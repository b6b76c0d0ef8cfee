"""The commands, from their arguments to the files that they leave."""

import contextlib
import dataclasses
import importlib
import io
import json
import re
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from jaxattn import cli
from jaxattn.train import data, loop, session
from jaxattn.train.augment import pix
from jaxattn.train.build import build
from jaxattn.train.checkpoint import Checkpoints
from jaxattn.train.config import Config, Options
from jaxattn.train.log import Log
from jaxattn.train.run import read_config

OUT = "digits & <co>"  # a name that HTML and shells would stumble over
EPOCH_KEYS = {
    "step",
    "epoch",
    "train_loss",
    "train_accuracy",
    "train_gradient_norm",
    "validation_accuracy",
    "images_per_second",
    "learning_rate",
}
RESULT_KEYS = {
    "test_accuracy",
    "test_correct",
    "test_images",
    "parameters",
    "flops_per_image",
    "train_images_per_second",
    "seconds",
}


def few(name: str, seed: int = 0, skip_bad: bool = False) -> data.Dataset:
    """A part of digits, so that an epoch takes a moment."""
    digits = data.load(name, seed, skip_bad)
    sizes = {"train": 200, "validation": 30, "test": 130}
    return dataclasses.replace(
        digits, **{part: data.Arrays(*getattr(digits, part).fetch(np.arange(size))) for part, size in sizes.items()}
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """`jaxattn train` with both mixers, and what `jaxattn eval` says of it: (folder, printed by each)."""
    folder = tmp_path_factory.mktemp("work")
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "load", few)
        patch.chdir(folder)
        for arguments in (["train", "--epochs", "1", "--out", OUT], ["eval", OUT]):
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                cli.main(arguments)
            said.append(printed.getvalue().splitlines())
    return folder / OUT, *said


@pytest.mark.full
def test_every_file_is_written(both):
    out, _, _ = both
    files = {str(path.relative_to(out)) for path in out.rglob("*")}
    per_run = {"config.json", "metrics.jsonl", "steps.jsonl", "tensorboard", "checkpoints", "results.json", "figures"}
    per_run |= {"figures/learning_curves.png"}
    inside = {
        "conv": {"figures/kernels.png"},
        "attention": {"figures/attention_maps.png", "figures/mean_attention.png"},
    }
    expected = {"config.json", "results.json", "report.html", "conv", "attention", "figures"}
    for mix, own in inside.items():
        expected |= {f"{mix}/{name}" for name in per_run | own}
        expected |= own
    assert files >= expected
    assert {path.name for path in out.parent.iterdir()} == {out.name}
    for path in out.rglob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_files_hold_what_they_promise(both):
    out, _, _ = both
    assert read_config(out) == Config(epochs=1)
    for mix in ("conv", "attention"):
        assert read_config(out / mix) == Config(epochs=1, mix=mix)
        (epoch,) = [json.loads(line) for line in (out / mix / "metrics.jsonl").read_text().splitlines()]
        assert set(epoch) == EPOCH_KEYS
        assert np.isfinite(list(epoch.values())).all()
        results = json.loads((out / mix / "results.json").read_text())
        assert set(results) == RESULT_KEYS
        assert results["test_accuracy"] == results["test_correct"] / results["test_images"]
        assert results["test_images"] == 130


def test_the_parameters_are_counted_as_the_design_says(both):
    """3·3 convolutions of widths 32 and 64 and a projection; attention has W_Q, W_K, W_V and (2·5-1)·2 row and column
    embeddings of half a head in place of each 3·3."""
    out, _, _ = both
    counts = {mix: json.loads((out / mix / "results.json").read_text())["parameters"] for mix in ("conv", "attention")}
    mixers = [(32, 32), (32, 32), (32, 64), (64, 64)]
    shared = 9 * 32 + 2 * 32 + 2 * 2 * 32 + 2 * 2 * 64 + (32 * 64 + 2 * 64) + 64 * 10 + 10
    assert counts["conv"] == shared + sum(9 * a * b for a, b in mixers)
    assert counts["attention"] == shared + sum(3 * a * b + 9 * b for a, b in mixers)


def test_eval_prints_what_training_printed(both):
    out, trained, evaluated = both
    assert trained[-1] == f"report: {OUT}/report.html"
    assert evaluated == trained[:-1]
    for mix, line in zip(("conv", "attention"), evaluated, strict=True):
        results = json.loads((out / mix / "results.json").read_text())
        assert line == f"{mix}: test accuracy {results['test_correct'] / 130:.2%} ({results['test_correct']} of 130)"


def test_the_report_is_self_contained(both):
    page = (both[0] / "report.html").read_text()
    assert "http:" not in page
    assert "https:" not in page
    assert "<script" not in page
    assert "<link" not in page
    assert "@import" not in page
    for target in re.findall(r'(?:src|href)="([^"]*)"', page) + re.findall(r"url\(([^)]*)\)", page):
        assert target.startswith(("#", "data:image/png;base64,"))
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids)) > 100
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', page)) <= set(ids)
    assert "$" not in page  # no placeholder was left
    assert page.count("<svg") == page.count("</svg>") == 4


def test_the_report_says_what_was_measured(both):
    out, _, _ = both
    page = (out / "report.html").read_text()
    for mix in ("conv", "attention"):
        results = json.loads((out / mix / "results.json").read_text())
        assert f"<td>{results['test_accuracy']:.2%}</td>" in page
        assert f"<td>{results['parameters']:,}</td>" in page
        assert f"<td>{results['flops_per_image'] / 1e6:.2f}</td>" in page
        assert f"<td>{results['train_images_per_second']:,.0f}</td>" in page
    assert "jaxattn train --epochs 1" in page
    for field in dataclasses.fields(Config):
        assert f"<dt>{field.name}</dt>" in page
    for package in ("jaxattn", "jax", "flax"):
        assert f"<dt>{package}</dt>" in page
    assert page.count("prefers-color-scheme: dark") == 1
    assert "@media print" in page


# What goes wrong


def fails(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code not in (0, None)
    said = capsys.readouterr()
    # tyro frames its messages; the frame and the line breaks are left out
    return " ".join(re.sub(r"[╭╮╰╯│─]", " ", said.out + said.err + str(stopped.value.code)).split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "train, eval"),
        (["fly"], "fly"),
        (["train", "--model", "vgg"], "tiny"),
        (["train", "--mix", "mlp"], "attention"),
        (["train", "--epochs", "-3"], "jaxattn: epochs (=-3) must be at least 1"),
        (["train", "--epochs", "many"], "many"),
        (["train", "--data", "mnist"], "jaxattn: data (='mnist') must be one of 'digits', 'fashion-mnist:PATH'"),
        (["train", "--recipe", "soup"], "jaxattn: recipe (='soup') must be one of digits, fashion"),
        (["train", "--checkpoint-every", "-1"], "jaxattn: checkpoint_every (=-1) must be at least 0"),
        (["train", "--resume", "--overwrite"], "jaxattn: resume (=True) and overwrite (=True) must not both be set"),
        (["train", "--data", "fashion-mnist:nowhere"], "jaxattn: nowhere: has neither train-images-idx3-ubyte"),
        (["train", "--mesh", "data=3"], "jaxattn: mesh (='data=3') takes 3 devices and there are 8; this fits: data=8"),
        (["train", "--mesh", "data=8"], "jaxattn: batch_size (=50) must be a multiple of data·fsdp (=8)"),
        (["eval"], "run"),
        (["eval", "nowhere"], "jaxattn: run (=nowhere) must be a folder that `jaxattn train` wrote"),
        (["eval", "."], "jaxattn: run (=.) must be a folder that `jaxattn train` wrote: config.json is missing"),
    ],
)
def test_a_mistake_is_explained_and_leaves_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *arguments)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_run_without_its_checkpoint(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"mix": "conv"}))
    assert "must be a whole run: checkpoints is missing or empty" in fails(capsys, "eval", str(tmp_path))


def test_an_existing_run_is_not_overwritten(both, capsys):
    out, _, _ = both
    before = (out / "report.html").read_bytes()
    said = fails(capsys, "train", "--epochs", "1", "--out", str(out))
    assert "holds a run already; replace it with --overwrite" in said
    assert (out / "report.html").read_bytes() == before


@pytest.mark.full  # the core has `test_resume`
def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, capsys):
    """Ctrl-C after the first of two networks: it is not trained again, and the report is there in the end."""
    real = loop.train

    def interrupted(config, *args, **kwargs):
        if config.mix == "attention":
            raise KeyboardInterrupt
        return real(config, *args, **kwargs)

    monkeypatch.setattr(session, "load", few)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", interrupted)
        assert "interrupted" in fails(capsys, "train", "--epochs", "1")
    assert "unfinished run: go on with --resume" in fails(capsys, "train", "--epochs", "1")
    assert "epochs is 1, not 2" in fails(capsys, "train", "--epochs", "2", "--resume")
    first = (tmp_path / "runs" / "digits" / "conv" / "results.json").read_bytes()
    cli.main(["train", "--resume", "--out", "runs/digits"])  # whose settings are the run's
    assert (tmp_path / "runs" / "digits" / "conv" / "results.json").read_bytes() == first
    assert (tmp_path / "runs" / "digits" / "report.html").stat().st_size > 50_000
    assert "holds a run already" in fails(capsys, "train", "--epochs", "1")


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in said
    for field in dataclasses.fields(Options):
        assert f"--{field.name.replace('_', '-')}" in said
    assert "default: 0.003" in said
    with pytest.raises(SystemExit):
        cli.main(["train", "--recipe", "resnet", "--help"])
    assert "default: resnet18" in " ".join(capsys.readouterr().out.split())  # that recipe's own


@pytest.mark.parametrize(
    ("module", "using"),
    [
        ("sklearn", lambda path: data.load("digits")),
        ("orbax", lambda path: Checkpoints(path).save(1, {}, {})),
        ("grain", lambda path: data.batches(data.load("digits").train, 4, seed=0)),
        ("dm_pix", lambda path: pix()),
        ("tensorboardX", lambda path: Log(path, 0)),
        ("tqdm", "jaxattn.train.loop"),
        ("tyro", "jaxattn.cli"),
        ("matplotlib", "jaxattn.plots"),
    ],
)
def test_a_missing_extra_names_the_install_that_brings_it(tmp_path, monkeypatch, module, using):
    for name in [name for name in sys.modules if name == using or name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # so importing it fails
    with pytest.raises(ImportError, match=re.escape("pip install 'jaxattn[train]'")):
        importlib.import_module(using) if isinstance(using, str) else using(tmp_path)


def test_eval_is_of_the_network_as_it_ended_and_not_of_its_best_epoch(tmp_path):
    config, digits = Config(mix="conv"), few("digits")
    with Checkpoints(tmp_path) as checkpoints:
        for step, validation in ((1, 0.9), (2, 0.1)):
            model = build(config, digits.image_shape, 10)
            weights, rest = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
            weights = jax.tree.map(lambda weight, step=step: weight + step, weights)
            checkpoints.save(step, {"weights": weights, "rest": rest}, {}, validation)
    loaded = nnx.state(session.load_model(config, digits.image_shape, 10, tmp_path), nnx.Param)
    assert jax.tree.all(jax.tree.map(lambda one, two: (one == two).all(), loaded, weights))
