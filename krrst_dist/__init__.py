"""Self-supervised dataset distillation (KRR-ST, ICLR 2024) at cluster scale.

    import krrst_dist
    dataset = krrst_dist.load("runs/cifar100-0/seed-0/distilled.safetensors")   # a torch TensorDataset
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.data import TensorDataset

__version__ = "0.1.0"


def load(path: str) -> TensorDataset:
    """A distilled set as (x_syn [m, C, H, W], y_syn [m, k] or [m]; k = 0 without labels), ready for a DataLoader.

    Only the arrays: what the labels are, the recipe, the space of the images (mean and std) and class names are what
    `krrst_dist.artifacts.DistilledSet.load(path)` gives with them.

    path: a file or URI written by a run. Raises FileNotFoundError; artifacts.ArtifactError for a damaged file.
    """
    import torch
    from torch.utils.data import TensorDataset

    from krrst_dist.artifacts import DistilledSet

    distilled = DistilledSet.load(path)
    return TensorDataset(torch.from_numpy(distilled.x_syn), torch.from_numpy(distilled.y_syn))
