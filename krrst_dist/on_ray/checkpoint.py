"""Checkpoints: what a run leaves behind so that any process may die at any instant.

A checkpoint is a folder `step-<t>-<incarnation>` with outer.safetensors, one file a shard (written by the actors) and
manifest.json, written last: it exists when its manifest does. Every start of actors is an incarnation of its own, so
that a process that was cut off writes where nobody looks; a coordinator that another one has replaced finds its claim
gone and stops. Works on any storage; knows nothing of actors or of how training is done.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import safetensors.torch
from torch import Tensor

from krrst_dist import storage
from krrst_dist.artifacts import ArtifactError
from krrst_dist.config import ConfigError
from krrst_dist.on_ray.errors import TakenOverError
from krrst_dist.on_ray.worker import SavedShard, read_verified, saved_as

FORMAT = "krrst_dist checkpoint, version 1"
MANIFEST, OUTER, CLAIM = "manifest.json", "outer.safetensors", "claim.json"
_FOLDER = re.compile(r"step-(\d+)-(\d+)")


@dataclass(frozen=True)
class Facts:
    """What a run must have in common with the one it goes on from.

    trajectory: the settings and data that X_s, Y_s depend on. decay_updates: horizon of the learning rate, fixed by the first
    start. cpu_capability: instruction set of all its CPUs, None where GPUs do the work. torch: its version.
    """

    trajectory: Mapping[str, Any]
    decay_updates: int
    cpu_capability: str | None
    torch: str


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint, as its manifest tells it."""

    uri: str
    step: int
    facts: Facts
    outer: Mapping[str, Any]  # size, sha256
    shards: Mapping[int, SavedShard]

    def read_outer(self) -> dict[str, Tensor]:
        """The outer optimiser's state. Raises ArtifactError when it is damaged."""
        return safetensors.torch.load(read_verified(self.uri, OUTER, self.outer["size"], self.outer["sha256"]))


class Checkpoints:
    """The checkpoints of one run, in the folder or at the URI `uri`, the last `keep` of them."""

    def __init__(self, uri: str, *, keep: int) -> None:
        self.uri, self._keep = uri, keep
        self._incarnation = 0
        self._token = uuid.uuid4().hex

    def whole(self) -> list[str]:
        """Folders that have a manifest, newest first: by incarnation, then by step."""
        return [name for name in self._folders() if storage.exists(storage.join(self.uri, name, MANIFEST))]

    def read(self, name: str) -> Checkpoint:
        """The checkpoint in a folder. Raises ArtifactError when its manifest is damaged."""
        uri = storage.join(self.uri, name)
        try:
            about = json.loads(storage.read_whole(storage.join(uri, MANIFEST)))
            if about["format"] != FORMAT:
                raise ArtifactError(f"{uri} was written by another version of this package ({about['format']})")
            shards = {entry["shard"]: SavedShard(**entry) for entry in about["shards"]}
            if any(saved.name != saved_as(shard) for shard, saved in shards.items()):
                raise ArtifactError(f"{uri}/{MANIFEST} names files that are not a checkpoint's")
            return Checkpoint(uri, about["step"], Facts(**about["facts"]), about["outer"], shards)
        except (ValueError, TypeError, KeyError) as error:
            raise error if isinstance(error, ArtifactError) else ArtifactError(f"{uri}/{MANIFEST} is damaged ({error})") from None

    def claim(self) -> None:
        """Begin a new incarnation, one above any seen; remove what earlier ones left unfinished. A damaged claim is replaced."""
        seen = [_key(name)[0] for name in self._folders()]
        try:
            seen += [claim["incarnation"]] if (claim := self._claim()) else []
        except ArtifactError:
            pass  # the folders tell enough
        self._incarnation = 1 + max(seen, default=0)
        payload = json.dumps({"incarnation": self._incarnation, "token": self._token})
        storage.write_whole(storage.join(self.uri, CLAIM), payload.encode())
        for name in set(self._folders()) - set(self.whole()):
            storage.delete_tree(storage.join(self.uri, name))

    def folder(self, step: int) -> str:
        """Where the checkpoint of `step` belongs."""
        return storage.join(self.uri, f"step-{step:08d}-{self._incarnation}")

    def finish(self, step: int, outer: Mapping[str, Tensor], shards: list[SavedShard], facts: Facts) -> str:
        """Write the outer optimiser's state and the manifest: from here on the checkpoint exists. Then drop old ones.

        Raises TakenOverError when another process has claimed the run since, ArtifactError when the claim was damaged meanwhile.
        """
        uri = self.folder(step)
        payload = safetensors.torch.save(dict(outer))
        storage.write_whole(storage.join(uri, OUTER), payload)
        manifest = {"format": FORMAT, "step": step, "incarnation": self._incarnation, "facts": asdict(facts),
                    "outer": {"size": len(payload), "sha256": hashlib.sha256(payload).hexdigest()},
                    "shards": [asdict(shard) for shard in shards]}
        claim = self._claim()
        if claim is None:
            raise storage.StorageError(f"{self.uri}: the run's folder is gone, at update {step}: is its storage not mounted, or was it "
                                       f"removed?")
        if claim["token"] != self._token:
            raise TakenOverError(f"another process goes on with the run in {self.uri}: this one stops, at update {step}; see to it that "
                                 f"only one runs at a time")
        storage.write_whole(storage.join(uri, MANIFEST), json.dumps(manifest, indent=1).encode())
        for name in reversed(self.whole()[self._keep:]):
            storage.delete_tree(storage.join(self.uri, name))
        return uri

    def discard(self, step: int) -> None:
        """Remove what was written of a checkpoint that could not be finished."""
        storage.delete_tree(self.folder(step))

    def _folders(self) -> list[str]:
        return sorted((name for name in storage.list_names(self.uri) if _FOLDER.fullmatch(name)), key=_key, reverse=True)

    def _claim(self) -> dict[str, Any] | None:
        """Who goes on with the run: incarnation and token. None where nobody does; raises ArtifactError when that is damaged."""
        uri = storage.join(self.uri, CLAIM)
        try:
            payload = storage.read_whole(uri)
        except FileNotFoundError:
            return None
        try:
            claim = json.loads(payload)
            return {"incarnation": int(claim["incarnation"]), "token": str(claim["token"])}
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise ArtifactError(f"{uri} is damaged ({type(error).__name__}: {error}), so it cannot be told whether another process goes on "
                                f"with the run; see to it that none does, and resume with --resume, which writes it anew") from None


def require_same(old: Facts, new: Facts, *, asked_decay: int | None, uri: str) -> None:
    """May a run with the facts `new` go on from a checkpoint with the facts `old`?

    asked_decay: distill.decay_updates where it was set by hand. Raises ConfigError naming every field that differs.
    """
    was, now = dict(old.trajectory), dict(new.trajectory)
    if asked_decay is not None:
        was["distill.decay_updates"], now["distill.decay_updates"] = old.decay_updates, asked_decay
    changed = [field for field in sorted(was | now) if was.get(field) != now.get(field)]
    if changed:
        lines = [f"  {field}: was {was.get(field)!r}, now {now.get(field)!r}" for field in changed]
        raise ConfigError("\n".join([f"the run in {uri} was started with other settings, on which its result depends:", *lines,
                                     "put them back to resume it, or start a new run with another --out"]))
    if None not in (old.cpu_capability, new.cpu_capability) and old.cpu_capability != new.cpu_capability:
        raise ConfigError(f"CPU capability = {new.cpu_capability}: the run in {uri} was computed with {old.cpu_capability} and would not "
                          f"go on along the same trajectory; resume it on such a machine, or, where this CPU has it, with "
                          f"ATEN_CPU_CAPABILITY={old.cpu_capability.lower()} set")


def _key(name: str) -> tuple[int, int]:
    step, incarnation = map(int, _FOLDER.fullmatch(name).groups())
    return incarnation, step
