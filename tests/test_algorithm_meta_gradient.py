"""The closed-form meta-gradient against plain autograd, and what it promises about memory, modes and rounding."""

from __future__ import annotations

import math

import pytest
import torch
from algorithm_toys import FEATURES, extractor, problem, relative_error, textbook_gradient
from torch import Tensor, nn

from krrst_dist.algorithm import Contribution, RidgeError, mean, meta_gradient

DUAL, EDGE, PRIMAL = 10, FEATURES + 1, 60  # m below, at and above d + 1


@pytest.mark.parametrize("reference", ["dual", "primal"])
@pytest.mark.parametrize("m", [1, DUAL, EDGE, EDGE + 1, PRIMAL])
def test_loss_and_both_gradients_agree_with_autograd_through_an_lu_solve(m, reference):
    data = problem(m=m)
    ours = meta_gradient(extractor(), *data)
    loss, g_x, g_y = textbook_gradient(extractor(), *data, primal=reference == "primal")
    assert relative_error(ours.loss, loss) < 1e-9
    assert relative_error(ours.x, g_x) < 1e-9
    assert relative_error(ours.y, g_y) < 1e-9
    assert ours.x.shape == data[0].shape and ours.y.shape == data[1].shape and ours.loss.shape == () and ours.retries == 0


def test_the_gradient_predicts_the_change_of_the_loss_when_lambda_is_held():
    """A finite difference, so that a mistake shared with autograd's formulation cannot hide; lambda does not follow x_syn."""
    x_syn, y_syn, x_real, y_real = problem()
    network, ours = extractor().eval(), meta_gradient(extractor(), *problem())
    ridge = 1e-6
    with torch.no_grad():
        trace = network(x_syn).square().sum() + len(x_syn)

        def loss_at(x: Tensor, y: Tensor) -> Tensor:
            held = ridge * trace / (network(x).square().sum() + len(x))  # the ridge that gives the same lambda at x
            return meta_gradient(network, x, y, x_real, y_real, ridge=held.item()).loss

        step = 1e-6
        along_x = (loss_at(x_syn + step * ours.x, y_syn) - loss_at(x_syn - step * ours.x, y_syn)) / (2 * step)
        along_y = (loss_at(x_syn, y_syn + step * ours.y) - loss_at(x_syn, y_syn - step * ours.y)) / (2 * step)
    assert relative_error(along_x, ours.x.square().sum()) < 1e-5
    assert relative_error(along_y, ours.y.square().sum()) < 1e-5


def test_lambda_is_a_constant_and_not_differentiated():
    """With a ridge that matters, differentiating trace(K) would change the gradient: ours is the one that does not."""
    x_syn, y_syn, x_real, y_real = data = problem()
    ours = meta_gradient(extractor(), *data, ridge=0.1)
    network, x = extractor().eval(), x_syn.clone().requires_grad_()
    f_syn, f_real = (torch.cat([f, f.new_ones(len(f), 1)], 1) for f in (network(x), network(x_real)))
    kernel = f_syn @ f_syn.T
    moving = f_real @ f_syn.T @ torch.linalg.solve(kernel + 0.1 * kernel.trace() * torch.eye(len(x), dtype=x.dtype), y_syn)
    (g_moving,) = torch.autograd.grad((moving - y_real).square().mean(), x)
    _, g_x, _ = textbook_gradient(extractor(), *data, ridge=0.1)
    assert relative_error(ours.x, g_x) < 1e-9
    assert relative_error(ours.x, g_moving) > 1e-2


@pytest.mark.parametrize("m", [DUAL, PRIMAL])
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 1000])
def test_chunks_of_any_size_give_the_whole(m, chunk_size):
    whole, chunked = (meta_gradient(extractor(), *problem(m=m), chunk_size=size) for size in (None, chunk_size))
    assert relative_error(chunked.loss, whole.loss) < 1e-12
    assert relative_error(chunked.x, whole.x) < 1e-10
    assert relative_error(chunked.y, whole.y) < 1e-10


def test_a_chunk_bounds_the_images_that_pass_with_activations_held():
    seen: list[tuple[int, bool]] = []

    def watched(x: Tensor) -> Tensor:
        seen.append((len(x), x.requires_grad))
        return x.flatten(1)

    meta_gradient(watched, *problem(), chunk_size=4)
    assert max(images for images, _ in seen) == 4
    assert [images for images, held in seen if held] == [4, 4, 2]


@pytest.mark.parametrize("m", [DUAL, PRIMAL])
def test_parts_of_the_real_batch_combine_to_the_whole(m):
    x_syn, y_syn, x_real, y_real = problem(m=m, b=16)
    whole = meta_gradient(extractor(), x_syn, y_syn, x_real, y_real)
    parts = []
    for rows in (slice(0, 3), slice(3, 4), slice(4, 16)):  # unequal on purpose
        g = meta_gradient(extractor(), x_syn, y_syn, x_real[rows], y_real[rows])
        parts.append(Contribution(g.loss.item(), (g.x, g.y), len(x_real[rows]), g.retries))
    combined = mean(parts)
    assert combined.images == 16
    assert combined.loss == pytest.approx(whole.loss.item(), rel=1e-12)
    assert relative_error(combined.gradients[0], whole.x) < 1e-10
    assert relative_error(combined.gradients[1], whole.y) < 1e-10


def spectrum(n: int, d: int, smallest: float, *, seed: int) -> Tensor:
    """A float32 [n, d] with singular values 1, then 0.3 falling geometrically to `smallest`."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(n, d)
    u, v = (torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64))[0] for size in (n, d))
    values = torch.cat([torch.ones(1), torch.logspace(math.log10(0.3), math.log10(smallest), rank - 1)]).double()
    return (u * values @ v.T).float()


@pytest.mark.parametrize(("smallest", "least", "most", "bound"), [(4e-3, 3e4, 1e5, 1e-2), (1e-8, 5e5, 1.1e6, 1e-1)])
@pytest.mark.parametrize("m", [40, 400])
def test_float32_keeps_the_stated_share_of_the_largest_entry(m, smallest, least, most, bound):
    """1e-2 where cond(K + lambda I) < 1e5, 1e-1 at 1e6, in the smaller of the two systems (METHOD 2)."""
    d, k, b = 108, 16, 64  # images of 3 x 6 x 6 are their own features
    scale = 100.0  # far above the bias column, which would otherwise set the conditioning
    features = scale * spectrum(m, d, smallest, seed=m)
    x_syn = features.view(m, 3, 6, 6)
    generator = torch.Generator().manual_seed(1)
    x_real = features[torch.randint(m, (b,), generator=generator)].view(b, 3, 6, 6) + 1e-2 * torch.randn(b, 3, 6, 6, generator=generator)
    y_syn, y_real = torch.randn(m, k, generator=generator), torch.randn(b, k, generator=generator)

    f = torch.cat([features, torch.ones(m, 1)], 1).double()
    gram = f @ f.T if m <= d + 1 else f.T @ f
    system = gram + 1e-6 * gram.trace() * torch.eye(len(gram), dtype=gram.dtype)
    assert least < torch.linalg.cond(system) < most

    single = meta_gradient(lambda x: x.flatten(1), x_syn, y_syn, x_real, y_real)
    double = meta_gradient(lambda x: x.flatten(1), x_syn.double(), y_syn.double(), x_real.double(), y_real.double())
    assert single.x.dtype == single.y.dtype == single.loss.dtype == torch.float32
    assert relative_error(single.loss, double.loss) < bound
    assert relative_error(single.x, double.x) < bound
    assert relative_error(single.y, double.y) < bound


def test_the_extractor_works_in_eval_mode_and_is_left_as_it_was_found():
    network = extractor()
    network.train()
    frozen, evaluating = network.layers[0], network.layers[1]
    frozen.weight.requires_grad_(False)
    evaluating.eval()
    modes = [module.training for module in network.modules()]
    needs = [parameter.requires_grad for parameter in network.parameters()]
    state = {name: value.clone() for name, value in network.state_dict().items()}
    inside: list[bool] = []
    network.register_forward_hook(lambda module, *_: inside.append(module.training or any(p.requires_grad for p in module.parameters())))

    meta_gradient(network, *problem(), chunk_size=4)

    assert inside and not any(inside)
    assert [module.training for module in network.modules()] == modes
    assert [parameter.requires_grad for parameter in network.parameters()] == needs
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())  # batch norm's counters included
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_network_given_by_its_method_is_in_eval_mode_too():
    network = extractor()
    assert torch.equal(meta_gradient(network.features, *problem()).x, meta_gradient(network, *problem()).x)
    assert network.training


def test_the_extractor_is_left_as_it_was_found_by_an_error_too():
    network = extractor()
    x_syn, *rest = problem()
    with pytest.raises(RidgeError):
        meta_gradient(network, x_syn * float("nan"), *rest)
    assert network.training and all(parameter.requires_grad for parameter in network.parameters())


def test_inputs_are_not_touched():
    data = problem()
    copies = [value.clone() for value in data]
    meta_gradient(extractor(), *data)
    assert all(torch.equal(value, copy) for value, copy in zip(data, copies, strict=True))
    assert all(value.grad is None and not value.requires_grad for value in data)


def test_channels_last_images_change_rounding_only():
    x_syn, y_syn, x_real, y_real = problem()
    ours = meta_gradient(extractor(), x_syn, y_syn, x_real, y_real)
    last = meta_gradient(extractor().to(memory_format=torch.channels_last), x_syn.contiguous(memory_format=torch.channels_last), y_syn,
                         x_real.contiguous(memory_format=torch.channels_last), y_real)
    assert relative_error(last.x, ours.x) < 1e-10 and relative_error(last.y, ours.y) < 1e-10


def test_bfloat16_features_leave_the_ridge_system_in_float32():
    data = problem(dtype=torch.float32)
    exact = meta_gradient(extractor(dtype=torch.float32), *data, ridge=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        rough = meta_gradient(extractor(dtype=torch.float32), *data, ridge=1e-2)
    assert rough.loss.dtype == rough.x.dtype == rough.y.dtype == torch.float32
    assert 0 < relative_error(rough.y, exact.y) < 0.1  # a ridge system in bfloat16 would be off by far more than 2^-8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y, xb, yb: (x, y[:, :3], xb, yb), "y_syn has 3 target dimensions, y_real 5"),
        (lambda x, y, xb, yb: (x[:4], y, xb, yb), "same n > 0"),
        (lambda x, y, xb, yb: (x, y, xb[:0], yb[:0]), "same n > 0"),
        (lambda x, y, xb, yb: (x, y, xb[..., :4], yb), "one shape"),
        (lambda x, y, xb, yb: (x, y[:, 0], xb, yb), r"\[n, k\]"),
    ],
    ids=["widths of y", "lengths", "an empty batch", "image sizes", "labels instead of targets"],
)
def test_shapes_that_do_not_fit_are_refused_before_anything_is_computed(change, message):
    def never(x: Tensor) -> Tensor:
        raise AssertionError("computed")

    with pytest.raises(ValueError, match=message):
        meta_gradient(never, *change(*problem()))


def test_a_chunk_of_no_images_is_refused():
    with pytest.raises(ValueError, match="chunk_size = 0: at least 1"):
        meta_gradient(nn.Flatten(), *problem(), chunk_size=0)
