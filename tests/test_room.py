"""Room on a cluster that is busy, that grows, and that loses a host: whoever can have it waits for it and says so, others are refused.

Runs on a cluster of several nodes of its own.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import engine_parts
import pytest
import ray
import torch
from engine_parts import Parts, serial
from ray.cluster_utils import Cluster

from krrst_dist.artifacts import DistilledSet
from krrst_dist.config import Config
from krrst_dist.data.cache import Cache
from krrst_dist.data.prepare import prepare
from krrst_dist.data.prepared import Prepared
from krrst_dist.on_ray import coordinator, distillation, rooms, targets
from krrst_dist.on_ray.cluster import ClusterError
from krrst_dist.on_ray.coordinator import Coordinator
from krrst_dist.on_ray.distillation import distil
from krrst_dist.on_ray.rooms import Rooms
from krrst_dist.presets_and_grids import load_preset

ray.cloudpickle.register_pickle_by_value(engine_parts)
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A head of two CPUs, to which nodes can be added. It looks twice a second whether they live."""
    head = {"num_cpus": 2, "object_store_memory": 150_000_000, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head | {"_system_config": {"health_check_period_ms": 500}})
    ray.init(address=made.address, logging_level="error", log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@dataclass(frozen=True)
class Digits:
    """Prepared digits with an untrained target, and what distils them."""

    source: Prepared
    target: Path
    cache: Cache

    def distil(self, out: Path, config: Config, **how: bool) -> list[DistilledSet]:
        return [run.result for run in distil(config, self.cache, self.source.path, self.target, str(out), resume=False, **how)]


def settings(**overrides: object) -> Config:
    return load_preset("quickstart", **{
        "target.network": {"name": "convnet", "widths": [8, 8, 8]}, "target.steps": 0, "distill.m": 8, "distill.batch": 18,
        "distill.updates": 4, "distill.shards": 3, "distill.pool.network.widths": [4, 4, 8], "distill.pool.size": 2,
        "distill.pool.max_steps": 4, "source.held_out": 50, "evaluate.networks": 1, "evaluate.pretrain.steps": 3, "repeats": 1} | overrides)


@pytest.fixture(scope="module")
def digits(nodes, tmp_path_factory) -> Digits:
    folder = tmp_path_factory.mktemp("digits")
    source = prepare("digits-0-4", "train", root=folder, directory=folder, resolution=16, progress=False)
    cache = Cache(folder)
    return Digits(source, targets.compute(settings(), source, cache, wait=False).file, cache)


@ray.remote
class Hog:
    """Somebody else's actor."""

    def ready(self) -> bool:
        return True


@pytest.fixture
def hog() -> Iterator[Callable[[int], None]]:
    """Takes CPUs until the test ends."""
    hogs = []

    def take(cpus: int) -> None:
        hogs.append(Hog.options(num_cpus=cpus).remote())
        assert ray.get(hogs[-1].ready.remote(), timeout=60)

    yield take
    for each in hogs:
        ray.kill(each)


def test_seeds_that_do_not_fit_beside_somebody_elses_work_wait_for_each_other(digits, hog, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rooms, "FIRST_LINE", 0)
    free = digits.distil(tmp_path / "free", settings(repeats=2))
    hog(1)
    busy = digits.distil(tmp_path / "busy", settings(repeats=2))
    assert [a.fingerprint for a in free] == [b.fingerprint for b in busy]
    said = [line for line in capsys.readouterr().out.splitlines() if "waiting for" in line]
    assert any("1 actors of 1 CPUs and 0 GPUs each: 0 CPUs and 0 GPUs are free" in line for line in said)
    assert any("a run of this job that holds room goes first" in line for line in said)


def test_a_seed_that_nothing_will_make_room_for_is_refused_and_leaves_nothing(digits, hog, tmp_path, monkeypatch):
    hog(2)
    monkeypatch.setattr(distillation, "Rooms", lambda *room, **how: Rooms(*room, **how, deadline_s=3))
    with pytest.raises(ClusterError, match=r"too busy for 3 s: 0 CPUs and 0 GPUs are free; .*--wait"):
        digits.distil(tmp_path, settings(repeats=2))
    assert not list(tmp_path.rglob("step-*"))


def test_a_cluster_that_has_become_too_small_is_refused_at_once_or_waited_for_until_it_has_grown(
        digits, nodes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rooms, "FIRST_LINE", 0)
    config, started = settings(**{"engine.actors": 3}), time.monotonic()
    with pytest.raises(ClusterError, match=r"3 actors of 1 CPUs .* lacks room for 1 of them .*--wait"):
        digits.distil(tmp_path / "refused", config)
    assert time.monotonic() - started < 30
    found: list[list[DistilledSet]] = []
    run = threading.Thread(target=lambda: found.append(digits.distil(tmp_path / "waited", config, wait=True)))
    run.start()
    time.sleep(3)
    assert not found and run.is_alive()
    node = nodes.add_node(num_cpus=1, object_store_memory=150_000_000)
    run.join(timeout=120)
    nodes.remove_node(node)
    assert "seed 0: waiting for 3 actors of 1 CPUs and 0 GPUs each: 2 CPUs and 0 GPUs are free; the" in capsys.readouterr().out
    assert found and found[0][0].metadata["updates"] == 4


def test_a_run_whose_host_is_lost_waits_for_another_and_ends_as_if_undisturbed(nodes, tmp_path, monkeypatch):
    monkeypatch.setattr(coordinator, "PAUSES", (0.1,) * 10)
    config = engine_parts.config(actors=3, updates=24, checkpoint_every=4)
    outcomes = []

    def go() -> None:
        outcomes.append(Coordinator(config, engine_parts.work(config, build=Parts(config, slow=0.2)), directory=str(tmp_path)).run())

    node = nodes.add_node(num_cpus=1, object_store_memory=150_000_000)
    run = threading.Thread(target=go)
    run.start()
    while not list(tmp_path.glob("checkpoints/step-00000008-1/manifest.json")):
        time.sleep(0.05)
    nodes.remove_node(node, allow_graceful=False)
    deadline = time.monotonic() + 60
    while sum(there["Alive"] for there in ray.nodes()) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(3)  # a run that did not wait would have ended
    assert run.is_alive()
    node = nodes.add_node(num_cpus=1, object_store_memory=150_000_000)
    run.join(timeout=120)
    nodes.remove_node(node)
    assert torch.equal(outcomes[0].values[0], serial(config)[0]) and torch.equal(outcomes[0].values[1], serial(config)[1])
    assert list(tmp_path.glob("checkpoints/step-00000024-[2-9]/manifest.json"))
