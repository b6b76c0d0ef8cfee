"""Processes that train together: two real ones, joined on this machine, and what each says when the other is gone."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import processes
import pytest
import quick

from jaxattn.train import distributed, peers
from jaxattn.train.distributed import Group, find_group, is_main, joined

WORKER = """
import sys, time
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxattn.train.distributed import is_main, joined

coordinator, processes, process, what = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
with joined(coordinator, processes, process):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rng, weights = np.random.default_rng(0), jnp.zeros(3)
    images, labels = rng.normal(size=(8, 3)).astype("f"), rng.normal(size=8).astype("f")
    mine = slice(8 // processes * process, 8 // processes * (process + 1))
    sharding = NamedSharding(mesh, P("data"))
    batch = [jax.make_array_from_process_local_data(sharding, part[mine]) for part in (images, labels)]

    @jax.jit
    def step(weights, images, labels):
        loss, gradient = jax.value_and_grad(lambda w: ((images @ w - labels) ** 2).mean())(weights)
        return weights - 0.1 * gradient, loss

    if what == "train":
        time.sleep(process)  # the others wait at the end
    for n in range(5 if what == "train" else 10**6):
        weights, loss = jax.block_until_ready(step(weights, *batch))  # Gloo can deadlock where devices run ahead
        if is_main() and n < 5:
            print("loss", float(loss), flush=True)
        if n == 5:
            print("ready", flush=True)
            if what == "fail" and process == 1:
                raise ValueError("a mistake of its own")
print("over", flush=True)
"""


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


class Workers:
    """Processes of one group, what they print, and how they end."""

    def __init__(self, folder: Path, count: int, what: str):
        script, coordinator = folder / "worker.py", f"localhost:{free_port()}"
        script.write_text(WORKER)
        flags = [f"--xla_force_host_platform_device_count={2 // count}", *quick.FLAGS]
        environment = {**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self.files = [folder / f"output{process}" for process in range(count)]
        self.processes = []
        for process, file in enumerate(self.files):
            command = [sys.executable, str(script), coordinator, str(count), str(process), what]
            with open(file, "w") as output:
                self.processes.append(subprocess.Popen(command, stdout=output, stderr=output, env=environment))

    def said(self, process: int) -> str:
        return self.files[process].read_text()

    def wait_until_ready(self):
        deadline = time.monotonic() + 40
        while not all("ready" in self.said(process) for process in range(len(self.files))):
            assert time.monotonic() < deadline, "\n\n".join(self.said(process) for process in range(len(self.files)))
            time.sleep(0.1)

    def end(self, timeout: float) -> list[int]:
        return [process.wait(timeout) for process in self.processes]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            process.kill()
            process.wait()


def test_two_processes_train_as_one_does(tmp_path):
    losses = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        with Workers(folder, count, "train") as workers:
            assert workers.end(120) == [0] * count
            losses.append([float(loss) for loss in re.findall(r"loss (\S+)", workers.said(0))])
            assert all("over" in workers.said(process) for process in range(count))
            if count == 2:
                assert "loss" not in workers.said(1)
    assert len(losses[0]) == 5
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.full
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_which_names_it(tmp_path, victim):
    with Workers(tmp_path, 2, "forever") as workers:
        workers.wait_until_ready()
        workers.processes[victim].send_signal(signal.SIGKILL)
        survivor = 1 - victim
        assert workers.processes[survivor].wait(30) == 1
        said = workers.said(survivor)
        assert f"jaxattn: lost process {victim} (on {socket.gethostname()}): killed, failed or cut off" in said
        assert said.rstrip().endswith("--resume goes on from the last checkpoint")
        assert "Traceback" not in said


@pytest.mark.full
def test_a_failing_process_shows_its_error_and_ends_the_other(tmp_path):
    with Workers(tmp_path, 2, "fail") as workers:
        assert workers.end(60) == [1, 1]
        assert "lost process 1" in workers.said(0)
        assert workers.said(1).rstrip().endswith("ValueError: a mistake of its own")
        assert "lost" not in workers.said(1)


# The watch alone: three members in this process


class Ends(list):
    """What `lost` is told, in place of the end of the process."""

    def __init__(self):
        self.told = threading.Event()

    def __call__(self, process, host):
        self.append((process, host))
        self.told.set()


@pytest.fixture
def members():
    published = []
    watch = [peers.Peers(0, 3, published.append, lambda: "")]
    watch += [peers.Peers(n, 3, published.append, lambda: f"localhost {published[0]}") for n in (1, 2)]
    for member in watch:
        member.lost = Ends()
    while len(watch[0].connections) < 2:
        time.sleep(0.01)
    yield watch, int(published[0].split()[0])
    for member in watch:
        member.close()


def test_the_loss_of_one_is_told_to_all(members):
    watch, _ = members
    watch[2].close()
    for member in watch[:2]:
        assert member.lost.told.wait(10)
        assert member.lost == [(2, socket.gethostname())]


def test_the_loss_of_process_0_is_seen_by_all(members):
    watch, _ = members
    watch[0].close()
    for member in watch[1:]:
        assert member.lost.told.wait(10)
        assert member.lost[0] == (0, socket.gethostname())


def test_a_stranger_is_ignored(members):
    watch, port = members
    for line in (b"hello\n", b"x" * 1000, f"{'0' * 32} 1 elsewhere\n".encode(), b"\xff\n", b""):
        with socket.create_connection(("localhost", port)) as stranger:
            stranger.sendall(line)
    time.sleep(0.2)
    assert not any(member.lost for member in watch)


def test_all_finish_together(members):
    watch, _ = members
    over = [threading.Thread(target=member.finish) for member in watch]
    for thread in over[:2]:
        thread.start()
    time.sleep(0.2)
    assert over[0].is_alive()
    assert over[1].is_alive()
    over[2].start()
    for thread in over:
        thread.join(10)
        assert not thread.is_alive()
    assert not any(member.lost for member in watch)


# Who is in the group


def test_alone(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: pytest.fail("not alone"))
    assert find_group(None, None, None) is None
    assert find_group("localhost:1234", 1, 0) is None
    with joined():
        assert is_main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:1234", None, None), "processes and process (=None) must be given too"),
        ((None, 2, 1), "coordinator (=None) must be given too"),
        (("localhost", 2, 1), "coordinator (='localhost') must be HOST:PORT"),
        ((":1234", 2, 1), "coordinator (=':1234') must be HOST:PORT"),
        (("localhost:http", 2, 1), "coordinator (='localhost:http') must be HOST:PORT"),
        (("localhost:1234", 0, 0), "processes (=0) must be at least 1"),
        (("localhost:1234", 2, 2), "process (=2) must be at least 0 and less than processes (=2)"),
        (("localhost:1234", 2, -1), "process (=-1) must be at least 0"),
    ],
)
def test_a_mistake_is_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        find_group(*arguments)


SLURM = {"JOB_ID": "7", "STEP_NODELIST": "node[1-2]", "PROCID": "1", "LOCALID": "0"}


@pytest.mark.parametrize("tasks", [1, 2])
def test_slurm_says_how_many(monkeypatch, tasks):
    for name, value in {**SLURM, "NTASKS": str(tasks)}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert distributed.launched() == tasks
    assert find_group(None, None, None) == (None if tasks == 1 else Group(None, None, None))


def test_a_pod_of_no_indexed_job_is_alone(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
    assert distributed.launched() == 1


# The command itself

SETTINGS = ["--mix", "conv", "--epochs", "2", "--batch-size", "60", "--ema", "0.9"]
TRAIN = "import sys; from jaxattn.cli import main; main(['train', *sys.argv[1:]])"


def start_training(out: Path, *flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, *SETTINGS, "--out", str(out), *flags],
        env=processes.environment(out.parent / "cache"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_two(out: Path, *flags: str) -> list[subprocess.Popen]:
    group = ("--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2")
    return [start_training(out, *group, "--process", str(n), *flags) for n in range(2)]


def finish(process: subprocess.Popen):
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 0, said


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.full
def test_two_processes_train_as_one_does_and_go_on(tmp_path):
    """The same losses; and what two processes left when they were told to stop, two others take to the same end, and so
    does one, from the same checkpoint."""
    alone, pair, by_one = tmp_path / "alone", tmp_path / "pair", tmp_path / "by_one"
    finish(start_training(alone))
    group = start_two(pair, "--checkpoint-every", "5")
    deadline = time.monotonic() + 120
    while len(list((pair / "checkpoints").glob("[0-9]"))) < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in group:
        process.terminate()
    said = [process.communicate(timeout=180)[0] for process in group]
    assert [process.returncode for process in group] == [143, 143], said
    assert "and saved: go on with --resume" in said[0]
    assert "jaxattn" not in said[1]  # one of them talks
    assert lines_of(pair) == []  # before the first of two epochs ended
    shutil.copytree(pair, by_one)
    for process in [start_training(by_one, "--resume"), *start_two(pair, "--resume")]:
        finish(process)
    for run in (pair, by_one):
        for expected, line in zip(lines_of(alone), lines_of(run), strict=True):
            for name in ("train_loss", "train_accuracy", "validation_accuracy"):
                assert line[name] == pytest.approx(expected[name], rel=1e-4)
