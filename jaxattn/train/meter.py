"""What the steps measured: looked at when the device has long computed it, checked, and averaged."""

import collections
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxattn.errors import InputError

METRICS = ("loss", "accuracy", "gradient_norm")  # of a step, in this order
AHEAD = 4  # steps that the host may be ahead of the device: enough to keep it busy, few enough to hold their batches


class Diverged(InputError):
    """The loss is no longer a number, or far above that of guessing."""


class Meter:
    """Means of METRICS, over the epoch so far and since the last line of the log.

    Metrics come as arrays that the device has yet to compute, and wait here until AHEAD more steps have been asked for,
    or until `settle`. So the device never waits for the host.

    Args:
      worst: a loss above this has diverged.
      sums, count: what an interrupted run had measured in its epoch.
      ahead: steps that the host may be ahead.
    """

    def __init__(
        self, worst: float, sums: Sequence[float] = (0.0,) * len(METRICS), count: int = 0, *, ahead: int = AHEAD
    ):
        self.worst, self.sums, self.count, self.ahead = worst, np.array(sums), count, ahead
        self.pending: collections.deque = collections.deque()
        self.recent: list[np.ndarray] = []

    def add(self, step: int, index: Int[np.ndarray, "batch"], metrics: Float[jax.Array, "metrics"]):
        """Takes the metrics of one step, and the numbers of its images."""
        self.pending.append((step, index, metrics))
        self.settle(self.ahead)

    def settle(self, ahead: int = 0):
        """Waits until at most `ahead` steps are unseen.

        Raises:
          Diverged: at the first step whose loss or gradient is not finite, or whose loss is above `worst`.
        """
        while len(self.pending) > ahead:
            step, index, metrics = self.pending.popleft()
            values = np.asarray(metrics, float)
            if not np.isfinite(values).all() or values[0] > self.worst:
                measured = ", ".join(f"{name} {value:.4g}" for name, value in zip(METRICS, values, strict=True))
                raise Diverged(f"step {step} diverged: {measured}; its batch held the images {index.tolist()}")
            self.sums, self.count = self.sums + values, self.count + 1
            self.recent.append(values)

    def line(self) -> dict[str, float]:
        """The means since the last call."""
        means, self.recent = np.mean(self.recent, axis=0), []
        return dict(zip(METRICS, means.tolist(), strict=True))

    def epoch(self) -> dict[str, float]:
        """The means of the epoch, which ends here."""
        means, self.sums, self.count = self.sums / self.count, np.zeros(len(METRICS)), 0
        return {f"train_{name}": value for name, value in zip(METRICS, means.tolist(), strict=True)}

    def position(self) -> dict:
        """What `Meter` takes to go on from here."""
        return {"sums": self.sums.tolist(), "count": self.count}
