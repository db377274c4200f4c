"""The command line: every setting can be typed, what cannot be is refused, and the exit status says how it went."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from settings import another_value, settings

from krrst_dist import cli, exports
from krrst_dist.presets_and_grids import load_preset

ROOT = Path(__file__).resolve().parents[1]
JOB = ROOT / "jobs" / "distill_imagenet.py"
DAILY = ["--preset", "quickstart", "--data", "D", "--out", "O", "--seed", "7", "--updates", "5", "--shards", "2", "--actors", "2",
         "--resume"]


def job(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python jobs/distill_imagenet.py ...` in a process of its own."""
    return subprocess.run([sys.executable, JOB, *arguments], env=os.environ | environment, capture_output=True, text=True, timeout=120)


def refused(capsys, *arguments: str) -> str:
    """What a command says that ends with status 2, on one line."""
    with pytest.raises(SystemExit) as ended:
        cli.parse_run(arguments)
    assert ended.value.code == 2
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_every_setting_can_be_overridden():
    before = settings(load_preset("quickstart"))
    wanted = {field: another_value(field, value) for field, value in before.items() if field != "preset"}
    typed = ["--preset", "quickstart"]
    for field, value in wanted.items():
        flag = f"--{field.replace('_', '-')}"
        if isinstance(value, bool) and before[field] is not None:
            group, _, name = flag.rpartition(".")
            typed.append(flag if value else f"{group}.no-{name}")
        else:
            typed += [flag, *map(str, value if isinstance(value, list) else [value])]
    run = cli.parse_run(typed)
    assert settings(run.config) == wanted | {"preset": "quickstart"}


def test_the_daily_flags_are_short():
    run = cli.parse_run(DAILY)
    assert (run.data, run.out, run.resume, run.cache, run.wait) == ("D", "O", True, None, False)
    assert run.config == load_preset("quickstart", **{"seed": 7, "distill.updates": 5, "distill.shards": 2, "engine.actors": 2})


def test_the_job_takes_the_flags_of_krrst(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(JOB), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(JOB), run_name="__main__")
    of_the_job = capsys.readouterr().out
    for command in ("prepare", "target", "distill", "evaluate"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        assert capsys.readouterr().out == of_the_job.replace("krrst evaluate", f"krrst {command}")
    assert ended.value.code == 0
    for flag in DAILY:
        assert not flag.startswith("--") or f"{flag} " in of_the_job or f"{flag}," in of_the_job


def test_the_job_without_a_preset_is_imagenet_at_64_px_and_missing_data_is_one_error(tmp_path):
    ended = job("--data", str(tmp_path), "--out", str(tmp_path / "run"))
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: imagenet, train: no images found; put them in one of these places or give another --data.")
    assert cli.parse_run([]).config == load_preset("imagenet64")


def test_inside_a_job_a_relative_path_is_refused(tmp_path):
    ended = job("--data", "here", "--out", str(tmp_path / "run"), RAY_JOB_CONFIG_JSON_ENV_VAR="{}")
    assert ended.returncode == 1
    assert "error: --data = 'here': inside a Ray job a path is absolute or a URI" in ended.stderr
    assert not (tmp_path / "run").exists()


def test_an_unknown_flag_is_refused_with_the_nearest_one(capsys):
    said = refused(capsys, "--udpates", "3")
    assert "Unrecognized options: --udpates, 3" in said and "Perhaps you meant: --updates" in said
    assert "Perhaps you meant: --distill.pool.size" in refused(capsys, "--pool.size", "3")


@pytest.mark.parametrize(("flags", "complaint"), [
    (["--preset", "quikstart"], "error: preset = 'quikstart': no such preset; did you mean 'quickstart'?"),
    (["--preset"], "--preset: expected one argument"),
    (["--updates", "-4"], "config.distill: updates = -4: input should be greater than 0"),
    (["--updates", "x"], "invalid literal for int() with base 10: 'x'"),
    (["--seed", "-1"], "error: seed = -1: input should be greater than or equal to 0"),
    (["--shards", "3"], "batch = 1024 is not a multiple of shards = 3"),
    (["--actors", "2"], "error: engine.actors = 2 exceeds distill.shards * distill.slices = 1"),
    (["--distill.pool.reset", "papr"], "invalid choice 'papr' for argument '--distill.pool.reset'. Expected one of ('paper', 'released')"),
])
def test_a_value_that_does_not_fit_is_refused_with_status_2(capsys, flags, complaint):
    said = refused(capsys, *flags)
    assert complaint in said and "pydantic" not in said


def test_a_preset_of_ones_own_is_given_by_its_path(tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"base": "quickstart", "distill": {"m": 5}}))
    run = cli.parse_run([f"--preset={tmp_path}/mine.yaml", "--seed", "1"])
    assert run.config == load_preset("quickstart", **{"distill.m": 5, "seed": 1, "preset": "mine"})


def test_a_preset_given_by_a_relative_path_finds_its_base_beside_itself(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "common.yaml").write_text("base: quickstart\ndistill: {m: 5}\n")
    (tmp_path / "mine" / "run.yaml").write_text("base: common.yaml\nseed: 1\n")
    monkeypatch.chdir(tmp_path)
    assert cli.parse_run(["--preset", "mine/run.yaml"]).config == load_preset("quickstart", **{"distill.m": 5, "seed": 1, "preset": "run"})


def test_the_networks_options_can_be_typed_and_none_as_a_norm_is_not_the_default():
    typed = cli.parse_run(["--distill.pool.network.norm", "none", "--target.network.norm-before", "True"]).config
    assert (typed.distill.pool.network.options()["norm"], typed.target.network.norm_before) == ("none", True)
    assert "norm" not in cli.parse_run(["--distill.pool.network.norm", "None"]).config.distill.pool.network.options()


def test_what_is_exported_or_imported_is_named_by_flags_or_in_order(monkeypatch):
    asked = []

    def export(path: str, to: str, format: str = "png") -> None:
        asked.append((path, to, format))

    def import_released(x_syn: str, y_syn: str, to: str, preset: str | None = None) -> None:
        asked.append((x_syn, y_syn, to, preset))

    monkeypatch.setattr(exports, "export", export)
    monkeypatch.setattr(exports, "import_released", import_released)
    for arguments in (["set", "out"], ["--to", "out", "--path", "set"], ["set", "--to", "out"], ["set", "out", "--format", "pt"]):
        assert cli.main(["export", *arguments]) == 0
    for arguments in (["x", "y", "out"], ["--x-syn", "x", "--y-syn", "y", "--to", "out"], ["x", "--to=out", "--preset", "p", "--y-syn=y"]):
        assert cli.main(["import", *arguments]) == 0
    assert asked == [*[("set", "out", "png")] * 3, ("set", "out", "pt"), *[("x", "y", "out", None)] * 2, ("x", "y", "out", "p")]


@pytest.mark.parametrize(("arguments", "complaint"), [(["set"], "--to"), (["set", "out", "more"], "Unrecognized options: more")])
def test_too_few_or_too_many_words_to_export_are_refused(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", *arguments])
    assert ended.value.code == 2 and complaint in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "variable", "complaint"), [
    (["--address", "http://127.0.0.1:1"], None, "error: --address = 'http://127.0.0.1:1': no cluster answers there"),
    ([], "http://127.0.0.1:1", "error: RAY_ADDRESS = 'http://127.0.0.1:1': no cluster answers there"),
    ([], "127.0.0.1:6379", "error: RAY_ADDRESS = '127.0.0.1:6379': a job is submitted to the cluster's dashboard, http://HOST:8265"),
])
def test_a_job_for_a_cluster_that_is_not_there_is_refused_with_status_1_and_one_sentence(flags, variable, complaint, capfd, monkeypatch):
    if variable:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert cli.main(["submit", "--preset", "quickstart", *flags]) == 1
    said = capfd.readouterr()
    assert said.out == "" and said.err.startswith(complaint) and said.err.count("\n") == 1


def test_no_command_and_help_list_the_commands_and_presets(capsys):
    assert cli.main([]) == cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"krrst {command} " in said for command in cli.COMMANDS) and "cifar100-cpu-released" in said


def test_an_unknown_command_is_refused_with_the_nearest_one(capsys):
    assert cli.main(["distil"]) == 2
    assert capsys.readouterr().err == "krrst distil: no such command; did you mean 'distill'?\n"


@pytest.mark.parametrize("command", ["evaluate", "submit"])
def test_a_typo_is_refused_before_anything_is_started(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--sede", "3"])
    assert ended.value.code == 2 and "Perhaps you meant" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [
    ["distill", "--source.dataset", "imagnet"],
    ["prepare", "--preset", "quickstart", "--evaluate.datasets", "imagnet"],
])
def test_an_unknown_data_set_is_refused_with_status_1_and_the_nearest_name(arguments, capsys):
    assert cli.main(arguments) == 1
    assert "error: dataset = 'imagnet': no such data set; did you mean 'imagenet'?" in capsys.readouterr().err


def test_exit_statuses_are_0_1_and_130_and_a_users_error_is_one_sentence(capsys):
    def fails(error: BaseException):
        def work() -> None:
            raise error
        return work

    assert cli.guarded(lambda: None) == 0
    assert cli.guarded(fails(ValueError("m = 3: too few; take more"))) == 1
    assert capsys.readouterr().err == "error: m = 3: too few; take more\n"
    assert cli.guarded(fails(KeyboardInterrupt())) == 130
    assert "--resume" in capsys.readouterr().err
    with pytest.raises(AssertionError):  # our own mistakes keep their traceback
        cli.guarded(fails(AssertionError()))
