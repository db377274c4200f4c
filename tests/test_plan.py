"""`krrst plan`: what is predicted follows from what is counted and measured, and what limits a layout is named."""

from __future__ import annotations

import pytest

from krrst_dist.bench.cost import Cost
from krrst_dist.bench.plan import bytes_a_second, main, measured, plan
from krrst_dist.config import ConfigError
from krrst_dist.presets_and_grids import load_preset

ENGINE, RATE = measured()["engine"], measured()["gpus"]["h100"]["float32"]


def test_one_gpu_takes_what_was_measured_on_one(capsys):
    (one,) = plan(preset="cifar100", gpus=1, precision="float32")
    assert one.parts["computing"] == pytest.approx(Cost.of(load_preset("cifar100"), shards=1).operations / RATE)
    assert one.parts["computing"] == pytest.approx(0.0747, rel=0.02) and one.efficiency == 1 and one.limit == "computing"
    assert one.seconds - one.parts["computing"] == pytest.approx(ENGINE["collective"])
    assert 3.52 <= one.memory / 2**30 <= 2 * 3.52  # GiB, the peak of the same step with a pool of one model
    assert "a prediction" in capsys.readouterr().out


def test_slices_leave_the_pool_model_s_training_on_one_gpu():
    one, slices, _ = plan(preset="imagenet64", gpus=64, bandwidth="400Gb")
    cost = Cost.of(load_preset("imagenet64"), shards=1)
    assert slices.seconds > (cost.train + cost.ridge) / measured()["gpus"]["h100"]["bfloat16"]
    assert slices.parts["the engine"] == ENGINE["store"] * cost.learned
    assert one.seconds / slices.seconds < cost.operations / (cost.train + cost.ridge)


def test_a_slow_network_is_what_limits_slices_and_shards():
    _, slices, shards = plan(preset="tinyimagenet", gpus=8, bandwidth="1Gb")
    assert slices.limit == "moving weights and features through one link" and shards.limit == "summing gradients over the network"
    assert shards.parts["summing gradients over the network"] == pytest.approx(2 * 7 / 8 * 4 * 2000 * (3 * 64**2 + 512) / 1.25e8)
    fast = plan(preset="tinyimagenet", gpus=8, bandwidth="400Gb")
    assert fast[1].seconds < slices.seconds and fast[2].efficiency > 0.9 > shards.efficiency


def test_the_price_is_hours_times_gpus(capsys):
    layouts = plan(preset="cifar100", gpus=2, price=3.0, updates=1000)
    shown = capsys.readouterr().out
    for one in layouts:
        assert f"| {3.0 * one.seconds * 1000 / 3600 * one.gpus:,.0f} |" in shown
    assert "1,000 updates" in shown


@pytest.mark.parametrize(("given", "value"), [("25Gb", 3.125e9), ("400 Gbit/s", 5e10), ("100Mbps", 1.25e7), ("8b", 1.0)])
def test_a_bandwidth_is_in_bits(given, value):
    assert bytes_a_second(given) == value


@pytest.mark.parametrize(("given", "complaint"), [
    ({"bandwidth": "25GB"}, "bandwidth = '25GB': must be bits a second, such as 25Gb"), ({"bandwidth": "0Gb"}, "bandwidth = '0Gb'"),
    ({"bandwidth": "1.2.3Gb"}, "bandwidth = '1.2.3Gb'"), ({"gpus": 0}, "gpus = 0: at least 1"),
    ({"gpu": "h200", "precision": "tf32"}, "precision = 'tf32': has not been measured on h200; take float32 or bfloat16"),
    ({"gpu": "h10"}, "gpu = 'h10': has not been measured; .*h100"), ({"price": -1.0}, "price = -1"), ({"updates": 0}, "updates = 0"),
    ({"preset": "nope"}, "preset = 'nope'")])
def test_what_cannot_be_planned_is_refused(given, complaint):
    with pytest.raises(ConfigError, match=complaint):
        plan(**given)


def test_every_constant_says_where_it_is_from():
    assert all("commit" in gpu["from"] and "krrst bench" in gpu["from"] for gpu in measured()["gpus"].values())


def test_the_command_line_plans(capsys):
    main(["--preset", "cifar100", "--gpus", "4", "--bandwidth", "100Gb", "--price", "2"])
    assert "| S = 1, P = 4 slices | 4 |" in capsys.readouterr().out
