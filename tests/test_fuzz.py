"""Files from outside under seeded mutation: read, or refused by name, in little memory and time, and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import fuzz_files
import pytest

HERE = Path(__file__).parent


@pytest.mark.full
def test_a_mutated_file_is_read_or_refused_by_name(tmp_path):
    """Five hundred mutants of every kind of file, in a process that is given 1 GiB more than it starts with."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in (str(HERE), *sys.path) if path)}
    command = [sys.executable, "-X", "faulthandler", str(HERE / "fuzz_files.py"), str(tmp_path), "500"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line for line in lines if not line.startswith("ok ")] == []
    tallies = {line[3:].rpartition(": ")[0]: line for line in lines}
    assert tallies.keys() == fuzz_files.READERS.keys()


@pytest.mark.parametrize("name", fuzz_files.READERS)
def test_what_is_mutated_is_right_before(tmp_path, name):
    """Else every mutant would be refused for the same reason, and nothing said."""
    folder = tmp_path / name
    folder.mkdir()
    path = fuzz_files.READERS[name].write(folder)
    assert fuzz_files.outcome(fuzz_files.READERS[name], path) == "read"
