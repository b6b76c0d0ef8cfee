"""The real command, in processes of its own: on every kind of file, and what its exit status says."""

import subprocess
import sys
from pathlib import Path

import fuzz_files
import processes
import pytest

from jaxattn.train.data import load

KINDS = {  # a file of each kind as the fuzzer writes it, and the data's name with that file or its folder
    "npz": "numpy:{path}",
    "idx": "mnist:{path.parent}",
    "idx, gzipped": "fashion-mnist:{path.parent}",
    "cifar, a pickle": "cifar10:{path.parent}",
    "cifar, tar.gz": "cifar10:{path}",
    "cifar, tar.xz": "cifar10:{path}",
    "JPEG": "folder:{path.parent.parent}",
    "WEBP": "folder:{path.parent.parent}?size=8",
    "TIFF": "folder:{path.parent.parent}",
    "parquet of numbers": "parquet:{path}",
    "parquet of text": "parquet:{path.parent}?size=4",
}
SETTINGS = ("--recipe", "digits", "--mix", "conv", "--epochs", "1", "--batch-size", "5", "--shift", "1")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return processes.environment(tmp_path_factory.mktemp("cache"))


def command(environment, *arguments, cwd=None) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "jaxattn", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        cwd=cwd,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_the_command_trains_on_every_kind_of_file(tmp_path, environment, kind):
    path = fuzz_files.READERS[kind].write(tmp_path / "data")
    name = KINDS[kind].format(path=path)
    out = tmp_path / "run"
    status, printed, said = command(environment, "train", "--data", name, *SETTINGS, "--out", str(out))
    assert status == 0, said
    assert f"of {len(load(name).test)})" in printed
    assert (out / "results.json").is_file()
    path.write_bytes(path.read_bytes()[:40])
    status, _, said = command(environment, "train", "--data", name, *SETTINGS, "--out", str(tmp_path / "other"))
    assert status == 1
    assert "Traceback" not in said
    assert path.name in said
    assert str(path.parent) in said
    assert not (tmp_path / "other").exists()


@pytest.mark.core(1)
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("eval", "nowhere"), 1, "jaxattn: run (=nowhere) must be a folder that `jaxattn train` wrote"),
        (("train", "--epochs", "many"), 2, "many"),
        (("fly",), 2, "fly"),
        (("train", "--data", "folder:nowhere"), 1, "jaxattn: nowhere: cannot be read: No such file or directory"),
        (("--version",), 0, ""),
    ],
)
def test_the_exit_status_and_the_streams(tmp_path, environment, arguments, code, message):
    """130 and 143 are tested in `test_resume.py`, with what is saved."""
    status, printed, said = command(environment, *arguments, cwd=tmp_path)
    assert status == code, said
    assert message in (said if code else printed)
    assert "Traceback" not in said
    assert not list(Path(tmp_path).iterdir())
