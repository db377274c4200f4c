"""Every setting of a run: its name, type, range and meaning, in one frozen, validated tree.

Knows shapes and ranges only. Names (data sets, networks) are checked by their own registries when a run is
planned, and nothing here touches torch, Ray or a file: YAML is read in `presets_and_grids.py`.
`(4.2)` and the like name the paper's section, `METHOD 5` the table of published settings.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import tyro
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from krrst_dist import plugins
from krrst_dist.setting_names import ConfigError, flatten, nearest

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]

DEFAULT_METHOD = "krr_st"


class Settings(BaseModel):
    """Base of every group of settings: immutable, no unknown keys. Raises ConfigError, a line for every field that is wrong."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError("\n".join(_explain(e, type(self)) for e in error.errors())) from None


class NetworkSettings(Settings):
    """A network by its registry name; an option left None takes the network's own default."""

    name: str = "convnet"
    """registry name: convnet, resnet10, resnet18, resnet50, vgg11, alexnet, mobilenet"""
    widths: tuple[Positive, ...] | None = None
    """output channels of each block (ConvNet only)"""
    norm: Literal["batch", "instance", "none"] | None = None
    """normalisation layer (ConvNet only). `none`: no such layer; left out, or None: the network's own default, which is batch"""
    norm_before: bool | None = None
    """normalise before each convolution but the first, instead of after each (ConvNet only)"""
    stem_padding: Literal[1, 2] | None = None
    """padding of the 3x3 stem (ResNets only); the authors' released checkpoints need 2"""

    def options(self) -> dict[str, Any]:
        """The options that were given, as keyword arguments for `networks.build`."""
        return self.model_dump(exclude={"name"}, exclude_none=True)

    def __str__(self) -> str:
        """For tables: convnet-128-256-512, resnet18-stem_padding=2."""
        widths, others = self.widths or (), self.model_dump(exclude={"name", "widths"}, exclude_none=True)
        return "-".join([self.name, *map(str, widths), *(f"{key}={value}" for key, value in others.items())])


class SourceSettings(Settings):
    """The unlabeled images X_t."""

    dataset: str
    """registry name of the data set whose training split is distilled"""
    resolution: Positive
    """pixels a side, after resizing"""
    resize: Literal["crop", "squash"] = "crop"
    """crop: shorter side to the resolution, then the centre; squash: both sides, ignoring the aspect ratio"""
    held_out: Annotated[int, Field(ge=2)] = 1000
    """images set aside before the target is trained, for the held-out ridge loss alone"""
    split_seed: NonNegative = 0
    """seed of that split; independent of the run's seed, so that runs share one target"""


class TargetSettings(Settings):
    """The self-supervised target model g_phi (Barlow Twins), or an existing checkpoint of it."""

    network: NetworkSettings = NetworkSettings(name="resnet18")
    checkpoint: Annotated[str | None, tyro.conf.arg(aliases=("--target-checkpoint",))] = None
    """weights to use instead of training: a .pt (read weights-only) or .safetensors file"""
    steps: NonNegative = 100_000
    """optimiser steps of Barlow Twins; 0 leaves the network at its random start"""
    batch: Annotated[int, Field(ge=2)] = 256
    """images a step, over all workers"""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """peak learning rate of AdamW (linear warm-up, then cosine to 0)"""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    warmup_steps: NonNegative = 1000
    off_diagonal: Annotated[float, Field(gt=0)] = 0.0051
    """weight of the redundancy term"""
    projector: tuple[Positive, ...] = (2048, 2048, 2048)
    """widths of the projector's layers"""
    standardise: bool = False
    """scale each target dimension to mean 0, std 1 over the training part (published runs do not)"""
    seed: NonNegative = 0
    workers: Positive = 1
    """data-parallel training processes; changes rounding only"""
    checkpoint_every: Positive = 1000
    probe_every: Positive = 5000
    """steps between k-NN probes of the features"""


class MethodSettings(Settings):
    """What every distillation method has. A method's own settings are in its file (`methods/`)."""

    m: Positive = 1000
    """synthetic images"""
    updates: Annotated[NonNegative, tyro.conf.arg(aliases=("--updates",))] = 0
    """outer steps; 0 for a method that selects images"""
    shards: Annotated[Positive, tyro.conf.arg(aliases=("--shards",))] = 1
    """S, logical shards: parts of an outer step that can be done on different actors"""

    @property
    def horizon(self) -> int:
        """Outer steps of the learning rate's schedule."""
        return max(1, self.updates)


class PretrainSettings(Settings):
    """How a network is trained on a distilled set (METHOD 3). The defaults are KRR-ST's; `recipes.py` has the other published ones.

    The loss is none of these settings: it follows from the labels that the set carries.
    """

    steps: Positive = 4000
    """optimiser steps (1000 epochs of 1000 images at batch 256)"""
    batch: Positive = 256
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """of SGD; AdamW's betas are torch's"""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-3
    schedule: Literal["constant", "halfway", "cosine"] = "constant"
    """halfway: a tenth of lr for the second half of the steps; cosine: to 0"""
    warmup_steps: NonNegative = 0
    """steps over which lr rises linearly, before the schedule begins"""
    augment: Literal["none", "dsa"] = "none"
    """dsa: one operation a batch, other parameters for every image (REFERENCE 4). The two views that a set without labels is trained
    on belong to its loss"""

    def recipe(self, loss: str = "mse") -> dict[str, Any]:
        """As it is stored with a distilled set; `loss` is for readers without this package."""
        return {"loss": loss} | self.model_dump()


class ProbeSettings(Settings):
    """A linear classifier on frozen features (METHOD 3)."""

    steps: Positive = 5000
    batch: Positive = 512
    lr: Annotated[float, Field(gt=0)] = 0.2
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9


class EvaluateSettings(Settings):
    """What a distilled set is worth."""

    datasets: tuple[str, ...] = ()
    """labelled data sets to probe, by registry name"""
    few_labels: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.01,)
    """fractions of the training labels for the few-label probes"""
    networks: Positive = 5
    """networks (initial seeds 0, 1, ...) that the held-out ridge loss is averaged over"""
    every: Positive = 16_000
    """updates between measurements of the held-out ridge loss while distilling"""
    pretrain: PretrainSettings = PretrainSettings()
    probe: ProbeSettings = ProbeSettings()


class EngineSettings(Settings):
    """How the work is laid out on machines. Only `threads` and `precision` change rounding; nothing here
    changes the algorithm."""

    actors: Annotated[Positive, tyro.conf.arg(aliases=("--actors",))] = 1
    """G, processes that host the shards, or slices of them where a method has `slices` (at most one for each)"""
    min_actors: Positive | None = None
    """with how few a run starts, or goes on when hosts leave, rather than wait for all; it returns to all when hosts join.
    Default: all"""
    threads: Positive = 1
    """CPU threads of one actor"""
    gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs of one actor (fractions share one)"""
    aggregate: Literal["store", "collective"] | None = None
    """how the actors' gradients are summed. store: by the driver, in an order that does not depend on the actors. collective: by
    all-reduce among them, rounding as it comes; X_s and Y_s then stay on the GPU. Default: collective for one actor on a GPU, and for
    several with a GPU each that have shards of their own; else store"""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """arithmetic of the feature extractor; ridge regression is float32 always"""
    checkpoint_every: Positive = 1000
    """updates between checkpoints; others are written before the held-out loss is measured and when the run is stopped"""
    keep: Positive = 3
    """checkpoints kept"""

    @property
    def collective(self) -> bool:
        """Are gradients summed by all-reduce?"""
        alone_on_its_gpu = self.gpus >= 1 or (self.gpus > 0 and self.actors == 1)  # NCCL wants a GPU for each process
        return self.aggregate == "collective" or (self.aggregate is None and alone_on_its_gpu)


class Config(Settings):
    """One run: a preset with whatever was overridden."""

    preset: str
    """the preset this came from"""
    seed: NonNegative = 0
    repeats: Positive = 1
    """distillation seeds to run: seed, seed + 1, ..."""
    method: Annotated[str, tyro.conf.Suppress] = DEFAULT_METHOD
    """how it is distilled: krr_st, or another file of `methods/`"""
    source: SourceSettings
    target: TargetSettings = TargetSettings()
    distill: SerializeAsAny[MethodSettings] = Field(default={}, validate_default=True)
    """the method's settings"""
    evaluate: EvaluateSettings = EvaluateSettings()
    engine: EngineSettings = EngineSettings()

    @model_validator(mode="before")
    @classmethod
    def _has_a_method(cls, given: Any) -> Any:
        name = given.get("method", DEFAULT_METHOD) if isinstance(given, dict) else DEFAULT_METHOD
        if name not in plugins.names():
            raise ValueError(f"method = {name!r}: no such method; {nearest(str(name), plugins.names())}")
        return given

    @field_validator("distill", mode="before")
    @classmethod
    def _of_the_method(cls, given: Any, found: ValidationInfo) -> Any:
        settings = plugins.load(found.data["method"]).settings
        return settings(**given) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _actors_have_shards(self) -> Config:
        slices = getattr(self.distill, "slices", None)
        if self.engine.actors > self.distill.shards * (slices or 1):
            parts, other = ("distill.shards", "") if slices is None else ("distill.shards * distill.slices", ", or a slice of one")
            remedy = "" if slices is None else "slices (which changes rounding) or "
            raise ValueError(f"engine.actors = {self.engine.actors} exceeds {parts} = {self.distill.shards * (slices or 1)}: an actor "
                             f"hosts at least one shard{other}; take fewer actors, or raise {remedy}shards (which changes the result)")
        if self.engine.aggregate == "collective" and self.engine.actors > self.distill.shards:
            raise ValueError(f"engine.aggregate = 'collective' does not go with actors that share a shard's slices (engine.actors = "
                             f"{self.engine.actors}, distill.shards = {self.distill.shards}); leave it out, or take actors <= shards")
        if (self.engine.min_actors or 0) > self.engine.actors:
            raise ValueError(f"engine.min_actors = {self.engine.min_actors} exceeds engine.actors = {self.engine.actors}, the number that "
                             f"is wanted; take min_actors <= actors")
        return self

    def trajectory(self) -> dict[str, Any]:
        """The settings that the sequence of X_s, Y_s depends on, as a flat dict of dotted names.

        What the losses are measured with belongs to it, too. What is left out may change on resume: how many
        updates, how it is laid out, what is evaluated in the end.
        """
        flat = flatten(self.model_dump(mode="json", exclude={"preset": True, "repeats": True, "evaluate": {"probe"}}))
        harmless = {"distill.updates", "distill.decay_updates", "engine.actors", "engine.min_actors", "engine.gpus", "engine.aggregate",
                    "engine.checkpoint_every", "engine.keep", "evaluate.datasets", "evaluate.few_labels", "evaluate.every",
                    "target.checkpoint", "target.workers", "target.checkpoint_every", "target.probe_every"}
        return {key: value for key, value in flat.items() if key not in harmless}

    def distillation(self) -> dict[str, Any]:
        """What tells one way to make distilled sets from another, as a flat dict of dotted names: the trajectory's settings and how many
        updates, but not the seed, the threads (rounding only) or how many networks the held-out loss is measured with.
        """
        steps, no_matter = self.distill, {"seed", "engine.threads", "distill.slices", "evaluate.networks"}
        settings = self.trajectory() | {"distill.updates": steps.updates, "distill.decay_updates": steps.horizon}
        return {key: value for key, value in settings.items() if key not in no_matter}


def parse(tree: dict[str, Any]) -> Config:
    """Validate a nested dict. Raises ConfigError naming every field that is wrong."""
    return Config(**tree)


def _explain(error: Any, group: type[Settings]) -> str:
    """What is wrong with one field of a group: field, value, rule, remedy."""
    field = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{field}: no such setting; {nearest(field, list(group.model_fields))}"
    if error["type"] == "missing":
        return f"{field}: missing; give it a value"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":  # a rule over several fields, or a group's own lines, which begin with their field
        return "\n".join(f"{field}.{line}" if field else line for line in message.splitlines())
    return f"{field} = {error['input']!r}: {message[0].lower()}{message[1:]}"
