"""The method's parts on real images: where X_s starts, what each shard reads, and which sizes are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from betons import prepared_beton, real_images

from krrst_dist.config import Config, ConfigError, parse
from krrst_dist.data.prepared import Prepared
from krrst_dist.data.targets import write_targets
from krrst_dist.methods.common.source import Source
from krrst_dist.methods.krr_st import METHOD

COUNT, HELD_OUT, RESOLUTION, K = 90, 10, 16, 12


def config(**distill) -> Config:
    small = {"m": 6, "batch": 16, "pool": {"network": {"widths": [4, 8]}, "size": 2, "max_steps": 4}}
    seed = distill.pop("seed", 0)
    return parse({"preset": "test", "seed": seed, "source": {"dataset": "cifar100", "resolution": RESOLUTION, "held_out": HELD_OUT},
                  "distill": small | distill, "evaluate": {"pretrain": {"steps": 7}}})


@pytest.fixture(scope="module")
def files(shared_data, tmp_path_factory) -> tuple[Path, Path]:
    """The beton of 90 CIFAR-100 images, and a side file of targets: k pixels of each, which tell the image."""
    folder = tmp_path_factory.mktemp("krr_st")
    items = real_images(shared_data / "cifar100-test.parquet", COUNT, RESOLUTION)
    prepared = prepared_beton(folder / "images.beton", items, "raw")
    prepared.save()
    return prepared.path, side_file(prepared, views=0)


def side_file(prepared: Prepared, *, views: int) -> Path:
    path = prepared.path.with_name(f"targets-{views}.npy")
    write_targets(path, prepared, lambda images: pixels(images.float()), target_fingerprint="pixels", views=views, view_seed=0,
                  statistics_over=None, progress=False)
    return path


def pixels(images: torch.Tensor) -> torch.Tensor:
    """[b, 3, H, W] -> [b, 12]."""
    return images[:, :, ::8, ::8].flatten(1)


def opened(files: tuple[Path, Path], **distill) -> Source:
    return Source.open(config(**distill), *files)


def rows(array) -> set[tuple]:
    return set(map(tuple, np.asarray(array).tolist()))


def known(source: Source, indices: np.ndarray) -> set[tuple]:
    """The targets of these images, which tell them apart."""
    found = rows(source.targets.look_up(indices))
    assert len(found) == len(indices)
    return found


def test_x_s_starts_as_training_images_with_their_targets(files):
    source = opened(files)
    start = METHOD.start(config(), source)
    assert start.x_syn.shape == (6, 3, RESOLUTION, RESOLUTION) and start.y_syn.shape == (6, K)
    of_training = known(source, source.training)
    assert len(rows(start.y_syn)) == 6 and rows(start.y_syn) <= of_training
    shown = torch.from_numpy(start.space.to_pixels(start.x_syn) * 255)
    assert torch.allclose(pixels(shown), torch.from_numpy(start.y_syn), atol=1e-3)
    assert (start.label_kind, start.recipe["steps"], start.space.kind) == ("features", 7, "normalised")
    assert start.space.mean == source.prepared.mean and start.space.std == source.prepared.std


def test_the_normalised_start_is_what_a_network_sees_of_the_real_image(files):
    source = opened(files)
    start = METHOD.start(config(), source)
    seen = source.images(source.training).numpy()
    assert all(np.abs(seen - x).max((1, 2, 3)).min() < 1e-5 for x in start.x_syn)


@pytest.mark.parametrize("shards", [2, 4, 16])
def test_the_start_does_not_depend_on_the_number_of_shards(files, shards):
    one, other = (METHOD.start(c, Source.open(c, *files)) for c in (config(), config(shards=shards)))
    assert np.array_equal(one.x_syn, other.x_syn) and np.array_equal(one.y_syn, other.y_syn)


def test_another_seed_starts_elsewhere(files):
    one, other = (METHOD.start(config(seed=seed), opened(files)) for seed in (0, 1))
    assert not np.array_equal(one.x_syn, other.x_syn)


def test_a_raw_start_is_the_pixels_as_they_are(files):
    ours, raw = (METHOD.start(config(space=space), opened(files)) for space in ("normalised", "raw"))
    assert raw.space.kind == "raw" and 0 <= raw.x_syn.min() < raw.x_syn.max() <= 1
    assert np.array_equal(raw.y_syn, ours.y_syn) and np.allclose(ours.space.to_pixels(ours.x_syn), raw.x_syn, atol=1e-6)


def test_y_s_may_start_from_standard_normal_noise(files):
    c = config(m=80, start_y="noise")
    ours, noise = (METHOD.start(x, Source.open(x, *files)) for x in (config(m=80), c))
    assert np.array_equal(ours.x_syn, noise.x_syn)
    assert abs(noise.y_syn.mean()) < 0.1 and abs(noise.y_syn.std() - 1) < 0.1
    assert np.array_equal(noise.y_syn, METHOD.start(c, Source.open(c, *files)).y_syn)


@pytest.mark.parametrize("shards", [1, 3])
def test_the_shards_read_every_training_image_once_an_epoch_and_no_held_out_one(files, shards):
    c = config(shards=shards, batch=18)
    source = Source.open(c, *files)
    read: list[tuple] = []
    for shard in range(shards):
        batches = METHOD.part(c, source, None, shard).batches
        while batches.state()["epoch"] == 0:
            x, y = batches.next()
            read += map(tuple, y.tolist())
        batches.close()
    assert len(read) == len(set(read)) == COUNT - HELD_OUT
    assert set(read) == known(source, source.training)
    assert not set(read) & known(source, source.held_out)


def test_the_start_is_drawn_from_all_training_images_and_never_from_the_held_out_ones(files):
    every = config(m=COUNT - HELD_OUT)
    source = Source.open(every, *files)
    assert rows(METHOD.start(every, source).y_syn) == known(source, source.training)


@pytest.mark.parametrize("views", [0, 3])
def test_the_real_batch_is_normalised_and_its_targets_belong_to_it(files, views):
    c = config(views=views)
    source = Source.open(c, files[0], side_file(Prepared.open(files[0]), views=views))
    batches = METHOD.part(c, source, None, 0).batches
    x, y = batches.next()
    mean, std = (torch.tensor(values)[:, None, None] for values in (source.prepared.mean, source.prepared.std))
    assert torch.allclose(pixels((x * std + mean) * 255), y, atol=1e-2)
    assert (rows(y) <= known(source, source.training)) == (views == 0)  # a view is not the image as it is
    batches.close()


def test_a_shard_is_a_function_of_settings_seed_and_index(files):
    def first(index: int = 0, **distill) -> list[torch.Tensor]:
        c = config(shards=2, **distill)
        shard = METHOD.part(c, Source.open(c, *files), None, index)
        tensors, _ = shard.state_dict()
        x, y = shard.batches.next()
        shard.batches.close()
        return [tensors["member.1.model.network.layers.0.weight"], x, y]

    reference = first()
    assert all(map(torch.equal, reference, first()))
    for other in (first(1), first(seed=1)):
        assert not any(a.shape == b.shape and torch.equal(a, b) for a, b in zip(reference, other, strict=True))


def test_the_pool_is_as_the_settings_say(files):
    c = config(pool={"network": {"widths": [4, 8]}, "size": 3, "max_steps": 5, "lr": 0.2, "reset": "released"})
    pool = METHOD.part(c, Source.open(c, *files), None, 0).pool
    assert (len(pool.members), pool.max_steps, pool.reset) == (3, 5, "released")
    assert pool.members[0].optimizer.param_groups[0]["lr"] == 0.2
    assert pool.members[0].model(torch.zeros(2, 3, RESOLUTION, RESOLUTION)).shape == (2, K)


@pytest.mark.parametrize(("distill", "complaint"), [
    ({"m": 81}, "distill.m = 81: X_s starts as that many different training images, and there are 80; lower it"),
    ({"batch": 81}, "distill.batch = 81: each of the 1 shard.s. reads 81 images a batch but owns 80; lower distill.batch to at most 80"),
    ({"batch": 81, "shards": 3}, "each of the 3 shard.s. reads 27 images a batch but owns 26; lower distill.batch to at most 78"),
])
def test_sizes_that_the_training_part_cannot_serve_are_refused(distill, complaint):
    with pytest.raises(ConfigError, match=complaint):
        METHOD.check(config(**distill), training=COUNT - HELD_OUT, classes=None)


@pytest.mark.parametrize("distill", [{"m": 80}, {"batch": 80}, {"batch": 78, "shards": 3}])
def test_sizes_that_it_can_just_serve_are_taken(files, distill):
    c = config(**distill)
    METHOD.check(c, training=COUNT - HELD_OUT, classes=None)
    source = Source.open(c, *files)
    assert len(METHOD.start(c, source).x_syn) == c.distill.m
    batches = METHOD.part(c, source, None, c.distill.shards - 1).batches
    assert len(batches.next()[0]) == c.distill.batch // c.distill.shards
    batches.close()

