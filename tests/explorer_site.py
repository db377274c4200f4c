"""What a grid leaves, in small and without computing it, and a running explorer over it."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow as pa

from krrst_dist import parquet
from krrst_dist.artifacts import DistilledSet, Space
from krrst_dist.provenance import Revision
from krrst_dist.results import Cell, Outcome, ResultStore

HOSTILE = "<script>alert(1)</script> --> ../../x & \"y\""
SPACE = Space("normalised", (0.5, 0.4, 0.3), (0.25, 0.2, 0.1))


def cell(method: str, target: str, seed: int, m: int = 20) -> Cell:
    return Cell(method=method, source="cifar100", source_fingerprint="5a", target=target, target_fingerprint=f"7{target}", task="finetune",
                architecture="convnet-128-256-512", resolution=32, evaluation_seed=0, distillation_seed=seed,
                set_fingerprint=f"{method}{seed}", distillation={"distill": {"m": m}}, hyperparameters={"steps": 100})


def outcome(accuracy: float, trial: str = "") -> Outcome:
    return Outcome(status="ok", metrics={"accuracy": accuracy}, n_test=1000, steps=100, seconds=2.5, device="a CPU", trial_path=trial)


def distilled(images: int, seed: int = 0) -> DistilledSet:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(images, 3, 8, 8)).astype(np.float32)
    return DistilledSet(x, rng.integers(0, 2, images), "class", {"loss": "ce"}, SPACE, ("cat", HOSTILE), {"method": "dm", "seed": seed})


def fill(folder: Path) -> None:
    """What a grid leaves, in small."""
    store = ResultStore(folder / "results", Revision("c0ffee" + "0" * 34, False))
    for seed in range(3):
        for target in ("cifar10", "cifar100"):
            store.write(cell("Random", target, seed), outcome(0.50 + 0.01 * seed))
            store.write(cell("KRR-ST", target, seed, m=40), outcome(0.60 + 0.02 * seed, f"/elsewhere/tune/cells-1/trial-{seed}"))
    store.write(cell(HOSTILE, "cifar10", 0), Outcome(status="failed", error=f"RuntimeError: {HOSTILE}",
                                                     trial_path="/elsewhere/tune/cells-1/trial-9"))
    store.write(cell("DM", "cifar10", 0), Outcome(status="diverged", metrics={"train_loss": float("nan")}, error="NaN from step 3 on",
                                                  trial_path="../../../etc/passwd"))
    for seed in range(3):
        trial = folder / "tune" / "cells-1" / f"trial-{seed}"
        trial.mkdir(parents=True)
        lines = [{"step": step, "loss": 1 / step} for step in range(1, 30)] + ([{"status": "ok", "step": 29, "loss": 0.03}] if seed else [])
        (trial / "result.json").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 30, "lo')
    failed = folder / "tune" / "cells-1" / "trial-9"
    failed.mkdir()
    (failed / "error.txt").write_text(f"Traceback (most recent call last):\n  {HOSTILE}")
    run = folder / "sets" / "dm-1" / "seed-0"
    distilled(150).save(run / "distilled.safetensors")
    distilled(150, seed=1).save(run / "start.safetensors")
    history = pa.table({"step": [0, 1, 2], "loss": [None, 2.0, 1.0], "held_out": [0.5, None, 0.25]})
    (run / "history.parquet").write_bytes(parquet.encode(history))
    damaged = folder / "sets" / "dm-1" / "seed-1"
    damaged.mkdir()
    (damaged / "distilled.safetensors").write_bytes((run / "distilled.safetensors").read_bytes()[:1000])
    (folder / "sets" / "dm-1" / "seed-2").mkdir()


class Site:
    """A running explorer."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen([sys.executable, "-m", "krrst_dist.explorer", str(folder), "--port", "0", *options],
                                        stdout=subprocess.PIPE, text=True)
        self.address = self.process.stdout.readline().split()[0].rstrip("/")

    def get(self, path: str, status: int = 200, **query: str) -> bytes:
        try:
            asked = self.address + path + ("?" + urllib.parse.urlencode(query) if query else "")
            with urllib.request.urlopen(asked, timeout=60) as answer:
                assert answer.status == status
                assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
                return answer.read()
        except urllib.error.HTTPError as error:
            assert error.code == status, error.read()
            return error.read()

    def page(self, path: str, status: int = 200, **query: str) -> str:
        text = self.get(path, status, **query).decode()
        assert "<script>alert" not in text and '"y"' not in text
        return text

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)
