"""The networks are the published ones, and behave as the meta-gradient needs them to."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional

from krrst_dist.config import ConfigError, NetworkSettings
from krrst_dist.networks import _REGISTRY, build, convnet, names, with_head
from krrst_dist.torchvision_ops import torchvision

# (name, resolution, options, parameters without the head, features): REFERENCE 3, ResNet-50 as torchvision counts it
PUBLISHED = [
    ("convnet", 32, {"widths": (128, 256, 512)}, 1_480_704, 8192),
    ("convnet", 64, {"widths": (64, 128, 256, 512)}, 1_552_896, 8192),
    ("convnet", 224, {"widths": (32, 64, 128, 256, 512)}, 1_570_560, 25_088),
    ("vgg11", 64, {}, 9_225_984, 2048),
    ("alexnet", 64, {}, 1_843_392, 12_288),
    ("mobilenet", 64, {}, 1_079_504, 1280),
    ("resnet10", 64, {}, 4_898_112, 512),
    ("resnet18", 32, {"stem_padding": 1}, 11_168_832, 512),
    ("resnet18", 32, {"stem_padding": 2}, 11_168_832, 512),
    ("resnet50", 224, {}, 25_557_032 - 2_049_000, 2048),
]
SMALL = [
    ("convnet", {"widths": (8, 12)}),
    ("convnet", {"widths": (8, 12), "norm": "instance"}),
    ("convnet", {"widths": (8, 12), "norm": "none"}),
    ("convnet", {"widths": (8, 12), "norm_before": True}),
    ("resnet10", {}),
    ("resnet18", {"stem_padding": 2}),
    ("resnet50", {}),
    ("vgg11", {}),
    ("alexnet", {}),
    ("mobilenet", {}),
]


def used_network(name, options, dtype=torch.float64):
    """A small network in eval mode whose running statistics are not those of its start."""
    torch.manual_seed(0)
    network = build(name, resolution=32, **options).to(dtype)
    network.train()
    with torch.no_grad():
        network(2 * torch.rand(4, 3, 32, 32, dtype=dtype))
    return network.eval()


def sizes_of(network, modules, x):
    """Height of the map that each of the named modules puts out."""
    heights = []
    for module in modules:
        getattr(network, module).register_forward_hook(lambda _module, _args, out: heights.append(out.shape[2]))
    network(x)
    return heights


@pytest.mark.parametrize(("name", "resolution", "options", "parameters", "features"), PUBLISHED)
def test_parameters_without_the_head_and_features_are_the_published_ones(name, resolution, options, parameters, features):
    network = build(name, resolution=resolution, **options).eval()
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network.feature_dim == features
    with torch.no_grad():
        assert network.features(torch.rand(1, 3, resolution, resolution)).shape == (1, features)


def test_every_registered_network_is_among_the_tested_ones():
    assert {name for name, *_ in PUBLISHED} == {name for name, _ in SMALL} == set(names())


@pytest.mark.parametrize(("name", "options"), SMALL)
def test_in_eval_mode_each_image_is_treated_on_its_own(name, options):
    network = used_network(name, options)
    x = torch.rand(3, 3, 32, 32, dtype=torch.float64, requires_grad=True)  # [n, C, H, W]
    together = network.features(x)  # [n, d]
    for i in range(3):
        torch.testing.assert_close(network.features(x[i : i + 1])[0], together[i], rtol=1e-10, atol=1e-12)
    (gradient,) = torch.autograd.grad(together[1].sum(), x)
    assert gradient[1].abs().max() > 0
    assert torch.count_nonzero(gradient[[0, 2]]) == 0


@pytest.mark.parametrize(("name", "options"), SMALL)
def test_memory_format_changes_rounding_only(name, options):
    network = used_network(name, options)
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    expected = network.features(x)
    found = network.to(memory_format=torch.channels_last).features(x.to(memory_format=torch.channels_last))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), SMALL)
def test_every_parameter_gets_a_gradient_in_train_mode(name, options):
    network = used_network(name, options, torch.float32).train()
    (network(torch.rand(4, 3, 32, 32)) ** 2).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


@pytest.mark.parametrize(("name", "options"), SMALL)
def test_grayscale_input_is_one_option_away(name, options):
    network = build(name, resolution=32, channels=1, **options).eval()
    with torch.no_grad():
        assert network(torch.rand(2, 1, 32, 32)).shape == (2, network.feature_dim)


def test_a_network_starts_from_the_global_generator():
    def start(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in build("convnet", resolution=8, widths=(4,)).parameters()])

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


def test_a_head_is_linear_in_the_features_of_its_network():
    network = used_network("convnet", {"widths": (4,)})
    model = with_head(network, 7).double()
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    assert model.network is network
    assert model.head.in_features == network.feature_dim
    torch.testing.assert_close(model(x), network.features(x) @ model.head.weight.T + model.head.bias)
    assert torch.equal(network(x), network.features(x))


# ConvNet


def test_halving_by_interpolation_is_the_average_pool():
    x = torch.rand(2, 8, 6, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    torch.testing.assert_close(convnet.halve(x), functional.avg_pool2d(x, 2), rtol=1e-14, atol=0)


def pooled_relu(x):
    return functional.avg_pool2d(functional.relu(x), 2)


def test_convnet_normalises_after_the_convolution():
    network = used_network("convnet", {"widths": (4, 5)})
    (conv1, norm1, _, _, conv2, norm2, _, _) = network.layers
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    expected = pooled_relu(norm2(conv2(pooled_relu(norm1(conv1(x)))))).flatten(1)
    torch.testing.assert_close(network(x), expected)


def test_convnet_of_frepo_normalises_before_each_convolution_but_the_first():
    network = used_network("convnet", {"widths": (4, 5), "norm_before": True})
    (conv1, _, _, norm2, conv2, _, _) = network.layers
    assert isinstance(norm2, nn.BatchNorm2d)
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(network(x), pooled_relu(conv2(norm2(pooled_relu(conv1(x))))).flatten(1))


def test_instance_norm_standardises_each_channel_of_each_image_and_is_affine():
    network = used_network("convnet", {"widths": (4,), "norm": "instance"})
    (conv, norm, _, _) = network.layers
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    maps = conv(x)
    standard = (maps - maps.mean((2, 3), keepdim=True)) / (maps.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    expected = pooled_relu(standard * norm.weight[:, None, None] + norm.bias[:, None, None])
    torch.testing.assert_close(network(x), expected.flatten(1))


def test_convnet_of_the_compared_methods_has_2048_features():
    assert build("convnet", resolution=32, widths=(128,) * 3, norm="instance").feature_dim == 2048
    assert build("convnet", resolution=64, widths=(128,) * 4, norm="instance").feature_dim == 2048


def test_without_norm_there_are_convolutions_only():
    network = build("convnet", resolution=32, widths=(4, 5), norm="none")
    assert [type(layer) for layer in network.layers] == [nn.Conv2d, nn.ReLU, nn.AvgPool2d] * 2


# ResNets


@pytest.mark.parametrize("padding", [1, 2])
def test_resnet18_is_torchvisions_behind_a_small_stem_and_takes_its_state_dict(padding):
    reference = torchvision.models.resnet18(weights=None)
    reference.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=padding, bias=False)
    reference.maxpool, reference.fc = nn.Identity(), nn.Identity()
    network = used_network("resnet18", {"stem_padding": padding})
    network.load_state_dict(reference.state_dict())
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(network(x), reference.double().eval()(x), rtol=1e-10, atol=1e-12)


def test_resnet50_is_torchvisions_and_takes_its_state_dict():
    reference = torchvision.models.resnet50(weights=None)
    reference.fc = nn.Identity()
    network = used_network("resnet50", {})
    network.load_state_dict(reference.state_dict())
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(network(x), reference.double().eval()(x), rtol=1e-10, atol=1e-12)


def test_stem_padding_1_keeps_the_resolution_and_2_gives_the_maps_of_the_released_code():
    stages, x = ("conv1", "layer1", "layer2", "layer3", "layer4"), torch.rand(1, 3, 32, 32)
    assert sizes_of(build("resnet10", resolution=32).eval(), stages, x) == [32, 32, 16, 8, 4]
    assert sizes_of(build("resnet10", resolution=32, stem_padding=2).eval(), stages, x) == [34, 34, 17, 9, 5]


def test_resnet10_starts_with_its_blocks_switched_off_and_resnet18_does_not():
    def last_gains(network):
        return [block.bn2.weight for stage in ("layer1", "layer2", "layer3", "layer4") for block in getattr(network, stage)]

    assert all(torch.count_nonzero(gain) == 0 for gain in last_gains(build("resnet10", resolution=32)))
    assert all(torch.all(gain == 1) for gain in last_gains(build("resnet18", resolution=32)))


# MobileNet


def test_mobilenet_reduces_the_resolution_eightfold_and_every_stride_1_block_has_a_shortcut():
    network = build("mobilenet", resolution=32).eval()
    blocks = [layer for layer in network.layers if hasattr(layer, "shortcut")]
    assert len(blocks) == 17
    for block in blocks:
        stride = block.layers[3].stride[0]
        assert (block.shortcut is not None) == (stride == 1)
    with torch.no_grad():
        assert network.layers(torch.rand(1, 3, 32, 32)).shape == (1, 1280, 4, 4)


# Refusals


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"name": "convnett", "resolution": 32}, "did you mean 'convnet'"),
        ({"name": "convnet", "resolution": 32, "width": (8,)}, "did you mean 'widths'"),
        ({"name": "vgg11", "resolution": 32, "norm": "batch"}, "vgg11 has no such option"),
        ({"name": "resnet50", "resolution": 224, "stem_padding": 2}, "resnet50 has no such option"),
        ({"name": "convnet", "resolution": 32, "norm": "layer"}, "take one of 'batch', 'instance', 'none'"),
        ({"name": "convnet", "resolution": 32, "widths": ()}, "one positive width for each block"),
        ({"name": "resnet18", "resolution": 32, "stem_padding": 3}, "take one of 1, 2"),
        ({"name": "convnet", "resolution": 36}, "multiple of 8.*take resolution = 32"),
        ({"name": "convnet", "resolution": 4}, "at least 8; take resolution = 8"),
        ({"name": "vgg11", "resolution": 16}, "at least 32; take resolution = 32"),
        ({"name": "alexnet", "resolution": 30}, "multiple of 8.*take resolution = 32"),
        ({"name": "resnet18", "resolution": 4}, "at least 8"),
        ({"name": "resnet50", "resolution": 16}, "at least 32"),
        ({"name": "mobilenet", "resolution": 4}, "at least 8"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_remedy(request_, message):
    with pytest.raises(ConfigError, match=message):
        build(**request_)


def test_settings_of_a_network_are_the_options_it_is_built_with():
    settings = NetworkSettings(name="convnet", widths=(4, 8), norm="instance", norm_before=True)
    network = build(settings.name, resolution=16, **settings.options())
    assert network.feature_dim == 8 * 4 * 4
    assert [layer.num_channels for layer in network.layers if isinstance(layer, nn.GroupNorm)] == [4]


def test_there_is_a_setting_for_every_option_of_every_network():
    options = {option for name in names() for option in inspect.signature(_REGISTRY[name]).parameters} - {"resolution", "channels"}
    assert options == set(NetworkSettings.model_fields) - {"name"}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("options", "precision"), [({}, "float32"), ({}, "bfloat16"), ({"norm": "instance"}, "float32"),
                                                    ({"norm": "none"}, "float32"), ({"norm_before": True}, "float32")])
def test_a_convnet_in_channels_last_is_its_layers_one_by_one_bit_for_bit(options, precision, training, monkeypatch):
    """Where it keeps a mask for backward."""
    def used():
        network = used_network("convnet", {"widths": (32, 12)} | options, torch.float32).train(training)
        network.to(memory_format=torch.channels_last)
        x = torch.randn(9, 3, 32, 32, generator=torch.manual_seed(1)).to(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            features = network(x)
        features.float().square().sum().backward()
        return [features, x.grad, *(p.grad for p in network.parameters()), *network.buffers()]

    found = used()
    monkeypatch.setattr(convnet, "_is_channels_last", lambda _x: False)
    expected = used()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_convnet_in_channels_last_can_be_differentiated_twice():
    network = used_network("convnet", {"widths": (3, 2)}).train().to(memory_format=torch.channels_last)
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    assert torch.autograd.gradcheck(network.features, (x,)) and torch.autograd.gradgradcheck(network.features, (x,))


def test_a_convnet_in_channels_last_keeps_a_byte_for_each_number_that_passes_relu():
    network = build("convnet", resolution=32, widths=(8,), norm="none").to(memory_format=torch.channels_last)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        network(torch.rand(5, 3, 32, 32).to(memory_format=torch.channels_last))
    assert [tensor.element_size() for tensor in kept if tensor.shape == (5, 8, 32, 32)] == [1]
