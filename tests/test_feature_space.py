"""Sheets of images, the map of the feature space as a file, and how it is computed."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
import torch
from betons import prepared_beton, real_images
from explorer_site import distilled, feature_map, grey
from PIL import Image, PngImagePlugin
from torch import nn

from krrst_dist.artifacts import ArtifactError, DistilledSet, Space
from krrst_dist.data.prepared import Prepared
from krrst_dist.data.targets import write_targets
from krrst_dist.evaluation import feature_space
from krrst_dist.feature_map import FeatureMap
from krrst_dist.on_ray.snapshots import due, write
from krrst_dist.sheets import LAYOUT, cut, sheet, to_pixels


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("m", "columns"), [(1, 20), (7, 3), (20, 20), (41, 20)])
def test_a_sheet_gives_back_the_images_that_it_was_made_of(m, columns, channels):
    pictures = np.random.default_rng(m).integers(0, 256, (m, 4, 6, channels), np.uint8)
    assert np.array_equal(cut(sheet(pictures, columns=columns)), pictures)


def with_text(text: str | None, mode: str = "RGB", size: tuple[int, int] = (16, 8)) -> bytes:
    info, sink = PngImagePlugin.PngInfo(), io.BytesIO()
    if text is not None:
        info.add_text(LAYOUT, text)
    Image.new(mode, size).save(sink, "PNG", pnginfo=info)
    return sink.getvalue()


@pytest.mark.parametrize("payload", [b"", b"x" * 100, sheet(grey(9, 3), columns=3)[:110], with_text(None), with_text("a b c d"),
                                     with_text("2 8 8 0"), with_text("99999999999 8 8 2"), with_text("2 8"), with_text("-2 8 8 -2"),
                                     with_text("0 8 8 2"), with_text("-2 8 -8 -2"), with_text("-2 -8 8 2"), with_text("2 8 8 2", "P"),
                                     with_text("2 8 8 2", "I;16"), with_text("2 8 8 2", "RGBA")])
def test_what_is_no_sheet_is_refused(payload):
    with pytest.raises(ArtifactError, match="no sheet of images"):
        cut(payload)


def test_a_sheet_of_unusual_size_is_refused_before_it_is_decoded(monkeypatch):
    payload = with_text("12000 100 100 100", "L", (10_000, 12_000))
    monkeypatch.setattr(np, "asarray", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ArtifactError, match="12000 x 10000 pixels"):
        cut(payload)


def test_a_picture_that_cannot_be_drawn_or_written_ends_nothing(tmp_path):
    (tmp_path / "pictures").write_text("in the way")

    def wrong(values):
        raise TypeError("no such channels")

    assert "no picture of the images after 3 updates: no such channels" in write(str(tmp_path), 3, wrong, ())
    assert "after 3 updates: cannot write" in write(str(tmp_path), 3, lambda values: b"png", ())


def test_no_images_make_no_sheet():
    with pytest.raises(ArtifactError, match="no images to show"):
        sheet(np.zeros((0, 4, 4, 3), np.uint8), columns=10)


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (2, 1), (3, 3), (4, 3), (6, 3)])
def test_other_numbers_of_channels_are_shown_as_three_or_one(channels, shown):
    space = Space("raw", (0.0,) * channels, (1.0,) * channels)
    assert to_pixels(np.ones((2, channels, 4, 4), np.float32), space).shape == (2, 4, 4, shown)


def test_pixels_are_the_sets_own_and_clipped():
    space = Space("normalised", (0.5,), (0.25,))
    x = np.array([-9, -2, 0, 1, 9], np.float32).reshape(1, 1, 1, 5)
    assert to_pixels(x, space).ravel().tolist() == [0, 0, 128, 191, 255]


def test_pictures_are_due_at_the_start_at_the_end_and_at_even_steps_between():
    assert [step for step in range(301) if due(step, 300)] == list(range(0, 301, 15))
    assert [step for step in range(8) if due(step, 7)] == list(range(8))
    assert not due(0, 0)
    assert sum(due(step, 160_001) for step in range(160_002)) == 21 and due(160_001, 160_001)


def test_a_feature_map_is_read_as_it_was_saved(tmp_path):
    saved = feature_map(5)
    saved.save(tmp_path / "map.safetensors")
    read = FeatureMap.load(tmp_path / "map.safetensors")
    assert vars(read).keys() == vars(saved).keys()
    assert all(np.array_equal(value, getattr(saved, name)) for name, value in vars(read).items())


@pytest.mark.parametrize("change", [{"kinds": np.full(35, 3, np.uint8)}, {"indices": np.full(35, 30)}, {"indices": np.full(35, -1)},
                                    {"positions": np.full((35, 2), np.nan, np.float32)}, {"positions": np.zeros((34, 2), np.float32)},
                                    {"positions": np.zeros((35, 3), np.float32)}, {"distances": np.zeros(5)},
                                    {"distances": np.full(5, np.nan, np.float32)}, {"real_images": np.zeros((30, 8, 8, 4), np.uint8)},
                                    {"nearest_images": np.zeros((5, 8, 4, 3), np.uint8)}, {"positions": np.zeros((0, 2), np.float32)}])
def test_a_map_whose_arrays_do_not_fit_is_refused(change):
    with pytest.raises(ArtifactError, match="feature map"):
        replace(feature_map(5), **change)


def test_another_file_is_no_feature_map(tmp_path):
    distilled(3).save(tmp_path / "set.safetensors")
    (tmp_path / "empty.safetensors").write_bytes(safetensors.numpy.save({}, metadata={"format": "krrst_dist feature map, version 1",
                                                                                       "about": "[]"}))
    for name in ("set", "empty"):
        with pytest.raises(ArtifactError, match="run `krrst features` again"):
            FeatureMap.load(tmp_path / f"{name}.safetensors")


def test_the_nearest_row_is_the_nearest_of_all_chunks(monkeypatch):
    monkeypatch.setattr(feature_space, "CHUNK", 7)
    rng = np.random.default_rng(0)
    rows, features = (rng.normal(size=(count, 5)).astype(np.float32) for count in (40, 9))
    place, distance = feature_space.nearest_rows(torch.tensor(features), lambda at: torch.tensor(rows[at]), 40, torch.device("cpu"))
    all_distances = np.linalg.norm(features[:, None] - rows[None], axis=2)
    assert np.array_equal(place, all_distances.argmin(1)) and np.allclose(distance, all_distances.min(1))


@pytest.mark.parametrize("count", [1, 3, 40])
def test_the_plane_is_a_function_of_the_seed(count):
    points = np.random.default_rng(1).normal(size=(count, 6))
    first, again = (feature_space.plane(points, seed=3, threads=1) for _ in range(2))
    assert first.shape == (count, 2) and first.dtype == np.float32 and np.isfinite(first).all() and np.array_equal(first, again)


@pytest.fixture(scope="module")
def prepared(shared_data, tmp_path_factory) -> Prepared:
    folder = tmp_path_factory.mktemp("beton")
    return prepared_beton(folder / "cifar.beton", real_images(shared_data / "cifar100-test.parquet", 60, 16), "raw")


@pytest.mark.parametrize("kind", ["normalised", "raw"])
def test_a_real_image_among_the_synthetic_ones_is_nearest_to_itself(prepared, tmp_path, kind):
    """The whole way on a real beton, for a set that consists of real images: each finds itself, at distance 0."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * prepared.resolution**2, 12))
    scale = [np.asarray(each, np.float32)[:, None, None] for each in (prepared.mean, prepared.std)]

    def represent(images):
        return network((images / 255 - torch.from_numpy(scale[0])) / torch.from_numpy(scale[1]))

    training = np.arange(prepared.count)[::2]
    targets = write_targets(tmp_path / "targets.npy", prepared, represent, target_fingerprint="t", views=0, view_seed=0,
                            statistics_over=training, progress=False)
    places = training[[3, 1, 8]]
    pixels = feature_space._small(prepared, places, 1)[0].transpose(0, 3, 1, 2) / 255
    space = Space(kind, prepared.mean, prepared.std)
    held = DistilledSet(space.from_pixels(pixels).astype(np.float32), targets.look_up(places).numpy(), "features", {}, space)
    found = feature_space.feature_map(held, network, prepared, targets, training, seed=0, device=torch.device("cpu"), say=lambda line: None)
    assert found.nearest_places.tolist() == places.tolist() and found.distances.max() < 1e-3
    assert np.abs(found.nearest_images.transpose(0, 3, 1, 2) / 255 - pixels).max() < 1e-6
    assert np.bincount(found.kinds).tolist() == [min(len(training), feature_space.REAL), 3, 3]
    labels, images = (found.positions[found.kinds == kind] for kind in (1, 2))
    assert np.linalg.norm(images[:, None] - labels[None], axis=2).argmin(1).tolist() == [0, 1, 2]
    assert set(found.real_places) <= set(training) and found.source == prepared.name and found.set_fingerprint == held.fingerprint
