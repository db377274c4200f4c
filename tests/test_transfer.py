"""Training as published: recipes, pre-training by the kind of labels, fine-tuning, knowledge distillation."""

from __future__ import annotations

import copy
import math
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from krrst_dist import seeds
from krrst_dist.algorithm import DivergedError
from krrst_dist.algorithm.barlow_twins import barlow_twins, projector
from krrst_dist.artifacts import ArtifactError, DistilledSet, Space
from krrst_dist.augment import ssl_pair
from krrst_dist.augment.diff_augment import diff_augment
from krrst_dist.augment.views import crop_flip
from krrst_dist.config import ConfigError, NetworkSettings, PretrainSettings
from krrst_dist.data.normalise import normalise
from krrst_dist.evaluation.finetune import finetune, score
from krrst_dist.evaluation.knowledge import distil_knowledge, soft_cross_entropy, train_teacher, untrained_classifier
from krrst_dist.evaluation.labelled import LabelledImages
from krrst_dist.evaluation.pretrain import fresh, pretrain, pretrain_on, soft_label_loss
from krrst_dist.evaluation.training import optimizer_of, shuffled_batches, train
from krrst_dist.evaluation.weights import load_weights, save_weights
from krrst_dist.recipes import OFF_DIAGONAL, PRETRAIN, PROJECTOR, FinetuneSettings, KDSettings, TeacherSettings, pretrain_recipe

NET = NetworkSettings(widths=(8, 16))
MEAN, STD = (0.3, 0.3, 0.3), (0.4, 0.4, 0.4)
SPACE = Space("normalised", MEAN, STD)


@pytest.fixture(scope="module")
def digits() -> LabelledImages:
    """Real handwritten digits, 1,200 to train on and 597 to test on: uint8 [n, 3, 8, 8]."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy((images.reshape(-1, 1, 8, 8).repeat(3, axis=1) * 255 / 16).astype(np.uint8))
    labels = torch.from_numpy(labels.astype(np.int64))
    return LabelledImages(pixels[:1200], labels[:1200], pixels[1200:], labels[1200:], MEAN, STD, 10)


def network(seed: int = 0, outputs: int = 1):
    return fresh(NET, resolution=8, channels=3, outputs=outputs, seed=seed).network


def a_set(labels: str, m: int = 30) -> DistilledSet:
    x = np.random.default_rng(0).standard_normal((m, 3, 8, 8)).astype(np.float32)
    y = {"features": np.ones((m, 5), np.float32), "soft": np.full((m, 4), 0.25, np.float32), "class": np.arange(m) % 3}[labels]
    return DistilledSet(x, y, labels, {}, SPACE)


# recipes


def test_the_published_recipes_are_the_published_ones():
    features, hard, soft = (PRETRAIN[kind] for kind in ("features", "class", "soft"))
    assert (features.optimizer, features.lr, features.momentum, features.weight_decay, features.schedule, features.augment) == \
        ("sgd", 0.1, 0.9, 1e-3, "constant", "none")
    assert (hard.optimizer, hard.lr, hard.momentum, hard.weight_decay, hard.schedule, hard.augment, hard.batch) == \
        ("sgd", 0.01, 0.9, 5e-4, "halfway", "dsa", 256)
    assert (soft.optimizer, soft.lr, soft.weight_decay, soft.schedule, soft.warmup_steps, soft.steps, soft.batch, soft.augment) == \
        ("adamw", 3e-4, 0, "cosine", 500, 10_000, 500, "dsa")
    recipe = FinetuneSettings()
    targets = ("cifar10", "cifar100", "tinyimagenet", "cars", "imagenette")
    assert [recipe.for_target(name).steps for name in targets] == [10_000] * 3 + [5000] * 2
    assert (recipe.batch, recipe.lr, recipe.momentum, recipe.weight_decay, recipe.padding) == (256, 0.01, 0.9, 5e-4, 4)
    assert FinetuneSettings(steps=7).for_target("cifar10").steps == 7
    kd = KDSettings()
    assert (kd.epochs, kd.batch, kd.lr, kd.noise_lr, kd.weight_decay, kd.teacher.network.name) == (1000, 512, 1e-4, 1e-3, 0, "resnet18")


def learning_rates(recipe: PretrainSettings) -> list[float]:
    optimizer, schedule = optimizer_of(nn.Linear(1, 1), recipe)
    rates = []
    for _ in range(recipe.steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_a_constant_rate_stays_a_halved_run_ends_at_a_tenth_and_a_cosine_falls_to_zero_after_its_warm_up():
    assert learning_rates(PretrainSettings(steps=4, lr=0.5)) == [0.5] * 4
    assert learning_rates(PretrainSettings(steps=4, lr=0.5, schedule="halfway")) == pytest.approx([0.5, 0.5, 0.05, 0.05])
    rates = learning_rates(PretrainSettings(steps=8, lr=0.5, schedule="cosine", warmup_steps=4))
    wanted = [0.125, 0.25, 0.375, 0.5] + [0.25 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    assert rates == pytest.approx(wanted)


def test_the_recipe_that_a_set_carries_can_be_changed_and_a_misspelt_change_is_refused():
    stored = PRETRAIN["class"].recipe("cross-entropy")
    assert stored["loss"] == "cross-entropy" and pretrain_recipe(stored) == PRETRAIN["class"]
    assert pretrain_recipe(stored, steps=3) == PRETRAIN["class"].model_copy(update={"steps": 3})
    with pytest.raises(ConfigError, match="stpes: no such setting; did you mean 'steps'"):
        pretrain_recipe(stored, stpes=3)


# pre-training


def test_the_loss_follows_from_the_labels():
    outputs, labels = torch.randn(6, 4), torch.randn(6, 4)
    literal = sum(0.5 * sum((outputs[i, c] - labels[i, c]) ** 2 for c in range(4)) for i in range(6)) / 6
    assert soft_label_loss(outputs, labels).item() == pytest.approx(literal.item(), rel=1e-5)
    recipe = PretrainSettings(steps=3, batch=8)
    losses = {"features": F.mse_loss, "soft": soft_label_loss, "class": F.cross_entropy}
    for kind, width in (("features", 5), ("soft", 4), ("class", 3)):
        one = a_set(kind)
        x, y = torch.tensor(one.x_syn), torch.tensor(one.y_syn)
        trained = pretrain_on(one, NET, recipe, seed=1).state_dict()
        literal = pretrain(NET, x, y, recipe, seed=1, loss=losses[kind], outputs=width).state_dict()
        assert all(torch.equal(trained[name], literal[name]) for name in literal)


def unlabelled(m: int = 12, *, channels: int = 3) -> DistilledSet:
    x = np.random.default_rng(0).standard_normal((m, channels, 8, 8)).astype(np.float32)
    return DistilledSet(x, np.zeros((m, 0), np.float32), "none", {}, Space("normalised", (0.5,) * channels, (0.25,) * channels))


def test_pretraining_without_labels_is_barlow_twins_on_two_views_of_each_batch():
    made, settings = unlabelled(), NetworkSettings(widths=(4, 8))
    recipe = PretrainSettings(steps=4, batch=12, lr=0.01, momentum=0, weight_decay=0)
    trained = pretrain_on(made, settings, recipe, seed=3)
    network = fresh(settings, resolution=8, channels=3, outputs=1, seed=3).network
    with seeds.seeded(3, "pretrain projector"):
        head = projector(network.feature_dim, PROJECTOR)
    model = nn.Sequential(network, head).train()
    for step in range(4):
        views = ssl_pair.two_views(torch.tensor(made.x_syn) * 0.25 + 0.5, seeds.torch_rng(3, "training views", step))
        z = model(torch.cat([(view - 0.5) / 0.25 for view in views]))
        weights = list(model.parameters())
        gradients = torch.autograd.grad(barlow_twins(z[:12], z[12:], OFF_DIAGONAL), weights)
        with torch.no_grad():
            for value, gradient in zip(weights, gradients, strict=True):
                value -= 0.01 * gradient
    assert not trained.training
    for name, value in network.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("made", "message"), [(unlabelled(1), r"1 image\(s\) with 3 channel"), (unlabelled(channels=1), "with 1 channel")])
def test_sets_that_it_cannot_be_done_on_are_refused(made, message):
    with pytest.raises(ConfigError, match=f"a set without labels of .*{message}.*at least 2 images of 3 channels"):
        pretrain_on(made, NetworkSettings(widths=(4,)), PretrainSettings(steps=1), seed=0)


def test_pretraining_with_augmentation_sees_each_batch_augmented_by_a_seed_of_its_own():
    x, y = torch.randn(20, 3, 8, 8), torch.randn(20, 2)
    recipe = PretrainSettings(steps=5, batch=8, augment="dsa")
    trained = pretrain(NET, x, y, recipe, seed=3)
    model = fresh(NET, resolution=8, channels=3, outputs=2, seed=3).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for step, (a, b) in enumerate(islice(shuffled_batches(x, y, batch=8, seed=3), 5)):
        optimizer.zero_grad()
        F.mse_loss(model(diff_augment(a, seed=seeds.derive(3, "training augmentation", step))), b).backward()
        optimizer.step()
    for name, value in model.network.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], value, rtol=1e-3, atol=1e-5)


def test_a_training_that_is_watched_reports_its_curve_and_stops_when_it_diverges():
    seen = []
    x, y = torch.randn(20, 3, 8, 8), torch.randn(20, 2)
    pretrain(NET, x, y, PretrainSettings(steps=120, batch=8), seed=0, watch=lambda step, loss: seen.append((step, loss)))
    assert [step for step, _ in seen] == [50, 100, 120] and all(math.isfinite(loss) for _, loss in seen)
    seen.clear()
    with pytest.raises(DivergedError, match="at step 50: lower the learning rate"):
        pretrain(NET, x, y * 1e30, PretrainSettings(steps=1000, lr=1e6), seed=0, watch=lambda step, loss: seen.append((step, loss)))
    assert len(seen) == 1 and not math.isfinite(seen[0][1])


# fine-tuning


def test_fine_tuning_trains_everything_on_views_that_are_new_in_every_epoch(digits):
    recipe = FinetuneSettings(steps=7, batch=400)
    trained = finetune(network(2), digits, recipe, seed=5).state_dict()
    with seeds.seeded(5, "classifier weights"):
        head = nn.Linear(16 * 4, 10)
    model = untrained_classifier(NET, resolution=8, channels=3, classes=10)
    model.network.load_state_dict(network(2).state_dict())
    model.head.load_state_dict(head.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    everything = torch.arange(1200)
    batches = islice(shuffled_batches(everything, everything, batch=400, seed=5), 7)
    for step, (index, _) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 + math.cos(math.pi * step / 7)) / 2
        views = crop_flip(digits.train_images[index], index, torch.full_like(index, step // 3), seed=seeds.derive(5, "fine-tuning views"))
        optimizer.zero_grad()
        F.cross_entropy(model.train()(normalise(views, MEAN, STD)), digits.train_labels[index]).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-3, atol=1e-5)
    assert not torch.equal(trained["network.layers.0.weight"], network(2).state_dict()["layers.0.weight"])


def test_a_fine_tuned_network_reads_digits_it_never_saw_and_few_labels_make_it_worse(digits):
    recipe = FinetuneSettings(steps=200, batch=64, lr=0.1, padding=1)
    many, few = (score(finetune(network(), digits.with_few_labels(share, 0), recipe, seed=0), digits) for share in (1, 0.02))
    assert many.accuracy > 0.8 > few.accuracy > 0.15 and many.loss < few.loss


def test_accuracy_and_loss_are_those_of_the_test_images_whatever_the_chunk(digits):
    model = untrained_classifier(NET, resolution=8, channels=3, classes=10).eval()
    outputs = model(normalise(digits.test_images, MEAN, STD))
    found = [score(model, digits, chunk=chunk) for chunk in (597, 100, 1)]
    assert {one.accuracy for one in found} == {(outputs.argmax(1) == digits.test_labels).float().mean().item()} or \
        found[0].accuracy == pytest.approx((outputs.argmax(1) == digits.test_labels).double().mean().item())
    for one in found:
        assert one.loss == pytest.approx(F.cross_entropy(outputs, digits.test_labels).item(), rel=1e-4)


# labelled images


def test_a_validation_split_is_a_tenth_of_every_class_of_the_training_images_and_no_test_image(digits):
    cut = digits.validation()
    assert len(cut.train_labels) + len(cut.test_labels) == 1200
    for label in range(10):
        assert (cut.test_labels == label).sum() == round(0.1 * int((digits.train_labels == label).sum()))
    rows = {image.numpy().tobytes() for image in digits.train_images}
    assert all(image.numpy().tobytes() in rows for image in cut.test_images)
    assert torch.equal(cut.test_images, digits.validation().test_images)


@pytest.mark.parametrize(("change", "message"), [
    ({"classes": 1}, "1 class.*at least 2"), ({"classes": 9}, "labels run from 0 to 9, but there are 9 classes"),
    ({"test_labels": torch.tensor([], dtype=torch.int64)}, "the test split holds no images"),
    ({"train_labels": torch.tensor([-1, 2])}, "training labels run from -1 to 2")])
def test_a_target_that_cannot_be_learned_is_refused(digits, change, message):
    with pytest.raises(ValueError, match=message):
        LabelledImages(**vars(digits) | change)


# knowledge distillation


def kd(**changes) -> KDSettings:
    return KDSettings(**{"epochs": 3, "batch": 16, "noise_images": 20} | changes)


def test_a_teachers_answers_are_learned_by_the_cross_entropy_of_softmaxes():
    outputs, answers = torch.randn(5, 3), torch.rand(5, 3).softmax(1)
    literal = np.mean([-sum(answers[i, c].item() * math.log(outputs[i].softmax(0)[c].item()) for c in range(3)) for i in range(5)])
    assert soft_cross_entropy(outputs, answers).item() == pytest.approx(literal, rel=1e-5)


def test_a_student_sees_augmented_synthetic_images_the_rate_falls_by_epoch_and_batch_norm_takes_the_batchs_statistics():
    teacher, x = untrained_classifier(NET, resolution=8, channels=3, classes=4), torch.randn(20, 3, 8, 8)
    before = copy.deepcopy(teacher)
    student = distil_knowledge(network(1), teacher, x, kd(lr=0.01), classes=4, seed=2)
    model = untrained_classifier(NET, resolution=8, channels=3, classes=4)
    model.network.load_state_dict(network(1).state_dict())
    with seeds.seeded(2, "classifier weights"):
        model.head = nn.Linear(16 * 4, 4)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=0.01, weight_decay=0)
    for step, (a, _) in enumerate(islice(shuffled_batches(x, x, batch=16, seed=2), 6)):  # 20 images: batches of 16 and 4
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 + math.cos(math.pi * (step // 2) / 3)) / 2
        a = diff_augment(a, seed=seeds.derive(2, "training augmentation", step))
        with torch.no_grad():
            answers = before.train()(a).softmax(1)
        optimizer.zero_grad()
        soft_cross_entropy(model(a), answers).backward()
        optimizer.step()
    weights = {name: value for name, value in model.named_parameters() if value.dim() > 1}  # AdamW makes much of a bias before batch norm,
    for name, value in weights.items():  # whose gradient is nothing but rounding
        torch.testing.assert_close(dict(student.named_parameters())[name], value, rtol=1e-3, atol=1e-4)
    assert student.training
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), before.parameters(), strict=True))


def test_noise_is_new_in_every_batch_and_has_its_own_learning_rate():
    seen = []

    class Teacher(nn.Module):
        def forward(self, x):
            seen.append(x.clone())
            return torch.zeros(len(x), 4)

    student = distil_knowledge(network(), Teacher(), (20, 3, 8, 8), kd(noise_lr=1e-9, lr=1.0), classes=4, seed=0)
    assert [len(x) for x in seen] == [16, 4] * 3
    pixels = torch.cat(seen).flatten()
    assert abs(pixels.mean()) < 0.03 and abs(pixels.std() - 1) < 0.03 and len(pixels.unique()) > 0.99 * len(pixels)
    for name, value in network().named_parameters():
        torch.testing.assert_close(dict(student.network.named_parameters())[name], value, atol=1e-6, rtol=0)


def test_a_student_learns_digits_from_a_teacher_without_seeing_one(digits):
    recipe = TeacherSettings(network=NET, training=FinetuneSettings(steps=200, batch=64, lr=0.1, padding=0))
    teacher = train_teacher(recipe, digits)
    x = normalise(digits.train_images[:200], MEAN, STD)
    student = distil_knowledge(network(), teacher, x, kd(epochs=60, batch=64, lr=3e-3), classes=10, seed=0)
    assert score(teacher.eval(), digits).accuracy > 0.85
    assert score(student, digits, chunk=200).accuracy > 0.6


def test_a_diverging_student_is_noticed():
    teacher = untrained_classifier(NET, resolution=8, channels=3, classes=4)
    with torch.no_grad():
        teacher.head.bias[0] = float("nan")
    with pytest.raises(DivergedError):
        distil_knowledge(network(), teacher, torch.randn(20, 3, 8, 8), kd(), classes=4, seed=0, watch=lambda step, loss: None)


# weights


def test_weights_come_back_and_those_of_another_network_are_refused(tmp_path):
    model = untrained_classifier(NET, resolution=8, channels=3, classes=4)
    save_weights(tmp_path / "w.safetensors", model, about={"title": "a"})
    again = untrained_classifier(NET, resolution=8, channels=3, classes=4)
    load_weights(tmp_path / "w.safetensors", again)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    with pytest.raises(ArtifactError, match="another network.*delete it"):
        load_weights(tmp_path / "w.safetensors", untrained_classifier(NET, resolution=8, channels=3, classes=5))
    (tmp_path / "w.safetensors").write_bytes(b"half")
    with pytest.raises(ArtifactError, match="truncated or no safetensors"):
        load_weights(tmp_path / "w.safetensors", again)
    a_set("class").save(tmp_path / "set.safetensors")
    with pytest.raises(ArtifactError, match="does not hold weights"):
        load_weights(tmp_path / "set.safetensors", again)


def test_an_unwatched_training_does_not_wait_for_losses():
    class Loss:
        def backward(self):
            pass

        def item(self):
            raise AssertionError("the loss was asked for")

    model = nn.Linear(1, 1)
    train(model, [(torch.ones(1, 1), torch.ones(1, 1))] * 60, lambda a, b: Loss(), torch.optim.SGD(model.parameters(), lr=0.1))
