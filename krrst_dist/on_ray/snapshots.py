"""Pictures of X_s along the way, for people: a sheet at the start, at the end, and at some updates between.

Checkpoints are few and large; these are small and stay. A run does not need them: what storage refuses is missing.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from krrst_dist import storage

FOLDER, MOST = "pictures", 20
Draw = Callable[[tuple[Tensor, ...]], bytes]
"""what is learned -> a PNG of its images, which `sheets.cut` takes apart"""


def due(step: int, updates: int) -> bool:
    """Is a picture due after `step` of all `updates`? At 0, at the end, and at about MOST - 1 between; nowhere where nothing is learned."""
    return updates > 0 and (step == 0 or step * MOST // updates > (step - 1) * MOST // updates)


def write(directory: str, step: int, draw: Draw, values: tuple[Tensor, ...]) -> str:
    """Write the picture after `step` updates to a run's folder; returns why there is none, '' if there is. It raises nothing."""
    try:
        storage.write_whole(storage.join(directory, FOLDER, f"step-{step:08d}.png"), draw(values))
        return ""
    except Exception as error:  # of any kind: a picture is not worth a run
        return f"no picture of the images after {step} updates: {error}"
