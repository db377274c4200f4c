"""The last stages of a run: probes of every set on every labelled data set, and the table and pictures that end it."""

from __future__ import annotations

from math import nan

from krrst_dist import plugins, provenance, storage
from krrst_dist.artifacts import DistilledSet
from krrst_dist.config import Config
from krrst_dist.data.cache import Cache
from krrst_dist.data.prepared import Prepared
from krrst_dist.evaluation import figures, table
from krrst_dist.evaluation.table import ALONE, LABELLED, RANDOM, SCRATCH, Row
from krrst_dist.on_ray import assembly, errands, rooms
from krrst_dist.on_ray.distillation import Distilled

HELD_OUT, FRACTION = "held-out ridge loss", "of predicting the mean"


def evaluate(config: Config, cache: Cache, labelled: dict[str, tuple[Prepared, Prepared]], runs: list[Distilled], *,
             wait: bool) -> list[Row]:
    """All rows of the table: the held-out losses that the runs measured, and probes of every method, seed and data set."""
    datasets, engine = {name: (train.path, test.path) for name, (train, test) in labelled.items()}, config.engine
    control, title = _names(config, runs)
    sets = [(run, method, distilled) for run in runs for method, distilled in ((SCRATCH, None), (control, run.start), (title, run.result))
            if method]
    rows = [row for run in runs if run.held_out
            for method, loss in ((control, run.held_out[0][1]), (title, run.held_out[-1][1])) if method
            for row in (Row(method, HELD_OUT, run.seed, loss), Row(method, FRACTION, run.seed, loss / run.of_mean if run.of_mean else nan))]
    if not datasets:
        return rows
    rooms.require(engine.threads, engine.gpus, 1, wait)
    cells = {f"probes {n}/{len(sets)}: {method}, seed {run.seed}": (config, cache, datasets, distilled, run.seed)
             for n, (run, method, distilled) in enumerate(sets, 1)}
    measured = errands.run(assembly.probe, cells, cpus=engine.threads, gpus=engine.gpus)
    for (run, method, _), (line, accuracy) in zip(sets, measured, strict=True):
        rows += [Row(method, _metric(name, fraction), run.seed, 100 * value) for (name, fraction), value in accuracy.items()]
        print(line, flush=True)
    return rows


def show(config: Config, out: str, runs: list[Distilled], rows: list[Row]) -> None:
    """Write and print the table, the pictures and what to do next."""
    first = runs[0]
    storage.write_whole(storage.join(out, "results.json"), table.to_json(rows).encode())
    origin = f"preset {config.preset}, {_commits(runs)}"
    storage.write_whole(storage.join(out, "results.md"), f"{table.markdown_table(rows)}{origin}\n".encode())
    figures.images_png(first.start.x_syn, first.result.x_syn, first.start.space, storage.join(out, "distilled.png"))
    figures.curve_png([figures.Curve(run.seed, run.outer, run.held_out) for run in runs], storage.join(out, "loss.png"))
    print(f"\n{table.text_table(rows)}{origin}\n")
    control, title = _names(config, runs)
    drops = table.drop(rows, HELD_OUT, method=title, against=control)
    if drops:
        below = ", ".join(f"{drop:.1%} (seed {seed})" for seed, drop in drops.items())
        print(f"held-out ridge loss of {title} below {control}: {below}")
    print(f"""
distilled sets   {storage.join(out, "seed-*", "distilled.safetensors")}
images           {storage.join(out, "distilled.png")}
loss curve       {storage.join(out, "loss.png")}
table            {storage.join(out, "results.md")}

next: pre-train your own network on it
  python -c "import krrst_dist; print(len(krrst_dist.load('{first.path}')), 'images to pre-train on')\"""")


def _names(config: Config, runs: list[Distilled]) -> tuple[str | None, str]:
    """The rows of the control (None where a method's start is its result) and of the method."""
    control = {"features": RANDOM, "none": ALONE}.get(runs[0].start.label_kind, LABELLED)
    return control if config.distill.updates else None, plugins.load(config.method).title


def _commits(runs: list[Distilled]) -> str:
    """The code that distilled the sets (they may have been there), and the code that measured the probes where it is another."""
    about = [DistilledSet.load(run.path).metadata for run in runs]
    made = sorted({_commit(one["commit"], one["dirty"]) for one in about})
    measured = _commit(*provenance.revision())
    return f"commit {', '.join(made)}" + ("" if made == [measured] else f", probes at commit {measured}")


def _commit(commit: str, dirty: bool) -> str:
    return commit[:12] + (" with changes" if dirty else "")


def _metric(name: str, fraction: float) -> str:
    return f"{name} probe, {'all' if fraction == 1 else f'{100 * fraction:g}% of'} labels (%)"
