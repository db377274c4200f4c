"""The pool of models: who is drawn, how members age, and what a saved pool is."""

from __future__ import annotations

import copy

import pytest
import torch
from algorithm_toys import Batches, headed, problem

from krrst_dist import seeds
from krrst_dist.algorithm import DivergedError, ModelPool, PoolMember, Shard

X_SYN, Y_SYN, *_ = problem()


def pool(**settings) -> ModelPool:
    return ModelPool(headed, **{"size": 3, "max_steps": 4, "lr": 0.05, "seed": 7} | settings)


def weights(member: PoolMember) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in member.model.parameters()])


def clone(state: dict) -> dict:
    return {name: value.clone() for name, value in state.items()}


def test_a_training_step_is_one_step_of_sgd_on_the_mean_squared_error_in_train_mode():
    member = PoolMember(headed, lr=0.1, momentum=0.9, weight_decay=1e-2)
    model = copy.deepcopy(member.model).train()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    member.model.eval()
    for _ in range(3):
        loss = ((model(X_SYN) - Y_SYN) ** 2).mean()
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        assert member.train_step(X_SYN, Y_SYN).item() == pytest.approx(loss.item(), rel=1e-12)
    ours, theirs = member.model.state_dict(), model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert member.steps == 3


def test_a_training_step_leaves_no_gradients_behind():
    member = PoolMember(headed)
    member.train_step(X_SYN, Y_SYN)
    assert all(parameter.grad is None for parameter in member.model.parameters())


def test_a_member_that_has_had_t_steps_is_replaced_and_trains_from_its_next_turn_on():
    models = pool()
    member, first = models.members[1], weights(models.members[1])
    for age in range(1, 5):
        models.advance(1, X_SYN, Y_SYN)
        assert (member.steps, member.births) == (age, 1)
    models.advance(1, X_SYN, Y_SYN)
    assert (member.steps, member.births) == (0, 2)
    fresh = weights(member)
    assert not torch.equal(fresh, first)
    assert not member.optimizer.state  # no momentum of the former life
    models.advance(1, X_SYN, Y_SYN)
    assert (member.steps, member.births) == (1, 2)
    assert not torch.equal(weights(member), fresh)


def test_under_the_released_rule_a_replaced_member_stays_untrained_for_ever():
    models = pool(reset="released")
    member = models.members[1]
    for _ in range(4):
        models.advance(1, X_SYN, Y_SYN)
    for turn in range(3):
        models.advance(1, X_SYN, Y_SYN)
        assert (member.steps, member.births) == (4, 2 + turn)
        with seeds.seeded(7, "pool member", 0, 1, 1 + turn):
            untrained = headed()
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(member.model.parameters(), untrained.parameters(), strict=True))


def test_others_are_not_touched_by_a_member_s_turn():
    models = pool()
    before = [weights(member) for member in models.members]
    models.advance(1, X_SYN, Y_SYN)
    assert [torch.equal(weights(member), old) for member, old in zip(models.members, before, strict=True)] == [True, False, True]


def test_starting_ages_are_uniform_over_1_to_t_minus_1_and_are_trained_for():
    ages = []
    for shard in range(100):
        models = ModelPool(Counting, size=3, max_steps=4, shard=shard)
        models.warm_up(torch.zeros(1, 1), torch.zeros(1, 1))
        ages += [member.steps for member in models.members]
        assert [member.model.calls for member in models.members] == ages[-3:]
    counts = torch.bincount(torch.tensor(ages), minlength=5)
    assert counts[0] == counts[4] == 0
    assert (counts[1:4] > 70).all()  # 100 expected each; 70 is 3.7 standard deviations off


class Counting(torch.nn.Module):
    """A model that counts the passes through it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Linear(1, 1)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.network(x)


def test_a_member_whose_training_loss_is_not_finite_stops_the_pool_and_is_named():
    models = pool()
    for parameter in models.members[1].model.parameters():
        parameter.data.fill_(float("inf"))
    models.advance(0, X_SYN, Y_SYN)
    with pytest.raises(DivergedError, match=r"pool member 1 has a training loss of nan in its training step 1; .*distill.pool.lr"):
        models.advance(1, X_SYN, Y_SYN)
    with pytest.raises(DivergedError, match=r"pool member 0 has a training loss of (nan|inf) in its training step"):
        pool(lr=1e200, max_steps=50).warm_up(X_SYN, Y_SYN)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("where", ["model.head.weight", "momentum.0"])
def test_a_pool_with_weights_or_momenta_that_cannot_be_computed_with_does_not_pass_its_check(value, where):
    """1e30 is finite, but its square is not in float32."""
    models = ModelPool(lambda: headed(dtype=torch.float32), size=3, max_steps=4)
    models.warm_up(X_SYN.float(), Y_SYN.float())
    models.check()
    models.members[2].state_dict()[where].view(-1)[1] = value
    with pytest.raises(DivergedError, match="pool member 2 has weights that are not finite"):
        models.check()


def test_a_shard_says_when_its_pool_diverged():
    shard = Shard(3, pool(lr=1e200, max_steps=50), Batches(problem()[2:]))
    with pytest.raises(DivergedError, match="^warm-up, shard 3: pool member 0 has a training loss"):
        shard.warm_up(X_SYN, Y_SYN)
    with pytest.raises(DivergedError, match=r"^update 7, shard 3: pool member \d has"):
        for _ in range(30):
            shard.advance(7, X_SYN, Y_SYN)
    with pytest.raises(DivergedError, match="^update 7, shard 3: pool member 0 has weights that are not finite"):
        shard.check(7)


def test_draws_are_uniform_and_a_pure_function_of_seed_shard_and_step():
    one, same, other_seed, other_shard = (pool(seed=seed, shard=shard) for seed, shard in ((7, 0), (7, 0), (8, 0), (7, 1)))
    draws = [one.draw(step) for step in range(3000)]
    assert [same.draw(step) for step in reversed(range(3000))] == draws[::-1]  # whatever was drawn before
    counts = torch.bincount(torch.tensor(draws), minlength=3)
    assert len(counts) == 3 and (counts > 900).all()  # 1000 expected each; 900 is 3.9 standard deviations off
    for other in (other_seed, other_shard):
        agreeing = sum(other.draw(step) == draw for step, draw in enumerate(draws))
        assert 850 < agreeing < 1150  # unrelated: a third of them agree by chance


def test_first_weights_are_a_function_of_seed_shard_member_and_birth_and_differ_between_them():
    one, same, other_seed, other_shard = (pool(seed=seed, shard=shard) for seed, shard in ((7, 0), (7, 0), (8, 0), (7, 1)))
    lives = [weights(member) for models in (one, other_seed, other_shard) for member in models.members]
    for member in one.members:
        member.reborn()
        lives.append(weights(member))
    assert all(not torch.equal(a, b) for i, a in enumerate(lives) for b in lives[:i])
    assert all(torch.equal(weights(member), life) for member, life in zip(same.members, lives[:3], strict=True))


def test_a_pool_is_restored_in_the_middle_of_its_life_bit_for_bit():
    models = pool(max_steps=6)
    models.warm_up(X_SYN, Y_SYN)
    for step in range(3):
        models.advance(models.draw(step), X_SYN, Y_SYN)
    assert any(0 < member.steps < 6 and member.optimizer.state for member in models.members)  # with momentum, and steps to come
    saved = clone(models.state_dict())
    restored = pool(max_steps=6)
    restored.load_state_dict(saved)
    for step in range(3, 30):  # long enough for members to be replaced
        for each in (models, restored):
            each.advance(each.draw(step), X_SYN, Y_SYN)
        ours, theirs = models.state_dict(), restored.state_dict()  # at every step: rebirth would make up for a wrong momentum
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert max(member.births for member in models.members) > 1


@pytest.mark.parametrize("reset", ["paper", "released"])
def test_a_member_saved_right_after_its_rebirth_is_restored_bit_for_bit(reset):
    models, restored = pool(reset=reset), pool(reset=reset)
    for _ in range(5):
        models.advance(0, X_SYN, Y_SYN)
    restored.load_state_dict(clone(models.state_dict()))
    for each in (models, restored):
        each.advance(0, X_SYN, Y_SYN)
    assert torch.equal(weights(models.members[0]), weights(restored.members[0]))
    assert models.members[0].births == restored.members[0].births > 1


def test_seeded_leaves_the_global_generator_as_it_was():
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    first = torch.rand(1)
    with seeds.seeded(1, "a purpose", 2):
        inside = torch.rand(3)
    with pytest.raises(RuntimeError), seeds.seeded(1, "a purpose", 2):
        raise RuntimeError
    pool()
    assert torch.equal(torch.cat([first, torch.rand(3)]), expected)
    with seeds.seeded(1, "a purpose", 2):
        assert torch.equal(torch.rand(3), inside)
    with seeds.seeded(1, "a purpose", 3):
        assert not torch.equal(torch.rand(3), inside)
