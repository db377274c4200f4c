"""Do all hosts compute the same? Those that take part in a run must have the same code and versions, and CPUs that round alike.

Compares what hosts say of themselves, and knows nothing of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from krrst_dist.config import ConfigError
from krrst_dist.on_ray.errors import EngineError
from krrst_dist.on_ray.worker import Host

ANSWER = 300.0
"""seconds that a node has to say what it runs"""


def require_nodes_alike(driver: Host) -> None:
    """`require_alike` of the driver and a process on each other node that the cluster has now, for all stages of a job. That CPUs round
    alike is for those to ask who depend on it. Raises EngineError with the nodes that do not answer."""
    here, ask = ray.get_runtime_context().get_node_id(), ray.remote(num_cpus=0, max_retries=0)(_host)
    others = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")}
    asked = {ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(): address
             for node, address in others.items() if node != here}
    ready, silent = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER) if asked else ([], [])
    if silent:
        raise EngineError(f"no answer within {ANSWER:.0f} s from {', '.join(asked[one] for one in silent)}; see `ray status`, and whether "
                          f"they have memory for a process")
    hosts = []
    for one in ready:
        with suppress(RayError):  # it has gone; who is given work there later is asked then
            hosts.append(ray.get(one))
    require_alike(driver, hosts, rounding=False)


def _host() -> Host:
    return Host.of_this_process()


def require_alike(driver: Host, hosts: Iterable[Host], *, rounding: bool) -> None:
    """Would the actors' hosts compute what the driver's would? Raises ConfigError with both sides of a difference.

    rounding: must their CPUs round alike? Not where GPUs do the work; there a head may have another build of the same torch, too.
    """
    hosts = list(hosts)

    def in_words(host: Host) -> str:
        return ", ".join(f"{name} {version if rounding else version.partition('+')[0]}" for name, version in host.versions)

    if found := _difference(driver, hosts, lambda host: host.code):
        raise ConfigError(f"hosts imported another krrst_dist than the one this run was started with (fingerprints of the code: {found}): "
                          f"remove the installed copy there, or set it up again from the same commit")
    if found := _difference(driver, hosts, in_words):
        raise ConfigError(f"hosts have different versions of what results depend on ({found}): run clusters/setup_node.sh from the same "
                          f"commit on all of them")
    if rounding and (found := _difference(driver, hosts, lambda host: host.cpu_capability)):
        raise ConfigError(f"the hosts' CPUs round differently ({found}), so the result would depend on who computes what. Use hosts of one "
                          f"kind, or set ATEN_CPU_CAPABILITY=avx2 for the job")


def _difference(driver: Host, hosts: list[Host], said: Callable[[Host], str]) -> str:
    """In words, what the driver's host and those that differ from it say; empty when all say the same."""
    strangers = sorted({f"{host.name}: {said(host)}" for host in hosts if said(host) != said(driver)})
    return "; ".join([f"the driver on {driver.name}: {said(driver)}", *strangers]) if strangers else ""
