"""FRePo on KRR-ST's pool and ridge regression: its objective, its pool, its optimiser, its mirrored images."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from algorithm_toys import Batches, extractor, headed, problem
from method_parts import CLASSES, method_config, small_source
from torch import nn

from krrst_dist import networks, seeds
from krrst_dist.algorithm import ModelPool, meta_gradient
from krrst_dist.algorithm.lamb import Lamb
from krrst_dist.artifacts import DistilledSet
from krrst_dist.config import ConfigError
from krrst_dist.methods.frepo import METHOD, FRePoShard, Shard, frepo_objective, label_margin_loss, lecun_normal, member_loss
from krrst_dist.presets_and_grids import load_preset


@pytest.fixture(scope="module")
def source(shared_data, tmp_path_factory):
    return small_source(shared_data, tmp_path_factory.mktemp("frepo"))


def literal_loss(features, x_syn, y_syn, x_real, y_real, ridge=1e-6):
    """As FRePo states it: K_ts (K_ss + ridge trace(K_ss) / n I)^-1 y_s, by an LU solve, the trace differentiated; and the margin."""
    f_syn, f_real = features(x_syn), features(x_real)
    k_ss = f_syn @ f_syn.T
    system = k_ss + ridge * k_ss.trace() / len(k_ss) * torch.eye(len(k_ss), dtype=k_ss.dtype)
    predicted = f_real @ f_syn.T @ torch.linalg.solve(system, y_syn)
    squared = (0.5 * (predicted - y_real) ** 2).sum(1).mean()
    margins = []
    for row in y_syn:
        first, second = sorted(row, reverse=True)[:2]
        margins.append(-torch.minimum(first - second, torch.tensor(1 / len(row), dtype=row.dtype)))
    return squared + torch.stack(margins).mean()


@pytest.mark.parametrize("m", [10, 40])  # fewer and more images than the 24 features: the dual and the primal system
@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_the_objective_and_its_gradient_are_the_literal_ones(m, ridge):
    x_syn, y_syn, x_real, y_real = problem(m=m, k=CLASSES)
    y_syn = 0.2 * y_syn  # some margins below 1 / C, some above
    network = extractor().eval()
    ours = meta_gradient(network, x_syn, y_syn, x_real, y_real, ridge=ridge, objective=frepo_objective)
    x, y = x_syn.clone().requires_grad_(), y_syn.clone().requires_grad_()
    loss = literal_loss(network, x, y, x_real, y_real, ridge)
    g_x, g_y = torch.autograd.grad(loss, (x, y))
    assert ours.loss.item() == pytest.approx(loss.item(), rel=1e-9)
    assert torch.allclose(ours.x, g_x, rtol=1e-6, atol=1e-6 * g_x.abs().max().item())
    assert torch.allclose(ours.y, g_y, rtol=1e-6, atol=1e-6 * g_y.abs().max().item())


def test_its_gradient_is_that_of_finite_differences():
    x_syn, y_syn, x_real, y_real = problem(m=6, k=CLASSES)
    network = extractor().eval()

    def loss(x, y):
        return meta_gradient(network, x, y, x_real, y_real, ridge=0.1, objective=frepo_objective).loss.item()

    ours = meta_gradient(network, x_syn, y_syn, x_real, y_real, ridge=0.1, objective=frepo_objective)
    for value, gradient, place in ((x_syn, ours.x, 0), (y_syn, ours.y, 1)):
        direction = torch.randn(value.shape, generator=seeds.torch_rng(0, "direction", place), dtype=value.dtype)
        step = [1e-5 * direction if i == place else 0 for i in range(2)]
        slope = (loss(x_syn + step[0], y_syn + step[1]) - loss(x_syn - step[0], y_syn - step[1])) / 2e-5
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-5)


def test_its_prediction_is_ridge_regression_solved_directly():
    """The ridge system's weights minimise |F w - y|^2 + lambda |w|^2: there the gradient of that is 0, and the loss is the prediction's."""
    x_syn, y_syn, x_real, y_real = problem(m=6, k=CLASSES)
    f_syn, f_real = x_syn.flatten(1)[:, :20], x_real.flatten(1)[:, :20]
    penalty = 0.1 * f_syn.square().sum() / len(f_syn)
    w = torch.linalg.lstsq(torch.cat([f_syn, penalty.sqrt() * torch.eye(20, dtype=f_syn.dtype)]),
                           torch.cat([y_syn, torch.zeros(20, CLASSES, dtype=f_syn.dtype)])).solution
    expected = 0.5 * (f_real @ w - y_real).square().sum(1).mean() + label_margin_loss(y_syn)
    assert frepo_objective(f_syn, y_syn, f_real, y_real, 0.1)[0].item() == pytest.approx(expected.item(), rel=1e-9)


def test_the_margin_counts_up_to_a_classes_share():
    y = torch.tensor([[0.9, 0.1, 0.0], [0.3, 0.2, 0.1], [0.5, 0.5, 0.0]])
    assert label_margin_loss(y).item() == pytest.approx(-(1 / 3 + 0.1 + 0) / 3)


# its pool


def pool(**settings) -> ModelPool:
    return ModelPool(headed, **{"size": 4, "max_steps": 9, "ages": "counted", "loss": member_loss, "seed": 7,
                                "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.01)} | settings)


def test_its_networks_start_untrained_with_spread_counts_and_are_replaced_when_these_are_spent():
    x_syn, y_syn, *_ = problem()
    models, fresh = pool(), pool()
    models.warm_up(x_syn, y_syn)
    assert [member.steps for member in models.members] == [0, 2, 4, 6]
    for ours, other in zip(models.members, fresh.members, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), other.model.parameters(), strict=True))
    for _ in range(3):
        models.advance(3, x_syn, y_syn)
    assert (models.members[3].steps, models.members[3].births) == (9, 1)
    models.advance(3, x_syn, y_syn)
    assert (models.members[3].steps, models.members[3].births) == (0, 2)


def test_a_network_is_replaced_after_more_steps_than_published(source):
    part = METHOD.part(config(), source, METHOD.start(config(), source), 0)
    assert part.pool.max_steps == 101  # a count above 100 ends it
    assert METHOD.settings().pool.max_steps == 100


def test_a_training_step_is_adams_on_half_the_squared_error_of_a_random_part():
    x_syn, y_syn, *_ = problem()
    models = pool(batch=4)
    member = models.members[0]
    order = torch.randperm(len(x_syn), generator=seeds.torch_rng(7, "pool batch", 0, 0, 1, 0))[:4]
    with seeds.seeded(7, "pool member", 0, 0, 0):
        model = headed().train()
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    loss = 0.5 * ((model(x_syn[order]) - y_syn[order]) ** 2).sum() / 4
    loss.backward()
    adam.step()
    assert member.train_step(x_syn, y_syn).item() == pytest.approx(loss.item(), rel=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(member.model.parameters(), model.parameters(), strict=True))


def test_a_saved_pool_goes_on_with_adams_moments_exactly():
    x_syn, y_syn, *_ = problem()
    models, resumed = pool(batch=4), pool(batch=4)
    for _ in range(3):
        models.advance(1, x_syn, y_syn)
    resumed.load_state_dict({name: value.clone() for name, value in models.state_dict().items()})
    for each in (models, resumed):
        each.advance(1, x_syn, y_syn)
    ours, theirs = models.state_dict(), resumed.state_dict()
    assert list(ours) == list(theirs)
    assert any("exp_avg_sq" in name for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_weights_start_with_the_variance_of_lecun_and_no_bias():
    with seeds.seeded(0, "lecun"):
        model = networks.with_head(networks.build("convnet", resolution=8, widths=(64, 64), norm_before=True), 10)
        lecun_normal(model)
    convolution = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)][1]
    assert convolution.weight.var().item() == pytest.approx(1 / (64 * 9), rel=0.05)
    assert not convolution.bias.any()
    assert {layer.momentum for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)} == {0.9}


# its optimiser


def test_lamb_moves_a_tensor_by_the_learning_rate_times_its_own_length():
    value = torch.randn(4, 5, generator=seeds.torch_rng(0, "lamb"), dtype=torch.float64)
    gradients = torch.randn(3, 4, 5, generator=seeds.torch_rng(1, "lamb"), dtype=torch.float64)
    stepped = value.clone()
    lamb = Lamb([{"params": [stepped], "lr": 0.1}])
    first, second, expected = torch.zeros_like(value), torch.zeros_like(value), value.clone()
    for t, gradient in enumerate(gradients, start=1):
        before = stepped.clone()
        stepped.grad = gradient
        lamb.step()
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        u = first / (1 - 0.9**t) / (torch.sqrt(second / (1 - 0.999**t)) + 1e-6)
        expected = expected - 0.1 * expected.norm() / u.norm() * u
        assert torch.allclose(stepped, expected, rtol=1e-12)
        assert (stepped - before).norm().item() == pytest.approx(0.1 * before.norm().item())


def test_lamb_takes_adams_step_where_a_tensor_is_0():
    value = torch.zeros(3)
    value.grad = torch.tensor([1.0, -2.0, 0.0])
    Lamb([{"params": [value], "lr": 0.1}]).step()
    assert value.tolist() == pytest.approx([-0.1, 0.1, 0.0], abs=1e-6)


def test_the_learning_rate_falls_by_a_cosine_to_a_tenth(source):
    outer = METHOD.outer(config(), METHOD.start(config(), source), horizon=4)
    factors = []
    for _ in range(6):
        factors.append(outer.lr_factor)
        outer.step(*(torch.zeros_like(value) for value in outer.values))
    assert factors == pytest.approx([1, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, 0.55, 0.1 + 0.9 * (1 - math.sqrt(0.5)) / 2, 0.1, 0.1])


def test_what_is_learned_goes_on_from_its_saved_state_exactly(source):
    whole, resumed = (METHOD.outer(config(), METHOD.start(config(), source), horizon=9) for _ in range(2))
    gradients = [[torch.randn(value.shape, generator=seeds.torch_rng(0, "gradient", step)) for value in whole.values] for step in range(4)]
    for step in range(3):
        whole.step(*gradients[step])
    resumed.load_state_dict(whole.state_dict())
    for outer in (whole, resumed):
        outer.step(*gradients[3])
    assert all(torch.equal(a, b) for a, b in zip(whole.values, resumed.values, strict=True))


# its parts, on files


def config(**distill):
    small = {"network": {"widths": [4, 4], "norm_before": True}, "size": 2}
    return method_config("frepo", **{"m": 6, "batch": 6, "updates": 3, "pool": small} | distill)


def test_it_starts_with_real_images_and_scaled_centred_labels(source):
    start = METHOD.start(config(), source)
    assert (start.label_kind, start.y_syn.shape) == ("soft", (6, CLASSES))
    rows = torch.from_numpy(start.y_syn) * math.sqrt(CLASSES / 10)
    assert torch.allclose(rows, F.one_hot(rows.argmax(1), CLASSES) - 1 / CLASSES)
    assert sorted(rows.argmax(1).tolist()) == [0, 0, 1, 1, 2, 2]


def test_real_batches_come_with_their_classes(source):
    part = METHOD.part(config(), source, METHOD.start(config(), source), 0)
    x, y = part.batches.next()
    assert (x.shape, y.shape) == ((6, 3, 8, 8), (6, CLASSES))
    every = source.training_images(range(len(source.training)))
    place = [int((every - image).abs().sum((1, 2, 3)).argmin()) for image in x]
    assert torch.allclose(y, F.one_hot(torch.from_numpy(source.labels[place]), CLASSES) - 1 / CLASSES)


def test_mirrored_images_count_as_images_of_their_own():
    x_syn, y_syn, x_real, y_real = (value.float() for value in problem(m=4, k=CLASSES))
    models = [ModelPool(lambda: headed(dtype=torch.float32, k=CLASSES), size=1, max_steps=9, ages="counted") for _ in range(2)]
    doubled, plain = (kind(0, pool, Batches((x_real, y_real)), ridge=0.1, objective=frepo_objective)
                      for kind, pool in zip((FRePoShard, Shard), models, strict=True))
    x, y = x_syn.clone().requires_grad_(), y_syn.clone().requires_grad_()
    both = torch.cat([x, x.flip(3)]), torch.cat([y, y])
    there = plain.contribute(0, *(value.detach() for value in both))
    expected = torch.autograd.grad(both, (x, y), there.gradients)
    ours = doubled.contribute(0, x_syn, y_syn)
    assert ours.loss == pytest.approx(there.loss)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours.gradients, expected, strict=True))
    assert ours.gradients[0].shape == x_syn.shape


def test_a_shard_that_is_saved_goes_on_exactly(source):
    start = METHOD.start(config(), source)
    whole, resumed = (METHOD.part(config(), source, start, 0) for _ in range(2))
    values = torch.from_numpy(start.x_syn), torch.from_numpy(start.y_syn)
    whole.warm_up(*values)
    for step in range(2):
        whole.contribute(step, *values)
        whole.advance(step, *values)
    tensors, numbers = whole.state_dict()
    resumed.load_state_dict({name: value.clone() for name, value in tensors.items()}, dict(numbers))
    ours, theirs = (part.contribute(2, *values) for part in (whole, resumed))
    assert ours.loss == theirs.loss
    assert all(torch.equal(a, b) for a, b in zip(ours.gradients, theirs.gradients, strict=True))


@pytest.mark.parametrize("changes, message", [
    ({"m": 61}, "distill.m = 61"), ({"batch": 5, "shards": 2}, "take batch = 4"), ({"batch": 60}, "lower distill.batch to at most 54"),
    ({"m": 1}, "m"), ({"pool": {"network": {"widths": [4, 4, 4, 4]}}}, "multiple of 16"),
])
def test_what_it_cannot_do_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        METHOD.check(config(**changes), training=54, classes=[18, 18, 18])


def test_a_single_class_and_another_precision_are_refused():
    with pytest.raises(ConfigError, match="single class"):
        METHOD.check(config(), training=54, classes=[54])
    rough = load_preset("quickstart", method="frepo", **{"engine.precision": "bfloat16"})
    with pytest.raises(ConfigError, match="float32 alone"):
        METHOD.check(rough, training=900, classes=[180] * 5)


@pytest.mark.parametrize("preset, steps, warm_up", [("cifar100", 10_000, 500), ("tinyimagenet", 40_000, 500), ("imagenet64", 10_000, 500),
                                                    ("imagenette", 1000, 500), ("quickstart", 300, 150)])
def test_its_set_carries_the_published_recipe(source, preset, steps, warm_up):
    settings = load_preset(preset, method="frepo").distill
    recipe = METHOD.start(config(pretrain_steps=settings.pretrain_steps), source).recipe
    assert (recipe["steps"], recipe["batch"], recipe["warmup_steps"]) == (steps, 500, warm_up)
    assert (recipe["optimizer"], recipe["lr"]) == ("adamw", 3e-4)


def test_its_result_is_a_set_with_soft_labels(source):
    start = METHOD.start(config(), source)
    made = METHOD.result(start, [torch.from_numpy(start.x_syn) + 1, torch.from_numpy(start.y_syn) * 2])
    assert isinstance(made, DistilledSet)
    assert (made.label_kind, made.x_syn[0, 0, 0, 0]) == ("soft", start.x_syn[0, 0, 0, 0] + 1)


def test_a_network_without_biases_in_its_convolutions_starts_too():
    network = networks.with_head(networks.build("resnet10", resolution=64), 3)
    lecun_normal(network)
    assert all(value.isfinite().all() for value in network.parameters())
