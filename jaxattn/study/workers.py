"""Processes side by side, each of which takes the next tasks when it has done its last: one that dies loses its own."""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Sequence
from typing import Any

from jaxattn.study import compiler
from jaxattn.study.worker import Job, Task

Answer = tuple[Task, dict[str, Any]]


class Worker:
    """One process of `jaxattn.study.worker`."""

    def __init__(self, job: Job):
        self.process = process = subprocess.Popen(
            [sys.executable, "-P", "-m", "jaxattn.study.worker", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=surroundings(),
            process_group=0,  # so that Ctrl-C is for this process alone, which then ends the others
            text=True,
            encoding="utf-8",
        )
        assert process.stdin is not None, "it is a pipe"
        assert process.stdout is not None, "it is a pipe"
        self.tasks, self.answers = process.stdin, process.stdout

    def ask(self, task: Task) -> dict[str, Any]:
        """The worker's answer; `error` if it died over it."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(task), file=self.tasks, flush=True)
        answer = self.answers.readline()
        if answer.endswith("\n"):
            return json.loads(answer)
        status = self.process.wait()
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return {"error": f"the process that ran it {how}"}

    def ended(self) -> bool:
        """Whether it can be asked no more."""
        return self.process.poll() is not None

    def end(self):
        """Ends it at once, whatever it does."""
        self.process.kill()
        self.process.wait()
        self.answers.close()
        with contextlib.suppress(BrokenPipeError):  # a task may be on its way
            self.tasks.close()


def answers(job: Job, groups: Sequence[Sequence[Task]], jobs: int) -> Generator[Answer, None, None]:
    """Every task with its answer, as they come.

    A worker does one task of a group after the other, since they share what is compiled. If no group is left to begin,
    it helps with the one that has most tasks to come. After an error the rest of a group is left out. Closing the
    generator ends all workers.
    """
    to_begin, begun, found = deque(map(deque, groups)), list[deque[Task]](), queue.SimpleQueue()
    workers: list[Worker] = []
    over = threading.Event()
    lock = threading.Lock()

    def take(group: deque[Task]) -> tuple[deque[Task], Task | None]:
        """The next task, of the same group if there is one."""
        with lock:
            if not group and to_begin:
                begun.append(group := to_begin.popleft())
            group = group or max(begun, key=len)
            return group, group.popleft() if group else None

    def work():
        worker, group = None, deque[Task]()
        while not over.is_set():
            group, task = take(group)
            if task is None:
                break
            try:
                if worker is None or worker.ended():
                    if worker is not None:
                        worker.end()
                    workers.append(worker := Worker(job))
                if over.is_set():
                    break
                answer = worker.ask(task)
            except OSError as error:  # no process, or no memory for one, to be had
                answer = {"error": f"no process to run it: {error}"}
            if "error" in answer:
                with lock:
                    group.clear()
            found.put((task, answer))
        if worker is not None:
            worker.end()
        found.put(None)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(jobs, sum(map(len, groups))))]
    for thread in threads:
        thread.start()
    try:
        for _ in threads:
            yield from iter(found.get, None)  # until one thread has nothing more to do
    finally:
        over.set()
        for worker in workers:
            worker.process.kill()  # its thread does the rest
        for thread in threads:
            thread.join()


def default_jobs() -> int:
    """As many as there are cores; one where there may be an accelerator, since a process takes the whole of it."""
    if accelerated():
        return 1
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def accelerated() -> bool:
    """Whether JAX may find an accelerator. Asking JAX itself would take it, and then no worker could."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    return bool(importlib.metadata.entry_points(group="jax_plugins")) or bool(importlib.util.find_spec("libtpu"))


def surroundings() -> dict[str, str]:
    """A worker's environment: this process's, where it imports from, and the compiler's flags. A user's flags win."""
    given = dict(os.environ)
    if not accelerated():
        flags = [*compiler.FLAGS, given.get("XLA_FLAGS", "")]
        given = compiler.ENVIRONMENT | given | {"XLA_FLAGS": " ".join(flags).strip()}
    return given | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
