"""The distil stage: one run of the engine per distillation seed, each ending in a distilled set."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from krrst_dist import provenance, storage
from krrst_dist.artifacts import ArtifactError, DistilledSet
from krrst_dist.config import Config
from krrst_dist.data.cache import Cache
from krrst_dist.on_ray.assembly import Assembly
from krrst_dist.on_ray.coordinator import Coordinator
from krrst_dist.on_ray.rooms import Rooms, capacity
from krrst_dist.on_ray.stopping import Stop, Stopped


@dataclass(frozen=True)
class Distilled:
    """One seed's run: where it started (the control), its result, and its losses as (update, loss) points.

    held_out begins with the control's loss, at update 0; it is empty for sets without target representations. of_mean: the held-out
    loss of predicting the mean, None there.
    """

    seed: int
    path: str
    start: DistilledSet
    result: DistilledSet
    outer: Sequence[tuple[int, float]]
    held_out: Sequence[tuple[int, float]]
    of_mean: float | None


def seeds(config: Config) -> range:
    """The distillation seeds of a run."""
    return range(config.seed, config.seed + config.repeats)


def seed_directory(out: str, seed: int) -> str:
    """Where one seed's run is."""
    return storage.join(out, f"seed-{seed}")


def distil(config: Config, cache: Cache, beton: Path, targets: Path | None, out: str, *, resume: bool,
           wait: bool = False) -> list[Distilled]:
    """Every distillation seed, as many at a time as the cluster has room for. Ctrl-C, SIGTERM or an error in one stops all, each with
    a checkpoint.

    wait: for room in a cluster that grows. Raises ClusterError where there is no room for a single one, and whatever `Coordinator` does.
    """
    engine, stop = config.engine, Stop()
    rooms = Rooms(engine.threads, engine.gpus, engine.actors, at_least=engine.min_actors, wait=wait)

    def one(seed: int) -> Distilled:
        if stop.soon.is_set():
            raise Stopped(stop.status)
        parts = Assembly(config.model_copy(update={"seed": seed}), cache, beton, targets, storage.join(out, "chores"))
        return _distil_seed(parts, seed_directory(out, seed), resume=resume, stop=stop, rooms=rooms)

    # An empty cluster's room. Seeds that find less wait for each other in `rooms`; for a cluster that grows all of them ask.
    at_once = config.repeats if wait else capacity(cpus=engine.threads, gpus=engine.gpus) // engine.actors
    ends = []
    with stop.by_signals(), ThreadPoolExecutor(max(1, min(config.repeats, at_once))) as pool:
        runs = [pool.submit(one, seed) for seed in seeds(config)]
        for run in as_completed(runs):
            if (error := run.exception()) is not None:
                ends.append(error)
                stop.soon.set()
    for error in ends:
        if not isinstance(error, Stopped):
            raise error
    if stop.soon.is_set():
        raise Stopped(max((end.status for end in ends), default=stop.status))
    return [run.result() for run in runs]


def _distil_seed(parts: Assembly, directory: str, *, resume: bool, stop: Stop, rooms: Rooms) -> Distilled:
    config, source = parts.config, parts.source
    target = source.targets and source.targets.fingerprint
    data = {"images": source.prepared.fingerprint} | ({"target": target} if target else {})
    outcome = Coordinator(config, parts.work(), directory=directory, data=data, resume=resume, name=f"seed {config.seed}", stop=stop,
                          rooms=rooms).run()
    code, start = provenance.revision(), parts.start
    result = replace(parts.method.result(start, outcome.values), metadata={
        "method": config.method, "config": config.model_dump(mode="json"), "distillation": config.distillation(), "seed": config.seed,
        "updates": outcome.updates, "commit": code.commit, "dirty": code.dirty, "source": source.prepared.name,
        "source_fingerprint": source.prepared.fingerprint, "target_fingerprint": target,
        "held_out_loss": outcome.held_out[-1][1] if outcome.held_out else None})
    path = storage.join(directory, "distilled.safetensors")
    start.save(storage.join(directory, "start.safetensors"))
    if not _is_there(path, result):
        result.save(path)
    return Distilled(config.seed, path, start, result, outcome.outer, outcome.held_out, parts.of_mean())


def _is_there(path: str, result: DistilledSet) -> bool:
    """Does the file hold this set already? Then it stays, with the commit that computed it."""
    try:
        return DistilledSet.load(path).fingerprint == result.fingerprint
    except (FileNotFoundError, ArtifactError):
        return False
