"""A process that runs experiments: `python -m jaxattn.study.worker JOB` answers each line of its input with a line.

It ends when its input does, in the middle of an experiment too: so no worker outlives the study that started it.
"""

import dataclasses
import importlib
import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

from jaxattn.study.claim import Claim, Profile, Setting
from jaxattn.study.kept import code_version, kept
from jaxattn.train.data import load
from jaxattn.train.data.fingerprint import fingerprint
from jaxattn.train.report import environment
from jaxattn.train.run import digest


class Job(NamedTuple):
    """What all tasks of a study share, as JSON can hold it."""

    claims: str  # the module whose CLAIMS they are
    profile: Profile
    data: str
    cache: str


class Task(NamedTuple):
    """One seed of a claim's experiment."""

    claim: int
    seed: int


class Runner:
    """Answers tasks, each from the cache or by a new run, which is kept there."""

    def __init__(self, job: Job):
        claims: tuple[Claim, ...] = importlib.import_module(job.claims).CLAIMS
        self.claims = {claim.number: claim for claim in claims}
        self.job, self.data, self.made_with = job, load(job.data), environment()
        versions = {name: value for name, value in self.made_with.items() if name != "CPU cores"}
        key = digest(code_version(), job.profile, job.data, fingerprint(self.data), versions)
        self.folder = Path(job.cache, key)
        self.folder.mkdir(exist_ok=True)

    def answer(self, task: Task) -> dict[str, Any]:
        """`kept`, the fields of a `Kept`, and `environment`; or `error`, where the experiment raised one."""
        claim = self.claims[task.claim]
        path = self.folder / f"{claim.experiment.__name__}-{task.seed}.json"
        try:
            result = kept(claim, path, Setting(self.job.profile, task.seed, self.data, self.folder))
        except Exception as error:  # whatever it is belongs in the report, and the other claims still run
            return {"error": f"{type(error).__name__}: {error}"}
        return {"kept": dataclasses.asdict(result), "environment": self.made_with}


def main():
    """Answers the tasks that come in, one after the other, until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what an experiment prints is no answer
    tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
    threading.Thread(target=_read, args=[tasks], daemon=True).start()
    runner = Runner(Job(*json.loads(sys.argv[1])))
    while True:
        print(json.dumps(runner.answer(tasks.get())), file=answers, flush=True)


def _read(tasks: queue.SimpleQueue[Task]):
    for line in sys.stdin:
        tasks.put(Task(*json.loads(line)))
    os._exit(0)


if __name__ == "__main__":
    main()
