"""The distributed loop on a real cluster: the same result whoever computes it, and whatever dies in between."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import engine_parts
import pytest
import ray
import safetensors.torch
import torch
from engine_parts import Parts, config, measure, run, serial

from krrst_dist.algorithm import DivergedError, RidgeError, ridge_head
from krrst_dist.artifacts import DistilledSet, Space
from krrst_dist.config import Config, ConfigError
from krrst_dist.evaluation.held_out import held_out_of_network
from krrst_dist.on_ray import coordinator, network
from krrst_dist.on_ray.assembly import Assembly
from krrst_dist.on_ray.coordinator import Coordinator
from krrst_dist.on_ray.errors import EngineError, LostActor
from krrst_dist.on_ray.group import WorkerGroup
from krrst_dist.on_ray.heartbeat import Beat
from krrst_dist.on_ray.shard_log import ShardLogs, ray_log_folder
from krrst_dist.on_ray.sliced import Layout
from krrst_dist.on_ray.stopping import Stop, Stopped

ray.cloudpickle.register_pickle_by_value(engine_parts)
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A cluster with room for three actors; yields its address."""
    ray.init(address="local", num_cpus=3, object_store_memory=300_000_000, include_dashboard=False, logging_level="warning",
             log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@dataclass(frozen=True)
class Once(Parts):
    """At shard 1's 7th batch something happens to its process, once for each run (`marker` is a file), or always."""

    marker: str | None = None

    def __call__(self, shard: int):
        built = super().__call__(shard)
        read = built.batches.next

        def next_batch():
            if shard == 1 and built.batches.state()["batch"] == 6 and not (self.marker and Path(self.marker).exists()):
                if self.marker:
                    Path(self.marker).touch()
                return self.happen(built) or read()
            return read()

        built.batches.next = next_batch
        return built

    def happen(self, built) -> None:
        """SIGKILL, as from the kernel when memory runs out."""
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class AtUpdate(Parts):
    """When shard 1 takes part in update 6, something happens to it."""

    def __call__(self, shard: int):
        built = super().__call__(shard)
        contribute = built.contribute

        def watched(step: int, *values: torch.Tensor):
            if shard == 1 and step == 6:
                self.happen(built)
            return contribute(step, *values)

        built.contribute = watched
        return built


@dataclass(frozen=True)
class Diverging(AtUpdate):
    """A pool whose weights become infinite."""

    def happen(self, built) -> None:
        for member in built.pool.members:
            member.model.network.layers[0].weight.data.fill_(float("inf"))


@dataclass(frozen=True)
class NaNTargets(Once):
    """Target representations that become NaN."""

    def happen(self, built):
        x, y = engine_parts.start()
        return x, y * float("nan")


@dataclass(frozen=True)
class Exploding(AtUpdate):
    """A pool whose next training steps are so large that the weights become infinite, from finite ones and a finite loss."""

    def happen(self, built) -> None:
        for member in built.pool.members:
            member.optimizer.param_groups[0]["lr"] = 1e38


def measured_nan(network: int, values: tuple[torch.Tensor, torch.Tensor], alive: Callable[[], None]) -> float:
    return float("nan") if network == 2 else 1.0


def measured_diverging(network: int, values: tuple[torch.Tensor, torch.Tensor], alive: Callable[[], None]) -> float:
    if network == 1:
        ridge_head(values[0].flatten(1) * float("inf"), values[1])
    return 1.0


def measured_slowly(network: int, values: tuple[torch.Tensor, torch.Tensor], alive: Callable[[], None]) -> float:
    for _ in range(12 if network == 0 else 0):
        time.sleep(0.25)
        alive()
    return 1.0


def measured_silently(network: int, values: tuple[torch.Tensor, torch.Tensor], alive: Callable[[], None]) -> float:
    time.sleep(60)
    return 1.0


@dataclass(frozen=True)
class SliceOnce(Parts):
    """The process of slice 1 is killed at its 7th batch, once for each run."""

    marker: str = ""

    def slice(self, shard: int, p: int):
        built = super().slice(shard, p)
        read = built.batches.next

        def next_batch():
            if built.batches.state()["batch"] == 6 and not Path(self.marker).exists():
                Path(self.marker).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return read()

        built.batches.next = next_batch
        return built


@dataclass(frozen=True)
class CannotBuild(Parts):
    """Shard 1 cannot be made: its data is missing, or, without a message, its process is killed."""

    message: str = ""

    def __call__(self, shard: int):
        if shard == 1 and self.message:
            raise FileNotFoundError(self.message)
        if shard == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(shard)


@pytest.mark.parametrize("actors", [1, 2, 3])
def test_any_number_of_actors_gives_the_serial_loops_result_bit_for_bit(cluster, tmp_path, actors):
    settings = config(updates=50, actors=actors, checkpoint_every=20, every=16)
    outcome = run(settings, tmp_path, measure=measure)
    x_syn, y_syn = serial(settings)
    assert torch.equal(outcome.values[0], x_syn) and torch.equal(outcome.values[1], y_syn)
    assert not torch.equal(x_syn, engine_parts.start()[0])
    assert [step for step, _ in outcome.held_out] == [0, 16, 32, 48, 50]
    assert outcome.held_out[-1][1] == sum(measure(i, (x_syn, y_syn)) for i in range(3)) / 3


@pytest.mark.parametrize(("shards", "slices", "actors"), [(1, 3, 1), (1, 3, 2), (1, 3, 3), (2, 2, 3)])
def test_slices_on_any_number_of_actors_give_the_serial_loops_result_bit_for_bit(cluster, tmp_path, shards, slices, actors):
    settings = config(updates=20, shards=shards, slices=slices, actors=actors, checkpoint_every=7)
    outcome = run(settings, tmp_path)
    x_syn, y_syn = serial(settings)
    assert torch.equal(outcome.values[0], x_syn) and torch.equal(outcome.values[1], y_syn)


@pytest.mark.parametrize(("back_to", "actors", "shards"), [(0, 1, "0, 1, 2"), (4, 2, "1")])
def test_a_killed_actor_is_replaced_and_the_result_is_that_of_an_undisturbed_run(cluster, tmp_path, capsys, back_to, actors, shards):
    settings = config(actors=actors, checkpoint_every=back_to or 12)
    outcome = run(settings, tmp_path / "run", build=Once(settings, marker=str(tmp_path / "killed")), measure=measure)
    lines = [line for line in capsys.readouterr().out.splitlines() if "was lost" in line]
    assert len(lines) == 1 and f"shard(s) {shards} on" in lines[0] and f"step-{back_to:08d}-1" in lines[0]
    x_syn, y_syn = serial(settings)
    assert torch.equal(outcome.values[0], x_syn) and torch.equal(outcome.values[1], y_syn)
    assert [step for step, _ in outcome.outer] == list(range(1, 13))
    assert [step for step, _ in outcome.held_out] == [0, 12]


def test_actors_on_one_host_meet_in_a_file_and_talk_over_the_loopback(monkeypatch, tmp_path):
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert network.meeting_place(network.LOOPBACK, tmp_path).startswith(f"file://{tmp_path}/")
    network.use_device_of(network.LOOPBACK)
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "lo")


@pytest.mark.parametrize("actors", [1, 3])
def test_all_reduce_gives_the_serial_loops_result_but_for_rounding(cluster, tmp_path, actors):
    settings = config(updates=12, actors=actors, checkpoint_every=5, aggregate="collective")
    outcome = run(settings, tmp_path, measure=measure)
    x_syn, y_syn = serial(settings)
    moved = (x_syn - engine_parts.start()[0]).abs().max()
    assert (outcome.values[0] - x_syn).abs().max() < 1e-3 * moved and (outcome.values[1] - y_syn).abs().max() < 1e-4
    assert [step for step, _ in outcome.outer] == list(range(1, 13)) and [step for step, _ in outcome.held_out] == [0, 12]
    assert outcome.held_out[-1][1] == sum(measure(i, outcome.values) for i in range(3)) / 3


@pytest.mark.parametrize("layout", [{"actors": 2}, {"actors": 2, "aggregate": "collective"}, {"actors": 3, "shards": 2, "slices": 2}])
def test_each_shard_leaves_a_log_for_machines_beside_rays_own(cluster, tmp_path, layout):
    settings = config(updates=3, checkpoint_every=2, **layout)
    directory = tmp_path / "<b>a run"
    run(settings, directory)
    for shard in range(settings.distill.shards):
        file, = ray_log_folder().glob(f"krrst-{tmp_path.name}-b-a-run-shard-{shard}.jsonl")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert [line["event"] for line in lines] == ["built", "saved", "update", "saved", "saved"]
        assert all((line["run"], line["shard"], line["host"]) == (str(directory), shard, socket.gethostname()) for line in lines)
        update = lines[2]
        assert update["step"] == 0 and update["loss"] > 0 and update["images"] > 0 and update["seconds"] > 0
        assert datetime.fromisoformat(update["time"]).tzinfo is not None


def test_a_shards_log_has_a_line_a_minute_and_a_full_disk_ends_no_run(tmp_path):
    now = [0.0]
    logs = ShardLogs("s3://bucket/runs/seed-0/", [4], tmp_path, clock=lambda: now[0])
    for step in range(0, 200):
        now[0] = step * 1.0
        logs.update(4, step, loss=0.5, images=8, retries=0, seconds=0.1)
    (file,) = tmp_path.iterdir()
    assert file.name == "krrst-runs-seed-0-shard-4.jsonl"
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [0, 60, 120, 180]
    ShardLogs("run", [0], tmp_path / "gone").say("built")


def test_a_run_by_all_reduce_goes_on_after_an_actors_death_where_it_was(cluster, tmp_path, capsys):
    settings = config(actors=3, checkpoint_every=4, aggregate="collective")
    outcome = run(settings, tmp_path / "run", build=Once(settings, marker=str(tmp_path / "killed")))
    assert "step-00000004-1" in next(line for line in capsys.readouterr().out.splitlines() if "was lost" in line)
    undisturbed = run(settings, tmp_path / "undisturbed")
    assert torch.equal(outcome.values[0], undisturbed.values[0]) and torch.equal(outcome.values[1], undisturbed.values[1])
    assert [step for step, _ in outcome.outer] == list(range(1, 13))


def test_a_diverged_shard_ends_a_run_by_all_reduce_with_its_own_error(cluster, tmp_path):
    settings = config(actors=2, aggregate="collective")
    with pytest.raises(DivergedError, match=r"update 6, shard 1: .*the last good checkpoint is .*step-00000004-1"):
        run(settings, tmp_path, build=NaNTargets(settings))


def test_a_killed_actor_that_hosts_a_slice_alone_is_named_and_replaced(cluster, tmp_path, capsys):
    settings = config(shards=1, slices=2, actors=2)
    outcome = run(settings, tmp_path / "run", build=SliceOnce(settings, marker=str(tmp_path / "killed")))
    lines = [line for line in capsys.readouterr().out.splitlines() if "was lost" in line]
    assert len(lines) == 1 and "slice(s) 1 of shard 0 on" in lines[0] and "step-00000004-1" in lines[0]
    x_syn, y_syn = serial(settings)
    assert torch.equal(outcome.values[0], x_syn) and torch.equal(outcome.values[1], y_syn)


def test_actors_that_die_again_and_again_stop_the_run_with_the_way_to_go_on(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(coordinator, "PAUSES", (0.1,))
    settings = config(actors=1)
    with pytest.raises(EngineError, match=r"2 failures in a row without a new checkpoint.*step-00000004-1, go on with --resume"):
        run(settings, tmp_path, build=Once(settings))


def test_an_actor_that_is_silent_for_too_long_is_named(cluster):
    with WorkerGroup(Layout(2, 1, 2), threads=1) as group:
        hosts = group.start()
        os.kill(hosts[1].pid, signal.SIGSTOP)
        with pytest.raises(LostActor, match=r"actor 1 with shard\(s\) 1 .*no sign of life for 3 s"):
            group.everywhere("host", silence=3)
        os.kill(hosts[1].pid, signal.SIGKILL)


def test_a_process_that_dies_at_its_start_is_one_clear_error(cluster, tmp_path):
    settings = config()
    with pytest.raises(EngineError, match=r"actor 0 with shard\(s\) 0, 1, 2 .* was lost.* while it started"):
        run(settings, tmp_path, build=CannotBuild(settings))
    assert not list((tmp_path / "checkpoints").glob("step-*"))


def test_an_error_in_an_actor_reaches_the_user_as_itself(cluster, tmp_path):
    settings = config()
    with pytest.raises(FileNotFoundError, match="no images in /nowhere"):
        run(settings, tmp_path, build=CannotBuild(settings, message="no images in /nowhere"))


@pytest.mark.parametrize(("parts", "error"), [(NaNTargets, DivergedError), (Diverging, RidgeError)])
def test_a_diverged_run_names_step_shard_and_the_last_good_checkpoint(cluster, tmp_path, parts, error):
    settings = config(actors=1)
    with pytest.raises(error, match=r"update 6, shard 1: .*the last good checkpoint is .*step-00000004-1"):
        run(settings, tmp_path, build=parts(settings))


def test_what_diverges_is_never_kept_and_no_resume_is_promised_that_would_only_repeat_it(cluster, tmp_path):
    settings = config(actors=2, checkpoint_every=1, keep=2)
    with pytest.raises(DivergedError) as first:
        run(settings, tmp_path, build=Exploding(settings))
    said = re.fullmatch(r"update 6, shard 1: pool member \d has weights that are not finite, .* after \d+ training steps; .*distill.pool.lr"
                        r".*; the last good checkpoint is (\S+), but going on from it with --resume would take the same steps to the same "
                        r"end, .* start one with another --out", str(first.value))
    kept = sorted((tmp_path / "checkpoints").glob("step-*"))
    assert [path.name for path in kept] == ["step-00000005-1", "step-00000006-1"] and str(kept[-1]) == said[1]
    tensors = [value for path in kept for file in path.glob("*.safetensors") for value in safetensors.torch.load_file(file).values()]
    assert len(tensors) > 100 and all(value.isfinite().all() for value in tensors)
    with pytest.raises(DivergedError, match="update 6, shard 1: "):
        run(config(checkpoint_every=1, keep=2), tmp_path, build=Exploding(settings), resume=True)  # on one actor
    with pytest.raises(ConfigError, match="distill.pool.lr: was 0.05, now 0.01.*\n.*another --out"):
        run(config(checkpoint_every=1, keep=2, pool_lr=0.01), tmp_path, resume=True)


def test_a_pool_that_diverges_in_its_warm_up_stops_there_with_shard_member_and_setting_and_keeps_nothing(cluster, tmp_path):
    with pytest.raises(DivergedError, match=r"^warm-up, shard 0: pool member 0 has .*distill.pool.lr.*; there is no checkpoint yet.*"
                                            r"start it again"):
        run(config(pool_lr=1e20), tmp_path)
    assert not list((tmp_path / "checkpoints").glob("step-*"))
    run(config(updates=1), tmp_path)  # so that it can be started again, there


def test_a_set_that_becomes_infinite_is_not_kept(cluster, tmp_path):
    settings = config(lr=1e37, updates=5, checkpoint_every=1, actors=2)
    with pytest.raises((DivergedError, RidgeError), match="distill.lr_x.*the last good checkpoint is .*step-00000000-1, but"):
        run(settings, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000000-1"]


@pytest.mark.parametrize(("measured", "network"), [(measured_nan, 2), (measured_diverging, 1)])
def test_a_held_out_loss_that_is_not_finite_stops_the_run_with_update_network_and_setting(cluster, tmp_path, measured, network):
    expected = rf"^update 0: held-out network {network}.*evaluate.pretrain.lr = 0.1 is too high.*--out"
    with pytest.raises(DivergedError, match=expected) as stopped:
        run(config(), tmp_path, measure=measured)
    assert "lr_x" not in str(stopped.value)


def test_a_measurement_may_take_long_as_long_as_it_gets_further(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(coordinator, "START", 2)
    monkeypatch.setattr(coordinator, "PAUSES", ())
    assert run(config(updates=1), tmp_path / "run", measure=measured_slowly).held_out == [(0, 1.0), (1, 1.0)]
    with pytest.raises(EngineError, match="no sign of life for 2 s"):
        run(config(updates=1), tmp_path / "silent", measure=measured_silently)


def test_a_real_measurement_tells_of_its_steps_and_of_its_divergence():
    settings, signs, (x_syn, y_syn) = config(), [], engine_parts.start()
    few = settings.evaluate.pretrain.model_copy(update={"steps": 3, "lr": 1e-3})
    settings = settings.model_copy(update={"evaluate": settings.evaluate.model_copy(update={"pretrain": few})})
    start = DistilledSet(x_syn.numpy(), y_syn.numpy(), "features", few.recipe(), Space("raw", (0.0,) * 3, (1.0,) * 3))

    def parts(settings: Config) -> Assembly:
        return Assembly(settings, None, None, None, "", _opened={"start": start, "held out": (x_syn, y_syn)})

    loss = parts(settings).measure(0, (x_syn, y_syn), lambda: signs.append(1))
    assert len(signs) == 3 and 0 < loss < 10
    assert loss == held_out_of_network(0, settings.distill.pool.network, x_syn, y_syn, x_syn, y_syn, recipe=few,
                                       ridge=settings.distill.ridge)
    assert len(signs) == 3
    wild = settings.model_copy(update={"evaluate": settings.evaluate.model_copy(update={"pretrain": few.model_copy(update={"lr": 1e30})})})
    with pytest.raises(DivergedError, match="training loss is"):
        parts(wild).measure(0, (x_syn, y_syn), lambda: None)


def test_a_run_in_a_thread_can_be_stopped(cluster, tmp_path):
    settings, stop, seen = config(updates=100_000), Stop(), []

    def target() -> None:
        try:
            Coordinator(settings, engine_parts.work(settings), directory=str(tmp_path), stop=stop).run()
        except Stopped as end:
            seen.append(end.status)

    thread = threading.Thread(target=target)
    thread.start()
    _wait_for(tmp_path, after=0)
    stop.ask()
    thread.join(timeout=30)
    assert seen == [130] and Beat.read(str(tmp_path)).step == _newest(tmp_path) > 0


def test_a_run_stopped_and_killed_at_random_moments_ends_as_if_undisturbed(cluster, tmp_path):
    moments = random.Random(0)
    steps = [-1]
    for how in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
        environment = os.environ | {"RAY_AUTH_MODE": "token"}
        driver = subprocess.Popen([sys.executable, engine_parts.__file__, str(tmp_path), "60", cluster], env=environment,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        _wait_for(tmp_path, after=steps[-1])
        time.sleep(moments.uniform(0, 0.5))
        driver.send_signal(how)
        output, _ = driver.communicate(timeout=30)
        if how == signal.SIGKILL:
            assert driver.returncode == -signal.SIGKILL
        else:
            assert driver.returncode == {signal.SIGINT: 130, signal.SIGTERM: 0}[how], output
            assert "stopping: the update" in output and f"step-{_newest(tmp_path):08d}" in output and "go on with --resume" in output
            assert Beat.read(str(tmp_path)).step == _newest(tmp_path)  # no update is lost
        steps.append(_newest(tmp_path))
    assert steps == sorted(set(steps)) and steps[-1] < 60
    settings = config(updates=60, actors=2)  # instead of one
    outcome = run(settings, tmp_path, resume=True)
    x_syn, y_syn = serial(settings)
    assert torch.equal(outcome.values[0], x_syn) and torch.equal(outcome.values[1], y_syn)
    assert [step for step, _ in outcome.outer] == list(range(1, 61))


def _newest(directory: Path) -> int:
    return max((int(path.parent.name.split("-")[1]) for path in directory.glob("checkpoints/step-*/manifest.json")), default=-1)


def _wait_for(directory: Path, *, after: int) -> None:
    """Until there is a checkpoint of a later step."""
    deadline = time.monotonic() + 60
    while _newest(directory) <= after:
        assert time.monotonic() < deadline, "no checkpoint within 60 s"
        time.sleep(0.02)
