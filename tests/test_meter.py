"""What the steps measured: means, the lag behind the device, and divergence; and the log's lines on disk."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.train.log import Log
from jaxattn.train.meter import AHEAD, Diverged, Meter


def fill(meter, rows, first=1):
    for step, row in enumerate(rows, first):
        meter.add(step, np.array([10 * step, 10 * step + 1]), jnp.array(row, jnp.float32))


def test_means_of_lines_and_epochs():
    rows = np.random.default_rng(0).random((12, 3)).astype(np.float32)
    meter = Meter(worst=10.0)
    fill(meter, rows[:5])
    meter.settle()
    np.testing.assert_allclose(list(meter.line().values()), rows[:5].mean(0), rtol=1e-6)
    fill(meter, rows[5:])
    meter.settle()
    assert meter.line() == pytest.approx(
        dict(zip(("loss", "accuracy", "gradient_norm"), rows[5:].astype(float).mean(0), strict=True))
    )
    means = meter.epoch()
    assert list(means) == ["train_loss", "train_accuracy", "train_gradient_norm"]
    np.testing.assert_allclose(list(means.values()), rows.astype(float).mean(0), rtol=1e-12)
    fill(meter, rows[:2], first=13)
    meter.settle()
    np.testing.assert_allclose(list(meter.epoch().values()), rows[:2].astype(float).mean(0), rtol=1e-12)


def test_an_epoch_goes_on_where_it_was_interrupted():
    rows = np.random.default_rng(0).random((7, 3)).astype(np.float32)
    whole, first = Meter(worst=10.0), Meter(worst=10.0)
    fill(whole, rows)
    fill(first, rows[:3])
    first.settle()
    second = Meter(10.0, **json.loads(json.dumps(first.position())))
    fill(second, rows[3:], first=4)
    for meter in (whole, second):
        meter.settle()
    assert whole.epoch() == second.epoch()  # to the last bit


@pytest.mark.parametrize("row", [(math.nan, 0, 1), (1, 0, math.inf), (11, 0, 1)])
def test_divergence_names_the_step_and_its_images(row):
    meter = Meter(worst=10.0)
    fill(meter, [(1, 0, 1)] * 3)
    meter.add(4, np.array([8, 5]), jnp.array(row, jnp.float32))
    with pytest.raises(Diverged, match=r"step 4 diverged: loss .*; its batch held the images \[8, 5\]"):
        meter.settle()


def test_the_host_runs_ahead_by_so_many_steps():
    meter = Meter(worst=10.0)
    meter.add(1, np.array([0]), jnp.array([math.nan, 0, 0]))
    fill(meter, [(1, 0, 1)] * (AHEAD - 1), first=2)
    with pytest.raises(Diverged, match="step 1 diverged"):
        fill(meter, [(1, 0, 1)], first=AHEAD + 1)


# The log


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_log_forgets_what_will_be_written_again(tmp_path):
    log = Log(tmp_path, 0)
    for step in (10, 20, 30):
        log.steps({"step": step, "loss": step / 3})
    log.epoch({"step": 25, "train_loss": 0.1})
    log.close()
    with open(tmp_path / "steps.jsonl", "a") as file:
        file.write('{"step": 40, "lo')  # the process was killed here
    log = Log(tmp_path, 25)
    assert log.epochs == [{"step": 25, "train_loss": 0.1}]
    log.steps({"step": 30, "loss": 5.0})
    log.epoch({"step": 50, "train_loss": 0.05})
    log.close()
    expected = [{"step": 10, "loss": 10 / 3}, {"step": 20, "loss": 20 / 3}, {"step": 30, "loss": 5.0}]
    assert lines(tmp_path / "steps.jsonl") == expected
    assert (
        lines(tmp_path / "metrics.jsonl")
        == log.epochs
        == [
            {"step": 25, "train_loss": 0.1},
            {"step": 50, "train_loss": 0.05},
        ]
    )
    assert {path.name for path in tmp_path.iterdir()} == {"steps.jsonl", "metrics.jsonl", "tensorboard"}
    Log(tmp_path, 0).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_tensorboard_gets_the_same_numbers(tmp_path):
    log = Log(tmp_path, 0)
    log.steps({"step": 10, "loss": 0.25})
    log.epoch({"step": 20, "validation_accuracy": 0.5})
    log.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    written = events.read_bytes()
    assert b"steps/loss" in written
    assert b"metrics/validation_accuracy" in written
    assert np.float32(0.25).tobytes() in written
