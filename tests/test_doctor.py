"""`krrst doctor`: what is well is said in a line, what is not comes with a remedy and exit status 1."""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import pytest

from krrst_dist import doctor


def test_a_machine_that_can_run_the_tests_is_ready(capsys, tmp_path):
    assert doctor.main(["--out", str(tmp_path / "not" / "yet")]) == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    assert "wrote and read a small file" in printed and "started a cluster and ran a task" in printed
    assert printed.endswith("this machine is ready\n")
    assert "problem" not in printed


def test_one_problem_makes_the_exit_status_one_and_is_shown_with_its_remedy(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "examine", lambda out: [doctor.Finding("a", "fine"), doctor.Finding("b", "broken", "mend it")])
    assert doctor.main([]) == 1
    assert capsys.readouterr().out == "ok       a: fine\nproblem  b: broken\n         -> mend it\n1 problem\n"


@pytest.mark.parametrize(("version", "good"), [((3, 10), False), ((3, 11), True), ((3, 12), True), ((3, 13), False)])
def test_python_3_11_and_3_12_are_good(version, good):
    assert bool(doctor.python(version).remedy) is not good


def test_a_package_that_is_missing_or_too_old_is_named():
    finding = doctor.packages(["numpy>=99", "no-such-package-as-this", "pytest", "tomli; python_version < '3'"])
    assert "numpy is " in finding.found and "not >=99" in finding.found and "no-such-package-as-this is missing" in finding.found
    assert "pytest" not in finding.found and "tomli" not in finding.found
    assert "setup_node.sh" in finding.remedy


def test_too_little_space_is_a_problem_on_disk_and_in_shared_memory(tmp_path):
    assert doctor.disk("disk", tmp_path, minimum=0, fullest=1.01).remedy == ""
    assert "--cache" in doctor.disk("disk", tmp_path, minimum=1e18).remedy
    assert doctor.disk("disk", tmp_path, minimum=0, fullest=0).remedy
    assert "--shm-size" in doctor.shared_memory(tmp_path, minimum=1e18).remedy
    assert "mount a tmpfs" in doctor.shared_memory(tmp_path / "none").remedy


def test_a_low_limit_of_open_files_is_a_problem_with_a_command_that_raises_it():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert doctor.file_limit(minimum=soft).remedy == ""
    assert doctor.file_limit(minimum=soft + 1).remedy.startswith(f"run `ulimit -n {min(hard, 65536)}`")


def test_a_machine_without_ffcv_is_told_so(monkeypatch, tmp_path):
    (tmp_path / "ffcv.py").write_text("raise ImportError('libopencv_core.so.406: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = doctor.ffcv_works()
    assert "libopencv_core.so.406" in finding.found
    assert "setup_node.sh" in finding.remedy


@pytest.mark.parametrize(("broken", "complaint"), [
    ("raise ImportError('libstdc++.so.6: GLIBCXX_3.4.32 not found')", "ImportError: libstdc++.so.6: GLIBCXX_3.4.32 not found"),
    ("import subprocess; subprocess.run(['sleep', '60'])", "it was not done in 1 s"),
])
def test_a_ray_that_does_not_start_is_a_problem_within_a_deadline(monkeypatch, tmp_path, broken, complaint):
    (tmp_path / "ray.py").write_text(broken)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    begun = time.monotonic()
    finding = doctor.ray_works(deadline_s=1 if "sleep" in broken else 60)
    assert f"could not start a cluster here and run a task: {complaint}" in finding.found and time.monotonic() - begun < 20
    assert "session_latest/logs" in finding.remedy and "setup_node.sh" in finding.remedy


def test_a_ray_without_its_dashboard_is_not_started(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "aiohttp_cors" else "1")
    assert doctor.ray_works(deadline_s=0).found == "1, without its dashboard (aiohttp_cors missing)"


def test_asking_for_help_examines_nothing():
    ran = subprocess.run([sys.executable, "-c", "from krrst_dist import doctor; doctor.main(['--help'])"], capture_output=True, text=True)
    assert ran.returncode == 0 and "usage: krrst doctor" in ran.stdout
