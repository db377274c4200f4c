"""The benchmarks: the textbook step computes what ours computes, and what is measured is what is said."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import ray
import torch
from algorithm_toys import RESOLUTION, headed, problem, relative_error
from torch import nn

import krrst_dist
from krrst_dist.algorithm import PoolMember, meta_gradient
from krrst_dist.bench import main, measure, overhead
from krrst_dist.bench.cost import Cost, Overhead
from krrst_dist.bench.engine import bench_engine
from krrst_dist.bench.explorer import bench_explorer
from krrst_dist.bench.methods import bench_methods
from krrst_dist.bench.overhead import Measured
from krrst_dist.bench.problem import Problem
from krrst_dist.bench.serial import bench_serial
from krrst_dist.bench.step import bench_step
from krrst_dist.bench.textbook import TextbookStep, crop_and_flip
from krrst_dist.bench.update import bench_update
from krrst_dist.config import ConfigError
from krrst_dist.evaluation.target_model import load_target
from krrst_dist.on_ray.errors import LostActor
from krrst_dist.presets_and_grids import load_preset

X_SYN, Y_SYN, X_REAL, Y_REAL = problem()


def textbook(model: nn.Module) -> TextbookStep:
    return TextbookStep(model, nn.Identity(), X_SYN, Y_SYN, torch.zeros(4, 3, RESOLUTION, RESOLUTION, dtype=torch.uint8), mean=(0.5,) * 3,
                        std=(0.2,) * 3, lr_x=1e-2, lr_y=1e-2, lr=0.1, momentum=0.9, weight_decay=1e-3, ridge=1e-6)


def test_the_textbook_step_has_our_loss_and_our_gradient():
    model = PoolMember(headed).model
    step, ours = textbook(model), meta_gradient(model.network, X_SYN, Y_SYN, X_REAL, Y_REAL)
    loss = step.outer_loss(X_REAL, Y_REAL)
    g_x, g_y = torch.autograd.grad(loss, (step.x_syn, step.y_syn))
    assert relative_error(ours.loss, loss.detach()) < 1e-9
    assert relative_error(ours.x, g_x) < 1e-9 and relative_error(ours.y, g_y) < 1e-9


def test_the_textbook_step_trains_the_model_as_ours_is_trained():
    member = PoolMember(headed)
    step = textbook(copy.deepcopy(member.model))
    for _ in range(2):
        step.train_model()
        member.train_step(X_SYN, Y_SYN)
    ours, theirs = member.model.state_dict(), step.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_textbook_batch_is_cropped_and_flipped_image_by_image():
    torch.manual_seed(0)
    image = torch.arange(1.0, 3 * 6 * 6 + 1).view(3, 6, 6)
    padded = nn.functional.pad(image, (4,) * 4)
    crops = [padded[:, i : i + 6, j : j + 6] for i in range(9) for j in range(9)]
    views = torch.stack(crops + [crop.flip(2) for crop in crops]).flatten(1)
    seen = crop_and_flip(image.expand(2000, -1, -1, -1)).flatten(1)
    which = (seen[:, None] == views[None]).all(2)  # [2000, 162]
    assert (which.sum(1) == 1).all()  # each is one of the 162 views
    assert (which.sum(0) > 0).all()  # and all of them come: 12 times each on average


def test_operations_are_two_a_multiply_add_forward_and_backward():
    convolution, x = nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.randn(2, 3, 5, 5, requires_grad=True)
    a, y = 2 * torch.eye(20).requires_grad_(), torch.randn(20, 6)
    once = 2 * (2 * 5 * 5) * 8 * (3 * 9)
    assert measure.operations(lambda: convolution(x)) == once
    assert measure.operations(lambda: convolution(x).sum().backward()) == 3 * once
    assert measure.operations(lambda: torch.autograd.grad(convolution(x).sum(), x)) == 2 * once
    solve = 2 / 3 * 20**3 + 2 * 20**2 * 6
    assert measure.operations(lambda: torch.linalg.solve(a, y)) == pytest.approx(solve)
    backward = 2 * 20**2 * 6 + 2 * 20 * 20 * 6  # another solve, and the outer product
    assert measure.operations(lambda: torch.linalg.solve(a, y).sum().backward()) == pytest.approx(solve + backward)
    factor = torch.linalg.cholesky(a.detach())
    symmetric = measure.operations(lambda: torch.cholesky_solve(y, torch.linalg.cholesky(a.detach())))
    assert symmetric == pytest.approx(20**3 / 3 + 2 * 20**2 * 6)
    assert measure.operations(lambda: factor @ y) == 2 * 20 * 20 * 6


def test_the_textbook_step_of_cifar_100_is_3_4_tera_operations():
    """What passes the networks is counted with 2 + 2 images, in proportion; ridge regression, which is not, is added."""
    m, b, d, k = 1000, 1024, 8193, 512
    per_pair = measure.operations(Problem(load_preset("cifar100", **{"distill.m": 2, "distill.batch": 2})).textbook()) / 2
    ridge = 2 * d * (3 * m * m + 2 * b * m) + 2 / 3 * m**3 + 6 * m * m * k + 6 * b * m * k
    assert 1000 * per_pair + ridge == pytest.approx(3.4e12, rel=0.03)


def test_steps_take_turns_and_the_first_alternates():
    order: list[str] = []
    times = measure.in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3)
    assert "".join(order) == "abbaab"
    assert [len(values) for values in times.values()] == [3, 3]


def allocating(mebibytes: int) -> measure.Step:
    held = torch.ones(64, 2**18)  # 64 MiB that are there before the step
    return lambda: torch.ones(mebibytes, 2**18).sum() + held[0, 0]


def test_peak_memory_is_what_a_step_needs_beyond_what_was_there():
    ours = torch.ones(300, 2**18)  # what the asking process holds does not count
    assert len(ours) == 300 and 200 <= measure.peak_memory(partial(allocating, 200)) / 2**20 < 260


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_benchmark_of_the_step_ends_with_a_table(precision, capsys):
    times = bench_step(preset="quickstart", rounds=2, threads=1, precision=precision, m=8, batch=16, memory=False)
    assert len(times.textbook) == len(times.ours) == len(times.ratios) == 2 and min(times.textbook + times.ours) > 0
    assert times.operations["textbook"] > times.operations["ours"] > 0
    shown = capsys.readouterr().out
    for part in ("commit", "torch", "1 thread(s)", "quickstart: m = 8, b = 16, 16 px", f"our features in {precision}",
                 "| textbook |", "| ours |", "| textbook / ours, by pair |"):
        assert part in shown


def allocated(step: measure.Step, folder: Path) -> int:
    """Bytes of tensors at a step's highest: what the allocator counts is the same on every machine, the resident set is not."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")


def test_chunks_keep_the_meta_gradient_s_memory_below_a_half(tmp_path):
    """Of 2,000 images on a small ConvNet, where K alone is a half of what the chunks need."""
    sizes = {"distill.m": 2000, "distill.batch": 16}
    whole, chunked = (allocated(Problem(load_preset("quickstart", **sizes | chunks)).our_meta_gradient(), tmp_path)
                      for chunks in ({}, {"distill.chunk_size": 20}))
    assert 0 < 2 * chunked < whole < 2**27


def test_the_table_shows_the_memory_of_each_step_with_and_without_chunks(capsys):
    times = bench_step(preset="quickstart", rounds=1, threads=1, m=200, batch=16, chunk_size=20)
    assert list(times.memory) == ["textbook", "ours", "ours, chunks of 20", "meta-gradient alone", "meta-gradient alone, chunks of 20"]
    chunked = times.memory["meta-gradient alone, chunks of 20"]
    assert chunked > 0 and f"| meta-gradient alone, chunks of 20 | | | {chunked / 2**30:.2f} GiB |" in capsys.readouterr().out


@pytest.fixture
def no_cluster() -> Iterator[None]:
    yield
    ray.shutdown()


def test_a_benchmark_of_the_engine_ends_with_a_table(no_cluster, capsys):
    times = bench_engine(preset="quickstart", rounds=2, threads=1, m=8, batch=16, actors=(1, 2), sizes=("quickstart", "cifar100-cpu"))
    assert [len(values) for values in (times.serial, times.store, times.collective, times.one_actor, times.two_actors)] == [2] * 5
    assert min(times.overhead + times.speed_up) > 0
    shown = capsys.readouterr().out
    assert all(f"| {row}, by pair |" in shown for row in ("object store / serial", "all-reduce / serial"))
    assert "| S = 2, two actors of one thread |" in shown
    assert {(one.way, one.preset, one.actors) for one in times.null} == {
        (way, preset, actors) for way in ("store", "collective") for preset in ("quickstart", "cifar100-cpu") for actors in (1, 2)}
    assert all(len(one.seconds) == 2 for one in times.null) and "fit      collective: " in shown and "| 64 | " in shown


def test_the_operations_of_an_update_are_counted_without_running_it():
    """As those of an update that runs, up to what is too small to be counted."""
    config = load_preset("quickstart", **{"distill.m": 40, "distill.batch": 30})
    counted = Cost.of(config, shards=1)
    assert counted.operations == pytest.approx(measure.operations(Problem(config).ours()), rel=0.02)
    in_chunks = Cost.of(load_preset("quickstart", **{"distill.m": 40, "distill.batch": 30, "distill.chunk_size": 10}), shards=1)
    assert in_chunks.synthetic > counted.synthetic and in_chunks.train == counted.train
    two = Cost.of(config, shards=2)
    assert two.real == counted.real / 2 and (two.train, two.synthetic, two.learned) == (counted.train, counted.synthetic, counted.learned)
    assert counted.learned == 4 * sum(value.numel() for value in Problem(config).start())


def test_the_model_of_the_overhead_finds_the_constants_that_made_it():
    made = Overhead(2e-3, 1e-3, 3e-9, 1e-9)
    measured = [Measured("store", "any", size, actors, [made.seconds(size, actors)] * 3) for size in (10**7, 10**8) for actors in (1, 2, 8)]
    found = Overhead.fit(measured)
    assert [found.start, found.actor, found.byte, found.byte_actor] == pytest.approx([2e-3, 1e-3, 3e-9, 1e-9], rel=1e-6)


def test_updates_that_are_too_much_for_the_machine_cost_their_own_line_only(monkeypatch, capsys):
    def measure(way, start, actors, rounds):
        if (way, actors) == ("collective", 2):
            raise LostActor("actor 1 was lost: out of memory")
        return [0.1 * actors] * rounds

    monkeypatch.setattr(overhead, "_measure", measure)
    measured = overhead.measure_overhead(presets=["quickstart"], actors=[1, 2], rounds=3)
    assert "quickstart, collective, 2 actors: no figure: actor 1 was lost: out of memory" in capsys.readouterr().out
    table = overhead.report(measured, {way: Overhead(0, 0.1, 0, 0) for way in overhead.WAYS}, update=1.0)
    assert len(measured) == 4 and table.count("| an actor was lost, see above |") == 1 and table.count("| 200 (200-200) |") == 1


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device = 'cuda'.*take device = 'cpu'"):
        bench_step(device="cuda")


def test_no_rounds_are_refused():
    with pytest.raises(ConfigError, match="rounds = 0"):
        bench_step(rounds=0)


@pytest.mark.parametrize(("command", "flags"), [("step", ("--preset", "--rounds", "--threads", "--device", "--precision", "--m", "--batch",
                                                          "--chunk-size")), ("engine", ("--preset", "--rounds", "--threads"))])
def test_the_command_line_shows_its_flags(command, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in flags)


def test_the_command_line_runs_a_benchmark(capsys):
    main(["step", "--preset", "quickstart", "--rounds", "1", "--threads", "1", "--m", "8", "--batch", "16", "--no-memory"])
    assert "| textbook |" in capsys.readouterr().out


def test_one_update_of_a_preset_is_timed_and_its_memory_measured(capsys):
    cost = bench_update(preset="quickstart", threads=1)
    assert len(cost.seconds) == 1 and cost.seconds[0] > 0 and cost.memory > 0
    assert "| quickstart |" in capsys.readouterr().out


def test_the_serial_run_ends_with_a_transfer_table_and_its_files(tmp_path, capsys):
    run = bench_serial(out=tmp_path, preset="quickstart", target_steps=40, updates=20, pretrain_steps=20, finetune_steps=5)
    printed = capsys.readouterr().out
    assert set(run.transfer) == {"from scratch", "Random + targets", "KRR-ST"}
    assert all(0.1 < value <= 1 for row in run.transfer.values() for value in row.values())
    assert run.held_out["KRR-ST"] < run.held_out["Random + targets"]
    assert "| KRR-ST |" in printed and "digits-5-9, fine-tuned" in printed and "20 updates" in printed
    assert len(krrst_dist.load(tmp_path / "distilled.safetensors")) == 20
    assert load_target(tmp_path / "target.safetensors", resolution=16).feature_dim == 256
    again = bench_serial(out=tmp_path, preset="quickstart", target_steps=40, updates=20, pretrain_steps=20, finetune_steps=5)
    assert (again.transfer, again.held_out) == (run.transfer, run.held_out)
    assert "target: " not in (printed := capsys.readouterr().out) and "distillation: " not in printed
    with pytest.raises(ConfigError, match="out = .*other settings.*name another folder"):
        bench_serial(out=tmp_path, preset="quickstart", target_steps=41, updates=20, pretrain_steps=20, finetune_steps=5)


def test_the_explorer_is_timed_over_a_store_of_many_results(capsys):
    times = bench_explorer(rows=40, files=3, repeats=2)
    assert 0 < times.start < times.first and min(*times.again, *times.filters, *times.trials) > 0
    assert "| 42 rows in 3 files | seconds: median (least-most) |" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="repeats = 19: there are 18 filters to try"):
        bench_explorer(repeats=19)


def test_every_method_that_learns_is_timed_at_equal_m(capsys):
    costs = bench_methods(preset="quickstart", m=10, classes=5, of_class=20, rounds=2)
    shown = capsys.readouterr().out
    assert list(costs) == ["krr_st", "dsa", "dm", "mtt", "kip", "frepo", "mkdt", "ssl_bilevel"]
    assert all(len(cost.seconds) == 2 and min(cost.seconds) > 0 and cost.memory > 0 for cost in costs.values())
    assert all(f"| {title} | 10 |" in shown for title in ("KRR-ST", "DSA", "DM", "MTT"))
