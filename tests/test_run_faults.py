"""What goes wrong with runs: settings that would do nothing, data that changed or moved, two processes in one folder,
and files in it that nobody wrote."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxattn import cli, models
from jaxattn.errors import InputError
from jaxattn.train import compile as compiling
from jaxattn.train import loop, session
from jaxattn.train.checkpoint import Checkpoints
from jaxattn.train.config import Config
from jaxattn.train.data import Arrays, Dataset, absolute, fingerprint
from jaxattn.train.fits import check_fits
from jaxattn.train.lock import locked
from jaxattn.train.log import Log
from jaxattn.train.run import read_epochs, read_results, read_source

COUNT = 40


class Small(nnx.Module):
    """A network that compiles at once."""

    def __init__(self, *, num_classes, in_features, rngs, **kwargs):
        self.linear = nnx.Linear(16 * in_features, num_classes, rngs=rngs)

    def __call__(self, images):
        return self.linear(images.reshape(len(images), -1))


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A network that compiles at once and draws nothing, and data of a file of 4×4 images, in a folder to work in."""
    monkeypatch.setattr(models, "tiny", Small)
    monkeypatch.setattr(session, "look_inside", lambda *_: {})
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    write(tmp_path / "x.npz")
    return tmp_path


def write(path, seed=0, count=COUNT):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    images = rng.integers(0, 256, (count, 4, 4, 1)).astype(np.uint8)
    parts = {"train_images": images, "train_labels": labels, "test_images": images[:6], "test_labels": labels[:6]}
    np.savez(path, **parts)


SETTINGS = ("--mix", "conv", "--model", "tiny", "--recipe", "digits", "--batch-size", "10", "--epochs", "2")


def train(*arguments):
    cli.main(["train", "--data", "numpy:../x.npz", *SETTINGS, "--out", "run", *arguments])


def refused(message, *arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert isinstance(stopped.value.code, str)  # which Python prints, and exits with 1
    assert message in stopped.value.code
    assert len(stopped.value.code) < 1000


# Settings


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(accumulate=50), r"accumulate \(=50\) must be at most the 6 steps of the run: no update"),
        (dict(shift=4), r"shift \(=4\) must be less than the 4 pixels of the images"),
        (dict(cutout=99), r"cutout \(=99\) must be less than the 4 pixels of the images"),
        (dict(mixup=0.2, batch_size=1), r"mixup \(=0.2\) must be 0 for a batch of one image"),
        (dict(cutmix=1.0, batch_size=1), r"cutmix \(=1.0\) must be 0 for a batch of one image"),
        (dict(batch_size=37), r"batch_size \(=37\) must be at most the 36 training images"),
        (dict(learning_rate=0.0), r"learning_rate \(=0\) must be more than 0"),
        (dict(seed=2**63), r"seed \(=9223372036854775808\) must be less than 4294967296"),
        (dict(model="volume_small", mix="attention"), r"images \(=\(4, 4, 1\)\) must have 3 axes and channels"),
    ],
)
def test_settings_that_cannot_be_or_would_do_nothing(setting, message):
    images, labels = np.zeros((36, 4, 4, 1), np.uint8), np.arange(36, dtype=np.int32) % 2
    part = Arrays(images, labels)
    data = Dataset("made", ("a", "b"), (4, 4, 1), np.zeros(1, np.float32), np.ones(1, np.float32), part, part, part)
    config = Config(mix="conv", batch_size=10, epochs=2)
    check_fits(dataclasses.replace(config, epochs=3, accumulate=9), data)
    with pytest.raises(ValueError, match=message):
        check_fits(dataclasses.replace(config, **setting), data)


def test_a_refused_setting_leaves_no_run_behind(small):
    refused(
        "batch_size (=99) must be at most the 37", "train", "--data", "numpy:../x.npz", *SETTINGS, "--batch-size", "99"
    )
    refused("must be at most the 6 steps", "train", "--data", "numpy:../x.npz", *SETTINGS, "--accumulate", "50")
    assert not [path for path in Path().rglob("*") if path.is_file()]


@pytest.mark.parametrize("out", ["gs://bucket/run", "s3://bucket/run"])
def test_an_address_is_no_folder(small, out):
    refused("must be a folder of this machine", "train", "--out", out)
    assert not list(Path().iterdir())


@pytest.mark.parametrize("out", ["a\0b", "x" * 5000, "~nouser/run"])
def test_a_folder_that_cannot_be(small, out):
    refused("", "train", "--out", out)
    assert not list(Path().iterdir())


@pytest.mark.full
def test_a_home_folder_that_the_shell_left_alone(small, monkeypatch):
    monkeypatch.setenv("HOME", str(small / "home"))
    train("--out=~/run", "--epochs", "1")
    assert (small / "home" / "run" / "results.json").is_file()
    assert not list(Path().iterdir())


# Data that changed, or lie elsewhere


@pytest.mark.full
def test_a_run_finds_its_data_from_any_folder(small, monkeypatch, capsys):
    train()
    accuracy = capsys.readouterr().out.splitlines()[0]
    source = read_source(Path("run"))
    assert source is not None
    assert source.absolute == f"numpy:{small / 'x.npz'}"
    assert json.loads(Path("run/config.json").read_text())["data"] == "numpy:../x.npz"  # as typed
    monkeypatch.chdir(small)
    cli.main(["eval", "work/run"])
    assert capsys.readouterr().out.splitlines()[0] == accuracy

    shutil.move("x.npz", "moved.npz")
    refused("x.npz: cannot be read", "eval", "work/run")
    cli.main(["eval", "work/run", "--data", "numpy:moved.npz"])
    assert capsys.readouterr().out.splitlines()[0] == accuracy
    write(small / "other.npz", seed=1)
    refused(
        "data (='numpy:other.npz') must be what the run in work/run is trained on",
        "eval",
        "work/run",
        "--data",
        "numpy:other.npz",
    )

    again = ["train", "--out", "work/run", "--resume", "--epochs", "3"]
    kept = Path("work/run/data.json").read_bytes()
    Path("work/run/data.json").unlink()  # as in runs of before: then nothing says that these are the same
    refused("did not keep what its data were", "eval", "work/run", "--data", "numpy:moved.npz")
    refused("data is 'numpy:../x.npz', not 'numpy:moved.npz'", *again, "--data", "numpy:moved.npz")
    Path("work/run/data.json").write_bytes(kept)
    refused("must be what the run in work/run is trained on", *again, "--data", "numpy:other.npz")
    cli.main([*again, "--data", "numpy:moved.npz"])
    cli.main(["eval", "work/run"])  # and from then on it is there


@pytest.mark.full
def test_data_that_grew_are_other_data(small, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "count_correct", lambda *_: os.kill(os.getpid(), signal.SIGINT) or 1)
        with pytest.raises(SystemExit) as stopped:
            train()
    assert stopped.value.code == 130
    write(small / "x.npz", count=COUNT + 2)
    refused("its images, labels or classes are others", "train", "--out", "run", "--resume")
    write(small / "x.npz")
    cli.main(["train", "--out", "run", "--resume"])
    assert Path("run/results.json").is_file()


def test_the_fingerprint_is_of_all():
    def data(**change):
        images, labels = np.zeros((3000, 2, 2, 1), np.uint8), np.zeros(3000, np.int32)
        images[change.get("image", 0), 0, 0, 0] += 1
        labels[change.get("label", 0)] += 1
        parts = [Arrays(images[s], labels[s]) for s in (slice(2000), slice(2000, 2500), slice(2500, None))]
        names = change.get("names", ("a", "b"))
        return Dataset("x", names, (2, 2, 1), np.zeros(1, np.float32), np.ones(1, np.float32), *parts)

    changes = [{}, {"image": 1999}, {"image": 2999}, {"label": 2200}, {"names": ("a", "c")}]
    assert len({fingerprint(data(**change)) for change in changes}) == len(changes)


def test_an_absolute_name_keeps_its_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("folder:img?size=8") == f"folder:{tmp_path.resolve() / 'img'}?size=8"
    assert absolute("relational:copy?size=8") == "relational:copy?size=8"
    assert absolute("digits") == "digits"


# More epochs


@pytest.mark.full
def test_a_whole_run_goes_on_to_more_epochs(small, monkeypatch):
    train()
    assert [epoch["step"] for epoch in read_epochs(Path("run"))] == [3, 6]
    with monkeypatch.context() as patch:
        patch.setattr(session, "draw", lambda *_: pytest.fail("what is whole is not drawn again"))
        cli.main(["train", "--out", "run", "--resume"])
    refused("epochs is 2, not 1", "train", "--out", "run", "--resume", "--epochs", "1")
    cli.main(["train", "--out", "run", "--resume", "--epochs", "4"])
    assert [epoch["step"] for epoch in read_epochs(Path("run"))] == [3, 6, 9, 12]
    assert json.loads(Path("run/config.json").read_text())["epochs"] == 4
    assert Path("run/results.json").is_file()


# Two processes in one folder


HOLD = """
import sys, time
from pathlib import Path
from jaxattn.train.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_in_use_is_refused_and_a_dead_holder_is_none(small):
    train()
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    with subprocess.Popen([sys.executable, "-c", HOLD, "run"], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for how in ("--overwrite", "--resume"):
            refused(
                f"is in use by process {holder.pid} on ",
                "train",
                "--data",
                "numpy:../x.npz",
                *SETTINGS,
                "--out",
                "run",
                how,
            )
        assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")} == before
        holder.kill()
    assert Path(".run.lock").exists()
    train("--overwrite")
    assert sorted(path.name for path in Path().iterdir()) == ["run"]


def test_a_link_to_a_folder_is_the_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with locked(tmp_path / "run"), pytest.raises(InputError, match="is in use by process"), locked(tmp_path / "link"):
        pass
    with locked(tmp_path / "link"):
        pass


def test_a_checkpoint_of_another_run_is_not_gone_on_from(tmp_path):
    like = {"weights": jax.ShapeDtypeStruct((3,), "float32")}
    with Checkpoints(tmp_path, identity="one") as checkpoints:
        checkpoints.save(1, {"weights": jnp.ones(3, "float32")}, {})
        assert checkpoints.restore(like) is not None
    with pytest.raises(
        InputError, match=r"checkpoints/1: is a checkpoint of other settings or data \(of one, and these are two\)"
    ):
        Checkpoints(tmp_path, identity="two").restore(like)
    assert Checkpoints(tmp_path).restore(like) is not None


# Files that nobody wrote


@pytest.mark.parametrize("name", ["0099", "٣", "99", "1e3"])
def test_odd_names_among_the_checkpoints(tmp_path, name):
    like = {"weights": jax.ShapeDtypeStruct((3,), "float32")}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, {"weights": jnp.ones(3, "float32")}, {})
    (tmp_path / "checkpoints" / name).mkdir()
    checkpoints = Checkpoints(tmp_path)
    if name == "99":
        with pytest.warns(UserWarning, match=r"checkpoints/99 is damaged: manifest\.json: No such file"):
            assert checkpoints.restore(like).step == 3
    else:
        assert checkpoints.steps() == [3]
        assert checkpoints.restore(like).step == 3


@pytest.mark.parametrize(
    "content", [[], {}, {"files": 3}, {"step": 1, "metric": "x", "position": [], "arrays": 1, "files": {}}]
)
def test_a_manifest_that_nobody_wrote(tmp_path, content):
    import zlib

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, {"weights": jnp.ones(3, "float32")}, {})
    path = tmp_path / "checkpoints" / "3" / "manifest.json"
    path.write_text(json.dumps([content, zlib.crc32(json.dumps(content).encode())]))
    with pytest.raises(InputError, match=r"checkpoints/3 is damaged: manifest\.json is not what was written"):
        Checkpoints(tmp_path).restore({})
    for damaged in ("[" * 100_000, "3", "\udcff"):
        path.write_bytes(damaged.encode("utf-8", "surrogatepass"))
        with pytest.raises(InputError, match=r"checkpoints/3 is damaged: manifest\.json"):
            Checkpoints(tmp_path).restore({})


def test_a_pipe_in_a_checkpoint(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, {"weights": jnp.ones(3, "float32")}, {})
    path = tmp_path / "checkpoints" / "3"
    file = next(file for file in sorted(path.rglob("*")) if file.is_file() and file.name != "manifest.json")
    for pipe in (file, path / "manifest.json"):
        pipe.unlink()
        os.mkfifo(pipe)
        with pytest.raises(InputError, match=r"is damaged: .* is a pipe"):
            Checkpoints(tmp_path).restore({})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results.json", b"[3]"),
        ("results.json", b"{}"),
        ("results.json", b'{"test_correct": "many"}'),
        ("results.json", b"\xff\xfe"),
        ("results.json", b"[" * 100_000),
        ("metrics.jsonl", b"{}\n{}\n"),
        ("metrics.jsonl", b"[3]\n{\n"),
        ("metrics.jsonl", b"\xff\n\n"),
        ("config.json", b"[]"),
        ("data.json", b'{"absolute": 3}'),
    ],
)
def test_a_file_of_a_run_that_is_not_what_was_written(small, name, content):
    run = Path("run")
    run.mkdir()
    (run / "config.json").write_text(json.dumps(dataclasses.asdict(Config(mix="conv"))))
    (run / name).write_bytes(content)
    read = {"results.json": lambda: read_results(run, *session.MEASURED), "metrics.jsonl": lambda: read_epochs(run)}
    if name in read:
        with pytest.raises(InputError, match=f"run/{name}"):
            read[name]()
    if name == "metrics.jsonl":
        with pytest.raises(InputError, match=r"run/metrics\.jsonl: line 1 is no line of a run's log"):
            Log(run, 3)
    else:
        refused(f"run/{name}", "eval", "run") if name != "results.json" else None


def test_a_folder_that_is_removed_while_training(small, monkeypatch):
    real = Checkpoints.save

    def removed(self, *args):
        shutil.rmtree("run")
        real(self, *args)

    monkeypatch.setattr(Checkpoints, "save", removed)
    refused("run/checkpoints was removed", "train", "--data", "numpy:../x.npz", *SETTINGS, "--out", "run")
    assert not Path("run").exists()


def test_a_log_that_is_removed_while_training(tmp_path):
    """As where a folder is removed while a checkpoint is made in it: that one is left, and the rest is gone."""
    log = Log(tmp_path, 0)
    log.steps({"step": 1, "loss": 0.5})
    (tmp_path / "steps.jsonl").unlink()
    with pytest.raises(InputError, match=r"steps\.jsonl was removed"):
        log.steps({"step": 2, "loss": 0.5})
    log.close()


def test_few_open_files_are_told_before_anything_is_made(small, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (12, 12))
    refused("the limit of open files (ulimit -n, =12) must be at least 64", "train", "--out", "run")
    assert not list(Path().iterdir())


def test_bare_compile_is_of_something_that_compiles(monkeypatch):
    """All but the topology, whose compiler need not be here, is the command's own."""
    seen = []
    monkeypatch.setattr(compiling, "plan_step", lambda *given: seen.append(given))
    monkeypatch.setattr(compiling, "describe", str)
    cli.main(["compile"])
    ((config, topology, mesh, image_shape, classes),) = seen
    config.check()
    assert (config.model, config.mix) == ("resnet18", "conv")
    assert config.batch_size % 16 == 0  # the chips of the topology
    assert (topology, mesh, image_shape, classes) == ("v5e:4x4", "", (224, 224, 3), 1000)


def test_what_is_not_installed_is_one_line(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    refused(
        "grain is not installed, and this needs it: pip install 'jaxattn[train]'",
        "train",
        "--data",
        "numpy:../x.npz",
        *SETTINGS,
    )


def test_the_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out.startswith("jaxattn 0.")
