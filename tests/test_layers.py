"""The rooms: imports flow one way, Ray and FFCV stay in theirs, the code is clean, and set-up is what it says."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

PACKAGE = ROOT / "krrst_dist"


def imported(source: str) -> set[str]:
    """Top-level names of all packages that a module imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


def importers(package: str) -> set[str]:
    return {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if package in imported(path.read_text())}


def test_an_import_inside_a_function_counts():
    assert imported("import os.path\ndef f():\n    from ray.util import x") == {"os", "ray"}


def test_only_on_ray_imports_ray():
    names = importers("ray")
    assert names and all(name.startswith("on_ray/") for name in names), names


def test_only_the_beton_and_its_reader_import_ffcv():
    names = importers("ffcv")
    assert names and all(re.fullmatch(r"data/(beton|reader)\w*\.py", name) for name in names), names


def test_the_algorithm_is_pure_pytorch():
    names = {name for path in (PACKAGE / "algorithm").rglob("*.py") for name in imported(path.read_text())}
    assert names <= {"torch", "krrst_dist", "numpy"} | sys.stdlib_module_names, names


def test_imports_flow_one_way():
    ran = subprocess.run([Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_an_import_against_the_flow_is_noticed(tmp_path):
    """The check itself works: config may not import storage."""
    copied = tmp_path / "krrst_dist"
    for path in PACKAGE.rglob("*.py"):
        target = copied / path.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text() + ("\nimport krrst_dist.storage\n" if path == PACKAGE / "config.py" else ""))
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    ran = subprocess.run([Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=tmp_path, capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert ran.returncode == 1
    assert "krrst_dist.config -> krrst_dist.storage" in ran.stdout


def test_ruff_finds_nothing():
    ran = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", ROOT], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


def test_every_dependency_has_a_pin_within_its_range():
    pins = {}
    for line in (ROOT / "clusters/constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[name.lower().replace("_", "-")] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"] + project["optional-dependencies"]["test"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[requirement.name.lower()]), text
    assert not [name for name in pins if name.startswith(("nvidia", "cuda", "triton"))]


def test_an_unknown_flag_is_refused_before_anything_is_set_up():
    ran = subprocess.run(["bash", ROOT / "tests/run.sh", "--slwo"], capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr == "tests/run.sh: unknown flag --slwo; there is: --slow --cluster --browser\n"


def script_paths(tmp_path: Path, *tools: str) -> str:
    """A PATH with these tools and nothing else."""
    for tool in tools:
        (tmp_path / tool).symlink_to(subprocess.run(["which", tool], capture_output=True, text=True, check=True).stdout.strip())
    return str(tmp_path)


def test_a_machine_without_apt_is_told_what_to_install(tmp_path):
    path = script_paths(tmp_path, "bash", "cat", "cut", "sha256sum", "dirname")
    ran = subprocess.run(["bash", ROOT / "clusters/setup_node.sh"], env={"PATH": path, "KRRST_VENV": str(tmp_path / "venv")},
                         capture_output=True, text=True)
    assert ran.returncode == 1
    for lacking in ("python3.12", "g++", "pkg-config", "libopencv-dev", "libturbojpeg0-dev", "There is no apt-get here"):
        assert lacking in ran.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.slow
def test_set_up_makes_an_environment_that_works_and_does_nothing_the_second_time(tmp_path):
    environment = os.environ | {"KRRST_VENV": str(tmp_path / "venv")}
    environment.pop("PYTHONPATH")
    setup = ["bash", str(ROOT / "clusters/setup_node.sh")]
    first = subprocess.run(setup, env=environment, capture_output=True, text=True)
    assert first.returncode == 0 and "done in" in first.stdout, first.stdout + first.stderr
    doctor = subprocess.run([tmp_path / "venv/bin/krrst", "doctor"], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    second = subprocess.run(setup, env=environment, capture_output=True, text=True)
    assert second.stdout.endswith("is up to date\n")
