"""Every setting of an evaluation grid: distilled sets x architectures x targets x tasks x seeds.

A grid is a YAML file, by name one that ships with the package (`grids/`), or a path. It may start from another one
(`base: NAME`). Knows shapes and ranges only; names are checked by their registries when a grid is planned.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import tyro
from pydantic import Field, model_validator

from krrst_dist.config import NetworkSettings, NonNegative, Positive, ProbeSettings, Settings
from krrst_dist.presets_and_grids import read_yaml, shipped
from krrst_dist.recipes import FinetuneSettings, KDSettings

Task = Literal["finetune", "probe", "knn", "kd", "fid"]
LabelKind = Literal["features", "class", "soft", "none"]
Fraction = Annotated[float, Field(gt=0, le=1)]


class SetSettings(Settings):
    """Distilled sets that stand in one row of the tables: files that are there, or sets that the grid makes first."""

    method: Annotated[str, Field(min_length=1)]
    """the row's name"""
    make: Literal["distilled", "random_targets", "random_labels", "all_targets", "nothing"] = "distilled"
    """distilled: what `krrst distill` makes of `preset`; random_targets: where that starts, real images with target
    representations; random_labels: as many real images, the same number of each class, with their labels; all_targets: the
    whole training part with target representations; nothing: no pre-training (for kd: Gaussian noise)"""
    path: str | None = None
    """files that are there (a path or URI; * in the last two parts stands for anything), instead of `preset`"""
    preset: str | None = None
    """the run that makes the sets"""
    by: str | None = None
    """how that is distilled, if not by the preset's own method: dsa, dm, ... (as `krrst distill --method`)"""
    settings: dict[str, Any] = {}
    """changes to the preset, by dotted name: ablations"""
    seeds: Annotated[tuple[NonNegative, ...], Field(min_length=1)] = (0,)
    """distillation seeds"""
    evaluation_seeds: Annotated[tuple[NonNegative, ...], Field(min_length=1)] | None = None
    """instead of the grid's"""
    paired: bool = False
    """evaluate each set with its distillation seed alone, instead of every evaluation seed"""
    pretrain: dict[str, Any] = {}
    """changes to the recipe that the sets carry"""

    @model_validator(mode="after")
    def _has_an_origin(self) -> SetSettings:
        given = [name for name in ("path", "preset") if getattr(self, name) is not None]
        if self.make == "nothing" and given:
            raise ValueError(f"{given[0]} = {getattr(self, given[0])!r}: make = nothing has no set; leave one of them out")
        if self.make != "nothing" and len(given) != 1:
            raise ValueError(f"path = {self.path!r}, preset = {self.preset!r}: give one of them, files that are there or the run that "
                             f"makes them (or make: nothing, for no pre-training)")
        if self.by is not None and (self.preset is None or self.make != "distilled"):
            raise ValueError(f"by = {self.by!r}: it says how a preset is distilled, and these sets are not; leave it out")
        if self.path is not None and self.settings:
            raise ValueError(f"settings = {self.settings!r}: they change a preset, and path names files that are there; leave one out")
        return self


class KnnSettings(Settings):
    """k-nearest-neighbour classification in feature space."""

    k: Positive = 20


class FidSettings(Settings):
    """The network in whose feature space sets are compared with their source."""

    network: str = "inception"
    """inception (v3), or the path of a target model that `krrst target` trained"""
    weights: str | None = None
    """file of Inception's weights; default: downloaded"""
    source: str | None = None
    """data set compared with; default: the one that each set says it was made of"""


class Grid(Settings):
    """One grid. Every combination that its tasks ask for is a cell, computed once."""

    name: str
    resolution: Positive
    """pixels a side of every set, target and network"""
    resize: Literal["crop", "squash"] = "crop"
    sets: Annotated[tuple[SetSettings, ...], Field(min_length=1), tyro.conf.Fixed]
    architectures: Annotated[tuple[NetworkSettings, ...], tyro.conf.Fixed] = ()
    targets: tuple[str, ...] = ()
    """labelled data sets, by registry name"""
    tasks: Annotated[tuple[Task, ...], Field(min_length=1)] = ("finetune",)
    seeds: Annotated[tuple[NonNegative, ...], Field(min_length=1)] = (0, 1, 2)
    """evaluation seeds"""
    split: Literal["test", "validation"] = "test"
    """what is tested on; validation: a tenth of every class of the training split, which is then not trained on"""
    label_fractions: Annotated[dict[Literal["finetune", "probe"], Annotated[tuple[Fraction, ...], Field(min_length=1)]],
                               tyro.conf.Fixed] = {}
    """shares of the target's training labels; a task that is not listed takes all"""
    pretrain: Annotated[dict[LabelKind, dict[str, Any]], tyro.conf.Fixed] = {}
    """changes to the recipes that sets carry, by the kind of their labels"""
    finetune: FinetuneSettings = FinetuneSettings()
    probe: ProbeSettings = ProbeSettings()
    knn: KnnSettings = KnnSettings()
    kd: KDSettings = KDSettings()
    fid: FidSettings = FidSettings()
    retries: NonNegative = 2
    """further attempts at a trial that failed"""
    cpus: Positive = 1
    """CPU threads of a trial"""
    gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs of a trial; fractions share one. Where it is not 0, sets that are missing are distilled on whole GPUs (engine.gpus = 1)"""

    @model_validator(mode="after")
    def _tasks_have_what_they_need(self) -> Grid:
        for name in ("architectures", "targets"):
            if not getattr(self, name) and set(self.tasks) - {"fid"}:
                raise ValueError(f"{name} = (): tasks = {self.tasks} need at least one; only fid needs none")
        same: dict[str, str] = {}
        for entry in self.sets:
            other = same.setdefault(entry.model_dump_json(exclude={"method"}), entry.method)
            if other != entry.method:
                raise ValueError(f"sets: methods {other!r} and {entry.method!r} are the same in all but their names, and so would be their "
                                 f"results; leave one of them out")
        return self

    def fractions(self, task: str) -> tuple[float, ...]:
        """Shares of the target's labels that a task is done with."""
        return self.label_fractions.get(task, (1.0,))


def grid_names() -> list[str]:
    """The grids that ship with the package."""
    return shipped("grids")


def load_grid(name: str) -> Grid:
    """Read a grid: a name, or the path of a .yaml file. Raises ConfigError (unknown name or key, with the nearest one; bad value)."""
    return Grid(**read_yaml(name, "grids"))
