"""Settings: what the presets hold, what is refused and how, and what a run's result depends on."""

from __future__ import annotations

import pickle
from math import ceil
from pathlib import Path

import pytest
import torch
import yaml
from settings import another_value, settings

from krrst_dist import networks
from krrst_dist.config import Config, ConfigError, NetworkSettings, parse
from krrst_dist.data import sources
from krrst_dist.grid_config import load_grid
from krrst_dist.on_ray.preflight import check_names
from krrst_dist.presets_and_grids import CARRIED, load_preset, preset_names

PUBLISHED = {  # METHOD 5: data set, resolution, m, widths, target, k, learning rate; and d
    "cifar100": ("cifar100", 32, 1000, (128, 256, 512), "resnet18", 512, 1e-4, 8192),
    "tinyimagenet": ("tinyimagenet", 64, 2000, (64, 128, 256, 512), "resnet18", 512, 1e-5, 8192),
    "imagenet64": ("imagenet", 64, 1000, (64, 128, 256, 512), "resnet18", 512, 1e-5, 8192),
    "imagenette": ("imagenette", 224, 10, (32, 64, 128, 256, 512), "resnet50", 2048, 1e-5, 25088),
}
HARMLESS = {"preset", "repeats", "target.checkpoint", "target.workers", "target.checkpoint_every", "target.probe_every", "distill.updates",
            "distill.decay_updates", "evaluate.datasets", "evaluate.few_labels", "evaluate.every", "evaluate.probe.steps",
            "evaluate.probe.batch", "evaluate.probe.lr", "evaluate.probe.momentum", "engine.actors", "engine.min_actors",
            "engine.gpus", "engine.aggregate", "engine.checkpoint_every", "engine.keep"}
FIELDS = settings(load_preset("imagenet64"))


def build(network: NetworkSettings, resolution: int) -> networks.Network:
    with torch.device("meta"):
        return networks.build(network.name, resolution=resolution, **network.options())


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_presets_numbers_are_the_published_ones(preset):
    dataset, resolution, m, widths, target, k, lr, d = PUBLISHED[preset]
    config = load_preset(preset)
    source, distill, evaluate = config.source, config.distill, config.evaluate
    assert (config.preset, config.repeats, source.dataset, source.resolution) == (preset, 1, dataset, resolution)
    assert (distill.m, distill.batch, distill.updates, distill.decay_updates) == (m, 1024, 160_000, None)
    assert (distill.lr_x, distill.lr_y, distill.ridge) == (lr, lr, 1e-6)
    assert (distill.shards, distill.space, distill.start_y, distill.views) == (1, "normalised", "target", 0)
    assert distill.pool.model_dump() == {
        "network": {"name": "convnet", "widths": widths, "norm": None, "norm_before": None, "stem_padding": None},
        "size": 10, "max_steps": 1000, "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "reset": "paper"}
    assert config.target.network == NetworkSettings(name=target)
    assert (config.target.off_diagonal, len(config.target.projector), config.target.standardise) == (0.0051, 3, False)
    epochs = 1000
    assert evaluate.pretrain.model_dump() == {"steps": epochs * ceil(m / 256), "batch": 256, "optimizer": "sgd", "lr": 0.1,
                                              "momentum": 0.9, "weight_decay": 1e-3, "schedule": "constant", "warmup_steps": 0,
                                              "augment": "none"}
    assert evaluate.probe.model_dump() == {"steps": 5000, "batch": 512, "lr": 0.2, "momentum": 0.9}
    assert (evaluate.every, config.engine.precision) == (16_000, "float32")
    assert build(distill.pool.network, resolution).feature_dim == d
    assert build(config.target.network, resolution).feature_dim == k
    assert source.resolution == sources.spec(dataset).resolution


@pytest.mark.parametrize("preset", [*PUBLISHED, "cifar100-cpu"])
def test_a_released_variant_differs_in_the_authors_choices_alone(preset):
    ours, released = settings(load_preset(preset)), settings(load_preset(f"{preset}-released"))
    choices = {"preset": f"{preset}-released", "distill.space": "raw", "distill.views": 10, "distill.pool.reset": "released"}
    if ours["target.network.name"] == "resnet18":  # imagenette's ResNet-50 has the usual stem, cifar100-cpu's target none
        choices["target.network.stem_padding"] = 2
    assert {field: value for field, value in released.items() if value != ours[field]} == choices


def test_there_are_these_presets_and_each_names_what_exists():
    small = {"quickstart", "cifar100-cpu"}
    assert set(preset_names()) == small | {"cifar100-cpu-released"} | set(PUBLISHED) | {f"{name}-released" for name in PUBLISHED}
    for name in preset_names():
        check_names(load_preset(name))


def test_the_small_presets_have_three_distillation_seeds_and_the_quickstart_needs_no_download():
    assert load_preset("quickstart").repeats == load_preset("cifar100-cpu").repeats == 3
    quickstart = load_preset("quickstart")
    assert (quickstart.source.dataset, quickstart.evaluate.datasets) == ("digits-0-4", ("digits-5-9",))


def test_settings_are_frozen_and_travel():
    config = load_preset("quickstart")
    with pytest.raises(ValueError, match="frozen"):
        config.distill.m = 3
    assert pickle.loads(pickle.dumps(config)) == config == parse(config.model_dump(mode="json"))


@pytest.mark.parametrize(("overrides", "complaint"), [
    ({"distill.pool.sise": 3}, "distill.pool.sise: no such setting; did you mean 'size'?"),
    ({"distil": {"m": 3}}, "distil: no such setting; did you mean 'distill'?"),
    ({"source.xyz": 1}, "source.xyz: no such setting; known: dataset, held_out, resize, resolution, split_seed"),
    ({"distill.m": 1}, "distill.m = 1: input should be greater than or equal to 2"),
    ({"distill.m": "many"}, "distill.m = 'many': input should be a valid integer, unable to parse string as an integer"),
    ({"distill.pool.reset": "papr"}, "distill.pool.reset = 'papr': input should be 'paper' or 'released'"),
    ({"distill.pool.network.widths": [8, -8]}, "distill.pool.network.widths.1 = -8: input should be greater than 0"),
    ({"target": 3}, "target = 3: input should be a valid dictionary or instance of TargetSettings"),
    ({"distill.shards": 3}, "distill.batch = 1024 is not a multiple of shards = 3: every shard reads batch / shards images; "
                            "take batch = 1023"),
    ({"engine.actors": 2}, "engine.actors = 2 exceeds distill.shards * distill.slices = 1: an actor hosts at least one shard, or a slice "
                           "of one; take fewer actors, or raise slices (which changes rounding) or shards (which changes the result)"),
    ({"engine.actors": 2, "distill.slices": 2, "engine.aggregate": "collective"},
     "engine.aggregate = 'collective' does not go with actors that share a shard's slices (engine.actors = 2, distill.shards = 1); leave "
     "it out, or take actors <= shards"),
    ({"engine.min_actors": 2}, "engine.min_actors = 2 exceeds engine.actors = 1, the number that is wanted; take min_actors <= actors"),
])
def test_a_setting_that_cannot_be_used_is_refused_with_field_value_and_rule(overrides, complaint):
    with pytest.raises(ConfigError) as refused:
        load_preset("cifar100", **overrides)
    assert str(refused.value) == complaint


@pytest.mark.parametrize(("gpus", "actors", "asked", "collective"), [
    (0, 1, None, False), (0, 4, None, False), (1, 1, None, True), (1, 4, None, True), (0.5, 1, None, True), (0.5, 4, None, False),
    (1, 4, "store", False), (0, 4, "collective", True)])
def test_gradients_are_summed_on_the_gpu_where_each_actor_has_one(gpus, actors, asked, collective):
    given = {"distill.shards": 4, "engine.gpus": gpus, "engine.actors": actors, "engine.aggregate": asked}
    assert load_preset("cifar100", **given).engine.collective is collective


def test_everything_that_is_wrong_is_told_at_once():
    with pytest.raises(ConfigError) as refused:
        parse({"preset": "x", "seed": -1, "distill": {"m": 0, "lr": 1.0, "pool": {"size": 0}}})
    assert [line.partition(":")[0] for line in str(refused.value).splitlines()] == [
        "seed = -1", "source", "distill.m = 0", "distill.pool.size = 0", "distill.lr"]


@pytest.mark.parametrize(("overrides", "nearest"), [
    ({"source.dataset": "imagnet"}, "did you mean 'imagenet'?"),
    ({"evaluate.datasets": ["cifar10", "dog"]}, "did you mean 'dogs'?"),
    ({"target.network.name": "resnet81"}, "did you mean 'resnet18'?"),
    ({"distill.pool.network.name": "covnet"}, "did you mean 'convnet'?"),
    ({"evaluate.datasets": ["folder:mine"]}, "no labelled test split"),
    ({"target.network.widths": [8]}, "resnet18 has no such option; known: stem_padding"),
])
def test_an_unknown_data_set_or_network_is_refused_with_the_nearest_name(overrides, nearest):
    with pytest.raises(ConfigError) as refused:
        check_names(load_preset("imagenet64", **overrides))
    assert nearest in str(refused.value)


def test_an_unknown_preset_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="preset = 'imagenet-64': no such preset; did you mean 'imagenet64'?"):
        load_preset("imagenet-64")


def preset_file(folder: Path, text: str, name: str = "mine.yaml") -> str:
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    return str(file)


def test_a_users_own_preset_is_a_file_and_may_start_from_another_one(tmp_path):
    mine = load_preset(preset_file(tmp_path, "base: cifar100\ndistill: {m: 7, pool: {size: 3}}\n"), **{"seed": 5})
    theirs = load_preset("cifar100")
    changed = {field: value for field, value in settings(mine).items() if value != settings(theirs)[field]}
    assert changed == {"preset": "mine", "seed": 5, "distill.m": 7, "distill.pool.size": 3}


@pytest.mark.parametrize("where", ["{folder}/mine.yaml", "mine.yaml", "../folder/mine.yaml", "~/mine.yaml"])
def test_a_base_is_looked_for_beside_the_file_that_names_it(tmp_path, monkeypatch, where):
    folder = tmp_path / "folder"
    preset_file(folder, "base: ../above.yaml\ndistill: {m: 7}\n")
    preset_file(tmp_path, "base: deeper/one.yaml\nseed: 5\n", "above.yaml")
    preset_file(tmp_path / "deeper", "base: cifar100\ndistill: {m: 3, batch: 32}\n", "one.yaml")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    preset_file(folder, "[misleading]", "one.yaml")
    mine = load_preset(where.format(folder=folder))
    assert mine == load_preset("cifar100", **{"preset": "mine", "seed": 5, "distill.m": 7, "distill.batch": 32})


def test_a_base_that_is_not_beside_the_file_is_not_looked_for_elsewhere(tmp_path, monkeypatch):
    mine = preset_file(tmp_path / "folder", "base: other.yaml\n")
    preset_file(tmp_path, "base: cifar100\n", "other.yaml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"preset = '{tmp_path}/folder/other.yaml': no such preset"):
        load_preset(mine)


def test_a_preset_that_a_users_grid_names_is_looked_for_beside_the_grid(tmp_path):
    grid = preset_file(tmp_path, "base: quickstart\nsets: [{method: mine, preset: presets/mine.yaml}, {method: new, preset: quickstart}]\n")
    assert [entry.preset for entry in load_grid(grid).sets] == [f"{tmp_path}/presets/mine.yaml", "quickstart"]


def test_a_file_that_a_job_carries_is_read_from_there(tmp_path, monkeypatch):
    gone = str(tmp_path / "mine.yaml")
    monkeypatch.setenv(CARRIED, yaml.safe_dump({gone: {"source": {"dataset": "cifar10", "resolution": 32}, "distill": {"lr_x": 1e-5}}}))
    mine = load_preset(gone, **{"distill.lr_y": 0.5})
    assert (mine.preset, mine.source.dataset, mine.distill.lr_x, mine.distill.lr_y) == ("mine", "cifar10", 1e-5, 0.5)
    assert load_preset("cifar100").distill.m == 1000


@pytest.mark.parametrize(("text", "complaint"), [
    ("source: {dataset: digits-0-4, resolution: 16}\ndistill: {udates: 3}", "distill.udates: no such setting; did you mean 'updates'?"),
    ("distill: {m: 3}", "source: missing; give it a value"),
    ("[1, 2]", "must be a mapping of settings"),
    ("a: [", "not YAML"),
    ("base: imagnet64", "preset = 'imagnet64': no such preset; did you mean 'imagenet64'?"),
    ("base: {itself}", "its bases go in a circle"),
    ("base: mine.yaml", "its bases go in a circle"),
])
def test_a_preset_file_that_is_wrong_is_refused(tmp_path, text, complaint):
    path = preset_file(tmp_path, text.replace("{itself}", str(tmp_path / "mine.yaml")))
    with pytest.raises(ConfigError) as refused:
        load_preset(path)
    assert complaint in str(refused.value)


def test_a_preset_file_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="no such preset"):
        load_preset("nowhere/mine.yaml")


@pytest.mark.parametrize("field", FIELDS)
def test_a_change_is_harmless_or_makes_another_run(field):
    config, changed = load_preset("imagenet64"), dict(FIELDS)
    changed[field] = another_value(field, FIELDS[field])
    if field == "engine.actors":  # needs shards to host
        config, changed = load_preset("imagenet64", **{"distill.shards": 2}), changed | {"distill.shards": 2}
    if field == "engine.min_actors":  # of as many
        two = {"distill.shards": 2, "engine.actors": 2}
        config, changed = load_preset("imagenet64", **two), changed | two
    other = unflattened(changed)
    assert other != config
    differing = {key for key, value in other.trajectory().items() if value != config.trajectory()[key]}
    assert differing == (set() if field in HARMLESS else {field})


@pytest.mark.parametrize("field, counts", [
    ("seed", False), ("engine.threads", False), ("evaluate.networks", False), ("engine.gpus", False), ("distill.slices", False),
    ("engine.precision", True), ("distill.updates", True), ("distill.m", True), ("target.steps", True)])
def test_sets_are_told_apart_by_what_they_depend_on(field, counts):
    config, other = load_preset("imagenet64"), unflattened(FIELDS | {field: another_value(field, FIELDS[field])})
    assert (other.distillation() != config.distillation()) == counts
    assert load_preset("imagenet64", **{"distill.decay_updates": config.distill.updates}).distillation() == config.distillation()


def test_another_method_is_another_run_with_its_own_settings():
    ours, other = load_preset("imagenet64"), load_preset("imagenet64", method="random")
    assert (ours.method, other.method) == ("krr_st", "random") and ours.trajectory()["method"] != other.trajectory()["method"]
    assert other.distill.m == ours.distill.m and other.distill.updates == 0 and not hasattr(other.distill, "lr_x")
    assert ours.model_copy(update={"method": other.method, "distill": other.distill}) == other


def test_a_preset_holds_settings_for_other_methods(tmp_path):
    path = preset_file(tmp_path, "base: quickstart\nmethods: {random: {labels: targets}, kmeans: {m: 7}}\n")
    assert load_preset(path) == load_preset("quickstart", **{"preset": "mine"})
    assert load_preset(path, method="random").distill.labels == "targets"
    assert load_preset(path, method="kmeans").distill.m == 7
    again = preset_file(tmp_path / "above", f"base: {path}\nmethod: random\n")
    assert load_preset(again).distill.labels == "targets" and load_preset(again, method="krr_st").method == "krr_st"


@pytest.mark.parametrize("method, complaint", [
    ("krrst", "method = 'krrst': no such method; did you mean 'krr_st'?"), (3, "method = 3: no such")])
def test_an_unknown_method_is_refused(method, complaint):
    with pytest.raises(ConfigError) as refused:
        load_preset("quickstart", method=method)
    assert complaint in str(refused.value)


def unflattened(flat: dict[str, object]) -> Config:
    tree: dict = {}
    for field, value in flat.items():
        *parents, leaf = field.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return parse(tree)


def test_a_key_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: quickstart\n1: 2\n")
    with pytest.raises(ConfigError, match="key 1 is not text"):
        load_preset(str(tmp_path / "mine.yaml"))
