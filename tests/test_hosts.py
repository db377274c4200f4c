"""Several hosts, for real: `ray up`, a job, `ray down`; and what befalls hosts while they distil, none of which changes the result.

The hosts are namespaces of this machine (`hosts.py`), the cluster is what clusters/onprem.yaml makes of them (`cluster_site.py`), and
nothing is shared between them but an S3 server. Needs root; `bash tests/run.sh --cluster` runs it.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster_site import DASHBOARD, Site, site, wait
from hosts import Host

pytestmark = pytest.mark.cluster

RUN = ("--preset quickstart --repeats 1 --target.steps 100 --distill.updates 240 --distill.shards 3 --distill.batch 255 "
       "--distill.pool.max-steps 60 --engine.checkpoint-every 20 --evaluate.every 1000 --evaluate.networks 1 "
       "--evaluate.pretrain.steps 20 --evaluate.probe.steps 20")
ACTOR = "^ray::Actor"
BEFORE = 40  # updates done when something happens
CACHE = "/root/.cache/krrst_dist"
"""where prepared data lie on each host"""
NOTICED = 180
"""seconds in which a loss is noticed and the run goes on, on slow machines too; the bound that README states is a quarter of that"""
DEADLINE = 900  # seconds for a run that takes a minute on two idle cores


@pytest.fixture(scope="module")
def cluster() -> Iterator[Site]:
    """Three hosts of one CPU and a small disk for prepared data each, as `ray up` leaves them."""
    with site() as made:
        for host in made.hosts.values():
            host.run(f"mkdir -p {CACHE} && mount -t tmpfs -o size=64m cache {CACHE}")
        began = time.monotonic()
        made.up()
        print(f"\nray up: {time.monotonic() - began:.0f} s until {len(made.hosts)} hosts had joined")
        yield made


@pytest.fixture(scope="module")
def undisturbed(cluster) -> str:
    """Fingerprint of the set that the laptop distils alone, without the cluster."""
    cluster.on_laptop(f"krrst distill {RUN} --actors 1 --out /root/alone/run", timeout=DEADLINE)
    return fingerprint(cluster, "/root/alone/run")


def fingerprint(site: Site, out: str) -> str:
    """Of the distilled set in a run's folder or URI."""
    load = f"from krrst_dist.artifacts import DistilledSet; print(DistilledSet.load('{out}/seed-0/distilled.safetensors').fingerprint)"
    return site.on_laptop(f'python -c "{load}"', timeout=120).stdout.split()[-1]


def steps(site: Site, out: str) -> dict[int, int]:
    """The whole checkpoints of a run: step -> incarnation."""
    return {int(step): int(incarnation) for step, incarnation in re.findall(r"/step-(\d+)-(\d+)/manifest.json<", site.listing(out))}


@dataclass(frozen=True)
class Moment:
    """When something befell a run, and the checkpoint that it had then."""

    at: float
    step: int


@dataclass
class Running:
    """A job that was submitted from the laptop, and its output."""

    site: Site
    out: str
    log: Path

    def said(self) -> str:
        return self.log.read_text()

    def befallen(self, at: float | None = None) -> Moment:
        """To be asked right after something happened, lest a checkpoint of before should pass for one of after. at: when; default: now."""
        return Moment(time.monotonic() if at is None else at, max(steps(self.site, self.out)))

    def until_further(self, than: Moment, after: str, deadline_s: float = NOTICED) -> None:
        """Wait until it has a later checkpoint than it had, and say how long that took."""
        wait(lambda: max(steps(self.site, self.out)) > than.step or self.process.poll() is not None, f"it to go on after {after}",
             deadline_s=deadline_s)
        print(f"\n{after}: {time.monotonic() - than.at:.0f} s until there was a checkpoint after the one of update {than.step}", flush=True)
        assert max(steps(self.site, self.out)) > than.step, f"{after}: the run has ended\n{self.said()}"

    def end(self) -> int:
        """Wait for it. Gives its exit status."""
        self.process.wait(timeout=DEADLINE)
        return self.process.returncode

    def __post_init__(self) -> None:
        self.process = self.site.begin(f"krrst submit --address {DASHBOARD} {RUN} --out {self.out} --actors 2 --resume", self.log)


@pytest.fixture
def distilling(cluster, undisturbed, tmp_path, request) -> Iterator[Running]:
    """A job on two of the hosts that has come some way."""
    run = Running(cluster, f"s3://bucket/{request.node.name}", tmp_path / "log")
    wait(lambda: run.process.poll() is not None or max(steps(cluster, run.out), default=0) >= BEFORE, "the first checkpoints",
         deadline_s=DEADLINE)
    assert run.process.poll() is None, run.said()
    yield run
    run.process.kill()


def working(site: Site) -> list[str]:
    """The hosts that have actors of a run."""
    return [name for name, host in site.hosts.items() if host.processes(ACTOR)]


def test_a_job_without_the_token_is_refused(cluster):
    refused = cluster.on_laptop(f"ray job submit --address {DASHBOARD} --working-dir jobs -- echo hello", timeout=120, check=False,
                                RAY_AUTH_MODE="disabled")
    assert refused.returncode and "auth" in refused.stdout.lower() and "submitted successfully" not in refused.stdout


def test_keys_that_ray_up_copied_are_for_their_owner_only(cluster):
    for host in cluster.hosts.values():
        assert host.run("stat -c %a .ray/auth_token .aws/credentials").stdout.split() == ["600", "600"], host.name


def test_three_hosts_distil_what_one_machine_does(cluster, undisturbed, tmp_path):
    out = "s3://bucket/first"
    job = cluster.begin(f"ray job submit --address {DASHBOARD} --working-dir . -- python jobs/distill_imagenet.py {RUN} --out {out} "
                        f"--actors 3", tmp_path / "log")
    wait(lambda: job.poll() is not None or len(working(cluster)) == 3, "an actor on each host", deadline_s=DEADLINE)
    assert job.wait(timeout=DEADLINE) == 0, (tmp_path / "log").read_text()
    assert fingerprint(cluster, out) == undisturbed
    status = cluster.on_laptop(f"krrst status {out}", timeout=120)
    assert "finished, update 240 of 240" in status.stdout


def test_actors_on_three_hosts_that_sum_among_themselves_come_to_the_same_but_for_rounding(cluster, undisturbed, tmp_path):
    out = "s3://bucket/all-reduce"
    job = cluster.begin(f"krrst submit --address {DASHBOARD} {RUN} --engine.aggregate collective --out {out} --actors 3", tmp_path / "log")
    wait(lambda: job.poll() is not None or len(working(cluster)) == 3, "an actor on each host", deadline_s=DEADLINE)
    assert job.wait(timeout=DEADLINE) == 0, (tmp_path / "log").read_text()
    compare = f"""import numpy
from krrst_dist.artifacts import DistilledSet
from krrst_dist.on_ray.progress import curve, read_history
runs = [f"{{run}}/seed-0" for run in ({out!r}, "/root/alone/run")]
here, alone = (DistilledSet.load(f"{{run}}/distilled.safetensors").x_syn for run in runs)
start = DistilledSet.load(f"{{runs[1]}}/start.safetensors").x_syn
losses = [numpy.array(curve(read_history(run), "loss"))[:20, 1] for run in runs]
print(abs(losses[0] / losses[1] - 1).max(), numpy.linalg.norm(here - alone) / numpy.linalg.norm(alone - start))"""
    in_loss, in_images = map(float, cluster.on_laptop(f"python -c {shlex.quote(compare)}", timeout=120).stdout.split()[-2:])
    print(f"\nall-reduce over TCP: 20 losses differ from those of one machine by up to {in_loss:.1g},"
          f" the images by {in_images:.1g} of their way")
    assert in_loss < 1e-3 and in_images < 0.1  # rounding, which a run of 240 updates makes larger


def ends_as_if_undisturbed(run: Running, undisturbed: str) -> None:
    assert run.end() == 0, run.said()
    assert fingerprint(run.site, run.out) == undisturbed, run.said()


def a_worker(site: Site) -> Host:
    """A host that has actors of a run, and not its driver."""
    return next(site.hosts[name] for name in working(site) if name != "head")


def kill(host: Host, pattern: str, how: str = "KILL") -> None:
    host.run(f"kill -{how} " + " ".join(map(str, host.processes(pattern))))


def test_an_actor_killed_where_the_disk_is_full_and_then_storage_that_stands_still_for_a_minute(distilling, undisturbed):
    cluster = distilling.site
    distilling.until_further(distilling.befallen(), "nothing")
    lost = a_worker(cluster)
    filled = lost.run(f"cat /dev/zero > {CACHE}/another", check=False)
    assert "No space left" in filled.stdout
    kill(lost, ACTOR)
    distilling.until_further(distilling.befallen(), "an actor killed, the disk of its host full")
    began = time.monotonic()
    kill(cluster.laptop, "moto.server", "STOP")
    time.sleep(60)
    kill(cluster.laptop, "moto.server", "CONT")
    distilling.until_further(distilling.befallen(began), "storage that stood still for 60 s")
    lost.run(f"rm {CACHE}/another")
    ends_as_if_undisturbed(distilling, undisturbed)
    assert "was lost" in distilling.said()


def test_a_worker_host_that_loses_power(distilling, undisturbed):
    cluster = distilling.site
    lost = a_worker(cluster)
    lost.power_off()
    distilling.until_further(distilling.befallen(), "a worker host without power")
    ends_as_if_undisturbed(distilling, undisturbed)
    assert "was lost" in distilling.said()
    lost.boot()
    cluster.wait_for_nodes(3)


def test_a_host_that_is_cut_off_and_comes_back_is_no_second_writer(distilling, undisturbed):
    cluster = distilling.site
    lost = a_worker(cluster)
    actors = lost.processes(ACTOR)
    lost.cut()
    distilling.until_further(distilling.befallen(), "a worker host cut off")
    lost.heal()
    ends_as_if_undisturbed(distilling, undisturbed)
    wait(lambda: not set(actors) & set(lost.processes(ACTOR)), "the actor of before to be gone", deadline_s=120)
    assert 1 not in steps(cluster, distilling.out).values()  # the incarnation that the lost actor was of
    cluster.wait_for_nodes(3)


def test_a_host_that_stands_still_for_half_a_minute_is_waited_for(distilling, undisturbed):
    cluster = distilling.site
    slow = cluster.hosts[working(cluster)[0]]
    kill(slow, ACTOR, "STOP")
    stopped = distilling.befallen()
    time.sleep(30)
    kill(slow, ACTOR, "CONT")
    distilling.until_further(stopped, "an actor that stood still for 30 s")
    ends_as_if_undisturbed(distilling, undisturbed)
    assert "was lost" not in distilling.said() and "has not answered" not in distilling.said()


def test_the_driver_and_a_worker_host_at_once(distilling, undisturbed):
    cluster = distilling.site
    lost = a_worker(cluster)
    lost.power_off()
    kill(cluster.hosts["head"], "python jobs/distill_imagenet.py")
    both = distilling.befallen()
    assert distilling.end() != 0
    again = Running(cluster, distilling.out, distilling.log)
    again.until_further(both, "the driver and a worker host, the job submitted again", DEADLINE)
    ends_as_if_undisturbed(again, undisturbed)
    lost.boot()
    cluster.wait_for_nodes(3)


def test_the_head_is_restarted_and_the_job_resubmitted(distilling, undisturbed):
    cluster = distilling.site
    cluster.hosts["head"].power_off()
    off = distilling.befallen()
    cluster.hosts["head"].boot()
    assert distilling.end() != 0
    cluster.up()
    again = Running(cluster, distilling.out, distilling.log)
    again.until_further(off, "the head restarted, `ray up`, the job submitted again", DEADLINE)
    ends_as_if_undisturbed(again, undisturbed)


def test_ray_down_ends_the_cluster(cluster):
    """After a while: workers leave when the head has been gone for a minute."""
    cluster.on_laptop("ray down -y clusters/onprem.yaml", timeout=300)
    wait(lambda: not any(host.processes("raylet/raylet") for host in cluster.hosts.values()), "all raylets to end", deadline_s=300)
