"""The serial loop: Algorithm 1, written out once more with plain autograd, and its shards."""

from __future__ import annotations

import pytest
import torch
from algorithm_toys import Batches, extractor, headed, problem, relative_error, textbook_gradient, textbook_loss

from krrst_dist import seeds
from krrst_dist.algorithm import DivergedError, ModelPool, OuterOptimizer, Shard, distill, mean

STD = torch.tensor([0.25, 0.2, 0.3], dtype=torch.float64).view(3, 1, 1)
L, T, SEED = 2, 4, 11
X_SYN, Y_SYN, X_REAL, Y_REAL = problem(m=10, b=40)
BATCHES = [(X_REAL[rows], Y_REAL[rows]) for rows in (slice(0, 16), slice(16, 32), slice(32, 40))]  # the last one is short


def shard(index: int = 0, batches=BATCHES, *, pool_shard: int | None = None, chunk_size: int | None = None) -> Shard:
    pool = ModelPool(headed, size=L, max_steps=T, lr=0.05, seed=SEED, shard=index if pool_shard is None else pool_shard)
    return Shard(index, pool, Batches(*batches), ridge=1e-3, chunk_size=chunk_size)


def outer(*, lr: float = 1e-2, updates: int = 12) -> OuterOptimizer:
    return OuterOptimizer(X_SYN, Y_SYN, lr_x=lr, lr_y=lr, decay_updates=updates, scale=STD)


def algorithm_1(updates: int) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """Line by line as published; only who is drawn, how old members start and first weights come from the same seeds."""

    def fresh(i: int, birth: int):
        with seeds.seeded(SEED, "pool member", 0, i, birth):
            model = headed()
        return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)

    def train(i: int):
        model, sgd = pool[i]
        model.train()
        loss = ((model(x_syn) - y_syn) ** 2).mean()
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        steps[i] += 1

    x_syn, y_syn = X_SYN.clone(), Y_SYN.clone()
    pool, steps, births = [fresh(i, 0) for i in range(L)], [0] * L, [1] * L
    for i in range(L):
        for _ in range(seeds.numpy_rng(SEED, "pool age", 0, i).integers(1, T)):
            train(i)
    pixels = (x_syn * STD).requires_grad_()
    y = y_syn.clone().requires_grad_()
    adamw = torch.optim.AdamW([pixels, y], lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(adamw, start_factor=1.0, end_factor=1e-3, total_iters=updates)
    losses = []
    for step in range(updates):
        i = int(seeds.numpy_rng(SEED, "pool draw", 0, step).integers(L))
        model, _ = pool[i]
        model.eval()
        loss = textbook_loss(model.network, pixels / STD, y, *BATCHES[step % 3], ridge=1e-3)
        pixels.grad, y.grad = torch.autograd.grad(loss, (pixels, y))
        adamw.step()
        schedule.step()
        losses.append(loss.item())
        x_syn, y_syn = (pixels / STD).detach(), y.detach().clone()
        if steps[i] < T:
            train(i)
        else:
            pool[i], steps[i] = fresh(i, births[i]), 0
            births[i] += 1
    assert max(births) > 1  # the run is long enough for the reset rule to matter
    return x_syn, y_syn, losses


def test_one_shard_is_algorithm_1_to_the_letter():
    seen = []
    x_syn, y_syn = distill(outer(), [shard()], updates=12, on_update=lambda step, update: seen.append((step, update.loss)))
    x_expected, y_expected, losses = algorithm_1(12)
    assert [step for step, _ in seen] == list(range(12))
    assert [loss for _, loss in seen] == pytest.approx(losses, rel=1e-8)
    assert relative_error(x_syn - X_SYN, x_expected - X_SYN) < 1e-8
    assert relative_error(y_syn - Y_SYN, y_expected - Y_SYN) < 1e-8


def test_distilling_lowers_the_ridge_loss_on_images_and_networks_it_has_not_seen():
    """Targets are features of a fixed network, as in the method; the networks that judge are not the pool's."""
    teacher = extractor(seed=5).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.interpolate(torch.randn(400, 3, 3, 3, generator=generator, dtype=torch.float64), 8, mode="bilinear")
    with torch.no_grad():
        targets = teacher(images)[:, :8] / teacher(images)[:, :8].std(0)
    learned, held_out = (images[:300], targets[:300]), (images[300:], targets[300:])
    batches = [(learned[0][i : i + 50], learned[1][i : i + 50]) for i in range(0, 300, 50)]

    def held_out_loss(x_syn, y_syn):
        with torch.no_grad():
            return sum(textbook_loss(extractor(seed=seed).eval(), x_syn, y_syn, *held_out) for seed in (101, 102, 103))

    start = OuterOptimizer(images[:10], targets[:10], lr_x=3e-2, lr_y=3e-2, decay_updates=200)
    pool = ModelPool(lambda: headed(k=8), size=3, max_steps=10, lr=0.05, seed=1)
    x_syn, y_syn = distill(start, [Shard(0, pool, Batches(*batches))], updates=200)
    assert held_out_loss(x_syn, y_syn) < 0.7 * held_out_loss(images[:10], targets[:10])


@pytest.mark.parametrize("shards", [1, 2])
def test_a_run_saved_and_restored_in_the_middle_goes_on_bit_for_bit(shards):
    def parts():
        return outer(), [shard(index) for index in range(shards)]

    uninterrupted, its_shards = parts()
    x_syn, y_syn = distill(uninterrupted, its_shards, updates=12)

    first, first_shards = parts()
    distill(first, first_shards, updates=3)
    assert any(0 < member.steps < T for member in first_shards[0].pool.members)  # in mid-life, with a momentum
    saved = first.state_dict()
    saved_shards = [({name: value.clone() for name, value in pool.items()}, position)
                    for pool, position in map(Shard.state_dict, first_shards)]
    distill(first, first_shards, updates=5)  # goes on after saving: the save is not touched
    second, second_shards = parts()
    second.load_state_dict(saved)
    for each, state in zip(second_shards, saved_shards, strict=True):
        each.load_state_dict(*state)
    x_again, y_again = distill(second, second_shards, updates=12)
    assert torch.equal(x_again, x_syn) and torch.equal(y_again, y_syn)


def test_shards_with_equal_pools_give_the_gradient_of_the_mean_over_all_images():
    x, y = X_REAL[:16], Y_REAL[:16]
    whole = shard(0, [(x, y)])
    parts = [shard(index, [(x[rows], y[rows])], pool_shard=0) for index, rows in enumerate((slice(0, 5), slice(5, 16)))]
    for each in (whole, *parts):
        each.warm_up(X_SYN, Y_SYN)
    expected, update = whole.contribute(0, X_SYN, Y_SYN), mean([part.contribute(0, X_SYN, Y_SYN) for part in parts])
    assert update.images == 16 and update.loss == pytest.approx(expected.loss, rel=1e-12)
    assert all(relative_error(ours, whole) < 1e-10 for ours, whole in zip(update.gradients, expected.gradients, strict=True))
    model = whole.pool.members[whole.pool.draw(0)]
    _, g_x, g_y = textbook_gradient(model.extractor, X_SYN, Y_SYN, x, y, ridge=1e-3)
    assert relative_error(update.gradients[0], g_x) < 1e-9 and relative_error(update.gradients[1], g_y) < 1e-9


def test_one_part_alone_is_passed_on_bit_for_bit():
    part = shard().contribute(0, X_SYN, Y_SYN)
    update = mean([part])
    assert update.loss == part.loss and all(map(torch.equal, update.gradients, part.gradients))


def test_the_model_that_was_used_is_the_one_that_is_trained_and_on_the_updated_set():
    one, same, stale = shard(), shard(), shard()
    one.contribute(4, X_SYN, Y_SYN)
    one.advance(4, X_SYN + 1, Y_SYN)
    used = one.pool.draw(4)
    assert [member.steps for member in one.pool.members] == [int(i == used) for i in range(L)]
    same.pool.advance(used, X_SYN + 1, Y_SYN)
    stale.pool.advance(used, X_SYN, Y_SYN)
    trained, expected, wrong = (each.pool.members[used].model.head.weight for each in (one, same, stale))
    assert torch.allclose(trained, expected, rtol=1e-9) and not torch.allclose(trained, wrong, rtol=1e-3)


def test_chunks_leave_the_run_what_it_is():
    whole, chunked = (distill(outer(), [shard(chunk_size=size)], updates=4) for size in (None, 3))
    assert relative_error(chunked[0], whole[0]) < 1e-9 and relative_error(chunked[1], whole[1]) < 1e-9


@pytest.mark.parametrize("broken", ["x_real", "y_real"])
def test_a_loss_that_is_not_finite_stops_the_run_with_the_step_and_the_shard(broken):
    bad = {"x_real": X_REAL[:16].clone(), "y_real": Y_REAL[:16].clone()}
    bad[broken].view(-1)[3] = float("nan")
    run, shards = outer(), [shard(0), shard(1, [BATCHES[0], (bad["x_real"], bad["y_real"])])]
    with pytest.raises(DivergedError, match="update 1, shard 1: loss nan"):
        distill(run, shards, updates=4)
    assert run.steps == 1 and torch.isfinite(run.x_syn).all()  # the bad gradient was not applied


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_a_shard_s_precision_holds_inside_its_own_computations_only(precision):
    seen = set()

    def watched():
        model = headed(dtype=torch.float32)
        model.network.register_forward_hook(lambda _m, _i, out: seen.add((torch.backends.cudnn.allow_tf32, out.dtype)))
        return model

    x, y, x_real, y_real = (value.float() for value in (X_SYN, Y_SYN, X_REAL, Y_REAL))
    one = Shard(0, ModelPool(watched, size=1), Batches((x_real, y_real)), ridge=1e-2, precision=precision)
    before = torch.backends.cudnn.allow_tf32
    part = one.contribute(0, x, y)
    arithmetic = torch.bfloat16 if precision == "bfloat16" else torch.float32
    assert (seen, part.gradients[0].dtype) == ({(precision == "tf32", arithmetic)}, torch.float32)
    assert torch.backends.cudnn.allow_tf32 == before and not torch.is_autocast_enabled("cpu")


def test_bfloat16_warm_up_uses_the_weights_of_every_step():
    """Autocast would keep its first casts of the weights for as long as it is entered."""
    x, y = X_SYN.float(), Y_SYN.float()
    pools = [ModelPool(lambda: headed().float(), size=1, max_steps=40) for _ in range(2)]
    together, apart = (Shard(0, pool, batches=None, precision="bfloat16") for pool in pools)
    together.warm_up(x, y)
    member = apart.pool.members[0]
    while member.steps < together.pool.members[0].steps:
        apart.advance(0, x, y)
    ours, theirs = together.pool.members[0].model.state_dict(), member.model.state_dict()
    assert member.steps > 3 and all(torch.equal(ours[name], theirs[name]) for name in theirs)
