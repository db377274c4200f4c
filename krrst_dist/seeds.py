"""All randomness, as a pure function of (seed, purpose, indices).

Nothing in the package keeps a random state that would have to be saved: whatever is random (an epoch's order, a
draw from the pool, a network's first weights) is derived anew from the run's seed, a purpose in words and the
indices it belongs to (shard, step, epoch, ...). So a run resumes exactly, and who computes what does not matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def derive(seed: int, purpose: str, *indices: int) -> int:
    """A 63-bit seed; different arguments give unrelated seeds (SHA-256)."""
    digest = hashlib.sha256(repr((int(seed), purpose, tuple(int(i) for i in indices))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def numpy_rng(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """A NumPy generator for this purpose."""
    return np.random.default_rng(derive(seed, purpose, *indices))


def torch_rng(seed: int, purpose: str, *indices: int):
    """A CPU torch.Generator for this purpose."""
    import torch

    return torch.Generator().manual_seed(derive(seed, purpose, *indices))


@contextmanager
def seeded(seed: int, purpose: str, *indices: int) -> Iterator[None]:
    """Run a block with torch's global CPU generator seeded, and put it back: for code that takes no generator
    of its own, such as the initial weights of `torch.nn` layers. Not for several threads at once."""
    import torch

    before = torch.random.get_rng_state()
    torch.random.default_generator.manual_seed(derive(seed, purpose, *indices))
    try:
        yield
    finally:
        torch.random.set_rng_state(before)
