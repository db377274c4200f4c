"""The self-supervised target: Barlow Twins, its data-parallel training, its files. Real digits, no Ray."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from sklearn.datasets import load_digits
from torch import nn

from krrst_dist import networks
from krrst_dist.algorithm.barlow_twins import TwinsTrainer, barlow_twins, learning_rate, train, worker_rows
from krrst_dist.algorithm.shard import DivergedError
from krrst_dist.algorithm.sync_batch_norm import synchronise
from krrst_dist.artifacts import ArtifactError
from krrst_dist.config import ConfigError, NetworkSettings, TargetSettings
from krrst_dist.evaluation.knn import knn_accuracy
from krrst_dist.evaluation.target_model import FORMAT, load_target, save_target, target_fingerprint
from krrst_dist.seeds import numpy_rng, seeded

BATCH = 15
RESNET = NetworkSettings(name="resnet18", stem_padding=2)
TINY = NetworkSettings(name="convnet", widths=(4, 8))


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The real handwritten digits that ship with scikit-learn: uint8 [1797, 3, 16, 16], labels [1797]."""
    found = load_digits()
    gray = torch.from_numpy(found.images * 255 / 16).to(torch.uint8)[:, None]  # [n, 1, 8, 8]
    return gray.expand(-1, 3, -1, -1).repeat_interleave(2, 2).repeat_interleave(2, 3), torch.from_numpy(found.target)


def digit_batch(step: int) -> torch.Tensor:
    """This worker's rows of the batch of a step."""
    images, _ = digits()
    return images[numpy_rng(0, "test batch", step).permutation(len(images))[:BATCH][worker_rows(BATCH)]]


def tiny_trainer(steps: int = 6, **changes) -> TwinsTrainer:
    with seeded(0, "test network"):
        network = networks.build("convnet", resolution=16, widths=(4, 8))
    settings = dict(projector_widths=(16, 8), batch=BATCH, steps=steps, lr=1e-2, warmup_steps=2, weight_decay=1e-3, off_diagonal=0.0051,
                    mean=(0.3,) * 3, std=(0.35,) * 3, seed=3)
    return TwinsTrainer(network, **settings | changes)


def flat(model: nn.Module) -> torch.Tensor:
    """Everything that was learned or counted, in one vector."""
    return torch.cat([value.double().flatten() for value in model.state_dict().values()])


def test_the_loss_is_the_papers_formula_written_out():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 7, 4))
    standard = [(z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5) for z in (a, b)]
    expected = 0.0
    for i in range(4):
        for j in range(4):
            c = sum(standard[0][n, i] * standard[1][n, j] for n in range(7)) / 7
            expected += (1 - c) ** 2 if i == j else 0.0051 * c**2
    assert barlow_twins(torch.from_numpy(a), torch.from_numpy(b), 0.0051).item() == pytest.approx(expected, rel=1e-12)


def test_the_gradient_of_the_loss_agrees_with_finite_differences():
    a, b = torch.randn(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda x, y: barlow_twins(x, y, 0.1), (a.requires_grad_(), b.requires_grad_()))


def test_the_learning_rate_warms_up_linearly_and_falls_to_zero_as_a_cosine():
    rates = [learning_rate(step, peak=2.0, warmup_steps=4, steps=12) for step in range(13)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[8] == pytest.approx(1.0)
    assert rates[12] == pytest.approx(0.0, abs=1e-12)


def test_synchronised_batch_norm_is_plain_batch_norm_for_a_single_worker():
    x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    plain = nn.Sequential(nn.BatchNorm2d(3))
    sync = synchronise(nn.Sequential(nn.BatchNorm2d(3)))
    assert torch.equal(plain(x), sync(x))
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), sync.state_dict().values(), strict=True))
    assert plain.state_dict().keys() == sync.state_dict().keys()


def norm_problem() -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.BatchNorm1d(12)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.rand(3, generator=generator))
        model[0].bias.copy_(torch.rand(3, generator=generator))
    x = 5 + torch.randn(BATCH, 3, 2, 2, generator=generator, dtype=torch.float64)
    return model, x, torch.randn(2, 12, 12, generator=generator, dtype=torch.float64)


def norm_loss(out: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    return barlow_twins(torch.sin(out @ mix[0]), torch.cos(out @ mix[1]), 0.1)


def in_a_worker(rank: int, workers: int, folder: str) -> None:
    """What each of several real processes does: batch norm and loss in float64, then six training steps."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=workers)
    model, x, mix = norm_problem()
    model = synchronise(model)
    mine = x[worker_rows(BATCH)].clone().requires_grad_()
    out = model(mine)
    loss = norm_loss(out, mix)
    loss.backward()
    trainer = tiny_trainer()
    losses = []
    train(trainer, digit_batch, after_step=lambda done, loss: losses.append(loss))
    found = {"out": out.detach(), "loss": loss.detach(), "gradient": mine.grad / workers, "state": flat(model),
             "weights": flat(trainer.model), "losses": torch.stack(losses)}
    safetensors.torch.save_file(found, f"{folder}/{rank}.safetensors")
    dist.barrier()
    os._exit(0)  # gloo's own threads may abort a process that takes them down while the other end is leaving


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("workers")
    multiprocessing.spawn(in_a_worker, args=(2, str(folder)), nprocs=2)
    return [safetensors.torch.load_file(folder / f"{rank}.safetensors") for rank in range(2)]


def test_two_workers_with_unequal_parts_compute_the_batch_norm_and_loss_of_the_whole_batch(two_workers):
    model, x, mix = norm_problem()
    x.requires_grad_()
    out = model(x)
    loss = norm_loss(out, mix)
    loss.backward()
    first, second = two_workers
    assert len(first["out"]) != len(second["out"])
    torch.testing.assert_close(torch.cat([first["out"], second["out"]]), out.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([first["gradient"], second["gradient"]]), x.grad, rtol=1e-9, atol=1e-12)
    state = flat(model)
    for worker in two_workers:
        torch.testing.assert_close(worker["loss"], loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(worker["state"], state, rtol=1e-12, atol=1e-12)


def test_one_and_two_workers_learn_the_same_weights_up_to_rounding(two_workers):
    trainer = tiny_trainer()
    start = flat(trainer.model)
    losses = []
    train(trainer, digit_batch, after_step=lambda done, loss: losses.append(loss))
    moved = (flat(trainer.model) - start).abs().max()
    assert torch.equal(two_workers[0]["weights"], two_workers[1]["weights"])
    assert (two_workers[0]["weights"] - flat(trainer.model)).abs().max() < 1e-3 * moved
    torch.testing.assert_close(two_workers[0]["losses"], torch.stack(losses), rtol=1e-3, atol=0)


def test_training_continued_from_a_saved_state_equals_uninterrupted_training_to_the_bit():
    whole = tiny_trainer()
    train(whole, digit_batch)
    first = tiny_trainer()
    for step in range(3):
        first.step(digit_batch(step))
    saved = safetensors.torch.save(first.state_dict())
    second = tiny_trainer()
    second.load_state_dict(safetensors.torch.load(saved))
    train(second, digit_batch)
    assert torch.equal(flat(whole.model), flat(second.model))


def test_training_lowers_the_loss():
    images, _ = digits()
    losses = []
    trainer = tiny_trainer(steps=60, batch=128)
    train(trainer, lambda step: images[step * 20 :][:128], after_step=lambda done, loss: losses.append(loss.item()))
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_a_loss_that_is_not_finite_stops_the_training_and_names_the_step():
    trainer = tiny_trainer(lr=1e30, warmup_steps=0, weight_decay=0.0)
    with pytest.raises(DivergedError, match="step [1-5]: lower target.lr"):
        train(trainer, digit_batch)


def test_nearest_neighbours_recognise_real_digits_and_not_shuffled_labels():
    images, labels = digits()
    x = images.flatten(1).float()
    assert knn_accuracy(x[:1000], labels[:1000], x[1000:], labels[1000:]) > 0.9
    shuffled = torch.from_numpy(np.random.default_rng(0).permutation(labels[:1000].numpy()))
    assert knn_accuracy(x[:1000], shuffled, x[1000:], labels[1000:]) < 0.25


def test_a_near_neighbour_outvotes_two_far_ones():
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.1, 1.0]])
    assert knn_accuracy(bank, torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.1]]), torch.tensor([0]), k=3) == 1.0


def torchvision_checkpoint(path: Path, wrap) -> networks.Network:
    """A checkpoint as the authors released it: torchvision's names, with a classifier; returns the network it is of."""
    network = networks.build("resnet18", resolution=32, stem_padding=2).eval()
    torch.save(wrap(network.state_dict() | {"fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}), path)
    return network


@pytest.mark.parametrize("wrap", [
    pytest.param(lambda w: w, id="bare"),
    pytest.param(lambda w: {"model": w, "epoch": 3}, id="model"),
    pytest.param(lambda w: {"state_dict": {f"module.{k}": v for k, v in w.items()}}, id="state_dict of a data-parallel module"),
])
def test_a_released_checkpoint_loads_without_its_classifier(tmp_path, wrap):
    network = torchvision_checkpoint(tmp_path / "teacher.pt", wrap)
    loaded = load_target(TargetSettings(network=RESNET, checkpoint=str(tmp_path / "teacher.pt")), resolution=32)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(x), network(x))


def test_a_checkpoint_that_cannot_tell_its_stem_padding_asks_for_it(tmp_path):
    torchvision_checkpoint(tmp_path / "teacher.pt", dict)
    with pytest.raises(ConfigError, match="stem_padding = None.*2 for the authors' released"):
        load_target(TargetSettings(checkpoint=str(tmp_path / "teacher.pt")), resolution=32)


def test_a_checkpoint_of_another_network_is_refused_with_what_differs(tmp_path):
    torchvision_checkpoint(tmp_path / "teacher.pt", dict)
    smaller = NetworkSettings(name="resnet10", stem_padding=2)
    with pytest.raises(ArtifactError, match=r"does not fit network resnet10.*unknown, e.g. layer1.1.conv1.weight.*stem_padding 2"):
        load_target(TargetSettings(network=smaller, checkpoint=str(tmp_path / "teacher.pt")), resolution=32)
    with pytest.raises(ArtifactError, match="missing, e.g. layers.0.weight"):
        load_target(TargetSettings(network=TINY, checkpoint=str(tmp_path / "teacher.pt")), resolution=32)


class Trap:
    """What a hostile .pt file may hold: unpickling it would run code."""

    def __reduce__(self):
        return print, ("unpickled!",)


def test_a_checkpoint_that_holds_code_or_is_cut_short_is_refused(tmp_path, capfd):
    torch.save({"model": Trap()}, tmp_path / "trap.pt")
    torchvision_checkpoint(tmp_path / "whole.pt", dict)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:100_000])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("hello, this is no checkpoint")
    (tmp_path / "stack.pt").write_bytes(b"\x80\x020.")
    (tmp_path / "number.pt").write_bytes(b"\x80\x02G\x00")
    for name in ("trap", "cut", "empty", "text", "stack", "number"):
        with pytest.raises(ArtifactError, match=rf"{name}\.pt: no file of weights alone, or damaged"):
            load_target(TargetSettings(network=RESNET, checkpoint=str(tmp_path / f"{name}.pt")), resolution=32)
    assert "unpickled" not in capfd.readouterr().out


@pytest.mark.parametrize("held", [
    pytest.param({3: torch.zeros(2)}, id="a number for a name"), pytest.param({"a": torch.zeros(2).to_sparse()}, id="sparse"),
    pytest.param({"a": torch.zeros(2, dtype=torch.cfloat)}, id="complex"), pytest.param({"a": 1.0}, id="no tensor"),
    pytest.param([torch.zeros(2)], id="a list")])
def test_a_checkpoint_that_is_no_state_dict_is_refused(tmp_path, held):
    torch.save(held, tmp_path / "odd.pt")
    with pytest.raises(ArtifactError, match="odd.pt: holds no state dict"):
        load_target(TargetSettings(network=RESNET, checkpoint=str(tmp_path / "odd.pt")), resolution=32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_are_loaded_as_float32(tmp_path, dtype):
    network = networks.build("convnet", resolution=16, widths=(4, 8)).to(dtype)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "half.safetensors")
    loaded = load_target(TargetSettings(network=TINY, checkpoint=str(tmp_path / "half.safetensors")), resolution=16)
    assert target_fingerprint(loaded) == target_fingerprint(network.float())


def test_our_own_file_with_mangled_metadata_is_refused(tmp_path):
    network = networks.build("convnet", resolution=16, widths=(4, 8))
    whole = {"format": FORMAT, "network": TINY.model_dump_json(), "resolution": "16"}
    for change in ({"network": "convnet"}, {"network": '{"name": 3}'}, {"resolution": "small"}):
        safetensors.torch.save_file(network.state_dict(), tmp_path / "target.safetensors", whole | change)
        with pytest.raises(ArtifactError, match="target.safetensors: does not say what network it is for"):
            load_target(tmp_path / "target.safetensors", resolution=16)


def test_our_own_file_is_enough_to_load_a_target_and_says_where_it_comes_from(tmp_path):
    network = networks.build("convnet", resolution=16, widths=(4, 8)).eval()
    save_target(tmp_path / "target.safetensors", network, TINY, resolution=16, about={"steps": 7})
    loaded = load_target(tmp_path / "target.safetensors", resolution=16)
    assert target_fingerprint(loaded) == target_fingerprint(network)
    with safetensors.safe_open(tmp_path / "target.safetensors", "pt") as file:
        assert json.loads(file.metadata()["about"]) == {"steps": 7}
    with pytest.raises(ArtifactError, match="a target for 16 px, but 32 px was asked for"):
        load_target(tmp_path / "target.safetensors", resolution=32)
    with pytest.raises(ArtifactError, match=r"network convnet \(widths \(4, 8\)\), but the settings ask for resnet18"):
        load_target(TargetSettings(checkpoint=str(tmp_path / "target.safetensors")), resolution=16)


def test_a_truncated_target_file_is_refused(tmp_path):
    save_target(tmp_path / "whole.safetensors", networks.build("convnet", resolution=16, widths=(4, 8)), TINY, resolution=16, about={})
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-8])
    with pytest.raises(ArtifactError, match="truncated"):
        load_target(tmp_path / "cut.safetensors", resolution=16)


def test_a_target_of_no_steps_is_the_seeded_untrained_network():
    first, same, other = (load_target(TargetSettings(network=TINY, steps=0, seed=seed), resolution=16) for seed in (0, 0, 1))
    assert target_fingerprint(first) == target_fingerprint(same) != target_fingerprint(other)
    with pytest.raises(ConfigError, match="has to be trained first"):
        load_target(TargetSettings(network=TINY, steps=5), resolution=16)


def test_the_fingerprint_tells_stem_paddings_apart_though_the_weights_are_the_same():
    narrow, wide = (networks.build("resnet18", resolution=32, stem_padding=padding) for padding in (1, 2))
    wide.load_state_dict(narrow.state_dict())
    assert target_fingerprint(narrow) != target_fingerprint(wide)
