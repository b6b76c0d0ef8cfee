"""The training loop, from the untrained network to the last checkpoint."""

import contextlib
import functools
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxattn.errors import needs_extra
from jaxattn.train.build import build
from jaxattn.train.checkpoint import Checkpoints
from jaxattn.train.config import Config
from jaxattn.train.data import Dataset, batches
from jaxattn.train.distributed import is_main
from jaxattn.train.evaluate import count_correct
from jaxattn.train.fits import check_fits
from jaxattn.train.log import Log, Silent
from jaxattn.train.meter import AHEAD, Diverged, Meter
from jaxattn.train.optimizer import schedule
from jaxattn.train.peak import peak_flops
from jaxattn.train.program import assemble

with needs_extra("train"):
    from tqdm.auto import tqdm  # in a notebook a bar of its own

LINE = 50  # steps a line of steps.jsonl
ASK = 5  # steps after which several processes ask each other whether one was told to stop
BAR = ("loss", "accuracy", "images_per_second", "of_peak")  # what the progress bar shows of one


class Trained(NamedTuple):
    """The network as it ends, what every epoch measured, and the seconds that all of it took."""

    model: nnx.Module
    epochs: list[dict]
    seconds: float


class Stopped(Exception):
    """The process was asked to end by a signal, SIGTERM or SIGINT, and all is saved."""

    def __init__(self, said: str, signal: int):
        super().__init__(said)
        self.signal = signal


class Asked:
    """The signal that asked this process to end, if one did; false before."""

    def __init__(self):
        self.signal = 0

    def __bool__(self) -> bool:
        return bool(self.signal)


def train(
    config: Config,
    data: Dataset,
    folder: Path,
    *,
    resume: bool = False,
    checkpoint_every: int = 0,
    mesh: Mesh | None = None,
    identity: str = "",
) -> Trained:
    """Trains one network, with its log and its checkpoints in `folder`.

    Args:
      config: what is trained.
      data: on what.
      folder: of the run. It gets `metrics.jsonl` (a line an epoch), `steps.jsonl`, `tensorboard/` and
        `checkpoints/`.
      resume: go on from the newest checkpoint in `folder`, where there is one, exactly as if there had been no break.
      checkpoint_every: save after so many steps, beside the end of every epoch; 0 for the epochs alone.
      mesh: of `make_mesh`, over which batch, weights and grid are split; None for one device. A run may go on with
        another mesh than it began with.
      identity: a digest of settings and data, kept in every checkpoint; a run does not go on from one of another.

    Raises:
      ValueError: a setting that does not fit the data, or a checkpoint that does not fit the settings.
      Diverged: the loss became NaN or senseless; it names the step, its images and the last good checkpoint.
      Stopped: the process got SIGTERM or SIGINT (Ctrl-C); the state is saved. A second one ends it at once.
    """
    check_fits(config, data)
    process = jax.process_index(), jax.process_count()
    stream = batches(data.train, config.batch_size, seed=config.seed, process=process)
    steps = len(data.train) // config.batch_size  # in an epoch
    total = config.epochs * steps
    rate = schedule(config, total // config.accumulate)
    program = assemble(config, data, total, mesh)

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(folder, identity=identity))
        restored = checkpoints.restore(program.init(False)) if resume else None
        position = {"seconds": 0.0, "meter": {}}
        if restored:
            state, position = restored.tree, restored.position
            stream.set_state(position["data"])
        else:
            state = program.init(True)
        # CPUs of several processes can wait for one another forever if one runs ahead
        ahead = 0 if jax.process_count() > 1 and jax.default_backend() == "cpu" else AHEAD
        meter = Meter(100 * math.log(len(data.class_names) + 1), **position["meter"], ahead=ahead)
        done, before = int(state.step), position["seconds"]
        log = stack.enter_context(contextlib.closing(Log(folder, done) if is_main() else Silent()))
        stopping = stack.enter_context(stop_signals())
        bar = tqdm(total=total, initial=done, desc=f"{config.label}, compiling", unit="step", disable=not is_main())
        stack.enter_context(bar)

        # compiled before the clock starts, so that images per second measures training alone
        start = time.perf_counter()
        rows = np.arange(config.batch_size // jax.process_count())
        images, labels = data.train.fetch(rows)
        compiled = program.step.lower(state, program.place({"image": images, "label": labels})).compile()
        flops, peak = (compiled.cost_analysis() or {}).get("flops", math.nan), peak_flops(config.dtype)
        bar.set_description(config.label)

        line = epoch = (done, time.perf_counter())  # since when the speed is measured
        for step in range(done + 1, total + 1):
            batch = next(stream)
            state, metrics = compiled(state, program.place(batch))
            try:
                meter.add(step, batch["index"], metrics)
                line_ends, epoch_ends = step % LINE == 0 or step == total, step % steps == 0
                stops = agreed(bool(stopping), step)
                saves = epoch_ends or stops or (checkpoint_every and step % checkpoint_every == 0)
                if line_ends or saves:
                    meter.settle()
            except Diverged as error:
                checkpoints.wait()
                good = checkpoints.steps()
                where = f"is {checkpoints.folder / str(good[-1])}" if good else "was not saved yet"
                raise Diverged(f"{error}; the last good checkpoint {where}") from None
            bar.update()

            if line_ends:
                speed, line = _speed(line, step), (step, time.perf_counter())
                means = meter.line() | {"images_per_second": speed * config.batch_size, "of_peak": speed * flops / peak}
                log.steps({"step": step, **means, "learning_rate": float(np.asarray(rate(step // config.accumulate)))})
                bar.set_postfix({name: f"{means[name]:.3g}" for name in BAR})

            validation = None
            if epoch_ends:
                speed = _speed(epoch, step)
                weights = state.weights if state.average is None else state.average
                predict = functools.partial(program.predict, weights, state.rest)
                correct = count_correct(predict, data.validation, config.batch_size)
                validation = correct / len(data.validation)
                log.epoch(
                    {
                        "step": step,
                        "epoch": step // steps,
                        **meter.epoch(),
                        "validation_accuracy": validation,
                        "images_per_second": speed * config.batch_size,
                        "learning_rate": float(np.asarray(rate(step // config.accumulate))),
                    }
                )
                line = epoch = (step, time.perf_counter())

            if saves:
                seconds = before + time.perf_counter() - start
                position = {"data": stream.get_state(), "meter": meter.position(), "seconds": seconds}
                checkpoints.save(step, state, position, validation)
                if stops and step < total:
                    checkpoints.wait()
                    said = f"stopped at step {step} of {total}, and saved: go on with --resume"
                    raise Stopped(said, stopping.signal or signal.SIGTERM)  # another process was told, and so are all

        model = build(config, data.image_shape, len(data.class_names))
        nnx.update(model, *program.gather((state.weights if state.average is None else state.average, state.rest)))
        model.eval()
        return Trained(model, log.epochs, before + time.perf_counter() - start)


def _speed(since: tuple[int, float], step: int) -> float:
    """Steps per second."""
    return (step - since[0]) / (time.perf_counter() - since[1])


def agreed(stops: bool, step: int) -> bool:
    """Whether to stop after this step, of which several processes must think alike: now and then they ask."""
    if jax.process_count() == 1:
        return stops
    return step % ASK == 0 and bool(multihost_utils.process_allgather(np.array(stops)).any())


@contextlib.contextmanager
def stop_signals() -> Iterator[Asked]:
    """What SIGTERM and SIGINT set, where this thread can be told of signals. A second signal acts as it did before."""
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(number: int, _):
        asked.signal = number
        restore()

    def restore():
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in previous:
        signal.signal(number, stop)
    try:
        yield asked
    finally:
        restore()
