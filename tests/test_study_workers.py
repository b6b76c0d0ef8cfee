"""The study's processes: that they change no number, and what is left when one of them, or the study, is killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from jaxattn.study import run, workers
from jaxattn.study.claim import FAILED


def studied(out, claims, jobs, seeds=2):
    run.study(claims, "quick", seeds, "digits", out, jobs)
    return {claim["number"]: claim for claim in json.loads((out / "report.json").read_text())["claims"]}


@pytest.mark.full
@pytest.mark.parametrize("claims", ["1,4,5,16", "20"])
def test_two_processes_give_what_one_gives(tmp_path, claims):
    """Bit for bit, of what is computed by hand and of what is trained."""
    one, two = (studied(tmp_path / str(jobs), claims, jobs, seeds=1) for jobs in (1, 2))
    assert one.keys() == two.keys() == set(map(int, claims.split(",")))
    for number, claim in one.items():
        assert claim["verdict"] != FAILED
        assert claim["numbers"]
        for what in ("verdict", "numbers", "summary"):
            assert claim[what] == two[number][what], f"claim {number}: {what}"


def test_a_killed_process_is_one_experiment_that_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "SOURCE", "study_fakes")
    monkeypatch.setenv("FRAGILE", str(tmp_path / "mark"))
    first = studied(tmp_path / "study", "1,2,3,4,5,6", 2)
    assert first[5]["verdict"] == first[6]["verdict"] == FAILED
    assert first[5]["error"] == first[6]["error"] == "the process that ran it was killed by SIGKILL"
    assert first[2]["error"] == "RuntimeError: no <luck>"
    assert [first[n]["verdict"] for n in (1, 3, 4)] == ["holds", "depends on the seed", "holds"]
    assert "killed by SIGKILL" in (tmp_path / "study" / "report.html").read_text()
    (before,) = (tmp_path / "study" / "cache").glob("*/killed-0.json")
    kept = before.read_bytes()
    again = studied(tmp_path / "study", "1,2,3,4,5,6", 1)
    assert again[5]["verdict"] == again[6]["verdict"] == "holds"
    assert before.read_bytes() == kept  # the seed that came to its end was not run again
    assert again[5]["numbers"]["process"][0] == json.loads(kept)["numbers"]["process"]
    assert again[3]["numbers"] == first[3]["numbers"]
    said = capsys.readouterr()
    assert said.out == ""  # an experiment's own words are no answer
    assert re.search(r"^claim  4: holds \[\d of 6, 0:\d\d; about 0:\d\d left\]$", said.err, re.MULTILINE)
    assert re.search(r"^claim [ \d]+: .* \[6 of 6, 0:\d\d\]$", said.err, re.MULTILINE)


def test_an_idle_process_helps_with_the_last_experiment(tmp_path, monkeypatch):
    """The seeds stand in their order, whoever ran them and whichever ended first."""
    monkeypatch.setattr(run, "SOURCE", "study_fakes")
    found = studied(tmp_path / "study", "9", 2, seeds=4)[9]["numbers"]
    assert found["seed"] == [0, 1, 2, 3]
    assert len(set(found["process"])) == 2


def alive(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.full  # the core has a worker that is killed
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="processes are looked up in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_no_worker_outlives_the_study(tmp_path, how):
    started = tmp_path / "started"
    code = "import pathlib, sys; from jaxattn.study import run; run.SOURCE = 'study_fakes'; "
    code += "run.study('7,8', 'quick', 1, 'digits', pathlib.Path(sys.argv[1]), 2)"
    surroundings = os.environ | {"STARTED": str(started), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code, str(tmp_path / "study")]
    with subprocess.Popen(command, env=surroundings, stderr=subprocess.PIPE, text=True) as study:
        until = time.monotonic() + 120
        while not started.exists() or len(started.read_text().split()) < 2:
            assert study.poll() is None, study.stderr.read()
            assert time.monotonic() < until, "the workers did not start"
            time.sleep(0.1)
        study.send_signal(how)
        assert study.wait(20) != 0
    at_work = list(map(int, started.read_text().split()))
    until = time.monotonic() + 20
    while any(map(alive, at_work)):
        assert time.monotonic() < until, "a worker goes on"
        time.sleep(0.1)


def test_what_a_worker_is_given(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=2")
    assert workers.surroundings()["XLA_FLAGS"].split()[0] == "--xla_backend_optimization_level=1"
    assert workers.surroundings()["XLA_FLAGS"].split()[-1] == "--xla_backend_optimization_level=2"  # XLA takes the last
    assert workers.default_jobs() >= 1
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    monkeypatch.setattr(workers.importlib.util, "find_spec", lambda name: object())
    assert workers.default_jobs() == 1
    assert workers.surroundings()["XLA_FLAGS"].split() == ["--xla_backend_optimization_level=2"]
