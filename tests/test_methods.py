"""The compared methods: what each one's file says it does, on tiny inputs in float64, and the protocol they are written to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import method_runs
import numpy as np
import pytest
import ray
import torch
import torch.nn.functional as F
from method_parts import CLASSES, SIDE, method_config, small_source

from krrst_dist import cli, networks, plugins, seeds
from krrst_dist.algorithm import DivergedError, total
from krrst_dist.artifacts import DistilledSet
from krrst_dist.augment.diff_augment import diff_augment
from krrst_dist.config import Config, ConfigError
from krrst_dist.data.prepared import held_out_split
from krrst_dist.methods.common import real_images as real
from krrst_dist.methods.common.source import Source
from krrst_dist.methods.common.trajectories import matching_loss
from krrst_dist.methods.common.unroll import through_steps
from krrst_dist.methods.dm import mean_distance
from krrst_dist.methods.dsa import gradient_distance
from krrst_dist.methods.kmeans import nearest_to_centres
from krrst_dist.on_ray import cluster, preflight
from krrst_dist.on_ray.progress import curve, read_history
from krrst_dist.presets_and_grids import load_preset
from krrst_dist.recipes import PRETRAIN

CPU = torch.device("cpu")
SMALL = {"dm": {"network": {"widths": [4, 4], "norm": "instance"}, "batch_real": 5, "updates": 4},
         "dsa": {"network": {"widths": [4, 4], "norm": "instance"}, "batch_real": 5, "updates": 4, "outer_loop": 3, "inner_loop": 2,
                 "batch_train": 4},
         "mtt": {"network": {"widths": [4, 4], "norm": "instance"}, "experts": 2, "teacher_epochs": 3, "max_start_epoch": 2,
                 "expert_epochs": 1, "steps": 3, "teacher_batch": 20, "updates": 4}}


def config(method: str, **distill) -> Config:
    return method_config(method, **SMALL.get(method, {}) | distill)


@pytest.fixture(scope="module")
def source(shared_data, tmp_path_factory) -> Source:
    return small_source(shared_data, tmp_path_factory.mktemp("methods"))


def start_of(method: str, source: Source, **distill) -> DistilledSet:
    return plugins.load(method).start(config(method, **distill), source, None)


def belongs(source: Source, made: DistilledSet) -> np.ndarray:
    """Rows of the training part that the images of a set are."""
    everything = source.training_images(np.arange(len(source.training))).numpy()
    found = [np.flatnonzero((everything == x).all((1, 2, 3))) for x in made.x_syn]
    assert all(len(rows) == 1 for rows in found)
    return np.concatenate(found)


# the protocol


def test_every_method_has_published_settings_and_a_row_of_its_own():
    methods = [plugins.load(name) for name in plugins.names()]
    assert {"krr_st", "random", "kmeans", "gaussian", "dsa", "dm", "mtt", "kip", "frepo", "ssl_bilevel", "mkdt"} <= set(plugins.names())
    assert len({method.title for method in methods}) == len(methods)
    assert all(method.settings().m == 1000 for method in methods)
    dsa, dm = (plugins.load(name).settings() for name in ("dsa", "dm"))
    assert (dsa.updates, dsa.outer_loop, dsa.inner_loop, dsa.lr_x, dsa.lr_net, dsa.batch_real) == (10_000, 10, 50, 0.1, 0.01, 256)
    assert (dm.updates, dm.lr_x, dm.momentum, dm.batch_real) == (20_000, 1.0, 0.5, 256)


def test_the_papers_presets_give_each_method_a_network_that_fits():
    for preset, labelled in {"cifar100": 100, "tinyimagenet": 200, "imagenet64": 1000, "imagenette": 10, "cifar100-cpu": 100,
                             "quickstart": 5}.items():
        for name in ("dm", "dsa", "mtt", "kip", "frepo", "ssl_bilevel", "mkdt", "random", "kmeans", "gaussian"):
            made = load_preset(preset, method=name)
            plugins.load(name).check(made, training=400 * labelled, classes=[400] * labelled)
    one = load_preset("imagenet64", method="dsa").distill
    assert (one.outer_loop, one.inner_loop, one.updates) == (1, 1, 1000)


def test_an_unlabeled_source_is_refused_with_the_methods_that_can_do_without():
    with pytest.raises(ConfigError, match=r"method = 'dsa' goes by class labels.*gaussian.*kmeans with distill.labels = targets.*krr_st"):
        preflight.check_labels(config("dsa"), labelled=False)
    preflight.check_labels(config("random", labels="targets"), labelled=False)


@pytest.mark.parametrize(("changes", "message"), [
    ({"m": 2}, r"distill.m = 2: DM goes class by class, and each of the 3 classes needs an image of its own; take at least 3"),
    ({"m": 55}, r"distill.m = 55: there are 54 training images; lower it"),
    ({"m": 40}, r"distill.m = 40: class 1 has 5 training images"),
    ({"network": {"widths": [4] * 4}}, r"resolution"),
])
def test_sizes_that_a_class_wise_method_cannot_take_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        plugins.load("dm").check(config("dm", **changes), training=54, classes=[30, 5, 19])


def test_more_shards_than_classes_are_refused():
    with pytest.raises(ConfigError, match=r"distill.shards = 4: DM shares out classes, and there are 3; take at most 3"):
        plugins.load("dm").check(config("dm", shards=4), training=54, classes=[18] * 3)


@pytest.mark.parametrize("method", ["dsa", "mtt", "kip", "frepo"])
def test_a_single_class_is_refused_where_the_loss_compares_classes(method):
    with pytest.raises(ConfigError, match=r"source.dataset = 'cifar100': it has a single class, and \w+'s loss compares classes"):
        plugins.load(method).check(config(method), training=54, classes=[54])
    plugins.load("dm").check(config("dm"), training=54, classes=[54])


@pytest.mark.parametrize("method", ["random", "kmeans", "gaussian"])
def test_outer_steps_of_a_method_that_has_none_are_refused(method):
    with pytest.raises(ConfigError, match=r"distill.updates = 5: [\w-]+ has no outer steps; leave it out"):
        preflight.check_images(config(method, updates=5), 1000, distils=True)
    preflight.check_images(config(method), 1000, distils=True)


def test_a_class_whose_images_are_all_held_out_is_counted():
    labels = np.zeros(60, np.int64)
    labels[held_out_split(60, 6, 0)[1][0]] = 1
    with pytest.raises(ConfigError, match=r"distill.m = 7: class 1 has 0 training images, and \d are wanted of it; lower it"):
        preflight.check_images(config("random"), 60, distils=True, labels=labels)


OUTSIDE = '''
from krrst_dist.config import MethodSettings
from krrst_dist.methods.common import real_images
from krrst_dist.methods.common.protocol import Method
class Settings(MethodSettings):
    darker: float = 0.5
class Dark(Method):
    title, settings = "Dark", Settings
    def needs_labels(self, settings):
        return True
    def start(self, config, source, read):
        made = real_images.random_labels(config, source)
        made.x_syn[:] *= config.distill.darker
        return made
METHOD = Dark()
'''


@pytest.fixture(scope="module")
def outside(tmp_path_factory) -> Path:
    """Where a package with a method of its own is installed."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "dark.py").write_text(OUTSIDE)
    (folder / "dark-1.dist-info").mkdir()
    (folder / "dark-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: dark\nVersion: 1\n")
    (folder / "dark-1.dist-info" / "entry_points.txt").write_text("[krrst_dist.methods]\ndark = dark:METHOD\n")
    return folder


def test_a_method_comes_from_another_package_without_a_change_to_ours(three_cpus, outside, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(outside))
    assert cli.main(["distill", "--preset", "quickstart", "--method", "dark", "--repeats", "1", "--out", str(tmp_path / "run"),
                     "--distill.darker", "0.25"]) == 0
    made = DistilledSet.load(tmp_path / "run" / "seed-0" / "distilled.safetensors")
    assert made.metadata["method"] == "dark" and made.metadata["config"]["distill"]["darker"] == 0.25
    assert np.bincount(made.y_syn).tolist() == [4] * 5 and np.abs(made.x_syn).max() < 1.5


# methods that select


def test_shares_are_equal_but_for_the_rest():
    assert sorted(real.shares(7, 3, 0)) == [2, 2, 3] and real.shares(6, 3, 5).tolist() == [2, 2, 2]


def test_random_is_balanced_real_images_with_their_own_labels(source):
    made = start_of("random", source)
    rows = belongs(source, made)
    assert len(set(rows)) == 7 and (source.labels[rows] == made.y_syn).all() and sorted(np.bincount(made.y_syn)) == [2, 2, 3]
    assert made.label_kind == "class" and made.recipe["steps"] == 9 and made.recipe["optimizer"] == PRETRAIN["class"].optimizer
    again, other = start_of("random", source), start_of("random", source, seed=1)
    assert np.array_equal(made.x_syn, again.x_syn) and set(belongs(source, other)) != set(rows)


def test_random_with_targets_has_the_targets_of_its_images(source):
    made = start_of("random", source, labels="targets")
    rows = belongs(source, made)
    assert made.label_kind == "features" and np.array_equal(made.y_syn, source.targets.look_up(source.training[rows]).numpy())


def test_the_nearest_row_to_each_centre_is_taken_and_none_twice():
    rng = np.random.default_rng(0)
    centres = np.eye(4) * 100
    features = np.concatenate([centre + rng.normal(size=(30, 4)) for centre in centres]).astype(np.float32)
    chosen = nearest_to_centres(features, 4, batch=1024, starts=3, seed=2**40)
    assert sorted(chosen // 30) == [0, 1, 2, 3]
    for row in chosen:
        blob = features[row // 30 * 30:][:30]
        distance = ((blob - blob.mean(0)) ** 2).sum(1)
        assert distance[row % 30] <= np.sort(distance)[2]  # a mini-batch's centre is near the mean
    assert len(set(nearest_to_centres(np.ones((9, 2), np.float32), 5, batch=4, starts=1, seed=0))) == 5


def test_kmeans_clusters_class_by_class_each_class_a_chore(source):
    method, settings = plugins.load("kmeans"), config("kmeans")
    chores = method.chores(settings, source)
    made = {chore: method.do(settings, source, chore, device=CPU, alive=lambda: None) for chore in chores}
    result = method.start(settings, source, made.get)
    rows = belongs(source, result)
    assert len(chores) == 3 and len(set(rows)) == 7 and (source.labels[rows] == result.y_syn).all()
    assert sorted(np.bincount(result.y_syn)) == [2, 2, 3]


def test_gaussian_is_noise(source):
    made = start_of("gaussian", source, m=100)
    assert made.label_kind == "soft" and made.y_syn.shape == (100, 3) and not made.y_syn.any()
    assert abs(made.x_syn.mean()) < 0.03 and abs(made.x_syn.std() - 1) < 0.03


# methods that go class by class


def part(method: str, source: Source, index: int = 0, **distill):
    settings = config(method, **distill)
    begin = plugins.load(method).start(settings, source)
    return plugins.load(method).part(settings, source, begin, index, device=CPU), torch.from_numpy(begin.x_syn), begin


@pytest.mark.parametrize("method", ["dm", "dsa"])
def test_the_gradient_is_that_of_the_loss_by_finite_differences(source, method, float64):
    shard, x, _ = part(method, source)
    x, step, direction = x.double(), 1, torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    found = shard.contribute(step, x)
    difference = (shard.contribute(step, x + 1e-5 * direction).loss - shard.contribute(step, x - 1e-5 * direction).loss) / 2e-5
    assert found.gradients[0].dtype == torch.float64 and abs(difference) > 1e-6
    assert (found.gradients[0] * direction).sum().item() == pytest.approx(difference, rel=2e-3)


@pytest.mark.parametrize("method", ["dm", "dsa"])
def test_three_shards_have_a_class_each_and_add_up_to_one(source, method, float64):
    whole, x, _ = part(method, source)
    parts = [part(method, source, s, shards=3)[0] for s in range(3)]
    one, three = whole.contribute(2, x.double()), [shard.contribute(2, x.double()) for shard in parts]
    assert sum(len(p.gradients[0].abs().sum((1, 2, 3)).nonzero()) for p in three) == 7
    combined = total(three)
    assert combined.loss == pytest.approx(one.loss) and combined.images == one.images == 15
    torch.testing.assert_close(combined.gradients[0], one.gradients[0])


def test_dms_loss_is_the_literal_one(source, float64):
    shard, x, begin = part("dm", source)
    with seeds.seeded(0, "DM network", 3):
        psi = networks.build("convnet", resolution=SIDE, widths=(4, 4), norm="instance")
    loss = 0.0
    for label in range(CLASSES):
        omega = seeds.derive(0, "siamese augmentation", 3, label)
        theirs = source.some_of_class(label, 5, seed=0, purpose="real of class", step=3).double()
        ours = x[torch.from_numpy(begin.y_syn == label)].double()
        means = [psi(diff_augment(batch, seed=omega, siamese=True)).mean(0) for batch in (ours, theirs)]
        loss += sum((a - b) ** 2 for a, b in zip(*(mean.tolist() for mean in means), strict=True))
    assert shard.contribute(3, x.double()).loss == pytest.approx(loss)


def test_dms_loss_is_0_for_equal_sets_whose_order_does_not_matter():
    embedded = torch.randn(6, 9, dtype=torch.float64)
    assert mean_distance(embedded, embedded).item() == 0
    assert mean_distance(embedded.flip(0), embedded).item() == pytest.approx(0, abs=1e-25)
    assert mean_distance(embedded + 1, embedded).item() == pytest.approx(9)


def test_dsas_distance_is_0_for_equal_and_2_a_row_for_opposite_gradients_without_biases():
    gradients = [torch.randn(5, 3, 3, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64), torch.randn(4, 20, dtype=torch.float64)]
    assert gradient_distance(gradients, gradients).item() == pytest.approx(0, abs=1e-5)
    opposite = [-gradients[0], gradients[1] * 7, -gradients[2]]
    assert gradient_distance(gradients, opposite).item() == pytest.approx(2 * (5 + 4), abs=1e-5)
    flat = [gradients[0].reshape(5, 27).tolist(), (gradients[0] + 1).reshape(5, 27).tolist()]
    literal = sum(1 - np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b) + 1e-6) for a, b in zip(*flat, strict=True))
    assert gradient_distance(gradients[:1], [gradients[0] + 1]).item() == pytest.approx(literal)


def test_dsa_trains_theta_on_the_images_and_not_after_a_trajectorys_last_step(source):
    shard, x, begin = part("dsa", source)
    shard.contribute(0, x)
    weights, y = [value.detach().clone().requires_grad_() for value in shard._theta.parameters()], torch.from_numpy(begin.y_syn)
    shard.advance(0, x)
    names = [name for name, _ in shard._theta.named_parameters()]
    for epoch in range(2):
        order = torch.randperm(7, generator=seeds.torch_rng(0, "theta's order", 0, epoch))
        for i, rows in enumerate([order[:4], order[4:]]):
            batch = diff_augment(x[rows], seed=seeds.derive(0, "theta's augmentation", 0, epoch, i))
            out = torch.func.functional_call(shard._theta, dict(zip(names, weights, strict=True)), (batch,))
            gradients = torch.autograd.grad(F.cross_entropy(out, y[rows]), weights)
            weights = [(w - 0.01 * g).detach().requires_grad_() for w, g in zip(weights, gradients, strict=True)]
    torch.testing.assert_close(list(shard._theta.parameters()), weights)
    shard.contribute(2, x)
    before = [value.clone() for value in shard._theta.parameters()]
    shard.advance(2, x)
    assert all(torch.equal(a, b) for a, b in zip(before, shard._theta.parameters(), strict=True))
    shard.contribute(3, x)
    assert not torch.equal(before[0], next(shard._theta.parameters()))


def test_dsa_goes_on_from_its_saved_state_exactly(source):
    undisturbed, x, _ = part("dsa", source)
    for step in range(2):
        undisturbed.contribute(step, x)
        undisturbed.advance(step, x)
    tensors, numbers = undisturbed.state_dict()
    resumed = part("dsa", source)[0]
    resumed.load_state_dict({name: value.clone() for name, value in tensors.items()}, numbers)
    for step in (2, 3):
        a, b = (shard.contribute(step, x) for shard in (undisturbed, resumed))
        assert a.loss == b.loss and torch.equal(a.gradients[0], b.gradients[0])


def test_what_is_not_finite_is_named(source):
    shard, x, _ = part("dm", source)
    with pytest.raises(DivergedError, match=r"update 2, shard 0: .*distill.lr_x"):
        shard.contribute(2, x * float("inf"))
    shard, x, _ = part("dsa", source, lr_net=1e30)
    shard.contribute(0, x)
    shard.advance(0, x)
    with pytest.raises(DivergedError, match=r"update 0, shard 0: theta .*distill.lr_net"):
        shard.check(0)


# MTT


def trained(source: Source, **distill):
    """Its part, X_s, alpha, and two experts' weights by chore."""
    settings, method = config("mtt", **distill), plugins.load("mtt")
    experts = {chore: method.do(settings, source, chore, device=CPU, alive=lambda: None) for chore in method.chores(settings, source)}
    begin = method.start(settings, source)
    return method.part(settings, source, begin, 0, read=experts.get), torch.from_numpy(begin.x_syn), torch.tensor([0.05]), experts, begin


def test_mtts_gradient_is_that_of_the_plain_unroll_and_of_finite_differences(source, float64):
    shard, x, alpha, _, _ = trained(source)
    x, alpha = x.double(), alpha.double()
    found = shard.contribute(1, x, alpha)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    for i, (dx, da) in enumerate([(direction, torch.zeros(1)), (torch.zeros_like(x), torch.ones(1))]):
        losses = [shard.contribute(1, x + e * dx, alpha + e * da).loss for e in (1e-5, -1e-5)]
        assert (found.gradients[i] * (dx, da)[i]).sum().item() == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-4)


def test_steps_that_are_computed_again_give_what_one_graph_gives(float64):
    a, b, theta = (torch.randn(5, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    seen = []

    def step(i: int, theta: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.append(i)
        return theta - a * torch.sin(theta * b + i)

    inputs, last = [a.clone().requires_grad_(), b.clone().requires_grad_()], theta
    for i in range(6):
        last = step(i, last, *inputs)
    plain = torch.autograd.grad(last.square().sum(), inputs)
    seen.clear()
    loss, gradients = through_steps(step, 6, theta, [a, b], lambda last: last.square().sum())
    assert loss.item() == pytest.approx(last.square().sum().item()) and seen == [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0]
    torch.testing.assert_close(gradients, plain)


def test_a_perfect_students_loss_is_0_and_that_of_one_that_stays_is_1():
    start, goal = torch.randn(2, 9, dtype=torch.float64)
    assert (matching_loss(goal, start, goal).item(), matching_loss(start, start, goal).item()) == (0, 1)


def test_an_expert_learns_and_its_weights_are_kept_after_every_epoch(source):
    shard, _, _, experts, _ = trained(source, teacher_epochs=12, teacher_lr=0.1)
    weights = experts["expert-1"]["weights"]
    assert weights.shape == (13, shard.student.start.numel()) and not torch.equal(weights[0], experts["expert-0"]["weights"][0])
    images, labels = source.training_images(np.arange(54)), torch.from_numpy(source.labels)
    first, last = (shard.student.loss(theta, images, labels).item() for theta in (weights[0], weights[-1]))
    assert last < first


def test_batches_of_a_student_are_parts_of_permutations(source):
    shard = trained(source, batch=3, steps=5)[0]
    batches = shard._batches(4)
    assert [len(rows) for rows in batches] == [3, 3, 1, 3, 3] and sorted(torch.cat(batches[:3]).tolist()) == list(range(7))


def test_a_start_without_an_end_is_refused():
    with pytest.raises(ConfigError, match=r"distill.max_start_epoch = 50: .*epoch 51 of an expert, which has teacher_epochs = 50"):
        config("mtt", teacher_epochs=50, max_start_epoch=50, expert_epochs=2)


# on the engine


@pytest.fixture(scope="module")
def three_cpus(outside) -> Iterator[None]:
    """A cluster whose workers have the outside package, too."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(outside), prepend=os.pathsep)
        cluster.start_local(num_cpus=3)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def undisturbed(three_cpus, tmp_path_factory) -> Callable[[str], Path]:
    """Method -> the folder of its run on one actor."""
    @cache
    def folder(method: str) -> Path:
        out = tmp_path_factory.mktemp(method) / "one"
        method_runs.run(method, out)
        return out

    return folder


def parts_of(run: Path) -> tuple[DistilledSet, DistilledSet]:
    """What a run began with, and what it came to."""
    return tuple(DistilledSet.load(run / "seed-0" / f"{name}.safetensors") for name in ("start", "distilled"))


@pytest.mark.parametrize("method", method_runs.SMALL)
def test_one_and_three_actors_make_the_same_set(undisturbed, tmp_path, method):
    one, three = parts_of(undisturbed(method))[-1], method_runs.run(method, tmp_path / "three", actors=3)
    assert one.fingerprint == three.fingerprint


@pytest.mark.parametrize("method", method_runs.LEARN)
def test_a_killed_run_goes_on_to_what_it_would_have_come_to(undisturbed, tmp_path, method):
    start, end = parts_of(undisturbed(method))
    assert not np.array_equal(start.x_syn, end.x_syn)
    assert np.array_equal(start.y_syn, end.y_syn) == (method not in ("krr_st", "frepo", "mkdt"))  # who learns labels, too
    killed = subprocess.run([sys.executable, method_runs.__file__, method, tmp_path / "run", ray.get_runtime_context().gcs_address],
                            env=os.environ | {"RAY_AUTH_MODE": "token"}, capture_output=True, text=True, timeout=180)
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    assert not (tmp_path / "run" / "seed-0" / "distilled.safetensors").exists()
    assert method_runs.run(method, tmp_path / "run", resume=True).fingerprint == end.fingerprint
    losses = [curve(read_history(str(run / "seed-0")), "loss") for run in (tmp_path / "run", undisturbed(method))]
    assert losses[0] == losses[1] and len(losses[0]) == method_runs.UPDATES
