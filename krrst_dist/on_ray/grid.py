"""An evaluation grid on the cluster: make the missing sets, train the shared networks, compute the cells, by Ray Tune.

What is finished is a file: a network's weights, a cell's rows. So a grid that was killed goes on where it was by being
started again, and of two grids on one store neither harms the other. A trial that fails is tried again; the rest goes on.
Knows the order of things; what a trial does is in `grid_trial.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import yaml

from krrst_dist import paths, provenance, storage
from krrst_dist.data.readers import Images
from krrst_dist.data.sources import open_images
from krrst_dist.grid_config import Grid
from krrst_dist.on_ray import cluster, rooms
from krrst_dist.on_ray import grid_fid as fid
from krrst_dist.on_ray.alike import require_nodes_alike
from krrst_dist.on_ray.errors import EngineError
from krrst_dist.on_ray.grid_plan import check_grid, check_names_kept, check_set, plan
from krrst_dist.on_ray.grid_sets import GridSet, check_makeable, given, load_presets, make
from krrst_dist.on_ray.grid_trial import Workshop, cell_trial, model_trial
from krrst_dist.on_ray.grid_work import Planned, Target
from krrst_dist.on_ray.heartbeat import of_job
from krrst_dist.on_ray.places import Places, prepared_split
from krrst_dist.on_ray.preflight import Split
from krrst_dist.on_ray.stopping import sigterm_as_interrupt
from krrst_dist.on_ray.trials import Ended, run_trials
from krrst_dist.on_ray.worker import Host
from krrst_dist.results import Outcome, ResultStore


@sigterm_as_interrupt()
def run(grid: Grid, *, data: str | None = None, out: str | None = None, cache: str | None = None, wait: bool = False,
        recompute: bool = False) -> int:
    """Compute every cell that is not finished; returns 0, or 1 where some failed or have no set.

    recompute: finished cells too, and their networks. Raises ValueErrors that say what a user can do, before anything is
    computed where that is possible.
    """
    check_grid(grid)
    grid = fid.located(grid)
    places = Places.of(paths.output_directory(out, name=f"grid-{grid.name}"), data=data, cache=cache)
    storage.check_writable(places.out)
    store = ResultStore(storage.join(places.out, "results"), provenance.revision())
    store.finished()  # can it be read?
    files = fid.files(grid)
    images = {(name, split): open_images(name, split, places.data) for name in grid.targets for split in ("train", "test")}
    there = _there(grid, places)
    cluster.connect()
    rooms.require(grid.cpus, grid.gpus, 1, wait=wait)
    require_nodes_alike(Host.of_this_process())
    with of_job(places.out) as says:
        says("preparing the targets")
        targets = _targets(grid, images, places, wait=wait)
        sets, missing = _made(grid, there, places, says, wait=wait)
        cells = plan(grid, sets, targets, fid.sources(grid, sets, places, wait=wait), places.out, files=files)
        failed = _computed(grid, cells, places, store, says, recompute=recompute)
    print("\n".join([*missing, f"results  {store.uri}", f"next: krrst report {store.uri}"]))
    return int(failed > 0 or bool(missing))


def _computed(grid: Grid, cells: Sequence[Planned], places: Places, store: ResultStore, says: Callable[[str], None], *,
              recompute: bool) -> int:
    """Compute what is not finished; returns how many cells have no result."""
    storage.write_whole(storage.join(places.out, "grid.yaml"), yaml.safe_dump(grid.model_dump(mode="json"), sort_keys=False).encode())

    finished = {} if recompute else store.finished()
    check_names_kept(cells, finished, store.uri)
    open_ = [planned for planned in cells if planned.cell.key not in finished]
    print(f"grid {grid.name}: {len(cells)} cells, {len(cells) - len(open_)} finished before", flush=True)
    return _compute(grid, open_, places, store, says, anew=recompute) if open_ else 0


def _there(grid: Grid, places: Places) -> list[list[GridSet]]:
    """The sets of each entry, none where they are to be made; with all that can be wrong with those, too."""
    there: list[list[GridSet]] = []
    for entry in grid.sets:
        there.append([] if entry.preset else given(entry))
        for found in there[-1]:
            check_set(grid, found)
            if "fid" in grid.tasks and found.path:
                open_images(fid.source_of(grid, found), "train", places.data)
        for config in load_presets(entry, grid.gpus):
            check_makeable(entry, config, places)
    return there


def _made(grid: Grid, there: Sequence[Sequence[GridSet]], places: Places, says: Callable[[str], None], *,
          wait: bool) -> tuple[list[GridSet], list[str]]:
    """All sets, the missing ones made, and a sentence for each that could not be: the rest goes on."""
    sets, missing = [], []
    for entry, found in zip(grid.sets, there, strict=True):
        sets += found
        for config in load_presets(entry, grid.gpus):
            says(f"making the set of {entry.method}, seed {config.seed}")
            try:
                sets.append(make(entry, config, places, wait=wait))
            except (ArithmeticError, EngineError) as error:
                missing.append(f"no set for {entry.method}, seed {config.seed}: {error}; its cells are missing")
                print(missing[-1], flush=True)
    return sets, missing


def _targets(grid: Grid, images: Mapping[Split, Images], places: Places, *, wait: bool) -> list[Target]:
    """The grid's targets, prepared."""
    betons = {split: prepared_split(*split, places, images=found, wait=wait, resolution=grid.resolution, resize=grid.resize)
              for split, found in images.items()}
    return [Target.of(name, betons[name, "train"], betons[name, "test"], validation=grid.split == "validation") for name in grid.targets]


def _compute(grid: Grid, cells: Sequence[Planned], places: Places, store: ResultStore, says: Callable[[str], None], *, anew: bool) -> int:
    """Networks first (anew: those that are there, too), then cells; returns how many cells have no result."""
    records = storage.join(places.out, "tune")
    workshop = Workshop(places.cache, store, records, grid.resolution, grid.cpus, grid.gpus)
    models = {model.uri: model for planned in cells for model in planned.models if anew or not storage.exists(model.uri)}
    how = {"cpus": grid.cpus, "gpus": grid.gpus, "retries": grid.retries, "storage": records, "says": says, "workshop": workshop}
    ended = run_trials("networks", model_trial, models, title=lambda uri: models[uri].title, **how)
    bad = {uri: end for uri, end in ended if end.status != "ok"}

    ready, failed = {}, 0
    for planned in cells:
        lost = next((bad[model.uri] for model in planned.models if model.uri in bad), None)
        if lost is None:
            ready[planned.cell.key] = planned
            continue
        store.write(planned.cell, _without_network(lost))
        failed += lost.status == "failed"
    for key, end in run_trials("cells", cell_trial, ready, title=lambda key: ready[key].title, **how):
        if end.status == "failed":
            store.write(ready[key].cell, Outcome(status="failed", error=end.error, trial_path=end.trial_path))
            failed += 1
    return failed


def _without_network(lost: Ended) -> Outcome:
    """The outcome of a cell whose network could not be trained."""
    if lost.status == "diverged":
        return Outcome(status="diverged", metrics={"train_loss": lost.last["loss"]}, steps=lost.last["step"], trial_path=lost.trial_path,
                       error=f"its pre-training diverged: {lost.error}")
    return Outcome(status="failed", trial_path=lost.trial_path, error=f"its network could not be trained: {lost.error}")
