"""Submission: what a job is told and carries, where it goes and its results, that it runs the uploaded code and stops when asked."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest
import requests
import yaml
from conftest import ROOT
from sockets import listening

from krrst_dist import paths, provenance, storage
from krrst_dist.config import ConfigError
from krrst_dist.on_ray import submit
from krrst_dist.on_ray.cluster import ClusterError, job_cluster, token
from krrst_dist.on_ray.submit import absolute_paths, check_address, own_files, runtime_env
from krrst_dist.presets_and_grids import CARRIED, load_preset
from krrst_dist.storage import StorageError

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # what Ray sets for a job's entry point
SECRETS = {"AWS_ACCESS_KEY_ID": "KeyIdNotToBeSeen", "AWS_SECRET_ACCESS_KEY": "KeyNotToBeSeen", "AWS_SESSION_TOKEN": "TokenNotToBeSeen"}


def test_path_flags_become_absolute_and_everything_else_stays_as_it_is():
    given = ["--preset", "quickstart", "--data", "../shared/data", "--out=runs/x", "--target-checkpoint", "t.pt", "--cache", "/c",
             "--seed", "1"]
    assert absolute_paths(given, base=Path("/home/ann/project")) == [
        "--preset", "quickstart", "--data", "/home/ann/shared/data", "--out=/home/ann/project/runs/x",
        "--target-checkpoint", "/home/ann/project/t.pt", "--cache", "/c", "--seed", "1"]


def test_a_preset_of_ones_own_is_a_path_too():
    given = ["--preset", "mine.yaml", "--preset=quickstart"]
    assert absolute_paths(given, base=Path("/x")) == ["--preset", "/x/mine.yaml", "--preset=quickstart"]


def test_uris_are_left_alone_and_a_tilde_means_the_callers_home():
    given = ["--out", "s3://bucket/run", "--data=~/d"]
    assert absolute_paths(given, base=Path("/x")) == ["--out", "s3://bucket/run", f"--data={Path.home()}/d"]


def test_the_virtual_environment_the_results_and_git_are_not_uploaded():
    assert {".venv", "runs", ".git"} <= set(runtime_env(provenance.Revision("c", True), None, {})["excludes"])


def test_a_job_carries_the_users_own_files_with_their_bases_merged_in(tmp_path):
    (tmp_path / "base.yaml").write_text("base: quickstart\ndistill: {m: 5}\n")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\nseed: 3\n")
    (tmp_path / "grid.yaml").write_text("base: quickstart\nsets: [{method: a, preset: mine.yaml}, {method: b, preset: cifar100}]\n")
    mine, grid = str(tmp_path / "mine.yaml"), str(tmp_path / "grid.yaml")
    carried = yaml.safe_load(own_files(["--seed", "4", f"--preset={mine}", "--resume"])[CARRIED])
    assert list(carried) == [mine] and "base" not in carried[mine]
    assert (carried[mine]["seed"], carried[mine]["distill"]["m"], carried[mine]["source"]["dataset"]) == (3, 5, "digits-0-4")
    carried = yaml.safe_load(own_files(["--grid", grid])[CARRIED])
    assert set(carried) == {mine, grid} and carried[grid]["sets"][0]["preset"] == mine and carried[grid]["targets"] == ["digits-5-9"]


def test_a_job_of_what_ships_with_the_package_carries_nothing():
    assert own_files(["--preset", "quickstart"]) == own_files(["--grid", "table1", "--data", "mine.yaml"]) == {}


@contextmanager
def server(status: int, text: str) -> Iterator[str]:
    """Something that answers every request in this way; gives its address."""
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_an_address_where_nobody_listens_is_refused_at_once():
    begun = time.monotonic()
    with pytest.raises(ClusterError, match=r"^--address = 'http://127.0.0.1:1/': no cluster answers there \(.*Connection refused\); check "
                                           r"that the cluster is up \(`ray status`.*8265"):
        submit.submit(["--preset", "quickstart"], address="http://127.0.0.1:1/")
    assert time.monotonic() - begun < 5


def test_an_address_that_keeps_silent_is_refused_after_a_while(monkeypatch):
    monkeypatch.setattr(submit, "ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ClusterError, match="no cluster answers there"):
        check_address(f"http://127.0.0.1:{silent.getsockname()[1]}", name="--address")


def test_an_address_where_something_else_answers_is_refused():
    with server(404, "what?") as address, pytest.raises(ClusterError, match=r"no Ray dashboard \(status 404\).*8265 by default"):
        check_address(address, name="--address")
    with server(200, '{"ray_version": "2.60.0"}') as address:
        check_address(f"{address}/", name="--address")


@pytest.mark.parametrize(("address", "remedy"), [
    ("10.0.0.1:6379", "http://10.0.0.1:8265"), ("ray://head:10001", "http://head:8265"), ("head", "http://head:8265"),
    ("auto", "http://HOST:8265"), ("http://", "http://HOST:8265"),
])
def test_the_address_that_a_run_joins_is_none_to_submit_to_and_both_forms_are_named(address, remedy, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError) as refused:
        submit.submit(["--preset", "quickstart"])
    assert str(refused.value) == (
        f"RAY_ADDRESS = {address!r}: a job is submitted to the cluster's dashboard, http://HOST:8265; host:port (usually 6379) is what "
        f"`krrst distill` and jobs/ join with RAY_ADDRESS; give --address {remedy}")


@pytest.fixture(scope="module")
def cluster_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="krrst-ray-"))  # a short name, for sockets
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def cluster(cluster_folder) -> Iterator[str]:
    """The address of a cluster that takes jobs, with tokens, whose processes have secrets in their environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)  # a job's `python` is this one
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        with job_cluster(cluster_folder) as address:
            yield address


def test_a_cluster_with_tokens_is_found_and_who_has_none_or_another_is_told(cluster, monkeypatch):
    check_address(cluster, name="--address")
    for shown, said in ((None, "there is none here"), ("another", "the one here is another")):
        monkeypatch.setattr(submit, "token", lambda shown=shown: shown)
        with pytest.raises(ClusterError, match=f"--address = '{cluster}': the cluster asks for its token and {said}.*copy the head's"):
            check_address(cluster, name="--address")


def test_the_server_that_takes_jobs_listens_on_the_loopback_only(cluster):
    ours = int(cluster.rpartition(":")[2])
    assert {address for address, port in listening("dashboard/dashboard.py") if port == ours} == {"127.0.0.1"}


def test_the_agent_that_runs_jobs_and_listens_on_the_network_refuses_who_shows_no_token(cluster):
    def statuses(**headers: str) -> set[int]:
        found = set()
        for address, port in listening("ray::DashboardAgent"):
            if not ip_address(address).is_unspecified:  # not where it tells metrics
                log = f"http://{address}:{port}/api/job_agent/jobs/none/logs"
                with suppress(requests.ConnectionError):
                    found.add(requests.get(log, headers=headers, timeout=10).status_code)
        return found

    deadline = time.monotonic() + submit.READY_SECONDS
    while not (refused := statuses()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert refused == {401} and statuses(Authorization=f"Bearer {token()}") == {404}


def test_the_token_that_is_shown_is_that_of_the_variables_before_that_of_the_file(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("of the file\n")
    assert token() == "of the file"
    (tmp_path / "other").write_text("of the other file")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "other"))
    assert token() == "of the other file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of the variable")
    assert token() == "of the variable"


def test_outside_a_job_results_go_under_the_project():
    assert paths.output_directory(None, name="quickstart-3") == str(ROOT / "runs" / "quickstart-3")


def test_outside_a_job_a_relative_path_means_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert paths.output_directory("here", name="p-0") == str(tmp_path / "here")


@pytest.mark.parametrize("uri", ["s3://AKIA:secret@bucket/run", "s3://AKIA:sec/ret@bucket/run"])
def test_a_uri_with_a_key_in_it_is_refused_without_showing_the_key(uri):
    with pytest.raises(ConfigError, match=r"--out = 's3://...@bucket/run': has a key in it.*AWS_SECRET_ACCESS_KEY") as refused:
        paths.output_directory(uri, name="a")
    with pytest.raises(StorageError, match="has a key in it"):
        storage.read_whole(uri)
    assert "sec" not in str(refused.value).lower().replace("secret_access_key", "")


@pytest.mark.parametrize("uri", ["s3://bucket/a@b", "hdfs://host:8020/a@b", "hdfs://user@host:8020/a", "file:///a:b@c"])
def test_a_uri_without_a_key_is_not(uri):
    paths.local(uri)


def test_inside_a_job_results_go_to_the_storage_or_to_the_home_of_the_node(monkeypatch):
    monkeypatch.setenv(JOB, "{}")
    assert paths.output_directory(None, name="p-1") == str(Path.home() / "krrst_runs" / "p-1")
    monkeypatch.setenv("KRRST_STORAGE", "s3://bucket/krrst/")
    assert paths.output_directory(None, name="p-1") == "s3://bucket/krrst/p-1"


@pytest.mark.parametrize("in_job", [False, True])
def test_a_file_uri_with_a_relative_path_is_refused_by_its_flag(in_job, monkeypatch):
    if in_job:
        monkeypatch.setenv(JOB, "{}")
    with pytest.raises(ConfigError, match="--out = 'file://rel/run': a file URI gives an absolute path .* file:///folder/run"):
        paths.output_directory("file://rel/run", name="p-0")
    with pytest.raises(ConfigError, match="'file://rel/run': a file URI gives"):
        absolute_paths(["--out", "file://rel/run"], base=Path("/x"))
    for uri in ("file:///abs/run", "file://localhost/abs/run"):
        assert paths.output_directory(uri, name="p-0") == uri


@pytest.mark.parametrize("out", ["{tmp}/file", "{tmp}/file/below/run", "file://{tmp}/file"])
def test_results_that_would_go_into_a_file_are_refused_by_their_flag(out, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"--out = .*: {tmp_path}/file is a file; give a folder"):
        paths.output_directory(out.format(tmp=tmp_path), name="p-0")


@pytest.mark.parametrize("flag", ["--out", "--data"])
def test_inside_a_job_a_relative_path_is_refused(flag, monkeypatch):
    monkeypatch.setenv(JOB, "{}")
    with pytest.raises(ConfigError, match=f"{flag} = 'here'.*absolute path or a URI.*krrst submit"):
        paths.resolve("here", name=flag)


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    return subprocess.run(["git", "-C", root, *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def test_a_revision_is_the_commit_and_whether_there_is_more_than_it_holds(tmp_path):
    assert provenance.revision(tmp_path) == ("unknown", False)
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "first")
    assert provenance.revision(tmp_path) == (git(tmp_path, "rev-parse", "HEAD"), False)
    (tmp_path / "file").write_text("2")
    assert provenance.revision(tmp_path).dirty


def test_a_folder_inside_somebody_elses_repository_has_no_revision(tmp_path):
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-qm", "theirs", "--allow-empty")
    (tmp_path / "inside").mkdir()
    assert provenance.revision(tmp_path / "inside") == ("unknown", False)


def test_inside_a_job_the_revision_is_what_was_passed_along(tmp_path, monkeypatch):
    for name, value in provenance.Revision("abc", True).environment().items():
        monkeypatch.setenv(name, value)
    assert provenance.revision(tmp_path) == ("abc", True)


def test_code_from_another_tree_than_the_jobs_is_refused(tmp_path):
    provenance.verify_uploaded_code(ROOT)
    with pytest.raises(ConfigError, match=f"imported from {ROOT}, but the job's own code is in {tmp_path}"):
        provenance.verify_uploaded_code(tmp_path)


REPORT = '''
import json, os, sys
from pathlib import Path
from krrst_dist import paths, provenance, storage
from krrst_dist.presets_and_grids import load_preset
from krrst_dist.grid_config import load_grid
from krrst_dist.on_ray.cluster import connect
from krrst_dist.on_ray.rooms import require

def given(flag):
    return sys.argv[sys.argv.index(flag) + 1]

provenance.verify_uploaded_code(Path(__file__).resolve().parents[1])
connect()
require(1, 0, 1)
import ray

@ray.remote
def worker(given):
    return provenance.code_fingerprint(), provenance.revision().commit, load_preset(given).model_dump(mode="json")

for file in Path(given("--preset")).parent.glob("*.yaml"):
    file.unlink()  # the head of a cluster has no such file
there, commit, preset = ray.get(worker.remote(given("--preset")))
print("report " + json.dumps({
    "arguments": sys.argv[1:], "out": paths.output_directory(None, name="p-0"), "in_job": paths.in_ray_job(),
    "same_code": there == provenance.code_fingerprint(), "commit": [provenance.revision().commit, commit],
    "auth": os.environ["RAY_AUTH_MODE"], "uploaded": sorted(path.name for path in Path.cwd().iterdir()), "changed": provenance.CHANGED,
    "preset": preset, "method_presets": [load_preset(entry.preset).preset for entry in load_grid(given("--grid")).sets],
}))
sys.exit(3 if "--fail" in sys.argv else 0)
'''

SLEEP = '''
import signal, time
signal.signal(signal.SIGTERM, signal.default_int_handler)
print("sleeping", flush=True)
try:
    time.sleep(300)
except KeyboardInterrupt:
    print("kept the checkpoint", flush=True)
    raise SystemExit(130)
'''


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of the package with a change, and jobs of our own."""
    root = tmp_path / "project"
    shutil.copytree(ROOT / "krrst_dist", root / "krrst_dist", ignore=shutil.ignore_patterns("__pycache__"))
    with open(root / "krrst_dist" / "provenance.py", "a") as file:
        file.write("\nCHANGED = True\n")
    for folder, name, text in (("jobs", "report.py", REPORT), ("jobs", "sleep.py", SLEEP), (".venv", "large", ""), ("runs", "old", "")):
        (root / folder).mkdir(exist_ok=True)
        (root / folder / name).write_text(text)
    git(root, "init", "-q")
    git(root, "commit", "-qm", "x", "--allow-empty")
    return root


def start(project: Path, script: str, *arguments: str, address: str | None = None) -> subprocess.Popen:
    program = ("import sys; from pathlib import Path; from krrst_dist.on_ray.submit import submit; "
               f"sys.exit(submit({list(arguments)!r}, address={address!r}, script={script!r}, root=Path({str(project)!r})))")
    elsewhere = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"}  # which Ray's own commands would prefer
    return subprocess.Popen([sys.executable, "-c", program], cwd=project, env=os.environ | elsewhere, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def remove_logs(output: str) -> None:
    """A job that failed on a cluster of its own leaves Ray's logs, and says where."""
    folder = Path(re.search("Ray's logs of this job are in (.*)", output)[1])
    assert any(folder.glob("session_*/logs/*"))
    shutil.rmtree(folder)


def test_a_job_runs_the_uploaded_code_with_absolute_paths_the_users_files_and_the_commit_on_a_cluster_with_tokens(project):
    outside = project.parent / "mine"
    outside.mkdir()
    (outside / "base.yaml").write_text("base: quickstart\ndistill: {m: 5}\n")
    (outside / "run.yaml").write_text("base: base.yaml\n# a comment: 'with quotes' and $signs\nseed: 3\n")
    (outside / "grid.yaml").write_text("base: quickstart\nsets: [{method: m, preset: run.yaml}, {method: n, preset: cifar100}]\n")
    expected = load_preset(str(outside / "run.yaml")).model_dump(mode="json")
    process = start(project, "jobs/report.py", "--data", "d", "--preset", "../mine/run.yaml", "--grid", "../mine/grid.yaml", "--fail")
    output = process.communicate(timeout=150)[0]
    remove_logs(output)
    line = next((line for line in output.splitlines() if line.startswith("report ")), None)
    assert line is not None, output
    report = json.loads(line.removeprefix("report "))
    assert report.pop("uploaded") == ["jobs", "krrst_dist"]
    assert report.pop("arguments") == ["--data", str(project / "d"), "--preset", str(outside / "run.yaml"), "--grid",
                                       str(outside / "grid.yaml"), "--fail"]
    assert not list(outside.iterdir())
    assert (report.pop("preset"), report.pop("method_presets")) == (expected, ["run", "cifar100"])
    assert (expected["preset"], expected["seed"], expected["distill"]["m"]) == ("run", 3, 5)
    assert report == {"out": str(project / "runs" / "p-0"), "in_job": True,
                      "same_code": True, "commit": [git(project, "rev-parse", "HEAD")] * 2, "auth": "token", "changed": True}
    assert process.returncode == 1  # what `ray job submit` makes of a job that failed


TINY = """
base: quickstart
repeats: 1
target: {network: {widths: [8, 8, 8]}, steps: 0}
distill: {m: 8, batch: 16, updates: 3, pool: {network: {widths: [4, 4, 8]}, size: 2, max_steps: 4}}
evaluate: {networks: 1, every: 3, pretrain: {steps: 3}, probe: {steps: 3}}
engine: {checkpoint_every: 2}
"""


def test_token_and_keys_of_the_environment_are_in_nothing_that_a_run_says_uploads_or_leaves(cluster, cluster_folder, project, monkeypatch):
    folder = project.parent
    monkeypatch.setenv("RAY_AUTH_TOKEN", token())
    shutil.copy(ROOT / "jobs/distill_imagenet.py", project / "jobs")
    (folder / "tiny.yaml").write_text(TINY)
    process = start(project, "jobs/distill_imagenet.py", "--preset", "../tiny.yaml", "--out", "../results/run", address=cluster)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    raylet = next(process for process in psutil.Process().children(recursive=True) if process.name() == "raylet")
    assert SECRETS.items() <= raylet.environ().items()  # which it hands on to the workers
    session = cluster_folder / "session_latest"
    places = [(folder / "results", "*"), (session / "runtime_resources/working_dir_files", "*"),
              *((session / "logs", pattern) for pattern in ("job-driver-*", "worker-*", "krrst-*"))]
    said = {str(path): path.read_bytes() for place, pattern in places for path in place.rglob(pattern) if path.is_file()}
    names = {Path(path).name for path in said}
    assert {"results.json", "status.json", "config.yaml", "distill_imagenet.py", "krrst-run-seed-0-shard-0.jsonl"} <= names
    assert any(b"== evaluate" in content for path, content in said.items() if "job-driver-" in path)
    told = requests.get(f"{cluster}/api/jobs/", headers={"Authorization": f"Bearer {token()}"}, timeout=10)
    assert "tiny.yaml" in told.text
    said |= {"the command's output": output.encode(), "what the cluster tells of its jobs": told.content}
    secrets = [secret.encode() for secret in (token(), *SECRETS.values())]
    assert [place for place, content in said.items() if any(secret in content for secret in secrets)] == []


def test_ctrl_c_stops_the_job_which_may_still_end_by_itself(cluster, project):
    process = start(project, "jobs/sleep.py", address=cluster)
    output = ""
    while "sleeping" not in output.splitlines():
        line = process.stdout.readline()
        assert line, output
        output += line
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    output += process.communicate(timeout=90)[0]
    assert process.returncode == 130, output
    assert "kept the checkpoint" in output, output
