"""`jaxattn train` in a process of its own, killed, stopped, damaged and out of disk: what it resumes ends as it would
have ended, to the last bit."""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import processes
import pytest

EVERY, STEPS = 5, 60
# All that a resumed run has to remember: moments, a gradient half accumulated, a mean of the weights, random images.
REMEMBERED = ["--accumulate", "2", "--ema", "0.9", "--mixup", "0.2", "--cutout", "2"]
SETTINGS = ["--mix", "conv", "--epochs", "1", "--batch-size", "20", "--checkpoint-every", str(EVERY), *REMEMBERED]
COMMAND = "from jaxattn.cli import main; main()"
# A process may give itself less before it becomes the command.
BEFORE = "import ctypes, os, resource, sys; {}; os.execv(sys.executable, [sys.executable, '-c', *sys.argv[1:]])"
NO_OVERRIDE = "ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)"  # root, too, respects permissions: PR_CAPBSET_DROP
SMALL_FILES = "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"


class Command:
    """The running command, and what it said."""

    def __init__(self, out: Path, environment: dict[str, str], *flags: str, before: str = ""):
        arguments = [COMMAND, "train", *SETTINGS, "--out", str(out), *flags]
        arguments = [BEFORE.format(before), *arguments] if before else arguments
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by `end`
        self.process = subprocess.Popen(
            [sys.executable, "-c", *arguments], env=environment, stdout=self.said, stderr=subprocess.STDOUT
        )

    def until(self, condition: Callable[[], bool]):
        """Waits for a condition, or the end."""
        while self.process.poll() is None and not condition():
            time.sleep(0.002)

    def end(self) -> tuple[int, str]:
        """The exit status and what was said."""
        with self.said:
            try:
                status = self.process.wait(120)
            finally:
                self.process.kill()
            self.said.seek(0)
            return status, self.said.read()


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    return processes.environment(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, environment) -> Path:
    """A run from its start to its end."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    status, said = Command(out, environment).end()
    assert status == 0, said
    return out


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, environment) -> Path:
    """A run that was killed when it had saved a few times."""
    out = tmp_path_factory.mktemp("interrupted") / "run"
    command = Command(out, environment)
    command.until(lambda: newest(out) >= 6 * EVERY)
    command.process.kill()
    assert command.end()[0] == -signal.SIGKILL
    return out


@pytest.fixture
def copy(interrupted, tmp_path) -> Path:
    """The interrupted run, to do with as one likes."""
    return shutil.copytree(interrupted, tmp_path / "run")


def saved(out: Path) -> list[Path]:
    """The checkpoints that bear a step's name, in any order."""
    return [path for path in out.glob("checkpoints/*") if path.name.isdecimal()]


def newest(out: Path) -> int:
    """The step of the last checkpoint, or 0."""
    return max((int(path.name) for path in saved(out)), default=0)


def arrays(out: Path) -> dict[str, np.ndarray]:
    """Weights, moments, statistics and mean, as the run ended, by Orbax alone."""
    from orbax.checkpoint import v1 as ocp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sharding info not provided")  # one device, as when it was saved
        loaded = ocp.load(str(out / "checkpoints" / str(newest(out)) / "arrays"))
    return {name: np.asarray(array) for name, array in loaded.items()}


def without_times(measured: dict) -> dict:
    return {name: value for name, value in measured.items() if "second" not in name}


def assert_same_end(out: Path, uninterrupted: Path):
    """Every array bit for bit, and every number that was logged."""
    ended, expected = arrays(out), arrays(uninterrupted)
    assert newest(out) == newest(uninterrupted) == STEPS
    assert ended.keys() == expected.keys()
    assert {"weights", "rest", "moments", "average"} <= {name.split("/")[0] for name in expected}
    for name, array in expected.items():
        assert array.dtype == ended[name].dtype
        assert array.tobytes() == ended[name].tobytes(), name
    for file in ("results.json", "metrics.jsonl"):
        one, two = ([without_times(json.loads(line)) for line in lines(run / file)] for run in (out, uninterrupted))
        assert one == two


def lines(path: Path) -> list[str]:
    text = path.read_text()
    return text.splitlines() if path.suffix == ".jsonl" else [text]


def resume(out: Path, environment: dict[str, str], **options) -> tuple[int, str]:
    return Command(out, environment, "--resume", **options).end()


@pytest.mark.full
def test_ten_kills_at_random_moments_leave_no_trace(uninterrupted, environment, tmp_path):
    """While it starts, trains or saves: what bears a step's name stays, and the end is bit for bit the same."""
    out, random = tmp_path / "run", np.random.default_rng(0)
    for n in range(10):
        before = newest(out)
        goal = before + EVERY * (1 + n % 2)
        late = time.monotonic() + (random.uniform(0, 5) if n % 3 == 0 else 60)  # every third falls in the start
        command = Command(out, environment, "--resume")
        command.until(lambda goal=goal, late=late: newest(out) >= goal or time.monotonic() > late)
        time.sleep(random.uniform(0, 0.03))
        assert newest(out) < STEPS, "it was too fast to be killed ten times"
        command.process.kill()
        assert command.end()[0] == -signal.SIGKILL
        assert newest(out) >= before
    status, said = resume(out, environment)
    assert status == 0, said
    assert_same_end(out, uninterrupted)


@pytest.mark.full
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_is_told_by_the_exit_status(uninterrupted, copy, environment, number, code):
    before = newest(copy)
    command = Command(copy, environment, "--resume")
    command.until(lambda: newest(copy) > before)
    command.process.send_signal(number)
    status, said = command.end()
    assert status == code, said
    step = newest(copy)
    assert f"stopped at step {step} of {STEPS}" in said
    assert "--resume" in said
    assert not (copy / "results.json").exists()
    assert resume(copy, environment)[0] == 0
    assert_same_end(copy, uninterrupted)


@pytest.mark.full
def test_a_kill_after_the_last_step_costs_the_results_alone(uninterrupted, environment, tmp_path):
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    (out / "results.json").unlink()
    status, said = resume(out, environment)
    assert status == 0, said
    assert_same_end(out, uninterrupted)


@pytest.mark.full
def test_a_damaged_and_a_half_written_checkpoint_cost_only_their_steps(uninterrupted, copy, environment):
    damaged = copy / "checkpoints" / str(newest(copy))
    largest = max(filter(Path.is_file, damaged.rglob("*")), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    shutil.copytree(damaged, damaged.with_name(f"{newest(copy) + 1}.partial"))
    status, said = resume(copy, environment)
    assert status == 0, said
    before = int(damaged.name) - EVERY
    assert f"{damaged} is damaged" in said
    assert f"using the checkpoint of step {before}" in said
    assert not list(copy.glob("checkpoints/*.partial"))
    assert_same_end(copy, uninterrupted)


@pytest.mark.full
def test_when_all_checkpoints_are_damaged_nothing_is_done(copy, environment):
    checkpoints = saved(copy)
    for path in checkpoints:
        (path / "manifest.json").unlink()
    status, said = resume(copy, environment)
    assert status == 1
    assert "Traceback" not in said
    for path in checkpoints:
        assert f"{path} is damaged" in said
        assert path.is_dir()


@pytest.mark.full
def test_a_read_only_folder_is_an_error_before_training(environment, tmp_path):
    tmp_path.chmod(0o555)
    status, said = Command(tmp_path / "run", environment, before=NO_OVERRIDE).end()
    tmp_path.chmod(0o755)
    assert status == 1
    assert re.search(r"run\) cannot be written to: .*Permission denied", said)
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_read_only_checkpoints_are_an_error_before_training(copy, environment):
    before, checkpoints = sorted(copy.rglob("checkpoints/**/*")), copy / "checkpoints"
    checkpoints.chmod(0o555)
    status, said = resume(copy, environment, before=NO_OVERRIDE)
    checkpoints.chmod(0o755)
    assert status == 1
    assert re.search(r"checkpoints: checkpoints cannot be written there: .*Permission denied", said)
    assert "Traceback" not in said
    assert sorted(copy.rglob("checkpoints/**/*")) == before


@pytest.mark.full
def test_a_full_disk_is_an_error_before_training(copy, environment):
    status, said = resume(copy, environment, before=SMALL_FILES)
    assert status == 1
    assert "checkpoints cannot be written there" in said
    assert "Traceback" not in said


@pytest.mark.full
def test_a_disk_that_fills_up_leaves_the_run_resumable(uninterrupted, copy, environment):
    command = Command(copy, environment, "--resume")
    before = newest(copy)
    command.until(lambda: newest(copy) > before)
    resource.prlimit(command.process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    status, said = command.end()
    assert status == 1
    assert "the checkpoint cannot be written" in said
    assert "Traceback" not in said
    assert "whole are those of the steps" in said
    assert before < newest(copy) < STEPS
    assert resume(copy, environment)[0] == 0
    assert_same_end(copy, uninterrupted)
