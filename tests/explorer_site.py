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
from krrst_dist.feature_map import FILE, FeatureMap
from krrst_dist.provenance import Revision
from krrst_dist.results import Cell, Outcome, ResultStore
from krrst_dist.sheets import sheet

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


def grey(images: int, shade: int) -> np.ndarray:
    """Pictures of one shade, their number in the red of the first pixel."""
    pictures = np.full((images, 8, 8, 3), shade, np.uint8)
    pictures[:, 0, 0, 0] = np.arange(images)
    return pictures


def feature_map(images: int, real: int = 30) -> FeatureMap:
    """Of `distilled(images)`: real images on a line, X_s on another one."""
    at = np.array([(i, 0) for i in range(real)] + [(i, 10) for i in range(images)], np.float32)
    kinds = np.repeat(np.array([0, 2], np.uint8), [real, images])
    return FeatureMap(at, kinds, np.r_[np.arange(real), np.arange(images)], grey(real, 100), 1000 + np.arange(real), np.arange(real) % 10,
                      grey(images, 200), 2000 + np.arange(images), np.linspace(1, 2, images).astype(np.float32),
                      distilled(images).fingerprint, "the target", HOSTILE)


def fill(folder: Path) -> None:
    """What a grid leaves, in small."""
    store = ResultStore(folder / "results", Revision("c0ffee" + "0" * 34, False))
    for seed in range(3):
        for target in ("cifar10", "cifar100"):
            store.write(cell("Random", target, seed), outcome(0.50 + 0.01 * seed))
            store.write(cell("KRR-ST", target, seed, m=40), outcome(0.60 + 0.02 * seed, f"/elsewhere/tune/cells-2-1/trial-{seed}"))
    store.write(cell(HOSTILE, "cifar10", 0), Outcome(status="failed", error=f"RuntimeError: {HOSTILE}",
                                                     trial_path="/elsewhere/tune/cells-2-1/trial-9"))
    store.write(cell("DM", "cifar10", 0), Outcome(status="diverged", metrics={"train_loss": float("nan")}, error="NaN from step 3 on",
                                                  trial_path="../../../etc/passwd"))
    for seed in range(3):
        trial = folder / "tune" / "cells-2-1" / f"trial-{seed}"
        trial.mkdir(parents=True)
        lines = [{"step": step, "loss": 1 / step} for step in range(1, 30)] + ([{"status": "ok", "step": 29, "loss": 0.03}] if seed else [])
        (trial / "result.json").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 30, "lo')
        (trial / "log.txt").write_text(f"2026-11-28 INFO trial {seed}: {HOSTILE}\n")
    told = [("trial-0", "RUNNING"), ("trial-1", "TERMINATED"), ("trial-7", "PENDING"), ("../../etc", "RUNNING")]
    trials = [[json.dumps({"custom_dirname": name, "status": status}), "{}"] for name, status in told]
    (folder / "tune" / "cells-2-1" / "experiment_state-2026.json").write_text(json.dumps({"trial_data": trials}))
    ended = folder / "tune" / "networks-1-1"
    (ended / "trial-0").mkdir(parents=True)
    (ended / "trial-0" / "result.json").write_text('{"status": "ok", "step": 3}\n' + "[" * 100_000)
    (ended / "experiment_state-2026.json").write_text(json.dumps({"trial_data": [[json.dumps({"custom_dirname": "trial-0",
                                                                                             "status": "TERMINATED"}), "{}"]]}))
    failed = folder / "tune" / "cells-2-1" / "trial-9"
    failed.mkdir()
    (failed / "error.txt").write_text(f"Traceback (most recent call last):\n  {HOSTILE}")
    run = folder / "sets" / "dm-1" / "seed-0"
    distilled(150).save(run / "distilled.safetensors")
    distilled(150, seed=1).save(run / "start.safetensors")
    history = pa.table({"step": [0, 1, 2], "loss": [None, 2.0, 1.0], "held_out": [0.5, None, 0.25], "lr": [None, 0.2, 0.1]})
    (run / "history.parquet").write_bytes(parquet.encode(history))
    (run / "pictures").mkdir()
    for step in (0, 40, 80):
        (run / "pictures" / f"step-{step:08}.png").write_bytes(sheet(grey(150, step), columns=20))
    feature_map(150).save(run / FILE)
    running = folder / "sets" / "dm-1" / "seed-3"
    (running / "pictures").mkdir(parents=True)
    (running / "pictures" / "step-00000000.png").write_bytes(sheet(grey(7, 9), columns=20))
    damaged = folder / "sets" / "dm-1" / "seed-1"
    damaged.mkdir()
    (damaged / "distilled.safetensors").write_bytes((run / "distilled.safetensors").read_bytes()[:1000])
    (folder / "sets" / "dm-1" / "seed-2").mkdir()


REAL_GRID = """
name: small
resolution: 16
sets:
  - {method: from scratch, make: nothing}
  - {method: Random + targets, make: random_targets, preset: quickstart, seeds: [0, 1], settings: &small {
      target.steps: 60, distill.updates: 40, distill.pool.size: 2, distill.pool.max_steps: 20, evaluate.every: 20, evaluate.networks: 1,
      evaluate.pretrain.steps: 60}}
  - {method: KRR-ST, preset: quickstart, seeds: [0, 1], settings: *small}
architectures: [{name: convnet, widths: [16, 32, 64]}]
targets: [digits-5-9]
tasks: [finetune, knn]
seeds: [0]
finetune: {steps: 30}
"""


def run_grid(folder: Path) -> Path:
    """A real small grid on the handwritten digits, run to its end, with the feature space of one of its sets."""
    (folder / "small.yaml").write_text(REAL_GRID)
    out = folder / "grid"
    krrst = [sys.executable, "-m", "krrst_dist.cli"]
    subprocess.run([*krrst, "grid", "--grid", str(folder / "small.yaml"), "--out", str(out)], check=True, stdout=subprocess.DEVNULL)
    made, = (path for path in (out / "sets").glob("*/seed-0") if (path / "distilled.safetensors").exists())
    subprocess.run([*krrst, "features", str(made / "distilled.safetensors")], check=True, stdout=subprocess.DEVNULL)
    return out


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
