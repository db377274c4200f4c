"""The whole run, in stages: prepare -> target -> distil -> evaluate -> show -> feature space. Each reuses what is there.

Data flows one way and each stage leaves files that the next one reads, so a run that was stopped goes on with the
first stage that is not finished. Knows the order of the stages and where their files are; each stage is elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import yaml

from krrst_dist import paths, storage
from krrst_dist.config import DEFAULT_METHOD, Config
from krrst_dist.data.prepared import Prepared
from krrst_dist.data.readers import Images
from krrst_dist.data.sources import open_images
from krrst_dist.on_ray import cluster, features, preflight, report, rooms, targets
from krrst_dist.on_ray.alike import require_nodes_alike
from krrst_dist.on_ray.distillation import distil, seed_directory, seeds
from krrst_dist.on_ray.heartbeat import of_job
from krrst_dist.on_ray.places import Places, prepared_split
from krrst_dist.on_ray.resume import check_resume
from krrst_dist.on_ray.stopping import sigterm_as_interrupt
from krrst_dist.on_ray.worker import Host

Stage = Literal["prepare", "target", "distill", "evaluate"]


def run(config: Config, *, data: str | None = None, out: str | None = None, cache: str | None = None, resume: bool = False,
        wait: bool = False, on_bad_image: Literal["stop", "skip"] = "stop", until: Stage = "evaluate") -> int:
    """Do every stage up to `until` that is not done yet; returns 0.

    Raises ValueErrors that say what a user can do, before anything is computed where that is possible.
    """
    other = "" if config.method == DEFAULT_METHOD else f"-{config.method}"
    places = Places.of(paths.output_directory(out, name=f"{config.preset}{other}-{config.seed}"), data=data, cache=cache)
    return run_stages(config, places, resume=resume, wait=wait, on_bad_image=on_bad_image, until=until)


@sigterm_as_interrupt()
def run_stages(config: Config, places: Places, *, resume: bool = False, wait: bool = False,
               on_bad_image: Literal["stop", "skip"] = "stop", until: Stage = "evaluate") -> int:
    """`run` at places that are known."""
    preflight.check_names(config)
    preflight.check_checkpoint(config)
    for seed in seeds(config) if until in ("distill", "evaluate") else ():
        check_resume(config.model_copy(update={"seed": seed}), seed_directory(places.out, seed), resume=resume, data=None)
    storage.check_writable(places.out)
    images = _found(config, places, until=until)
    clock = Clock()
    if until != "prepare" or cluster.at_hand():
        with clock("start Ray"):
            cluster.connect()
            if until != "prepare":
                rooms.require(config.engine.threads, config.engine.gpus, config.engine.min_actors or config.engine.actors, wait=wait)
            require_nodes_alike(Host.of_this_process())
    with of_job(places.out) as clock.says:
        return _stages(config, places, images, clock, resume=resume, wait=wait, on_bad_image=on_bad_image, until=until)


def _stages(config: Config, places: Places, images: Mapping[preflight.Split, Images], clock: Clock, *, resume: bool, wait: bool,
            on_bad_image: Literal["stop", "skip"], until: Stage) -> int:
    """From prepare on, when all that can be known beforehand is in order."""
    with clock("prepare"):
        betons = _prepare(config, places, images, until=until, wait=wait, on_bad_image=on_bad_image)
    source = betons[config.source.dataset, "train"]
    if until == "prepare":
        print("\n".join(f"prepared         {beton.path}" for beton in betons.values()))
        return 0

    found = None
    if until == "target" or preflight.needs_targets(config):
        with clock("target"):
            found = targets.compute(config, source, places.cache, wait=wait)
    if until == "target":
        return 0
    storage.write_whole(storage.join(places.out, "config.yaml"), yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())

    with clock("distil"):
        distilled = distil(config, places.cache, source.path, found and found.file, places.out, resume=resume, wait=wait)
    if until == "distill":
        print(f"distilled sets   {storage.join(places.out, 'seed-*', 'distilled.safetensors')}")
        return 0

    with clock("evaluate"):
        labelled = {name: (betons[name, "train"], betons[name, "test"]) for name in config.evaluate.datasets}
        rows = report.evaluate(config, places.cache, labelled, distilled, wait=wait)
    report.show(config, places.out, distilled, rows)
    if found is not None:
        with clock("feature space"):
            features.compute(config, places.cache, source.path, found, [run.path for run in distilled], wait=wait)
    print(f"\n{clock}\n")
    return 0


def _found(config: Config, places: Places, *, until: Stage) -> dict[preflight.Split, Images]:
    """The images that the stages up to `until` read, and what is wrong with the settings for them."""
    probed = config.evaluate.datasets if until == "evaluate" else ()
    source = config.source.dataset, "train"
    splits = dict.fromkeys([source, *((name, split) for name in probed for split in ("train", "test"))])
    images = {split: open_images(*split, places.data) for split in splits}
    distils, labelled = until in ("distill", "evaluate"), images[source].labelled
    if distils:
        preflight.check_labels(config, labelled)
    preflight.check_images(config, len(images[source]), distils=distils, labels=images[source].labels if labelled else None)
    return images


def _prepare(config: Config, places: Places, images: Mapping[preflight.Split, Images], *, until: Stage, wait: bool,
             on_bad_image: Literal["stop", "skip"]) -> dict[preflight.Split, Prepared]:
    """The betons of all images; the room for the target's training is looked for before the first is prepared."""
    source, distils = (config.source.dataset, "train"), until in ("distill", "evaluate")
    if until == "target" or (distils and preflight.needs_targets(config)):
        cached = places.cache.remote or str(places.cache.local)
        preflight.check_room_for_target(config, images[source], cached, on_bad_image=on_bad_image, wait=wait)
    how = {"resolution": config.source.resolution, "resize": config.source.resize, "on_bad_image": on_bad_image}
    betons = {split: prepared_split(*split, places, images=found, wait=wait, **how) for split, found in images.items()}
    preflight.check_images(config, betons[source].count, distils=distils)  # again: bad images may have been skipped
    return betons


class Clock:
    """Seconds a stage, announced as they begin and summed up at the end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.says: Callable[[str], None] = lambda line: None
        """told which stage begins"""

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        print(f"== {stage}", flush=True)
        self.says(f"stage: {stage}")
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] = time.monotonic() - start

    def __str__(self) -> str:
        parts = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in self.seconds.items())
        return f"time: {parts}; in all {sum(self.seconds.values()):.0f} s"
