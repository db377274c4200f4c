"""MKDT: trajectory matching on target representations, from the images that experts regress worst."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from method_parts import method_config, small_source
from torch import Tensor, nn

from krrst_dist import networks, seeds
from krrst_dist.config import ConfigError
from krrst_dist.methods.common.class_wise import network_of
from krrst_dist.methods.common.trajectories import matching_loss
from krrst_dist.methods.mkdt import METHOD

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(shared_data, tmp_path_factory):
    return small_source(shared_data, tmp_path_factory.mktemp("mkdt"))


def config(**distill):
    small = {"network": {"widths": [4, 4], "norm": "instance"}, "experts": 2, "teacher_epochs": 3, "expert_epochs": 1, "steps": 3,
             "teacher_batch": 20, "batch": 3, "updates": 4, "teacher_lr": 1e-4}
    return method_config("mkdt", **small | distill)


def trained(source, **distill):
    """Settings, experts by chore, the start and a part."""
    settings = config(**distill)
    experts = {chore: METHOD.do(settings, source, chore, device=CPU, alive=lambda: None) for chore in METHOD.chores(settings, source)}
    start = METHOD.start(settings, source, experts.__getitem__)
    return settings, experts, start, METHOD.part(settings, source, start, 0, read=experts.__getitem__)


def module(settings, source, theta: Tensor) -> nn.Module:
    """The network of these weights, as torch trains it."""
    model = networks.with_head(network_of(settings), source.targets.k)
    nn.utils.vector_to_parameters(theta.clone(), model.parameters())
    return model


def test_the_published_settings_are_those_of_its_commands():
    settings = METHOD.settings()
    assert (settings.teacher_lr, settings.teacher_momentum, settings.teacher_weight_decay, settings.teacher_epochs) == (0.1, 0.9, 1e-4, 20)
    assert (settings.updates, settings.steps, settings.expert_epochs, settings.max_start_epoch, settings.batch) == (5000, 40, 2, 2, 256)
    assert (settings.lr_x, settings.lr_y, settings.lr_alpha, settings.momentum) == (1000, 1, 1e-4, 0.5)


def test_an_expert_is_trained_as_torchs_sgd_does_on_the_squared_error_of_representations(source):
    settings, experts, _, _ = trained(source)
    weights = experts["expert-1"]["weights"]
    model = module(settings, source, weights[0])
    sgd = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)
    for epoch in range(3):
        order = seeds.numpy_rng(0, "expert's order", 1, epoch).permutation(54)
        for rows in (order[:20], order[20:40], order[40:]):
            sgd.zero_grad()
            error = model(source.training_images(rows)) - source.targets.look_up(source.training[rows])
            error.square().mean().backward()
            sgd.step()
        torch.testing.assert_close(nn.utils.parameters_to_vector(model.parameters()), weights[epoch + 1], rtol=1e-4, atol=1e-5)


def test_it_starts_with_the_images_that_trained_experts_regress_worst_and_their_representations(source):
    settings, experts, start, _ = trained(source)
    every, targets = np.arange(54), source.targets.look_up(source.training)
    with torch.no_grad():
        errors = [(module(settings, source, made["weights"][-1])(source.training_images(every)) - targets).square().mean(1)
                  for made in experts.values()]
    worst = np.argsort(-torch.stack(errors).mean(0).numpy())[:7]
    assert (start.label_kind, len(start.x_syn)) == ("features", 7)
    np.testing.assert_array_equal(start.x_syn, source.training_images(worst).numpy())
    np.testing.assert_array_equal(start.y_syn, targets[worst].numpy())


def test_the_loss_is_that_of_a_student_stepped_one_by_one_without_augmentation(source, float64):
    settings, experts, start, part = trained(source)
    x, y, alpha = torch.from_numpy(start.x_syn).double(), torch.from_numpy(start.y_syn).double(), torch.tensor([1e-4])
    found = part.contribute(1, x, y, alpha)
    rng = seeds.numpy_rng(settings.seed, "expert's stretch", 0, 1)
    expert, epoch = int(rng.integers(2)), int(rng.integers(2))
    weights = experts[f"expert-{expert}"]["weights"].double()
    model = module(settings, source, weights[epoch]).double()
    order = torch.randperm(7, generator=seeds.torch_rng(settings.seed, "student's order", 0, 1, 0))
    for rows in order.split(3):
        loss = (model(x[rows]) - y[rows]).square().mean()
        for value, gradient in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            value.data -= alpha * gradient
    arrived = nn.utils.parameters_to_vector(model.parameters())
    assert found.loss == pytest.approx(matching_loss(arrived, weights[epoch], weights[epoch + 1]).item(), rel=1e-6)


def test_the_gradient_is_that_of_finite_differences_in_images_representations_and_step_size(source, float64):
    _, _, start, part = trained(source)
    values = [torch.from_numpy(start.x_syn).double(), torch.from_numpy(start.y_syn).double(), torch.tensor([1e-4])]
    found = part.contribute(2, *values)
    for i, value in enumerate(values):
        direction = torch.randn(value.shape, generator=seeds.torch_rng(i, "direction"))
        size = 1e-5 * value.abs().mean()
        losses = [part.contribute(2, *(v + e * direction if j == i else v for j, v in enumerate(values))).loss for e in (size, -size)]
        slope = (losses[0] - losses[1]) / (2 * size.item())
        assert (found.gradients[i] * direction).sum().item() == pytest.approx(slope, rel=1e-3)


def test_images_and_representations_are_learned_and_the_step_size_is_left_behind(source):
    settings, _, start, part = trained(source, lr_x=10.0, lr_alpha=1e-6)
    outer = METHOD.outer(settings, start, horizon=4)
    outer.step(*part.contribute(0, *outer.values).gradients)
    made = METHOD.result(start, outer.values)
    assert made.label_kind == "features"
    assert not np.array_equal(made.x_syn, start.x_syn) and not np.array_equal(made.y_syn, start.y_syn)
    assert outer.values[2].item() != pytest.approx(1e-4, rel=1e-6)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ConfigError, match=r"distill.m = 55: there are 54 training images"):
        METHOD.check(config(m=55), training=54, classes=None)
    METHOD.check(config(m=54), training=54, classes=None)
    with pytest.raises(ConfigError, match="epoch 21 of an expert"):
        config(teacher_epochs=20, max_start_epoch=20, expert_epochs=2)
