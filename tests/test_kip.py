"""KIP: its loss against the literal one, its gradient against one graph and finite differences, its batches and its settings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from krrst_dist.algorithm import DivergedError, mean
from krrst_dist.algorithm.ntk import Convolutional, FullyConnected
from krrst_dist.bench.methods import RandomSource
from krrst_dist.config import Config, ConfigError, EngineSettings, parse
from krrst_dist.methods.kip import METHOD, KIPPart, kip_gradient, kip_loss

CLASSES, SIDE = 3, 8


def images(n: int, side: int, seed: int = 0, channels: int = 2) -> Tensor:
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def config(**distill) -> Config:
    small = {"m": 7, "kernel": "fc", "depth": 1, "batch": 20, "updates": 4}
    return parse({"preset": "test", "method": "kip", "seed": distill.pop("seed", 0),
                  "source": {"dataset": "cifar100", "resolution": SIDE, "held_out": 6}, "distill": small | distill})


def part(index: int = 0, *, of_class: int = 15, **distill) -> tuple[KIPPart, Tensor, Tensor]:
    """A shard over random images of three classes, X_s and Y_s."""
    settings = config(**distill)
    source = RandomSource(settings, CLASSES, of_class)
    start = METHOD.start(settings, source)
    return METHOD.part(settings, source, start, index), torch.from_numpy(start.x_syn).double(), torch.from_numpy(start.y_syn).double()


def test_the_published_settings_are_those_of_cifar100_with_fixed_labels():
    settings = METHOD.settings()
    assert (settings.m, settings.batch, settings.lr, settings.ridge, settings.learn_labels) == (1000, 5000, 0.04, 1e-6, False)
    assert settings.architecture() == Convolutional((False, True, True, True))
    assert METHOD.settings(extra_convolution=False).architecture() == Convolutional((True, True, True))
    assert METHOD.settings(kernel="fc", depth=1).architecture() == FullyConnected(1)


def test_the_loss_is_the_literal_one():
    features, real = images(1, 9, seed=1, channels=1)[0, 0], images(1, 9, seed=2, channels=1)[0, 0, :4]
    y_syn, y_real = images(1, 9, seed=3, channels=1)[0, 0, :, :3], images(1, 9, seed=4, channels=1)[0, 0, :4, :3]
    k_ss, k_st = features @ features.T, features @ real.T
    inverse = torch.linalg.inv(k_ss + 1e-3 * sum(k_ss[i, i] for i in range(9)) / 9 * torch.eye(9))
    errors = [(k_st[:, t] @ inverse @ y_syn[:, c] - y_real[t, c]).item() for t in range(4) for c in range(3)]
    assert kip_loss(k_ss, k_st, y_syn, y_real, 1e-3).item() == pytest.approx(0.5 * sum(e * e for e in errors) / 12)


@pytest.mark.parametrize("architecture", [FullyConnected(2), Convolutional((False, True))])
def test_the_gradient_is_that_of_one_graph(architecture):
    x, real = images(4, 4).requires_grad_(), images(5, 4, seed=1)
    y, y_real = torch.eye(4, 3, dtype=torch.float64).requires_grad_(), torch.eye(5, 3, dtype=torch.float64)
    ours, theirs = architecture.deviations(x), architecture.deviations(real)
    loss = kip_loss(architecture.kernel(x, ours, x, ours), architecture.kernel(x, ours, real, theirs), y, y_real, 1e-2)
    plain = torch.autograd.grad(loss, [x, y])
    for block in (1, 2**20):
        found, *gradients = kip_gradient(architecture, x.detach(), y.detach(), real, y_real, ridge=1e-2, block=block)
        assert found.item() == pytest.approx(loss.item())
        torch.testing.assert_close(gradients, list(plain))


@pytest.mark.parametrize("kernel", ["fc", "conv"])
def test_the_gradient_is_that_of_the_loss_by_finite_differences(kernel):
    shard, x, y = part(kernel=kernel, learn_labels=True)
    directions = images(7, SIDE, channels=3), images(1, 7, channels=1)[0, 0, :, :CLASSES]
    found = shard.contribute(1, x, y)
    for i, (dx, dy) in enumerate([(directions[0], torch.zeros_like(y)), (torch.zeros_like(x), directions[1])]):
        losses = [shard.contribute(1, x + e * dx, y + e * dy).loss for e in (1e-5, -1e-5)]
        assert (found.gradients[i] * directions[i]).sum().item() == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-5)


def test_three_shards_predict_a_third_each_and_give_what_one_gives():
    whole, x, _ = part(batch=19)
    parts = [part(s, batch=19, shards=3)[0] for s in range(3)]
    assert sorted(np.concatenate([shard.rows(2) for shard in parts])) == sorted(whole.rows(2))
    one, three = whole.contribute(2, x), mean([shard.contribute(2, x) for shard in parts])
    assert three.loss == pytest.approx(one.loss) and three.images == one.images == 19
    assert len(one.gradients) == 1
    torch.testing.assert_close(three.gradients, one.gradients)


def test_a_batch_has_equally_many_of_each_class_and_all_of_a_class_that_has_fewer():
    shard = part(batch=20)[0]
    rows = shard.rows(0)
    assert sorted(np.bincount(rows % CLASSES)) == [6, 7, 7] and len(set(rows)) == 20 and set(rows) != set(shard.rows(1))
    assert np.bincount(part(batch=20, of_class=5)[0].rows(0) % CLASSES).tolist() == [5, 5, 5]


def test_the_start_is_real_images_with_their_classes_centred_as_soft_labels():
    settings = config()
    start = METHOD.start(settings, RandomSource(settings, CLASSES, 15))
    labels = start.y_syn.argmax(1)
    assert start.label_kind == "soft" and start.recipe["optimizer"] == "adamw" and sorted(np.bincount(labels)) == [2, 2, 3]
    np.testing.assert_allclose(start.y_syn, np.eye(CLASSES)[labels] - 1 / 3, rtol=1e-6)


@pytest.mark.parametrize("learned", [False, True])
def test_adam_lowers_the_loss_on_images_that_are_always_the_same(learned):
    settings = config(learn_labels=learned, batch=45)
    source = RandomSource(settings, CLASSES, 15)
    start = METHOD.start(settings, source)
    shard, outer = METHOD.part(settings, source, start, 0), METHOD.outer(settings, start, horizon=30)
    losses = []
    for step in range(30):
        contribution = shard.contribute(step, *outer.values)
        losses.append(contribution.loss)
        before = outer.values
        outer.step(*contribution.gradients)
        if step == 0:
            moved = [(a - b).abs() for a, b in zip(outer.values, before, strict=True)]
            assert all(value.max().item() == pytest.approx(0.04, rel=1e-3) for value in moved)
    assert losses[-1] < 0.7 * losses[0]
    made = METHOD.result(start, outer.values)
    assert np.array_equal(made.y_syn, start.y_syn) != learned and not np.array_equal(made.x_syn, start.x_syn)


@pytest.mark.parametrize(("changes", "message"), [
    ({"m": 2}, r"distill.m = 2: KIP starts with real images of each of the 3 classes; take at least 3"),
    ({"m": 60}, r"distill.m = 60: there are 54 training images; lower it"),
    ({"m": 40}, r"distill.m = 40: class 1 has 5 training images"),
    ({"batch": 4, "shards": 5}, r"distill.shards = 5: .* a step has 3 \(distill.batch = 4\)"),
    ({"kernel": "conv", "depth": 4}, r"source.resolution = 8: 4 pools take a multiple of 16; .*distill.depth, or take distill.kernel = fc"),
])
def test_what_it_cannot_do_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        METHOD.check(config(**changes), training=54, classes=[30, 5, 19])


def test_another_precision_is_refused_and_labels_are_needed():
    made = config()
    METHOD.check(made, training=54, classes=[30, 5, 19])
    with pytest.raises(ConfigError, match=r"engine.precision = 'bfloat16': KIP computes in float64"):
        METHOD.check(made.model_copy(update={"engine": EngineSettings(precision="bfloat16")}), training=54, classes=[30, 5, 19])
    assert METHOD.needs_labels(made.distill) and not METHOD.needs_targets(made.distill)


def test_what_is_not_finite_is_named():
    shard, x, _ = part()
    with pytest.raises(DivergedError, match=r"update 2, shard 0: .*distill.lr = 0.04"):
        shard.contribute(2, x * float("inf"))
