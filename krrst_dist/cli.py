"""The command line: words in, one call out. The same flags in `krrst` and in jobs/.

Knows which settings can be typed and which function answers a command; nothing is computed here.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import tyro

from krrst_dist import plugins
from krrst_dist import presets_and_grids as files
from krrst_dist.config import Config, ConfigError, Settings, nearest
from krrst_dist.grid_config import Grid, load_grid

USAGE = """krrst: self-supervised dataset distillation (KRR-ST)

  krrst prepare     read a data set and write it as .beton files
  krrst target      ... and train the self-supervised target, and compute its representations
  krrst distill     ... and distil: X_s, Y_s and their metadata in one file a seed
  krrst evaluate    ... and measure what the sets are worth (what jobs/distill_imagenet.py does)
  krrst grid        distilled sets x architectures x targets x tasks x seeds (what jobs/transfer_grid.py does)
  krrst submit      one of the two as a job on a Ray cluster (RAY_ADDRESS or --address; else one started here)
  krrst status      is a run or a grid alive, how far is it, when will it end? From its folder or URI alone
  krrst report      the paper's tables of a grid's results
  krrst results     a results store: show, merge, export
  krrst explore     the same in a browser, with trials, charts and the distilled images; also while a grid runs
  krrst show        a distilled set's images and losses as PNG
  krrst features    where sets lie in the target's feature space, and the nearest real images, for the explorer
  krrst theorem1    the paper's Theorem 1 as an experiment
  krrst export      write a distilled set as PNG folder, Parquet or .pt
  krrst import      make a distilled set of the authors' x_syn.pt and y_syn.pt
  krrst bench       speed, as ratios measured side by side
  krrst plan        what a run would take on so many GPUs: time, memory, money
  krrst doctor      can this machine run all this, and what to do if not

The first four take the same settings, do what is missing and reuse what is there:
  --preset --method --data --out --seed --updates --shards --actors --resume     (krrst distill --help: all of them)
presets: """


class GridRun(Settings):
    """One evaluation grid: where things are, and the settings."""

    data: str | None = None
    """folder with the data sets, on the machine that runs the job; default: $KRRST_DATA"""
    out: str | None = None
    """folder or URI for made sets, networks and results; default: runs/grid-NAME under the project root"""
    cache: str | None = None
    """folder on this machine's disk for prepared data and targets, shared by runs; default: `cache` beside --out"""
    wait: bool = False
    """wait for a cluster that is still growing, instead of refusing when resources are missing"""
    recompute: bool = False
    """compute finished cells again"""
    config: Annotated[Grid, tyro.conf.arg(name="")]


class Run(Settings):
    """One run of the pipeline: where things are, and the settings."""

    data: str | None = None
    """folder with the data sets, on the machine that runs the job; default: $KRRST_DATA"""
    out: str | None = None
    """folder or URI for the results; default: runs/PRESET-SEED (runs/PRESET-METHOD-SEED for another method than the
    preset's) under the project root"""
    cache: str | None = None
    """folder on this machine's disk for prepared data and targets, shared by runs; default: `cache` beside --out"""
    resume: bool = False
    """go on with the unfinished run in --out"""
    wait: bool = False
    """wait for a cluster that is still growing, instead of refusing when resources are missing"""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """an image that cannot be decoded: stop with its name, or skip, count and list it"""
    config: Annotated[Config, tyro.conf.arg(name="")]


def parse_run(argv: Sequence[str], *, command: str = "krrst distill", preset: str = "imagenet64") -> Run:
    """Flags to settings: a preset, and whatever else was typed over it.

    Exits with status 2 and a sentence for an unknown flag or preset (with the nearest one) or a value that does not fit.
    """
    first = argparse.ArgumentParser(prog=command, add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=preset)
    first.add_argument("--method")
    chosen, rest = first.parse_known_args(list(argv))
    try:
        return tyro.cli(Run, args=rest, prog=command,
                        description=f"Presets (--preset, default {preset}): {', '.join(files.preset_names())}\n"
                                    f"Methods (--method, default: the preset's): {', '.join(plugins.names())}",
                        default=Run(config=files.load_preset(chosen.preset, method=chosen.method)))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def parse_grid(argv: Sequence[str], *, command: str = "krrst grid") -> GridRun:
    """Flags to settings: a grid, and whatever else was typed over it. Exits like `parse_run`."""
    first = argparse.ArgumentParser(prog=command, add_help=False, allow_abbrev=False)
    first.add_argument("--grid")
    chosen, rest = first.parse_known_args(list(argv))
    known = f"{', '.join(files.shipped('grids'))}, or the path of a .yaml file"
    if chosen.grid is None:
        print(f"{command}: --grid says what to compute: {known}" if {"-h", "--help"} & set(rest) else
              f"error: --grid is missing; give one of {known}", file=sys.stderr)
        raise SystemExit(0 if {"-h", "--help"} & set(rest) else 2)
    try:
        return tyro.cli(GridRun, args=rest, prog=f"{command} --grid {chosen.grid}", description=f"Grids (--grid): {known}",
                        default=GridRun(config=load_grid(chosen.grid)))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def main(argv: Sequence[str] | None = None) -> int:
    """`krrst ...`; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE + ", ".join(files.preset_names()))
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        print(f"krrst {command}: no such command; {nearest(command, list(COMMANDS))}", file=sys.stderr)
        return 2
    return guarded(lambda: COMMANDS[command](rest), again="the same command" if command == "grid" else WITH_RESUME)


WITH_RESUME = "the same command with --resume"


def guarded(work: Callable[[], int | None], *, again: str = WITH_RESUME) -> int:
    """Run a command; an error that a user can mend is one sentence and status 1 (Ctrl-C: 130; a distillation that
    SIGTERM has ended in order: 0), not a traceback.

    again: what goes on with a command that was stopped.
    """
    from krrst_dist.on_ray.errors import EngineError

    try:
        return work() or 0
    except (ValueError, ArithmeticError, OSError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        print(f"stopped; checkpoints are kept: {again} goes on", file=sys.stderr)
        if "ray" in sys.modules:
            from krrst_dist.on_ray import cluster

            cluster.leave()
        return getattr(stopped, "status", 130)


def _stage(name: Literal["prepare", "target", "distill", "evaluate"]) -> Callable[[list[str]], int | None]:
    def stage(arguments: list[str]) -> int | None:
        run = parse_run(arguments, command=f"krrst {name}")
        from krrst_dist.on_ray import pipeline

        where = {field: getattr(run, field) for field in Run.model_fields if field != "config"}
        return pipeline.run(run.config, **where, until=name)

    return stage


def _grid(arguments: list[str]) -> int | None:
    run = parse_grid(arguments)
    from krrst_dist.on_ray import grid

    return grid.run(run.config, **{field: getattr(run, field) for field in GridRun.model_fields if field != "config"})


JOBS = {"distill_imagenet": parse_run, "transfer_grid": parse_grid}
"""scripts in jobs/, and who understands their flags"""


def _submit(arguments: list[str]) -> int | None:
    description = "Run a script of jobs/ as a job on a Ray cluster; all further flags are its own (krrst evaluate|grid --help)."
    parser = argparse.ArgumentParser(prog="krrst submit", description=description, allow_abbrev=False)
    parser.add_argument("--address", help="the cluster's dashboard, http://host:8265; default: $RAY_ADDRESS, else a cluster started here")
    parser.add_argument("--job", choices=JOBS, default="distill_imagenet", help="default: distill_imagenet")
    own, others = parser.parse_known_args(arguments)
    JOBS[own.job](others, command="krrst submit")  # a typo is refused here, not a minute later by the job
    from krrst_dist.on_ray import submit

    return submit.submit(others, address=own.address, script=f"jobs/{own.job}.py")


def _status(arguments: list[str]) -> int | None:
    from krrst_dist.on_ray import status

    return status.main(arguments)


def _report(arguments: list[str]) -> int | None:
    if any(argument.partition("=")[0] == "--html" for argument in arguments):
        from krrst_dist.explorer import commands

        return commands.report_main(arguments)
    from krrst_dist import results

    return results.report_main(arguments)


def _results(arguments: list[str]) -> int | None:
    from krrst_dist import results

    return results.results_main(arguments)


def _explore(arguments: list[str]) -> int | None:
    from krrst_dist.explorer import explore

    return explore.explore_main(arguments)


def _show(arguments: list[str]) -> int | None:
    from krrst_dist.explorer import commands

    return commands.show_main(arguments)


def _features(arguments: list[str]) -> int | None:
    from krrst_dist.on_ray import features

    return features.main(arguments)


def _theorem1(arguments: list[str]) -> int | None:
    from krrst_dist.evaluation import theorem1

    return theorem1.main(arguments)


def _doctor(arguments: list[str]) -> int | None:
    from krrst_dist import doctor

    return doctor.main(arguments)


def _bench(arguments: list[str]) -> int | None:
    from krrst_dist import bench

    return bench.main(arguments)


def _plan(arguments: list[str]) -> int | None:
    from krrst_dist.bench import plan

    return plan.main(arguments)


def _export(arguments: list[str]) -> None:
    from krrst_dist import exports

    tyro.cli(exports.export, args=_flagged(arguments, "--path", "--to"), prog="krrst export",
             description="krrst export runs/cifar100-0/seed-0/distilled.safetensors FOLDER (--path and --to may be left out)")


def _import(arguments: list[str]) -> None:
    from krrst_dist import exports

    tyro.cli(exports.import_released, args=_flagged(arguments, "--x-syn", "--y-syn", "--to"), prog="krrst import",
             description="krrst import x_syn.pt y_syn.pt NAME.safetensors (--x-syn, --y-syn and --to may be left out)")


def _flagged(arguments: list[str], *flags: str) -> list[str]:
    """The words that a command begins with, as values of these flags in turn: `A B --format pt` is `--path A --to B --format pt`."""
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), arguments[:len(flags)]))
    return [part for pair in zip(flags, words, strict=False) for part in pair] + arguments[len(words):]


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    **{name: _stage(name) for name in ("prepare", "target", "distill", "evaluate")},
    "grid": _grid, "submit": _submit, "status": _status, "report": _report, "results": _results, "theorem1": _theorem1,
    "explore": _explore, "show": _show, "features": _features,
    "export": _export, "import": _import, "bench": _bench, "plan": _plan, "doctor": _doctor,
}


if __name__ == "__main__":
    sys.exit(main())
