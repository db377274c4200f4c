"""What a run tells Prometheus, by Ray's own exporter on the driver's node; each value has the tag `run`, the run's folder or URI."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

from krrst_dist.on_ray.aggregate import Update


class Metrics:
    """The values of one run."""

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        self._step = self._gauge("step", "meta-updates that are done")
        self._loss = self._gauge("loss", "outer loss of the last meta-update")
        self._held_out = self._gauge("held_out_loss", "held-out ridge loss, where it was last measured")
        self._seconds = {stage: self._gauge(f"{stage}_seconds", f"seconds of the last meta-update: {what}") for stage, what in {
            "update": "all of it", "train": "pool models", "contribute": "meta-gradients", "combine": "sum and outer step"}.items()}
        self._images = self._counter("images", "real images read by meta-updates")
        self._retries = self._counter("ridge_retries", "ridge factorisations that failed and were tried with more ridge")
        self._checkpoint = self._gauge("checkpoint_step", "meta-updates that the last checkpoint has")
        self._failures = self._counter("failures", "actors or hosts that were lost")

    def update(self, step: int, update: Update) -> None:
        """`step` updates are done, `update` was the last."""
        self._step.set(step, self._tags)
        self._loss.set(update.contribution.loss, self._tags)
        for stage, seconds in {"update": update.total, "train": update.train, "contribute": update.contribute,
                               "combine": update.combine}.items():
            self._seconds[stage].set(seconds, self._tags)
        self._images.inc(update.contribution.images, self._tags)
        if update.contribution.retries:
            self._retries.inc(update.contribution.retries, self._tags)

    def measured(self, held_out: float) -> None:
        """The held-out ridge loss."""
        self._held_out.set(held_out, self._tags)

    def checkpoint(self, step: int) -> None:
        """There is a checkpoint of `step` updates."""
        self._checkpoint.set(step, self._tags)

    def failure(self) -> None:
        """An actor or a host was lost."""
        self._failures.inc(1, self._tags)

    def _gauge(self, name: str, description: str) -> Gauge:
        return Gauge(f"krrst_{name}", description, tag_keys=("run",))

    def _counter(self, name: str, description: str) -> Counter:
        return Counter(f"krrst_{name}", description, tag_keys=("run",))
