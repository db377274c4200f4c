"""A meta-gradient cut into slices, and one prepared ahead: the same numbers, whoever computes which rows, and when."""

from __future__ import annotations

import pytest
import torch
from algorithm_toys import Batches, headed, problem, relative_error

from krrst_dist.algorithm import Contribution, DivergedError, ModelPool, Shard, Slice, SlicedShard, meta_gradient
from krrst_dist.algorithm.meta_gradient import cut

X_SYN, Y_SYN, X_REAL, Y_REAL = problem(m=10, b=40)
BATCHES = [(X_REAL[rows], Y_REAL[rows]) for rows in (slice(0, 16), slice(16, 32), slice(32, 34))]  # the last one is very short


def shard(*, slices: int = 1, chunk_size: int | None = None, size: int = 2) -> Shard:
    return Shard(0, ModelPool(headed, size=size, max_steps=4, lr=0.05, seed=11), Batches(*BATCHES), ridge=1e-3, chunk_size=chunk_size,
                 slices=slices)


def others(slices: int, chunk_size: int | None) -> list[Slice]:
    return [Slice(p, slices, headed().network, Batches(*BATCHES), chunk_size=chunk_size) for p in range(1, slices)]


def shared(step: int, lead: SlicedShard, rest: list[Slice], x_syn: torch.Tensor, y_syn: torch.Tensor) -> Contribution:
    """One meta-gradient by several, as the engine asks for it."""
    weights = {name: value.clone() for name, value in lead.weights(step).items()}
    solved = lead.solve(step, y_syn, [lead.features(step, x_syn), *(part.features(weights, x_syn) for part in rest)])
    first, *further = solved.g_features
    x = torch.cat([lead.pull_back(step, first), *(part.pull_back(g) for part, g in zip(rest, further, strict=True))])
    return Contribution(solved.loss, (x, solved.y), solved.images, solved.retries)


@pytest.mark.parametrize("slices", [2, 3, 10, 12])
def test_slices_change_rounding_only(slices):
    network = headed().network
    whole, cut_up = (meta_gradient(network, X_SYN, Y_SYN, X_REAL, Y_REAL, ridge=1e-3, slices=s) for s in (1, slices))
    assert relative_error(cut_up.x, whole.x) < 1e-10 and relative_error(cut_up.y, whole.y) < 1e-10
    parts = cut(X_SYN, slices)
    assert len(parts) == min(slices, 10) and max(map(len, parts)) - min(map(len, parts)) <= 1 and torch.equal(torch.cat(parts), X_SYN)


@pytest.mark.parametrize(("slices", "chunk_size"), [(2, None), (3, 2), (4, None)])
def test_slices_in_several_places_give_the_shards_own_numbers_bit_for_bit(slices, chunk_size):
    alone, lead = shard(slices=slices, chunk_size=chunk_size), shard(slices=slices, chunk_size=chunk_size)
    together, rest = SlicedShard(lead), others(slices, chunk_size)
    x_syn, y_syn = X_SYN.clone(), Y_SYN.clone()
    for step in range(7):
        expected, got = alone.contribute(step, x_syn, y_syn), shared(step, together, rest, x_syn, y_syn)
        assert (got.loss, got.images, got.retries) == (expected.loss, expected.images, expected.retries)
        assert all(torch.equal(a, b) for a, b in zip(got.gradients, expected.gradients, strict=True))
        x_syn, y_syn = x_syn - 0.1 * expected.gradients[0], y_syn - 0.1 * expected.gradients[1]
        for one in (alone, lead):
            one.advance(step, x_syn, y_syn)


def test_a_slice_whose_gradient_is_not_finite_says_so():
    lead, (other,) = SlicedShard(shard(slices=2)), others(2, None)
    features = [lead.features(0, X_SYN), other.features(lead.weights(0), X_SYN)]
    solved = lead.solve(0, Y_SYN, features)
    with pytest.raises(DivergedError, match="gradient of X_s is not finite"):
        other.pull_back(solved.g_features[1] * float("nan"))
    with pytest.raises(DivergedError, match="update 0, shard 0: .*not finite"):
        SlicedShard.solve(lead, 0, Y_SYN * float("inf"), features)


def test_looking_ahead_changes_nothing_whether_or_not_the_model_is_the_one_that_is_trained():
    plain, ahead = shard(), shard()
    draws = [plain.pool.draw(step) for step in range(9)]
    assert {a == b for a, b in zip(draws, draws[1:], strict=False)} == {True, False}  # both cases come up
    x_syn, y_syn = X_SYN.clone(), Y_SYN.clone()
    for step in range(8):
        expected, got = plain.contribute(step, x_syn, y_syn), ahead.contribute(step, x_syn, y_syn)
        assert got.loss == expected.loss and all(torch.equal(a, b) for a, b in zip(got.gradients, expected.gradients, strict=True))
        ahead.look_ahead(step + 1)
        x_syn, y_syn = x_syn - 0.1 * expected.gradients[0], y_syn - 0.1 * expected.gradients[1]
        for one in (plain, ahead):
            one.advance(step, x_syn, y_syn)


def test_what_is_known_ahead_is_used(monkeypatch):
    one = shard(size=5)
    step = next(step for step in range(1, 20) if one.pool.draw(step) != one.pool.draw(step - 1))
    seen = []
    one.extractor(step).register_forward_hook(lambda _module, inputs, _out: seen.append(len(inputs[0])))
    one.look_ahead(step)
    assert sum(seen) == 16
    one.contribute(step, X_SYN, Y_SYN)
    assert sum(seen) == 16 + 10  # the synthetic images alone


def test_a_saved_state_knows_nothing_of_what_was_prepared_ahead():
    one, other = shard(), shard()
    one.contribute(0, X_SYN, Y_SYN)
    one.look_ahead(1)
    one.advance(0, X_SYN, Y_SYN)
    tensors, position = one.state_dict()
    assert position == {"batch": 1}
    other.load_state_dict({name: value.clone() for name, value in tensors.items()}, position)
    a, b = (each.contribute(1, X_SYN, Y_SYN) for each in (one, other))
    assert a.loss == b.loss and torch.equal(a.gradients[0], b.gradients[0])
    one.look_ahead(2)
    one.load_state_dict({name: value.clone() for name, value in tensors.items()}, position)
    assert one.contribute(1, X_SYN, Y_SYN).images == 16 and one.batches.state() == {"batch": 2}
