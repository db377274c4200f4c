"""Pre-training, the held-out ridge loss, linear probes and the table of results."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from krrst_dist.config import ConfigError, NetworkSettings, PretrainSettings, ProbeSettings
from krrst_dist.data.normalise import normalise
from krrst_dist.evaluation.held_out import held_out_loss, held_out_of_network, loss_of_mean, ridge_loss
from krrst_dist.evaluation.labelled import LabelledImages, few_label_subset
from krrst_dist.evaluation.pretrain import fresh, pretrain
from krrst_dist.evaluation.probe import extract, linear_probe, probes
from krrst_dist.evaluation.table import KRRST, RANDOM, SCRATCH, Row, drop, from_json, markdown_table, text_table, to_json
from krrst_dist.evaluation.training import shuffled_batches

NET = NetworkSettings(widths=(8, 16))
FEW_STEPS = PretrainSettings(steps=3)
MEAN, STD = (0.3, 0.3, 0.3), (0.4, 0.4, 0.4)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def digits():
    """Real handwritten digits: uint8 [1797, 3, 8, 8] and labels [1797]."""
    images, labels = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 1, 8, 8).repeat(3, axis=1) * 255 / 16).astype(np.uint8)
    return torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64))


@pytest.fixture(scope="module")
def pairs(digits):
    """Real images with the features of a fixed network as targets: x [1797, 3, 8, 8], y [1797, 16 * 2 * 2]."""
    x = normalise(digits[0], MEAN, STD)
    teacher = fresh(NET, resolution=8, channels=3, outputs=1, seed=77).network.eval()
    with torch.no_grad():
        y = teacher.features(x)
    return x, (y - y.mean(0)) / (y.std(0) + 1e-3)


# pre-training


@pytest.mark.parametrize("batch", [256, 8], ids=["in one batch", "in several batches"])
def test_pretraining_is_plain_sgd_on_the_mean_squared_error_from_the_fresh_network(pairs, batch):
    x, y = pairs[0][:20], pairs[1][:20]
    model = fresh(NET, resolution=8, channels=3, outputs=y.shape[1], seed=4).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for a, b in islice(shuffled_batches(x, y, batch=batch, seed=4), 4):
        optimizer.zero_grad()
        ((model(a) - b) ** 2).mean().backward()
        optimizer.step()
    trained = pretrain(NET, x, y, PretrainSettings(steps=4, batch=batch), seed=4)
    for name, value in model.network.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], value, rtol=1e-3, atol=1e-5)
    assert not trained.training


def test_pretraining_is_a_function_of_its_seed_and_leaves_torchs_generator_alone(pairs):
    x, y = pairs[0][:30], pairs[1][:30]
    recipe = PretrainSettings(steps=5, batch=8)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, again, other = (pretrain(NET, x, y, recipe, seed=seed).features(x) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_fresh_networks_weights_do_not_depend_on_the_width_of_its_head():
    narrow, wide = (fresh(NET, resolution=8, channels=3, outputs=k, seed=3).network.state_dict() for k in (2, 64))
    assert all(torch.equal(narrow[name], wide[name]) for name in wide)


def test_an_epoch_gives_every_pair_once_in_a_new_order_and_keeps_the_short_batch():
    x = torch.arange(10)[:, None]
    batches = list(islice(shuffled_batches(x, x * 2, batch=4, seed=0), 6))
    assert [len(a) for a, _ in batches] == [4, 4, 2] * 2
    epochs = [torch.cat([a for a, _ in part]).flatten().tolist() for part in (batches[:3], batches[3:])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]
    assert all(torch.equal(b, a * 2) for a, b in batches)


def test_a_single_pair_left_over_joins_the_batch_before_it():
    x = torch.arange(9)[:, None]
    assert [len(a) for a, _ in islice(shuffled_batches(x, x, batch=4, seed=0), 4)] == [4, 5, 4, 5]


def test_a_network_whose_last_map_is_one_pixel_trains_on_one_pair_more_than_a_batch(pairs):
    trained = pretrain(NetworkSettings(name="resnet10"), pairs[0][:3], pairs[1][:3], PretrainSettings(steps=2, batch=2), seed=0)
    assert torch.isfinite(trained.features(pairs[0][:3])).all()


def test_class_labels_are_pretrained_on_with_another_loss(digits):
    x, labels = normalise(digits[0][:200], MEAN, STD), digits[1][:200]
    trained = pretrain(NET, x, labels, PretrainSettings(steps=60, batch=50), seed=0, loss=F.cross_entropy, outputs=10)
    with torch.no_grad():
        features = trained.features(x)
    centres = torch.stack([features[labels == c].mean(0) for c in range(10)])
    assert (torch.cdist(features, centres).argmin(1) == labels).float().mean() > 0.8


def test_images_and_targets_must_be_as_many(pairs):
    with pytest.raises(ValueError, match="20 images but y 19 targets"):
        pretrain(NET, pairs[0][:20], pairs[1][:19], FEW_STEPS, seed=0)


def test_an_unknown_network_or_a_resolution_it_cannot_take_is_refused_before_training(pairs):
    with pytest.raises(ConfigError, match="convnet"):
        pretrain(NetworkSettings(name="convent"), *pairs, FEW_STEPS, seed=0)
    with pytest.raises(ConfigError, match="resolution"):
        pretrain(NetworkSettings(widths=(4,) * 5), *pairs, FEW_STEPS, seed=0)


# the held-out ridge loss


@pytest.mark.parametrize("m", [12, 120], ids=["fewer images than features", "more images than features"])
def test_the_ridge_loss_is_the_error_of_the_ridge_solution_on_the_held_out_images(pairs, m):
    x, y = pairs
    network = pretrain(NET, x[:m], y[:m], FEW_STEPS, seed=0)

    def with_ones(images):
        with torch.no_grad():
            f = network.features(images).double().numpy()
        return np.hstack([f, np.ones((len(f), 1))])

    f_syn, f_held = with_ones(x[:m]), with_ones(x[200:300])
    gram = f_syn.T @ f_syn
    head = np.linalg.solve(gram + 1e-4 * np.trace(gram) * np.eye(len(gram)), f_syn.T @ y[:m].double().numpy())
    expected = ((f_held @ head - y[200:300].double().numpy()) ** 2).mean()
    measured = ridge_loss(network, x[:m], y[:m], x[200:300], y[200:300], ridge=1e-4, chunk=7)
    assert measured == pytest.approx(expected, rel=1e-5)


def test_the_loss_over_networks_is_made_of_the_single_ones_whoever_computes_them(pairs):
    x, y = pairs
    sets = x[:20], y[:20], x[200:260], y[200:260]
    whole = held_out_loss(NET, *sets, recipe=FEW_STEPS, ridge=1e-6, networks=3)
    alone = tuple(held_out_of_network(i, NET, *sets, recipe=FEW_STEPS, ridge=1e-6) for i in (2, 0, 1))
    assert whole.per_network == (alone[1], alone[2], alone[0])
    assert len(set(alone)) == 3
    assert whole.loss == pytest.approx(sum(alone) / 3)
    assert whole.fraction == pytest.approx(whole.loss / loss_of_mean(y[200:260]))


def test_predicting_the_mean_costs_the_held_out_targets_variance():
    y = torch.tensor([[1.0, 10.0], [3.0, 10.0]])
    assert loss_of_mean(y) == pytest.approx((1 + 0) / 2)


def test_real_targets_beat_the_mean_and_targets_of_other_images_do_not(pairs):
    x, y = pairs
    held = x[500:900], y[500:900]
    recipe = PretrainSettings(steps=60, batch=64)
    right = held_out_loss(NET, x[:100], y[:100], *held, recipe=recipe, ridge=1e-3, networks=2)
    wrong = held_out_loss(NET, x[:100], y[100:200], *held, recipe=recipe, ridge=1e-3, networks=2)
    assert right.fraction < 0.5 < 0.9 < wrong.fraction


def test_targets_of_another_width_are_refused(pairs):
    x, y = pairs
    network = fresh(NET, resolution=8, channels=3, outputs=2, seed=0).network.eval()
    with pytest.raises(ValueError, match="63 dimensions but the held-out targets have 64"):
        ridge_loss(network, x[:9], y[:9, 1:], x[9:20], y[9:20], ridge=1e-6)


# probes


def test_features_are_those_of_the_normalised_images_in_eval_mode_whatever_the_chunk(digits):
    network = fresh(NET, resolution=8, channels=3, outputs=2, seed=0).network.eval()
    images = digits[0][:25]
    pixels = images.float() / 255
    expected = network.features((pixels - 0.3) / 0.4).detach()
    for chunk in (4, 100):
        torch.testing.assert_close(extract(network, images, mean=MEAN, std=STD, chunk=chunk), expected, rtol=1e-4, atol=1e-5)


def test_a_linear_probe_reads_digits_off_their_pixels_and_only_chance_off_noise(digits):
    features, labels = digits[0][:, 0].flatten(1) / 255, digits[1]
    recipe = ProbeSettings(steps=200)
    data = {"train_y": labels[:1200], "test_y": labels[1200:], "classes": 10, "recipe": recipe, "seed": 0}
    assert linear_probe(features[:1200], test_f=features[1200:], **data) > 0.88
    noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    assert linear_probe(noise[:1200], test_f=noise[1200:], **data) < 0.2


def test_more_labels_make_a_better_probe(digits):
    images, labels = digits
    network = fresh(NET, resolution=8, channels=3, outputs=2, seed=0).network.eval()
    data = LabelledImages(images[:1200], labels[:1200], images[1200:], labels[1200:], MEAN, STD, classes=10)
    accuracy = probes(network, data, ProbeSettings(steps=1000), few_labels=(0.01, 0.1), seed=0)
    assert list(accuracy) == [1.0, 0.01, 0.1]
    assert 0.2 < accuracy[0.01] < accuracy[0.1] < accuracy[1.0]


def test_labels_outside_the_classes_are_refused_before_training():
    f, y = torch.zeros(4, 3), torch.tensor([0, 1, 2, 1])
    with pytest.raises(ValueError, match="test labels run from 0 to 2, but there are 2 classes"):
        linear_probe(f[:2], y[:2], f, y, classes=2, recipe=ProbeSettings(steps=10**9), seed=0)


def test_a_few_labels_are_the_same_share_of_every_class_and_at_least_one():
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 3)[torch.randperm(153, generator=torch.Generator().manual_seed(0))]
    chosen = few_label_subset(labels, 0.1, seed=0)
    assert labels[chosen].bincount().tolist() == [10, 5, 1]
    assert torch.equal(chosen, chosen.unique())


def test_few_label_subsets_follow_their_seed_and_lie_within_one_another():
    labels = torch.arange(300) % 3
    small, large, other = (set(few_label_subset(labels, f, s).tolist()) for f, s in ((0.05, 1), (0.2, 1), (0.05, 2)))
    assert small < large
    assert small != other
    assert torch.equal(few_label_subset(labels, 1.0, 0), torch.arange(300))


# the table


ROWS = [Row(KRRST, "loss", 0, 0.40), Row(KRRST, "loss", 1, 0.44), Row(RANDOM, "loss", 0, 0.80), Row(RANDOM, "loss", 1, 0.55),
        Row(SCRATCH, "probe, %", 0, 20.0), Row(SCRATCH, "probe, %", 1, 22.0), Row(RANDOM, "probe, %", 0, 25.0)]


def test_a_table_shows_mean_and_population_std_and_a_dash_for_what_is_missing():
    assert markdown_table(ROWS).splitlines() == [
        "| method | loss | probe, % |",
        "| --- | ---: | ---: |",
        "| from scratch | - | 21.0 ± 1.0 |",
        "| random images + targets | 0.675 ± 0.125 | 25.0 (n = 1) |",
        "| KRR-ST | 0.420 ± 0.020 | - |",
        "",
        "mean ± population std over seeds 0, 1",
    ]
    lines = text_table(ROWS).splitlines()
    assert len({len(line) for line in lines[:5]}) == 1, "columns line up"
    assert [line.split("  ")[0] for line in lines[2:5]] == [SCRATCH, RANDOM, KRRST]


def test_small_losses_keep_three_digits_and_one_run_has_no_spread():
    table = markdown_table([Row(KRRST, "loss", 7, 0.000123456), Row(RANDOM, "loss", 7, 0.0045)])
    assert "| 0.000123 |" in table and "| 0.004500 |" in table and "one run, seed 7" in table


def test_a_diverged_run_is_shown_and_survives_json():
    rows = [*ROWS, Row(SCRATCH, "loss", 0, float("nan")), Row(SCRATCH, "loss", 1, 1.0)]
    back = from_json(to_json(rows))
    assert back[:7] == ROWS and np.isnan(back[7].value) and back[8] == rows[8]
    assert "| from scratch | nan ± nan |" in markdown_table(back)
    assert "NaN" not in to_json(rows)


def test_the_drop_is_taken_seed_by_seed():
    assert drop(ROWS, "loss") == pytest.approx({0: 0.5, 1: 0.2})
    assert drop(ROWS, "probe, %") == {}


def test_two_values_for_one_cell_and_seed_are_refused():
    with pytest.raises(ValueError, match="two values for 'KRR-ST', 'loss', seed 1"):
        text_table([*ROWS, Row(KRRST, "loss", 1, 0.5)])
