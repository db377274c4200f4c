"""The outer optimiser: AdamW on pixels, with a learning rate that falls to a floor."""

from __future__ import annotations

import pytest
import torch

from krrst_dist.algorithm import OuterOptimizer

MEAN, STD = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in ((0.5, 0.45, 0.4), (0.25, 0.2, 0.3)))
PIXELS = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGETS = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels - MEAN) / STD


def optimizer(**settings) -> OuterOptimizer:
    return OuterOptimizer(normalised(PIXELS), TARGETS, **{"lr_x": 1e-2, "lr_y": 3e-2, "decay_updates": 10, "scale": STD} | settings)


def gradients(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """dL/dX_s in the normalised space and dL/dY_s, made up."""
    generator = torch.Generator().manual_seed(100 + step)
    g_x, g_y = (torch.randn(start.shape, generator=generator, dtype=torch.float64) for start in (PIXELS, TARGETS))
    return g_x, g_y


def test_it_is_torch_s_adamw_with_a_linear_schedule_on_the_pixels_themselves():
    """Literally: pixels as the parameter, normalisation inside the loss, LinearLR to 1e-3; past its end the rate stays there."""
    ours = optimizer()
    pixels, y = PIXELS.clone().requires_grad_(), TARGETS.clone().requires_grad_()
    adamw = torch.optim.AdamW([{"params": [pixels], "lr": 1e-2}, {"params": [y], "lr": 3e-2}], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(adamw, start_factor=1.0, end_factor=1e-3, total_iters=10)
    for step in range(14):
        g_x, g_y = gradients(step)
        adamw.zero_grad()
        ((normalised(pixels) * g_x).sum() + (y * g_y).sum()).backward()
        adamw.step()
        schedule.step()
        ours.step(g_x, g_y)
        assert (ours.x_syn - normalised(pixels.detach())).abs().max() < 1e-12
        assert (ours.y_syn - y.detach()).abs().max() < 1e-12


def test_the_rate_falls_linearly_to_a_thousandth_and_stays_there():
    ours, factors = optimizer(), []
    for step in range(13):
        factors.append(ours.lr_factor)
        ours.step(*gradients(step))
    assert factors[0] == 1
    assert factors[5] == pytest.approx(1 - 0.999 / 2)
    assert factors[10:] == pytest.approx([1e-3] * 3)
    assert torch.tensor(factors[:11]).diff() == pytest.approx([-0.0999] * 10, abs=1e-6)


def test_the_first_step_moves_every_channel_by_the_rate_in_pixels():
    """AdamW's first step is lr * sign(g): in units of X_s that is lr / std, channel by channel."""
    ours = optimizer()
    ours.step(*gradients(0))
    moved = (ours.x_syn - normalised(PIXELS)) * STD
    assert torch.allclose(moved, -1e-2 * gradients(0)[0].sign(), rtol=1e-5)


def test_without_a_scale_the_space_is_pixels():
    ours = optimizer(scale=1.0)
    ours.step(*gradients(0))
    assert torch.allclose(ours.x_syn - normalised(PIXELS), -1e-2 * gradients(0)[0].sign(), rtol=1e-5)


def test_there_is_no_weight_decay():
    ours = optimizer()
    start = ours.x_syn
    ours.step(torch.zeros_like(PIXELS), torch.zeros_like(TARGETS))
    assert torch.equal(ours.x_syn, start) and torch.equal(ours.y_syn, TARGETS)


def test_what_it_was_given_and_what_it_hands_out_are_not_its_own_tensors():
    x, y = normalised(PIXELS), TARGETS.clone()
    ours = OuterOptimizer(x, y, lr_x=1.0, lr_y=1.0, decay_updates=10)
    before = (ours.x_syn, ours.y_syn)
    ours.step(*gradients(0))
    assert torch.equal(x, normalised(PIXELS)) and torch.equal(y, TARGETS)
    assert torch.equal(before[0], x) and torch.equal(before[1], y)


def test_the_layout_of_the_gradient_does_not_matter():
    one, other = optimizer(), optimizer()
    g_x, g_y = gradients(0)
    one.step(g_x, g_y)
    other.step(g_x.contiguous(memory_format=torch.channels_last), g_y.T.contiguous().T)
    assert torch.equal(one.x_syn, other.x_syn) and one.x_syn.is_contiguous() and other.x_syn.is_contiguous()


@pytest.mark.parametrize("done", [0, 1, 7])
def test_it_is_restored_after_any_number_of_steps_bit_for_bit(done):
    ours = optimizer()
    for step in range(done):
        ours.step(*gradients(step))
    saved = ours.state_dict()
    restored = OuterOptimizer(torch.zeros_like(PIXELS), torch.zeros_like(TARGETS), lr_x=1e-2, lr_y=3e-2, decay_updates=10, scale=STD)
    for step in range(done, done + 5):
        ours.step(*gradients(step))
    restored.load_state_dict(saved)
    for step in range(done, done + 5):
        restored.step(*gradients(step))
    ours_now, restored_now = ours.state_dict(), restored.state_dict()
    assert ours_now.keys() == restored_now.keys() and all(torch.equal(ours_now[name], restored_now[name]) for name in ours_now)
    assert torch.equal(ours.x_syn, restored.x_syn) and restored.steps == done + 5 and restored.lr_factor == ours.lr_factor
