"""Clusters: their descriptions fit Ray's schema, and one that is too small or too busy is refused."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from importlib import metadata

import pytest
import ray
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray.autoscaler._private.util import prepare_config, validate_config

from krrst_dist.config import ConfigError
from krrst_dist.data.errors import DataError
from krrst_dist.on_ray.alike import require_alike
from krrst_dist.on_ray.cluster import ClusterError, connect
from krrst_dist.on_ray.errors import UnfitHost
from krrst_dist.on_ray.rooms import Rooms, require, room
from krrst_dist.on_ray.worker import Host, Worker

FILES = [ROOT / "clusters/gpu.yaml", ROOT / "clusters/onprem.yaml"]


@pytest.fixture(params=FILES, ids=lambda path: path.name)
def description(request) -> dict:
    return yaml.safe_load(request.param.read_text())


def test_there_is_one_description_for_the_cloud_one_for_machines_at_hand_and_one_for_kubernetes():
    assert sorted((ROOT / "clusters").glob("*.yaml")) == sorted([*FILES, ROOT / "clusters/kuberay.yaml"])


def test_a_description_passes_rays_own_check(description):
    validate_config(prepare_config(description))


def test_a_description_with_a_misspelt_key_does_not_pass(description):
    with pytest.raises(Exception, match="idle_timeout_minuts"):
        validate_config(prepare_config(description | {"idle_timeout_minuts": 5}))


def test_every_file_that_a_description_mentions_is_in_the_project(description):
    """And at the place in the node's copy where set-up looks for it; the token is the user's own."""
    mounts = {remote: local for remote, local in description["file_mounts"].items() if local != "~/.ray/auth_token"}
    assert all((ROOT / local).exists() and remote == f"~/krrst/{local}" for remote, local in mounts.items())
    needed = ("clusters/setup_node.sh", "clusters/constraints.txt", "pyproject.toml", "krrst_dist/__init__.py", "LICENSE")
    assert all((ROOT / name).is_file() and name.partition("/")[0] in mounts.values() for name in needed)
    assert "bash ~/krrst/clusters/setup_node.sh" in description["setup_commands"]


def test_every_node_of_a_description_uses_tokens_and_sends_no_telemetry(description):
    starts = [command for kind in ("head", "worker") for command in description[f"{kind}_start_ray_commands"] if "ray start" in command]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command and "RAY_USAGE_STATS_ENABLED=0" in command for command in starts)
    assert "chmod 600 ~/.ray/auth_token" in description["setup_commands"]


@pytest.fixture(scope="module")
def kubernetes() -> dict[str, dict]:
    """clusters/kuberay.yaml: what it describes, by kind."""
    return {document["kind"]: document for document in yaml.safe_load_all((ROOT / "clusters/kuberay.yaml").read_text())}


def test_on_kubernetes_there_are_a_cluster_and_a_job_for_it_of_this_version_of_ray(kubernetes):
    ray_cluster, job = kubernetes["RayCluster"], kubernetes["RayJob"]["spec"]
    assert [document["apiVersion"] for document in kubernetes.values()] == ["ray.io/v1"] * 2
    assert job["clusterSelector"] == {"ray.io/cluster": ray_cluster["metadata"]["name"]}
    python, script, *arguments = job["entrypoint"].split()
    folder, _, name = script.removeprefix("/").partition("/")
    assert (python, folder) == ("python", "krrst") and (ROOT / name).is_file()
    assert arguments[arguments.index("--out") + 1].startswith("s3://") and "--resume" in arguments
    assert yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_SIGNAL"] == "SIGTERM"
    assert f"ray=={ray_cluster['spec']['rayVersion']}" in (ROOT / "clusters/constraints.txt").read_text().splitlines()


def test_on_kubernetes_every_container_has_the_same_image_and_tokens_and_sends_no_telemetry(kubernetes):
    spec = kubernetes["RayCluster"]["spec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    containers = [container for group in groups for container in group["template"]["spec"]["containers"]]
    assert spec["authOptions"] == {"mode": "token"} and len(containers) == 2
    assert len({container["image"] for container in containers}) == 1
    assert all({"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in container["env"] for container in containers)
    assert all("secretRef" in source for container in containers for source in container["envFrom"])  # no key is written here
    ports = {port["name"]: port["containerPort"] for port in containers[0]["ports"]}
    assert ports == {"gcs-server": 6379, "dashboard": 8265}


def test_on_kubernetes_gpu_workers_come_and_go_and_the_head_computes_nothing(kubernetes):
    spec = kubernetes["RayCluster"]["spec"]
    described = yaml.safe_load((ROOT / "clusters/gpu.yaml").read_text())
    (workers,) = spec["workerGroupSpecs"]
    assert spec["enableInTreeAutoscaling"] and workers["minReplicas"] == 0 and workers["maxReplicas"] == described["max_workers"]
    assert spec["autoscalerOptions"]["idleTimeoutSeconds"] == 60 * described["idle_timeout_minutes"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for part in ("limits", "requests"):
        assert workers["template"]["spec"]["containers"][0]["resources"][part]["nvidia.com/gpu"] == "1"


def test_the_pinned_versions_fit_each_other_and_what_a_head_on_aws_installs_is_among_them():
    lines = (ROOT / "clusters/constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(pin.name): pin for pin in map(Requirement, (line for line in lines if line and line[0] != "#"))}
    assert "boto3" in pins
    for name, pin in pins.items():
        try:
            needed = [Requirement(text) for text in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:  # for the other Python
            continue
        for need in needed:
            other = pins.get(canonicalize_name(need.name))
            if other and (need.marker is None or need.marker.evaluate({"extra": ""})):
                version = str(other.specifier).removeprefix("==")
                assert need.specifier.contains(version, prereleases=True), f"{pin} needs {need}, not {version}"


def test_gpu_workers_come_and_go():
    description = yaml.safe_load((ROOT / "clusters/gpu.yaml").read_text())
    assert description["available_node_types"]["gpu"]["min_workers"] == 0
    assert description["idle_timeout_minutes"] <= 15


@pytest.mark.parametrize(("other", "said"), [
    ({"code": "feed"}, r"another krrst_dist .*driver on a: .{16}; b: feed\).*same commit"),
    ({"versions": (("Python", "3.12.1"), ("torch", "2.13.0"))}, r"on a: Python 3.11.7, torch 2.13.0; b: Python 3.12.1, .*setup_node"),
    ({"versions": (("Python", "3.11.7"), ("torch", "2.12.0"))}, r"driver on a: .*torch 2.13.0; b: .*torch 2.12.0\).*setup_node"),
    ({"cpu_capability": "ANOTHER"}, r"round differently \(the driver on a: .*; b: ANOTHER\).*ATEN_CPU_CAPABILITY"),
])
def test_hosts_that_would_compute_something_else_are_refused_naming_both(other, said):
    here = replace(Host.of_this_process(), name="a", versions=(("Python", "3.11.7"), ("torch", "2.13.0")))
    require_alike(here, [replace(here, name="b"), replace(here, name="c")], rounding=True)
    with pytest.raises(ConfigError, match=said):
        require_alike(here, [replace(here, name="c"), replace(here, name="b", **other)], rounding=True)


def test_with_gpus_at_work_the_heads_cpu_and_build_of_torch_are_its_own():
    here = replace(Host.of_this_process(), cpu_capability="AVX2", versions=(("torch", "2.13.0+cpu"),))
    require_alike(here, [replace(here, cpu_capability="AVX512", versions=(("torch", "2.13.0+cu130"),))], rounding=False)
    with pytest.raises(ConfigError, match="versions"):
        require_alike(here, [replace(here, versions=(("torch", "2.12.0+cu130"),))], rounding=False)


@pytest.mark.parametrize(("offer", "cpus", "gpus", "expected"), [
    ({"CPU": 8}, 2, 0, 4),
    ({"CPU": 8}, 3, 0, 2),
    ({"CPU": 8}, 1, 1, 0),
    ({"CPU": 8, "GPU": 2}, 1, 1, 2),
    ({"CPU": 1, "GPU": 2}, 1, 1, 1),
    ({"CPU": 8, "GPU": 2}, 1, 0.4, 4),  # two to a GPU; a fifth would straddle both
    ({"CPU": 8, "GPU": 1}, 1, 0.1, 8),
    ({}, 1, 0, 0),
])
def test_room_counts_the_actors_that_a_node_can_hold(offer, cpus, gpus, expected):
    assert room(offer, cpus=cpus, gpus=gpus) == expected


def test_a_cluster_that_is_large_enough_is_accepted_and_left_free(ray_cluster):
    require(1, 0, 2)
    require(2, 0, 1)


def test_a_cluster_without_enough_cpus_is_refused_at_once_with_what_is_missing(ray_cluster):
    started = time.monotonic()
    with pytest.raises(ClusterError, match=r"lacks room for 3 of them \(3 CPUs and 0 GPUs\).*offer .*: 2 CPUs, 0 GPUs.*--wait"):
        require(1, 0, 5)
    assert time.monotonic() - started < 30


def test_cpus_that_no_single_node_has_are_missing_however_many_there_are_in_all(ray_cluster):
    with pytest.raises(ClusterError, match="lacks room for 1 of them"):
        require(3, 0, 1)


def test_a_cluster_without_gpus_is_refused(ray_cluster):
    with pytest.raises(ClusterError, match=r"2 actors of 1 CPUs and 1 GPUs each do not fit.*2 GPUs"):
        require(1, 1, 2)


def test_a_busy_cluster_is_refused_after_the_deadline_and_accepted_when_it_is_free_again(ray_cluster):
    @ray.remote(num_cpus=2)
    class Hog:
        def ready(self) -> bool:
            return True

    hog = Hog.remote()
    assert ray.get(hog.ready.remote())
    with pytest.raises(ClusterError, match="too busy for 1 s"):
        require(1, 0, 1, deadline_s=1)
    ray.kill(hog)
    require(1, 0, 1, wait=True, deadline_s=1)


def test_a_host_is_left_out_only_where_the_others_are_enough(ray_cluster):
    here = ray.get_runtime_context().get_node_id()
    assert not Rooms(1, 0, 1).leave_out(here, "its disk is full")
    with Rooms(1, 0, 1).take() as room:
        assert room.actors == 1


@pytest.mark.parametrize("do", ["do", "build"])
def test_data_that_a_host_cannot_use_are_told_with_its_name_and_travel_with_it(ray_cluster, do):
    def refuse(*_: object) -> None:
        raise DataError("no room")

    with pytest.raises(UnfitHost, match="^no room$") as told:
        Worker().do("a chore", refuse) if do == "do" else Worker().build(refuse, [0], None)
    assert pickle.loads(pickle.dumps(told.value)).node == ray.get_runtime_context().get_node_id()


def test_connecting_twice_joins_the_same_cluster(ray_cluster):
    before = ray.get_runtime_context().get_node_id()
    connect()
    assert ray.get_runtime_context().get_node_id() == before


def test_without_an_address_a_cluster_is_started_with_tokens_and_its_dashboard_on_the_loopback_whose_workers_run_this_code(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("""
import os
from krrst_dist.on_ray.cluster import connect
connect(num_cpus=3)
import ray
from ray._private.worker import get_dashboard_url
from sockets import listening

@ray.remote
def look():
    import krrst_dist
    return os.environ["RAY_AUTH_MODE"], os.environ["RAY_USAGE_STATS_ENABLED"], os.path.dirname(os.path.dirname(krrst_dist.__file__))

assert ray.cluster_resources()["CPU"] == 3
dashboard = int(get_dashboard_url().rpartition(":")[2])
print(*ray.get(look.remote()), *(address for address, port in listening("dashboard/dashboard.py") if port == dashboard))
""")
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED")}
    environment["PYTHONPATH"] += f"{os.pathsep}{ROOT / 'tests'}"
    ran = subprocess.run([sys.executable, program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.stdout.split() == ["token", "0", str(ROOT), "127.0.0.1"], ran.stderr


def test_an_address_without_a_cluster_is_refused(tmp_path):
    program = "from krrst_dist.on_ray.cluster import *\ntry: connect('127.0.0.1:1')\nexcept ClusterError as error: print(error)"
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "'127.0.0.1:1': cannot join a cluster there" in ran.stdout, ran.stderr
