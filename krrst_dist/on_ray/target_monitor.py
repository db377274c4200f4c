"""What one sees of a target's training: TensorBoard scalars, a line with the time left, the k-NN probe.

Knows neither Ray nor the optimiser; the training calls it after every step. Labels are used for the probe only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from krrst_dist.evaluation.knn import knn_accuracy
from krrst_dist.evaluation.probe import extract
from krrst_dist.networks import Network
from krrst_dist.on_ray.progress import ProgressLine

QUERIES = 0.2
"""share of the probe's images that are classified by the others"""


class TargetMonitor:
    """Writes to `log_directory` (None: nowhere, as for remote storage) and to standard output.

    probe: uint8 images [n, C, H, W] and labels int64 [n] from the training part; the first fifth is classified by the rest.
    None where the source has no labels: then the loss alone is logged.
    """

    def __init__(self, network: Network, probe: tuple[Tensor, Tensor] | None, *, mean: Sequence[float], std: Sequence[float], steps: int,
                 done: int, probe_every: int, log_directory: Path | None):
        self._network, self._probe, self._mean, self._std = network, probe, mean, std
        self._steps, self._first, self._probe_every = steps, done, probe_every
        self._log_every = max(1, steps // 1000)
        self._writer = SummaryWriter(log_directory, purge_step=done + 1) if log_directory is not None else None
        self._line = ProgressLine("target", steps, start=done)
        self._started = time.monotonic()
        self.accuracy: float | None = None
        """of the last probe, in [0, 1]"""
        start = f"target: {steps} steps" + (f", resumed at {done}" if done else "")
        print(start if probe is not None else f"{start}; the source has no labels, so the loss alone is logged", flush=True)

    def after_step(self, done: int, loss: Tensor, lr: float) -> None:
        """Log step number `done` (1 for the first), whose learning rate was `lr`."""
        last = done == self._steps
        if self._probe is not None and (last or done % self._probe_every == 0):
            self.accuracy = self._knn()
            self._scalars(done, {"target/knn_accuracy": self.accuracy})
        if last or done % self._log_every == 0:
            seconds = (time.monotonic() - self._started) / (done - self._first)
            self._scalars(done, {"target/loss": loss.item(), "target/lr": lr, "target/seconds_per_step": seconds})
        seen = "" if self.accuracy is None else f"  k-NN {self.accuracy:.1%}"
        self._line.show(done, f"loss {loss.item():.4g}{seen}")

    def flush(self) -> None:
        """Put the log on disk, so that it reaches as far as a checkpoint written after it."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Flush, and sum up in a line."""
        self._line.close()
        if self._writer is not None:
            self._writer.close()
        seen = "" if self.accuracy is None else f", k-NN accuracy {self.accuracy:.1%}"
        print(f"target: {self._steps} steps done{seen}", flush=True)

    def _scalars(self, done: int, values: dict[str, float]) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, done)

    def _knn(self) -> float:
        images, labels = self._probe
        self._network.eval()
        features = extract(self._network, images, mean=self._mean, std=self._std)  # [n, d]
        cut = max(1, int(QUERIES * len(labels)))
        return knn_accuracy(features[cut:], labels[cut:], features[:cut], labels[:cut])
