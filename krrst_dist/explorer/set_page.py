"""What there is to see of a distillation run, and what of it cannot be read. Writes no HTML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from krrst_dist.artifacts import ArtifactError, DistilledSet
from krrst_dist.explorer.set_files import SetFiles
from krrst_dist.feature_map import FeatureMap
from krrst_dist.storage import StorageError

T = TypeVar("T")


@dataclass(frozen=True)
class Seen:
    """held: the set, None where there is none yet. map: of its feature space, None where it has none. moments: names of its images along
    the way, the last ones at the end. count: images. problems: sentences for people; note: one that is no problem."""

    held: DistilledSet | None
    map: FeatureMap | None
    moments: list[str]
    count: int
    problems: list[str]
    note: str

    @classmethod
    def of(cls, files: SetFiles) -> Seen:
        """What can be read."""
        problems: list[str] = []

        def read(what: Callable[[], T]) -> T | None:
            try:
                return what()
            except FileNotFoundError:
                pass
            except (ArtifactError, StorageError) as error:
                problems.append(str(error))
            return None

        held = read(lambda: files.load("distilled"))
        note = "" if held or problems else "This run has not ended: it has no distilled.safetensors yet."
        if held and not len(held.x_syn):
            note = "This set has no images."
        found = read(lambda: files.feature_map)
        if found and held and (found.set_fingerprint, len(found.distances)) != (held.fingerprint, len(held.x_syn)):
            problems.append("The feature map belongs to another set; delete features.safetensors and run krrst features again.")
            found = None
        if held and "start.safetensors" in files.names:
            read(lambda: files.load("start"))
        moments = [*files.steps, *(["distilled"] if held else [])]
        images = held.x_syn if held else read(lambda: files.images(moments[-1])) if moments else None
        return cls(held, found if held else None, moments if images is not None else [], 0 if images is None else len(images), problems,
                   note)

    @property
    def title(self) -> str:
        """The set's method and seed, where it says them."""
        said = self.held.metadata if self.held else {}
        return ", ".join([str(said["method"])] + [f"seed {said['seed']}"] * ("seed" in said)) if "method" in said else "Distilled set"

    @property
    def labels(self) -> list[str] | None:
        """The class of each image, where its labels are classes."""
        if self.held is None or self.held.label_kind != "class":
            return None
        names = self.held.class_names or ()
        return [names[label] if 0 <= label < len(names) else str(label) for label in self.held.y_syn.tolist()]


def title(moment: str) -> str:
    """A moment's name for people."""
    return f"update {int(moment.removeprefix('step-'))}" if moment.startswith("step-") else "as distilled"
