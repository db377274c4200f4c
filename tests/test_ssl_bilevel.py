"""SSL bilevel on tiny inputs in float64: its gradient, what random views do to it, and the set without labels that it leaves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import pytest
import torch
from betons import Items, prepared_beton, real_images
from torch import Tensor, nn

from krrst_dist import networks, plugins, seeds
from krrst_dist.algorithm import DivergedError, mean
from krrst_dist.algorithm.barlow_twins import barlow_twins, projector
from krrst_dist.artifacts import DistilledSet
from krrst_dist.augment import ssl_pair
from krrst_dist.config import Config, ConfigError, parse
from krrst_dist.methods.common.flat_network import FlatNetwork
from krrst_dist.methods.common.source import Source
from krrst_dist.methods.ssl_bilevel import outer_gradient
from krrst_dist.on_ray import preflight
from krrst_dist.presets_and_grids import load_preset
from krrst_dist.recipes import PRETRAIN, pretrain_recipe

SIDE = 8
METHOD = plugins.load("ssl_bilevel")


def config(**distill) -> Config:
    small = {"m": 7, "network": {"widths": [4, 4]}, "projector": [6, 5], "steps": 3, "batch": 9, "updates": 4, "lr_net": 0.01}
    return parse({"preset": "test", "method": "ssl_bilevel", "seed": distill.pop("seed", 0),
                  "source": {"dataset": "cifar100", "resolution": SIDE, "held_out": 6}, "distill": small | distill,
                  "evaluate": {"pretrain": {"steps": 9, "batch": 5}}})


@pytest.fixture(scope="module")
def source(shared_data, tmp_path_factory) -> Source:
    """60 CIFAR-100 images without their labels or any targets."""
    images = real_images(shared_data / "cifar100-test.parquet", 60, SIDE)
    prepared = prepared_beton(tmp_path_factory.mktemp("bilevel") / "images.beton", Items(images.pixels, np.full(60, -1)), "raw")
    prepared.save()
    return Source.open(config(), prepared.path, None)


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def part(source: Source, index: int = 0, **distill):
    settings = config(**distill)
    begin = METHOD.start(settings, source)
    return METHOD.part(settings, source, begin, index), torch.from_numpy(begin.x_syn)


# the gradient


def test_the_gradient_is_that_of_the_loss_by_finite_differences(source, float64):
    shard, x = part(source)
    noise, direction = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(0))
    x = 0.9 * x.double() + 0.05 * noise  # off the kinks: black and white are where clipping begins, gray is where hue has none
    found = shard.contribute(1, x)
    losses = [shard.contribute(1, x + e * direction).loss for e in (1e-7, -1e-7)]
    assert found.gradients[0].dtype == torch.float64 and found.images == 9
    assert (found.gradients[0] * direction).sum().item() == pytest.approx((losses[0] - losses[1]) / 2e-7, rel=1e-4)


def test_the_gradient_is_that_of_one_plain_graph_over_a_module_that_is_trained(source, float64):
    shard, x_syn = part(source, off_diagonal=0.1)
    found = shard.contribute(2, x_syn.double())
    scale, offset = (torch.from_numpy(values) for values in (source.space.scale(), source.space.offset()))

    def loss(model: nn.Module, weights: dict[str, Tensor], x: Tensor, purpose: str, *indices: int) -> Tensor:
        views = ssl_pair.two_views(x * scale + offset, seeds.torch_rng(0, purpose, *indices))
        z = torch.func.functional_call(model, weights, (torch.cat([(view - offset) / scale for view in views]),))
        return barlow_twins(z[:len(x)], z[len(x):], 0.1)

    with seeds.seeded(0, "bilevel network", 0, 2):
        network = networks.build("convnet", resolution=SIDE, widths=(4, 4))
        model = nn.Sequential(network, projector(network.feature_dim, [6, 5]))
    weights, x = dict(model.named_parameters()), x_syn.double().requires_grad_()
    for i in range(3):
        gradients = torch.autograd.grad(loss(model, weights, x, "bilevel views", 0, 2, i), list(weights.values()), create_graph=True)
        weights = {name: value - 0.01 * g for (name, value), g in zip(weights.items(), gradients, strict=True)}
    rows = seeds.numpy_rng(0, "bilevel real images", 0, 2).permutation(54)[:9]
    outer = loss(model, weights, source.training_images(rows).double(), "bilevel real views", 0, 2)
    assert found.loss == pytest.approx(outer.item(), rel=1e-12)
    torch.testing.assert_close(found.gradients[0], torch.autograd.grad(outer, x)[0], rtol=1e-7, atol=1e-12)


def test_shards_have_networks_and_real_images_of_their_own_and_their_gradients_are_averaged(source, float64):
    parts = [part(source, s, shards=3) for s in range(3)]
    three = [shard.contribute(1, x.double()) for shard, x in parts]
    assert len({found.loss for found in three}) == 3
    combined = mean(three)
    assert METHOD.combine is mean and combined.loss == pytest.approx(sum(found.loss for found in three) / 3)
    torch.testing.assert_close(combined.gradients[0], sum(found.gradients[0] for found in three) / 3)


def test_a_step_is_a_function_of_seed_shard_and_number_alone(source):
    (shard, x), (again, _), (other, _) = part(source), part(source), part(source, seed=1)
    shard.contribute(0, x)
    one, two = shard.contribute(1, x), again.contribute(1, x)
    assert one.loss == two.loss and torch.equal(one.gradients[0], two.gradients[0])
    assert len({found.loss for found in (one, shard.contribute(2, x), other.contribute(1, x))}) == 3


def test_batch_norms_statistics_are_not_carried_from_one_call_to_the_next(float64):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    flat, x = FlatNetwork(model), torch.randn(5, 3)
    torch.testing.assert_close(flat(flat.start, x), flat(flat.start, x), rtol=0, atol=0)
    assert model[1].num_batches_tracked == 0 and not model[1].running_mean.any()


def test_the_loss_on_fixed_draws_falls_as_x_syn_is_learned(source):
    """With the same network, real images and views in every step nothing is random, and steps downhill lead down."""
    settings = config(lr_x=0.003, lr_net=1e-3)
    begin = METHOD.start(settings, source)
    shard, outer, losses = METHOD.part(settings, source, begin, 0), METHOD.outer(settings, begin, horizon=60), []
    for _ in range(30):
        found = shard.contribute(0, *outer.values)
        losses.append(found.loss)
        outer.step(*found.gradients)
    assert np.mean(losses[-5:]) < 0.9 * losses[0]
    assert outer.lr == pytest.approx(0.003 * (1 - 0.999 / 2))


# Theorem 1 for this gradient, with two views of the whole set as all there are


class Tiny:
    """One network, six synthetic and six real images. All draws can be listed, so that expectations are exact."""

    def __init__(self) -> None:
        self._x_syn, self._x_real = torch.rand(2, 6, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        with seeds.seeded(0, "tiny"):
            network = networks.build("convnet", resolution=SIDE, widths=(4, 4))
            self._network = FlatNetwork(nn.Sequential(network, projector(network.feature_dim, [5])))

    def gradient(self, draws: Sequence[Sequence[int]], rate: float) -> Tensor:
        """draws: of every inner step, the views that its loss is averaged over."""
        def pair(x: Tensor, view: int) -> tuple[Tensor, Tensor]:
            return ssl_pair.two_views(x, torch.Generator().manual_seed(view))

        return outer_gradient(self._network, self._x_syn, views=lambda i, x: [pair(x, view) for view in draws[i]],
                              real=[pair(self._x_real, 9)], steps=len(draws), rate=rate, off_diagonal=0.1)[1]

    def bias(self, *, steps: int = 1, n: int = 1, rate: float = 1e-5) -> tuple[float, float]:
        """How far the expected gradient, n views drawn in a step, is from that of the expected inner loss; and its standard deviation.

        Both over the latter's norm.
        """
        true = self.gradient([[0, 1]] * steps, rate)
        each = list(product(product((0, 1), repeat=n), repeat=steps))
        found = torch.stack([self.gradient(draws, rate) for draws in each])
        return float((found.mean(0) - true).norm() / true.norm()), float(found.var(0, correction=0).sum().sqrt() / true.norm())


@pytest.fixture
def tiny(float64) -> Tiny:
    return Tiny()


def test_the_expected_gradient_is_biased_more_so_after_more_steps(tiny):
    biases, deviations = zip(*(tiny.bias(steps=steps) for steps in (1, 2, 3)), strict=True)
    assert 1e-3 < biases[0] < biases[1] / 2 < biases[2] / 2
    assert min(deviations) > 0.3, "the spread of a single gradient, beside which the bias is not seen"


def test_more_views_inside_one_loss_shrink_the_bias_as_1_over_n(tiny):
    one, two, four = (tiny.bias(n=n)[0] for n in (1, 2, 4))
    assert (one / two, two / four) == pytest.approx((2, 2), rel=0.05)


def test_the_bias_over_the_gradient_grows_with_the_inner_learning_rate(tiny):
    assert tiny.bias(rate=1e-6)[0] / tiny.bias(rate=1e-7)[0] == pytest.approx(10, rel=0.1)
    assert tiny.bias(rate=1e-3)[0] > 0.5, "at rates that train"


def test_with_one_view_alone_nothing_is_drawn_and_there_is_no_bias(tiny):
    torch.testing.assert_close(tiny.gradient([[1]] * 2, 1e-3), tiny.gradient([[1, 1]] * 2, 1e-3), rtol=1e-9, atol=1e-12)


# what comes out


def test_it_starts_as_random_images_alone_and_leaves_a_set_without_labels(source, tmp_path):
    settings = config()
    begin = METHOD.start(settings, source)
    made = METHOD.result(begin, [torch.from_numpy(begin.x_syn + 1)])
    assert begin.label_kind == made.label_kind == "none" and made.y_syn.shape == (7, 0) and made.class_names is None
    assert pretrain_recipe(made.recipe) == PRETRAIN["none"].model_copy(update={"steps": 9, "batch": 5})
    assert made.recipe["loss"].startswith("Barlow Twins")
    made.save(tmp_path / "set.safetensors")
    assert DistilledSet.load(tmp_path / "set.safetensors").fingerprint == made.fingerprint != begin.fingerprint


# what it asks for


def test_it_takes_sources_without_labels_or_targets():
    settings = config()
    preflight.check_labels(settings, labelled=False)
    assert not preflight.needs_targets(settings) and not METHOD.measured(settings.distill)
    METHOD.check(settings, training=54, classes=None)


def test_the_presets_give_it_a_network_that_fits():
    for preset in ("cifar100", "tinyimagenet", "imagenet64", "imagenette", "cifar100-cpu", "quickstart"):
        made = load_preset(preset, method="ssl_bilevel")
        METHOD.check(made, training=9000, classes=None)


@pytest.mark.parametrize(("changes", "message"), [
    ({"m": 55}, r"distill.m = 55: there are 54 training images; lower it"),
    ({"batch": 55}, r"distill.batch = 55: there are 54 training images; lower it"),
    ({"projector": []}, r"distill.projector = \(\): .*give at least one width"),
    ({"network": {"widths": [4] * 4}}, r"resolution"),
])
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        METHOD.check(config(**changes), training=54, classes=None)


def test_one_image_is_refused_and_so_are_networks_that_diverge(source):
    with pytest.raises(ConfigError, match=r"distill.m = 1"):
        config(m=1)
    shard, x = part(source, lr_net=1e30)
    with pytest.raises(DivergedError, match=r"update 2, shard 0: .*distill.lr_net, distill.lr_x"):
        shard.contribute(2, x)
