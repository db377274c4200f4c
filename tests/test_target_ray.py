"""Target training on a real one-machine Ray cluster, over real betons. One cluster for the file."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from krrst_dist.algorithm.barlow_twins import TwinsTrainer, train
from krrst_dist.algorithm.shard import DivergedError
from krrst_dist.config import Config, ConfigError, parse
from krrst_dist.data.cache import Cache
from krrst_dist.data.order import global_batch
from krrst_dist.data.prepare import prepare
from krrst_dist.data.prepared import Prepared, held_out_split
from krrst_dist.data.reader import read_all
from krrst_dist.evaluation.target_model import load_target, target_fingerprint, untrained
from krrst_dist.on_ray import cluster
from krrst_dist.on_ray.target_training import train_target


@pytest.fixture(scope="module", autouse=True)
def ray_cluster():
    cluster.start_local(num_cpus=2)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Prepared:
    folder = tmp_path_factory.mktemp("betons")
    return prepare("digits-0-4", "train", root=folder, directory=folder, resolution=16, progress=False)


def settings(**target) -> Config:
    """A tiny target: ConvNet 8-16 on 16 px digits."""
    small = dict(network={"name": "convnet", "widths": [8, 16]}, steps=12, batch=32, lr=5e-3, warmup_steps=2, projector=[32, 32],
                 checkpoint_every=4, probe_every=6)
    return parse({"preset": "test", "source": {"dataset": "digits-0-4", "resolution": 16, "held_out": 100}, "target": small | target})


def flat(network: nn.Module) -> torch.Tensor:
    """Everything that was learned or counted, in one vector."""
    return torch.cat([value.double().flatten() for value in network.state_dict().values()])


def without_ray(config: Config, source: Prepared) -> nn.Module:
    """The same training as a plain loop in this process."""
    target = config.target
    trainer = TwinsTrainer(untrained(target, resolution=16), projector_widths=target.projector, batch=target.batch, steps=target.steps,
                           lr=target.lr, warmup_steps=target.warmup_steps, weight_decay=target.weight_decay,
                           off_diagonal=target.off_diagonal, mean=source.mean, std=source.std, seed=target.seed)
    training, _ = held_out_split(source.count, config.source.held_out, config.source.split_seed)
    images, _ = read_all(source, np.arange(source.count))
    torch.set_num_threads(config.engine.threads)
    train(trainer, lambda step: images[global_batch(training, batch=target.batch, seed=target.seed, step=step)])
    return trainer.network


LASTING = settings(steps=300, checkpoint_every=20, probe_every=150)


def kill_a_worker_once_it_has_written(folder: Path, killed: list[int]) -> None:
    """SIGKILL a training worker of this test's own cluster after the first checkpoint."""
    while not list(folder.rglob("state.safetensors")):
        time.sleep(0.005)
    mine = psutil.Process().children(recursive=True)
    worker = next(process for process in mine if "RayTrainWorker" in " ".join(process.cmdline()))
    worker.send_signal(signal.SIGKILL)
    killed.append(worker.pid)


@pytest.fixture(scope="module")
def target(source, tmp_path_factory) -> Path:
    """A target trained by one worker, which was killed on the way."""
    folder, killed = tmp_path_factory.mktemp("target"), []
    killer = threading.Thread(target=kill_a_worker_once_it_has_written, args=(folder, killed), daemon=True)
    killer.start()
    path = train_target(LASTING, source, Cache(folder))
    killer.join(10)
    assert killed
    return Path(path)


def test_a_training_whose_worker_was_killed_equals_the_plain_uninterrupted_loop_to_the_bit(target, source):
    assert torch.equal(flat(load_target(target, resolution=16)), flat(without_ray(LASTING, source)))


def test_training_leaves_one_target_file_and_no_checkpoint(target):
    network = load_target(target, resolution=16)
    assert network(torch.zeros(2, 3, 16, 16)).shape == (2, network.feature_dim)
    assert [path.name for path in target.parent.rglob("*.safetensors")] == [target.name]
    assert not list(target.with_suffix("").glob("ray*"))


def test_loss_learning_rate_time_and_probe_are_logged_without_a_gap_where_the_worker_was_killed(target):
    log = EventAccumulator(str(target.with_suffix("") / "tensorboard"), size_guidance={"scalars": 0})
    log.Reload()
    assert set(log.Tags()["scalars"]) == {"target/loss", "target/lr", "target/seconds_per_step", "target/knn_accuracy"}
    assert [event.step for event in log.Scalars("target/loss")] == list(range(1, 301))
    assert [event.step for event in log.Scalars("target/knn_accuracy")] == [150, 300]
    assert log.Scalars("target/knn_accuracy")[-1].value > 0.9
    assert log.Scalars("target/lr")[0].value == pytest.approx(5e-3 / 2)


def test_two_workers_beside_another_cluster_find_their_own_and_learn_the_same_weights_up_to_rounding(source, tmp_path, capfd):
    config = settings(workers=2)
    program = "import ray, sys; ray.init(address='local', num_cpus=1, include_dashboard=False); print('up', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        one, start = flat(without_ray(config, source)), flat(untrained(config.target, resolution=16))
        assert any(line == "up\n" for line in iter(other.stdout.readline, ""))
        two = flat(load_target(train_target(config, source, Cache(tmp_path)), resolution=16))
        time.sleep(2)  # lines of workers arrive late
        other.communicate("")
    assert (one - two).abs().max() < 1e-3 * (one - start).abs().max()
    said = "".join(capfd.readouterr())
    assert "target: 12 steps done" in said and "multiple active Ray instances" not in said and "Traceback" not in said


def test_a_finished_target_is_used_again_and_another_setting_makes_another_one(target, source, capfd):
    before = target.stat().st_mtime_ns
    laid_out_otherwise = settings(steps=300, workers=2, checkpoint_every=7, probe_every=5, standardise=True)
    assert train_target(laid_out_otherwise, source, Cache(target.parent)) == str(target)
    assert target.stat().st_mtime_ns == before
    assert "already there" in capfd.readouterr().out
    assert train_target(settings(steps=0), source, Cache(target.parent)) != str(target)


def test_a_training_that_diverges_stops_with_the_step_and_is_not_tried_again(source, tmp_path):
    with pytest.raises(DivergedError, match="step .*lower target.lr"):
        train_target(settings(lr=1e30, warmup_steps=0), source, Cache(tmp_path))
    assert not list(tmp_path.glob("*.safetensors"))


def test_sigterm_while_a_target_is_trained_ends_with_status_130_and_the_checkpoint_kept(tmp_path):
    command = [sys.executable, "-c", "import sys; from krrst_dist import cli; sys.exit(cli.main(sys.argv[1:]))", "target", "--preset",
               "quickstart", "--out", str(tmp_path / "run"), "--target.steps", "100000", "--target.checkpoint-every", "20"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    while process.poll() is None and not list(tmp_path.rglob("state.safetensors")):
        time.sleep(0.05)
    process.terminate()
    said, _ = process.communicate(timeout=180)  # Ray may take half a minute to end its nodes
    assert process.returncode == 130, said
    assert "stopped; checkpoints are kept" in said and "Traceback" not in said and "Stack trace" not in said and "*** SIG" not in said
    assert list(tmp_path.rglob("state.safetensors")) and not list(tmp_path.rglob("target-*.safetensors"))


def test_an_existing_checkpoint_becomes_a_file_of_our_own(source, tmp_path):
    network = load_target(settings(steps=0, seed=5).target, resolution=16)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "theirs.pt")
    path = train_target(settings(checkpoint=str(tmp_path / "theirs.pt")), source, Cache(tmp_path))
    assert target_fingerprint(load_target(path, resolution=16)) == target_fingerprint(network)


@pytest.mark.parametrize("target, complaint", [
    ({"warmup_steps": 12}, "target.warmup_steps = 12: must be below target.steps = 12"),
    ({"batch": 5000}, "target.batch = 5000: there are only"),
    ({"workers": 33}, "target.workers = 33: more than target.batch = 32"),
])
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(source, tmp_path, target, complaint):
    with pytest.raises(ConfigError, match=complaint):
        train_target(settings(**target), source, Cache(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_more_workers_than_the_cluster_has_room_for_are_refused(source, tmp_path):
    with pytest.raises(cluster.ClusterError, match="lacks room for 1 of them"):
        train_target(settings(workers=3), source, Cache(tmp_path))


def test_every_training_image_comes_once_an_epoch_and_held_out_ones_never():
    training, held_out = held_out_split(50, 10, 0)
    drawn = [image for step in range(16) for image in global_batch(training, batch=5, seed=0, step=step)]  # two epochs
    assert sorted(drawn[:40]) == sorted(drawn[40:]) == sorted(training)
    assert drawn[:40] != drawn[40:]
    assert not set(drawn) & set(held_out)
    straddling = [image for step in range(10) for image in global_batch(training, batch=16, seed=0, step=step)]
    assert straddling[:80] == drawn
