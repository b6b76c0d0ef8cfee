"""Runs on disk: what starts, goes on, is replaced, or is refused."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from jaxattn.train.config import Config
from jaxattn.train.recipes import RECIPES
from jaxattn.train.run import (
    check_out,
    default_folder,
    end_run,
    is_whole,
    read_config,
    read_results,
    start_run,
    write_config,
)


def make_run(out: Path, seed: int = 0, **kwargs):
    start_run(out, Config(seed=seed), **kwargs)
    end_run(out, {"test_accuracy": 0.5, "seed": seed})


def test_a_run_is_known_for_what_it_is(tmp_path):
    out = tmp_path / "deep" / "run"
    start_run(out, Config(epochs=7))
    assert read_config(out) == Config(epochs=7)
    assert not is_whole(out)
    end_run(out, {"test_accuracy": 0.5})
    assert is_whole(out)
    assert read_results(out) == {"test_accuracy": 0.5}
    assert {path.name for path in out.iterdir()} == {"config.json", "results.json"}
    assert [path.name for path in out.parent.iterdir()] == ["run"]


def test_a_run_is_replaced_only_when_asked(tmp_path):
    out = tmp_path / "run"
    make_run(out)
    with pytest.raises(ValueError, match=r"out \(=.*\) holds a run already; replace it with --overwrite"):
        start_run(out, Config(seed=1))
    assert read_config(out).seed == 0
    make_run(out, seed=1, overwrite=True)
    assert read_results(out)["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_replaced_run_is_kept_until_the_new_one_is_whole(tmp_path):
    out, aside = tmp_path / "run", tmp_path / "run.replaced"
    make_run(out)
    for seed in (1, 2):  # the second attempt must not take the first one's remains for the run to keep
        start_run(out, Config(seed=seed), overwrite=True)
        assert (read_config(out).seed, is_whole(out)) == (seed, False)
        assert (read_config(aside).seed, is_whole(aside)) == (0, True)
    end_run(out, {})
    assert not aside.exists()


def test_an_unfinished_run_goes_on_or_is_refused(tmp_path):
    out = tmp_path / "run"
    start_run(out, Config())
    with pytest.raises(ValueError, match=r"holds an unfinished run: go on with --resume; replace it with --overwrite"):
        start_run(out, Config())
    (out / "metrics.jsonl").write_text("precious")
    start_run(out, Config(), resume=True)
    assert (out / "metrics.jsonl").read_text() == "precious"


def test_a_run_does_not_go_on_with_other_settings(tmp_path):
    start_run(tmp_path / "run", Config())
    message = r"resume: the run in .*run has other settings: epochs is 15, not 3; seed is 0, not 1"
    with pytest.raises(ValueError, match=message):
        check_out(tmp_path / "run", Config(epochs=3, seed=1), resume=True)
    assert read_config(tmp_path / "run") == Config()


def test_resuming_nothing_starts(tmp_path):
    start_run(tmp_path / "run", Config(), resume=True)
    assert read_config(tmp_path / "run") == Config()


@pytest.mark.parametrize("how", [{}, {"overwrite": True}, {"resume": True}])
def test_what_is_not_a_run_is_never_touched(tmp_path, how):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("thesis", "file"):
        with pytest.raises(ValueError, match="must be new, empty or a run; choose another --out"):
            start_run(tmp_path / name, Config(), **how)
    assert (tmp_path / "thesis" / "chapter1").read_text() == "precious"
    assert (tmp_path / "file").read_text() == "precious"


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match=r"out \(=.*file/run\) cannot be written to: .*[Nn]ot a directory"):
        start_run(tmp_path / "file" / "run", Config())


def test_an_empty_folder_may_become_a_run(tmp_path):
    (tmp_path / "run").mkdir()
    make_run(tmp_path / "run")
    assert read_config(tmp_path / "run") == Config()


def test_out_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(Path("run"))
    make_run(Path("run"), overwrite=True)
    assert read_config(tmp_path / "run") == Config()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_config_survives_the_disk(tmp_path):
    config = Config(model="resnet18", mix="conv", data="fashion-mnist:/x y", epochs=3, learning_rate=0.1, seed=9)
    write_config(config, tmp_path)
    assert read_config(tmp_path) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "must be a folder that `jaxattn train` wrote: config.json is missing"),
        ("{", r"config.json: "),
        ("[]", r"config.json: "),
        (json.dumps({"depth": 3}), "config.json: .*depth"),
        (json.dumps({"model": "vgg"}), "config.json: .*vgg"),
        (json.dumps({"epochs": -1}), r"config.json: epochs \(=-1\) must be at least 1"),
    ],
)
def test_a_folder_that_is_not_a_run_is_told_why(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        read_config(tmp_path)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(ValueError, match=r"run \(=.*nowhere\) must be a folder that `jaxattn train` wrote"):
        read_config(tmp_path / "nowhere")


def test_default_folders_say_what_differs():
    assert default_folder(Config()) == Path("runs/digits")
    assert default_folder(Config(mix="conv")) == Path("runs/digits-conv")
    fashion = dataclasses.replace(RECIPES["fashion"], data="fashion-mnist:/a/b")
    assert default_folder(fashion) == Path("runs/fashion-mnist")
    assert default_folder(dataclasses.replace(fashion, model="resnet18", mix="attention", seed=3)) == Path(
        "runs/fashion-mnist-resnet18-attention-seed3"
    )
    assert default_folder(dataclasses.replace(RECIPES["vit"], data="cifar10:/a")) == Path("runs/cifar10-vit")
