"""Trains the self-supervised target model g_phi on a Ray cluster, or finds that it has been trained.

Ray Train starts the workers, joins them in a process group and restarts them when one dies. What they compute is
`algorithm/barlow_twins.py`, of which the number of workers changes rounding only. Checkpoints are our own: one
.safetensors file, whole or absent, on any storage; Ray's checkpoint files are not used. Not yet run on several GPUs.

    target-<key>.safetensors              the result; the key is a hash of all that it depends on
    target-<key>/checkpoint/              the last checkpoint, while training
    target-<key>/tensorboard/             loss, learning rate, seconds a step, k-NN accuracy (local folders only)
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import safetensors.torch
import torch
import torch.distributed as dist
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch import Tensor

from krrst_dist import storage
from krrst_dist.algorithm.barlow_twins import TwinsTrainer, train, worker_rows
from krrst_dist.algorithm.shard import DivergedError
from krrst_dist.algorithm.sync_batch_norm import rank, world_size
from krrst_dist.config import Config, ConfigError
from krrst_dist.data.cache import Cache
from krrst_dist.data.order import global_batch
from krrst_dist.data.prepared import Prepared, held_out_split
from krrst_dist.data.reader import channels_first, open_decoder, read_all
from krrst_dist.evaluation.target_model import load_target, save_target, target_fingerprint, untrained
from krrst_dist.networks import Network
from krrst_dist.on_ray import assembly
from krrst_dist.on_ray.cluster import connect
from krrst_dist.on_ray.errors import EngineError, last_line
from krrst_dist.on_ray.rooms import require
from krrst_dist.on_ray.target_monitor import TargetMonitor
from krrst_dist.seeds import numpy_rng

PROBE_IMAGES = 5000
MAX_FAILURES = 3
"""times that a dead worker or host is made up for"""
TIME_TO_END = 10.0
"""seconds that the training's thread gets once its cluster is gone"""


def train_target(config: Config, prepared: Prepared, cache: Cache, *, wait: bool = False) -> str:
    """Train the target that `config.target` and `config.source` describe; returns the path or URI of its file (`load_target` reads it).

    A finished target that matches is used as it is, an interrupted training is continued, an untrained target
    (steps = 0) or an existing checkpoint (`target.checkpoint`) is put into a file of the same kind without a cluster.

    prepared: the source. Its held-out images are not read; its labels, if any, serve the k-NN probe alone.
    cache: where hosts get the prepared files from, and where the target is kept.
    wait: for room in a cluster that grows.

    Raises:
        ConfigError: settings that do not fit each other or the data.
        ClusterError: the cluster has no room for the workers.
        DivergedError: the loss became NaN or infinite.
        StorageError: the cache cannot be written, or the workers' file is not there.
        ray.train.TrainingFailedError: workers died more than MAX_FAILURES times.
    """
    training, _ = held_out_split(prepared.count, config.source.held_out, config.source.split_seed)
    check_target(config, len(training))
    directory = cache.remote or str(cache.local.absolute())
    if config.target.checkpoint is not None:
        network = load_target(config.target, resolution=prepared.resolution)
        return _save(config, prepared, network, storage.join(directory, f"target-{target_fingerprint(network)}.safetensors"))
    path = target_file(config, prepared.fingerprint, directory)
    stem = path.removesuffix(".safetensors")
    if storage.exists(path):
        load_target(path, resolution=prepared.resolution)
        print(f"target: already there, {path}", flush=True)
        return path
    storage.check_writable(directory)
    if config.target.steps == 0:
        return _save(config, prepared, untrained(config.target, resolution=prepared.resolution), path)
    _fit(_Task(config, prepared, cache, stem), wait=wait)
    if not storage.exists(path):
        raise storage.StorageError(f"{path}: not here after training, as the first worker wrote it on another host; give --cache a folder "
                                   f"that all hosts share, or --out a storage URI")
    storage.delete_tree(storage.join(stem, "checkpoint"))
    return path


def target_file(config: Config, source: str, directory: str) -> str:
    """Where the target that is trained on a source is kept. source: fingerprint of the prepared images."""
    return storage.join(directory, f"target-{target_key(config, source)}.safetensors")


def target_key(config: Config, source: str) -> str:
    """Hash of all that the trained weights depend on: 16 hex digits. How the training is laid out and watched is not part of it."""
    watching = {"checkpoint", "standardise", "workers", "checkpoint_every", "probe_every"}
    trained = config.target.model_dump(mode="json", exclude=watching)
    facts = [trained, source, config.source.held_out, config.source.split_seed]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Task:
    """What every worker is told."""

    config: Config
    prepared: Prepared
    cache: Cache
    stem: str

    @property
    def checkpoint(self) -> str:
        return storage.join(self.stem, "checkpoint", "state.safetensors")


def _fit(task: _Task, *, wait: bool) -> None:
    """Run the workers to the end."""
    target, engine = task.config.target, task.config.engine
    gpus = 1 if engine.gpus else 0  # NCCL takes no two workers on one GPU
    connect()
    require(engine.threads, gpus, target.workers, wait)
    name = uuid.uuid4().hex
    ray_files = storage.join(task.stem, f"ray-{name}")  # of this run alone: another may train the same target
    resources = {"CPU": engine.threads} | ({"GPU": gpus} if gpus else {})
    os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"  # it shows every printed line twice
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # until an end or a death is noticed
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "60")  # until a worker that answers no more is given up
    trainer = TorchTrainer(
        _work, train_loop_config={"task": task},
        scaling_config=ScalingConfig(num_workers=target.workers, use_gpu=bool(gpus), resources_per_worker=resources),
        run_config=RunConfig(name=name, storage_path=ray_files, failure_config=FailureConfig(max_failures=MAX_FAILURES),
                             logging_config=LoggingConfig(log_level="ERROR")))
    try:
        complaint = _beside_main_thread(trainer.fit).return_value
    except ray.train.TrainingFailedError as error:
        cause = last_line(error)
        raise EngineError(f"target training failed on its workers more than {MAX_FAILURES} times: {cause}; its last checkpoint is kept, "
                          f"the same command goes on from it") from error
    finally:
        storage.delete_tree(ray_files)
    if complaint is not None:
        raise DivergedError(f"{complaint}; the last checkpoint is in {storage.join(task.stem, 'checkpoint')}")


def _beside_main_thread(work: Callable[[], Any]) -> Any:
    """In the main thread Ray Train replaces the SIGINT handler for good: later stages would not hear Ctrl-C. Elsewhere it does not."""
    answer: Future = Future()

    def run() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:
            answer.set_exception(error)

    thread = threading.Thread(target=run, daemon=True, name="target-training")
    thread.start()
    atexit.register(thread.join, TIME_TO_END)  # after Ctrl-C it ends with the cluster; Python must not end under it
    return answer.result()


def _work(told: dict) -> str | None:
    """One worker. Returns what went wrong if the training diverged (an exception would be taken for a failure and tried again)."""
    task: _Task = told["task"]
    config, target = task.config, task.config.target
    torch.set_num_threads(config.engine.threads)
    prepared = task.cache.fetch_prepared(task.prepared.path)
    device = ray.train.torch.get_device() if assembly.device(config.engine).type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    trainer = TwinsTrainer(untrained(target, resolution=prepared.resolution), projector_widths=target.projector, batch=target.batch,
                           steps=target.steps, lr=target.lr, warmup_steps=target.warmup_steps, weight_decay=target.weight_decay,
                           off_diagonal=target.off_diagonal, mean=prepared.mean, std=prepared.std, seed=target.seed, device=device)
    _resume(trainer, task.checkpoint)
    training, _ = held_out_split(prepared.count, config.source.held_out, config.source.split_seed)
    monitor = _monitor(task, trainer, training) if rank() == 0 else None

    def after_step(done: int, loss: Tensor) -> None:
        if monitor is not None:
            monitor.after_step(done, loss, trainer.lr)
        if monitor is not None and done % target.checkpoint_every == 0 and done < target.steps:
            monitor.flush()
            storage.write_whole(task.checkpoint, safetensors.torch.save(trainer.state_dict()))
        if done % target.probe_every == 0:
            ray.train.report({"step": done, "loss": loss.item(), "knn_accuracy": monitor and monitor.accuracy})

    with _WorkersRows(prepared, training, batch=target.batch, seed=target.seed, threads=config.engine.threads) as batches:
        try:
            train(trainer, batches, after_step=after_step)
        except DivergedError as error:
            return str(error)
    if monitor is not None:
        monitor.close()
        _save(config, prepared, trainer.network, f"{task.stem}.safetensors")
    return None


class _WorkersRows:
    """`batches(step)`: this worker's images of a step, read one step ahead of the need."""

    def __init__(self, prepared: Prepared, training: np.ndarray, *, batch: int, seed: int, threads: int):
        rows = worker_rows(batch)
        self._training, self._batch, self._seed, self._rows = training, batch, seed, rows
        self._decoder = open_decoder(prepared, threads=threads)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._ahead = {}  # step -> future

    def __enter__(self) -> _WorkersRows:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._decoder.close()

    def __call__(self, step: int) -> Tensor:
        """uint8 [b_w, C, H, W], channels_last."""
        now = self._ahead.pop(step, None) or self._thread.submit(self._read, step)
        self._ahead = {step + 1: self._thread.submit(self._read, step + 1)}
        return now.result()

    def _read(self, step: int) -> Tensor:
        pixels, _ = self._decoder.read(global_batch(self._training, batch=self._batch, seed=self._seed, step=step)[self._rows])
        return channels_first(pixels)


def _resume(trainer: TwinsTrainer, checkpoint: str) -> None:
    """Put every worker where the checkpoint was taken. Only the first one reads it: others may not see its disk."""
    found = rank() == 0 and storage.exists(checkpoint)
    payload = torch.from_numpy(np.frombuffer(bytearray(storage.read_whole(checkpoint) if found else b""), np.uint8))
    if world_size() > 1:
        size = torch.tensor(len(payload), device=trainer.device)
        dist.broadcast(size, src=0)
        payload = payload.to(trainer.device) if rank() == 0 else torch.empty(int(size), dtype=torch.uint8, device=trainer.device)
        dist.broadcast(payload, src=0)
    if len(payload):
        trainer.load_state_dict(safetensors.torch.load(payload.cpu().numpy().tobytes()))


def _monitor(task: _Task, trainer: TwinsTrainer, training: np.ndarray) -> TargetMonitor:
    prepared, probe = task.prepared, None
    if prepared.labelled:
        images, labels = read_all(prepared, numpy_rng(0, "k-NN probe").permutation(training)[:PROBE_IMAGES])
        probe = images, torch.from_numpy(labels)
    local = storage.local_path(task.stem)
    return TargetMonitor(trainer.network, probe, mean=prepared.mean, std=prepared.std, steps=trainer.steps, done=trainer.done,
                         probe_every=task.config.target.probe_every, log_directory=local and local / "tensorboard")


def _save(config: Config, prepared: Prepared, network: Network, path: str) -> str:
    about = {"target": config.target.model_dump(mode="json"), "source": config.source.model_dump(mode="json"),
             "source_fingerprint": prepared.fingerprint}
    save_target(path, network, config.target.network, resolution=prepared.resolution, about=about)
    return path


def check_target(config: Config, images: int) -> None:
    """Raise ConfigError for what would only show when the workers run."""
    target = config.target
    if target.checkpoint is not None or target.steps == 0:
        return
    if target.warmup_steps >= target.steps:
        raise ConfigError(f"target.warmup_steps = {target.warmup_steps}: must be below target.steps = {target.steps}; take about a tenth "
                          f"of them")
    if target.batch > images:
        raise ConfigError(f"target.batch = {target.batch}: there are only {images} images to train on; take a smaller batch")
    if target.workers > target.batch:
        raise ConfigError(f"target.workers = {target.workers}: more than target.batch = {target.batch} images a step; take fewer workers")
