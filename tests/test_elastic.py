"""Hosts that come and go during a run: it goes on with as many actors as there is room for, and ends where the serial loop does.

Runs on a cluster of several nodes of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace

import engine_parts
import pytest
import ray
import running
from engine_parts import config
from ray.cluster_utils import Cluster

from krrst_dist import storage
from krrst_dist.config import Config, ConfigError
from krrst_dist.on_ray import coordinator, group
from krrst_dist.on_ray.alike import require_nodes_alike
from krrst_dist.on_ray.cluster import ray_command
from krrst_dist.on_ray.worker import Host

ray.cloudpickle.register_pickle_by_value(engine_parts)
ray.cloudpickle.register_pickle_by_value(running)
NODE = {"num_cpus": 1, "object_store_memory": 150_000_000}
UPDATES, PACE = 200, 0.25  # long enough for hosts to come and go


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A head of one CPU, to which nodes can be added. It looks twice a second whether they live."""
    made = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False,
                                                                "_system_config": {"health_check_period_ms": 500}})
    ray.init(address=made.address, logging_level="error", log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(autouse=True)
def in_short(monkeypatch) -> None:
    monkeypatch.setattr(coordinator, "PAUSES", (0.1,) * 3)
    monkeypatch.setattr(group, "_PULSE", 0.5)


def elastic(*, checkpoint_every: int = 2) -> Config:
    """Wants two actors, goes on with one."""
    settings = config(actors=2, updates=UPDATES, checkpoint_every=checkpoint_every)
    return settings.model_copy(update={"engine": settings.engine.model_copy(update={"min_actors": 1})})


def test_a_run_takes_what_room_there_is_moves_to_a_host_that_joins_and_goes_on_without_one_that_is_killed(nodes, start, capsys):
    run = start(elastic(), pace=PACE)
    run.until_step(4)
    assert run.process(0) == run.process(1)
    node = nodes.add_node(**NODE)
    run.until(lambda: run.process(0) != run.process(1), "two actors")
    run.until(lambda: run.checkpoints()[-1][1] == 2, "a checkpoint of theirs")
    nodes.remove_node(node, allow_graceful=False)
    run.until(lambda: run.process(0) == run.process(1), "one actor")
    run.ends_as_if_undisturbed()
    said = capsys.readouterr().out
    assert said.count("there is room for more than 1 actors now; going on from") == 1 and said.count("was lost") == 1


def test_a_host_that_joins_with_a_full_disk_is_left_out_and_the_run_goes_on_without_it(nodes, start, tmp_path, capsys):
    run = start(elastic(), pace=PACE)
    run.until_step(4)
    node = nodes.add_node(**NODE)
    storage.write_whole(tmp_path / "full", node.node_id.encode())
    run.until(lambda: run.checkpoints()[-1][1] == 3, "a checkpoint of the third set of actors")
    run.ends_as_if_undisturbed()
    nodes.remove_node(node)
    assert [incarnation for _, incarnation in run.checkpoints()][-1] == 3, "it was not tried a second time"
    said = capsys.readouterr().out
    assert "1 MB free, but fetching takes 2 MB; that host is left out of this run; going on from" in said


def test_a_job_on_a_cluster_with_a_node_that_runs_something_else_is_refused_naming_both(nodes):
    node, here = nodes.add_node(**NODE), Host.of_this_process()
    require_nodes_alike(here)
    with pytest.raises(ConfigError, match=r"versions .*the driver on a: torch 1.0; .*torch 2"):
        require_nodes_alike(replace(here, name="a", versions=(("torch", "1.0"),)))
    nodes.remove_node(node)


def test_a_host_that_is_drained_is_left_after_a_checkpoint_with_no_update_lost(nodes, start, capsys):
    node = nodes.add_node(**NODE)
    run = start(elastic(checkpoint_every=10**6), pace=PACE)
    run.until(lambda: run.checkpoints() and run.updates() > 3, "updates")
    assert run.process(0) != run.process(1)
    drain = ["drain-node", "--address", nodes.address, "--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
             "--reason-message", "a spot instance", "--deadline-remaining-seconds", "600"]
    subprocess.run([ray_command(), *drain], check=True, capture_output=True)
    noticed = time.monotonic()
    run.until(lambda: run.process(0) == run.process(1), "one actor")
    before = run.updates()
    run.until(lambda: run.updates() > before, "another update")
    with capsys.disabled():
        print(f"\nhost drained: {time.monotonic() - noticed:.0f} s until the next update elsewhere")
    nodes.remove_node(node)
    run.ends_as_if_undisturbed()
    assert [incarnation for _, incarnation in run.checkpoints()] == [1, 1, 2] and run.checkpoints()[1][0] == before
    assert "will be taken away; going on from" in capsys.readouterr().out


def test_an_actor_that_gets_sigterm_is_left_after_a_checkpoint_with_no_update_lost(nodes, start, capsys):
    run = start(elastic(checkpoint_every=10**6), pace=PACE)
    run.until(lambda: run.updates() > 3, "updates")
    warned = run.process(0)
    os.kill(warned, signal.SIGTERM)
    noticed = time.monotonic()
    run.until(lambda: run.process(0) != warned, "another process")
    before = run.updates()
    run.until(lambda: run.updates() > before, "another update")
    with capsys.disabled():
        print(f"\nactor given SIGTERM: {time.monotonic() - noticed:.0f} s until the next update elsewhere")
    run.ends_as_if_undisturbed()
    assert [incarnation for _, incarnation in run.checkpoints()] == [1, 1, 2]
    assert f"process {warned}) will be taken away; going on from" in capsys.readouterr().out
