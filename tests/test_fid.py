"""FID: against a float64 formula written anew, known Gaussians, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from krrst_dist.artifacts import ArtifactError, DistilledSet, Space
from krrst_dist.config import ConfigError
from krrst_dist.evaluation import fid as module
from krrst_dist.evaluation.fid import fid, inception, to_uint8


class Small(nn.Module):
    """uint8 [b, 3, 8, 8] -> [b, d]: a convolution with batch norm, fixed weights."""

    def __init__(self, d: int = 32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Conv2d(3, d // 4, 3, stride=2), nn.BatchNorm2d(d // 4), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
                                        nn.Flatten())

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.float() / 255)


class Pixels(nn.Module):
    """The features are the pixels."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


@pytest.fixture(scope="module")
def digits() -> Tensor:
    """Real handwritten digits: uint8 [1797, 3, 8, 8]."""
    images = load_digits().images[:, None].repeat(3, axis=1)
    return torch.from_numpy((images * 255 / 16).astype(np.uint8))


@torch.no_grad()
def formula(network: nn.Module, first: Tensor, second: Tensor) -> float:
    """|mu - mu'|^2 + tr(S) + tr(S') - 2 tr((S S')^(1/2)) in NumPy's float64; the last is the sum of singular values of S^(1/2) S'^(1/2)."""
    a, b = (network.eval()(x).double().numpy() for x in (first, second))  # [n, d] each
    roots = []
    for covariance in (np.cov(a.T), np.cov(b.T)):
        sizes, directions = np.linalg.eigh(covariance)
        roots.append(directions * np.sqrt(sizes.clip(0)))
    cross = np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum() - 2 * cross


# the statistic


@pytest.mark.parametrize("m", [2, 10, 300], ids=["two images", "fewer images than features", "more images than features"])
def test_two_equal_sets_give_0(digits, m):
    for network in (Small(), Pixels()):
        scale = fid(digits[:m], [digits[900:]], network=network)
        assert abs(fid(digits[:m], [digits[:m]], network=network)) < 1e-9 * scale


@pytest.mark.parametrize("m", [10, 300], ids=["fewer images than features", "more images than features"])
def test_it_agrees_with_the_formula_in_float64(digits, m):
    synthetic, real = 255 - digits[:m], digits[500:1100]
    measured = fid(synthetic, [real], network=Small())
    assert measured == pytest.approx(formula(Small(), synthetic, real), rel=1e-7)
    assert measured > 0.1


def test_it_agrees_with_scipys_matrix_root(digits):
    synthetic, real = 255 - digits[:300], digits[500:1100]
    with torch.no_grad():
        a, b = (Small().eval()(x).double().numpy() for x in (synthetic, real))
    product = np.cov(a.T) @ np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * scipy.linalg.sqrtm(product).real)
    assert fid(synthetic, [real], network=Small()) == pytest.approx(expected, rel=1e-9)


def test_gaussians_of_known_mean_and_covariance_are_as_far_apart_as_they_should_be():
    def spread(mean: float, deviation: float) -> Tensor:
        """[4, 1, 1, 2]: two uncorrelated features of that mean and standard deviation, exactly."""
        corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
        return (mean + deviation * (3 / 4) ** 0.5 * corners).reshape(4, 1, 1, 2)

    # two dimensions of (mean difference)^2 + (difference of the deviations)^2
    measured = fid(spread(1, 2), [spread(4, 7)], network=Pixels())
    assert measured == pytest.approx(2 * (3**2 + 5**2), abs=1e-9)


def test_a_feature_that_the_synthetic_images_do_not_vary_in_counts_with_its_whole_variance():
    synthetic = torch.tensor([[-1.0, 5], [1, 5]]).reshape(2, 1, 1, 2)
    real = torch.tensor([[-1.0, 0], [1, 0], [-1, 6], [1, 6]]).reshape(4, 1, 1, 2)
    first = 0 + (2**0.5 - (4 / 3) ** 0.5) ** 2
    second = (5 - 3) ** 2 + 12
    assert fid(synthetic, [real], network=Pixels()) == pytest.approx(first + second, abs=1e-9)


def test_synthetic_images_that_are_all_alike_are_a_point(digits):
    alike, real = digits[:1].repeat(5, 1, 1, 1), digits[500:700]
    features = real.flatten(1).double()
    expected = (features - alike[0].flatten()).square().sum(1).mean() + features.var(0, correction=1).sum() / len(real)
    assert fid(alike, [real], network=Pixels()) == pytest.approx(float(expected), rel=1e-9)


def test_the_order_and_the_batches_do_not_matter(digits):
    synthetic, real = digits[:40], digits[500:800]
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    whole = fid(synthetic, [real], network=Small())
    for batches in (real.split(7), real[order].split(100), [real[:1], real[1:1], real[1:]]):
        assert fid(synthetic.flip(0), batches, network=Small()) == pytest.approx(whole, rel=1e-5)


def test_images_nearer_to_the_real_ones_have_a_lower_fid(digits):
    real = digits[500:1500]
    noise = torch.randint(0, 256, (100, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    others, blurred, noisy = (fid(x, [real], network=Small()) for x in (digits[:100], digits[:100] // 2 + 60, noise))
    assert 0 < others < blurred < noisy


def test_the_network_is_used_in_eval_mode(digits):
    network = Small().train()
    fid(digits[:10], [digits[10:20]], network=network)
    assert not network.training
    assert (network.layers[1].running_mean == 0).all()


# the images of a distilled set


@pytest.mark.parametrize("kind", ["normalised", "raw"])
def test_a_distilled_sets_images_come_back_as_the_pixels_they_were(kind):
    space = Space(kind, (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762))
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(3, axis=1)
    x = space.from_pixels(pixels.astype(np.float32) / 255)
    images = to_uint8(DistilledSet(x, np.zeros((1, 2), np.float32), "features", {}, space))
    assert images.dtype == torch.uint8 and np.array_equal(images.numpy(), pixels)


def test_values_beyond_black_and_white_are_clipped():
    x = np.array([-0.2, 0.499 / 255, 0.501 / 255, 1.7], np.float32).reshape(1, 1, 2, 2)
    images = to_uint8(DistilledSet(x, np.zeros((1, 2), np.float32), "features", {}, Space("raw", (0.5,), (0.2,))))
    assert images.flatten().tolist() == [0, 0, 1, 255]


# what is refused


def test_fewer_than_two_images_are_refused(digits):
    with pytest.raises(ValueError, match="FID of 1 synthetic image"):
        fid(digits[:1], [digits], network=Small())
    for batches, count in (([], 0), ([digits[:1]], 1)):
        with pytest.raises(ValueError, match=f"FID against {count} real image"):
            fid(digits[:5], batches, network=Small())


def test_images_of_another_shape_or_type_are_refused(digits):
    for real in (digits[:, :1], digits[:, :, :4, :4], digits.float()):
        with pytest.raises(ValueError, match="both must be alike"):
            fid(digits[:5], [digits[5:9], real], network=Pixels())


def test_a_network_whose_features_are_no_rows_of_finite_numbers_is_refused(digits):
    with pytest.raises(ValueError, match=r"must give \[b, d\]"):
        fid(digits[:5], [digits], network=nn.Identity())
    broken = Small()
    nn.init.constant_(broken.layers[0].bias, float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite"):
        fid(digits[:5], [digits], network=broken)


# Inception


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A file with random weights of Inception's shapes."""
    class Random(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, *args, **kwargs):
            pass

    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    torch.save(Random("random", ["2048"], path).state_dict(), path)
    return path


def test_inception_makes_2048_features_of_colour_images_and_fid_takes_it(weights, digits):
    network = inception(str(weights))
    images = digits[:3]
    features = network(images)
    assert features.shape == (3, 2048) and not network.training and not features.requires_grad
    assert abs(fid(images, [images], network=network)) < 1e-9
    with pytest.raises(ValueError, match=r"takes uint8 images \[b, 3, H, W\], not torch.uint8 \(3, 1, 8, 8\)"):
        network(images[:, :1])


def test_a_missing_weights_file_says_where_to_get_one(tmp_path):
    with pytest.raises(ConfigError, match=r"fid.weights = '.*none.pth': there is no such file; take the file from https://.*\.pth"):
        inception(str(tmp_path / "none.pth"))


def test_a_file_that_is_no_weights_file_is_refused(tmp_path, weights):
    for name, payload in {"text": b"not weights", "empty": b"", "half": weights.read_bytes()[:100_000]}.items():
        (tmp_path / name).write_bytes(payload)
        with pytest.raises(ArtifactError, match=f"fid.weights = '.*{name}': no file of weights.*take the file from https://"):
            inception(str(tmp_path / name))


@pytest.mark.parametrize("content", [nn.Linear(2, 2).state_dict(), {"fc.weight": 3}, [1, 2], torch.zeros(3)],
                         ids=["another network", "no tensors", "a list", "one tensor"])
def test_the_weights_of_something_else_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ArtifactError, match="other.pth': the file does not hold Inception v3's weights"):
        inception(str(tmp_path / "other.pth"))


class Trap:
    """Unpickled, it would create a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_code_in_a_weights_file_is_not_run(tmp_path):
    mark, path = tmp_path / "ran", tmp_path / "trap.pth"
    torch.save({"fc.weight": Trap(mark)}, path)
    with pytest.raises(ArtifactError, match="more than tensors"):
        inception(str(path))
    path.write_bytes(pickle.dumps(Trap(mark), protocol=2))
    with pytest.raises(ArtifactError, match="more than tensors"):
        inception(str(path))
    assert not mark.exists()


def test_without_a_network_and_a_file_the_error_says_what_to_do(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(ConfigError, match=r"fid.weights = None: .*not known.*; on a machine with a network take the file from https://.*"
                                          r"and name it in fid.weights"):
        inception(None)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_download_that_is_not_what_it_should_be_is_refused_and_not_kept(monkeypatch, tmp_path):
    source = tmp_path / "page.html"
    source.write_text("<html>log in to this network first</html>")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(module, "URL_INCEPTION_V3", f"file://{source.with_name('weights-6726825d.pth')}")
    source.rename(tmp_path / "weights-6726825d.pth")
    with pytest.raises(ArtifactError, match="is damaged .*invalid hash"):
        inception(None)
    assert not [path for path in (tmp_path / "hub").rglob("*") if path.is_file()]
