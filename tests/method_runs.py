"""A small run of each compared method, by the whole pipeline; as a program it is one that gets killed on the way."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from krrst_dist.artifacts import DistilledSet
from krrst_dist.on_ray import pipeline
from krrst_dist.presets_and_grids import load_preset

UPDATES, CHECKPOINT_EVERY = 4, 2
_NARROW = {"network.widths": [4, 4]}
_TRAJECTORIES = _NARROW | {"experts": 3, "teacher_epochs": 2, "max_start_epoch": 1, "expert_epochs": 1, "steps": 2, "lr_x": 10.0}
SMALL = {
    "kmeans": {},
    "dm": _NARROW | {"batch_real": 8},
    "dsa": _NARROW | {"batch_real": 8, "outer_loop": 3, "inner_loop": 1},
    "mtt": _TRAJECTORIES,
    "mkdt": _TRAJECTORIES,
    "kip": {"batch": 8},
    "frepo": {"batch": 9, "pool.size": 2, "pool.network.widths": [4, 4]},
    "ssl_bilevel": _NARROW | {"steps": 2, "batch": 8, "projector": (4,)},
    "krr_st": {"batch": 9, "pool.size": 2, "pool.max_steps": 3, "pool.network.widths": [4, 4]},
}
LEARN = tuple(name for name in SMALL if name != "kmeans")


def run(method: str, out: Path, *, actors: int = 1, resume: bool = False) -> DistilledSet:
    """The set that the method makes of the digits, in three shards."""
    distill = {"m": 11, "shards": 3} | ({"updates": UPDATES} if method in LEARN else {}) | SMALL[method]
    settings = {"repeats": 1, "target.steps": 0, "evaluate.datasets": (), "evaluate.networks": 1, "evaluate.pretrain.steps": 2,
                "engine.checkpoint_every": CHECKPOINT_EVERY, "engine.actors": actors}
    config = load_preset("quickstart", method=method, **settings | {f"distill.{name}": value for name, value in distill.items()})
    assert pipeline.run(config, data="/nowhere", out=str(out), resume=resume, until="distill") == 0
    return DistilledSet.load(out / "seed-0" / "distilled.safetensors")


def _die_after(update: int) -> None:
    """SIGKILL to this process, the run's driver, once so many updates are done."""
    from krrst_dist.on_ray.progress import Record

    note = Record.update

    def update_and_die(self: Record, step: int, *arguments, **named) -> None:
        note(self, step, *arguments, **named)
        if step == update:
            os.kill(os.getpid(), signal.SIGKILL)

    Record.update = update_and_die


if __name__ == "__main__":
    import ray

    method, out, address = sys.argv[1:]
    ray.init(address=address, logging_level="warning", log_to_driver=False)
    _die_after(CHECKPOINT_EVERY + 1)
    run(method, Path(out))
