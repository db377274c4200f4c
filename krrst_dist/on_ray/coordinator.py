"""The distributed loop: Algorithm 1 with its shards on actors, its state on storage, and deaths in between.

The same steps as `algorithm.distill`, bit for bit on CPUs: who hosts a shard changes the time only. Lives in the job's
driver process. Does not know which method it runs nor what a shard is made of (`Work` says how), how contributions are
summed (`aggregate.py`), how actors are called (`group.py`) or what a checkpoint looks like (`checkpoint.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TypeVar

import ray
import torch
from torch import Tensor

from krrst_dist import storage
from krrst_dist.algorithm import DivergedError, Outer
from krrst_dist.artifacts import ArtifactError
from krrst_dist.config import Config
from krrst_dist.on_ray import snapshots
from krrst_dist.on_ray.aggregate import Aggregator, CollectiveAggregator, ObjectStoreAggregator
from krrst_dist.on_ray.alike import require_alike
from krrst_dist.on_ray.checkpoint import Checkpoint, Facts
from krrst_dist.on_ray.cluster import ClusterError
from krrst_dist.on_ray.errors import EngineError, LostActor, Moved, TakenOverError, UnfitHost
from krrst_dist.on_ray.group import START, WorkerGroup
from krrst_dist.on_ray.heartbeat import Heartbeat
from krrst_dist.on_ray.metrics import Metrics
from krrst_dist.on_ray.patience import patiently
from krrst_dist.on_ray.progress import ProgressLine, Record
from krrst_dist.on_ray.resume import check_resume, checkpoints_of, facts, nothing_readable
from krrst_dist.on_ray.rooms import Room, Rooms
from krrst_dist.on_ray.sliced import Layout
from krrst_dist.on_ray.stopping import INTERRUPTED, Stop, Stopped
from krrst_dist.on_ray.work import Outcome, Work
from krrst_dist.on_ray.worker import Host

PAUSES = (1.0, 10.0, 30.0)  # seconds before each new try after failures in a row without a new checkpoint; then the run stops
REPLACE = 300.0  # seconds that a cluster has to replace a host that was lost

T = TypeVar("T")


class Coordinator:
    """One run, in the folder or URI `directory` (checkpoints/, pictures/, tensorboard/, history.parquet, status.json).

    config: `distill`, `engine` and `evaluate` are used, and `trajectory()` is what a resumed run must have in common.
    data: fingerprints of what the shards read, by name; a resumed run must have them in common, too.
    resume: go on from the last checkpoint, if there is one. name: put before every line printed.
    stop: ends the run when asked; for a run in another thread than the main one, which signals do not reach.
    rooms: where its actors' room comes from, shared with other runs of the same job; default: its own.
    """

    def __init__(self, config: Config, work: Work, *, directory: str, data: Mapping[str, str] | None = None, resume: bool = False,
                 name: str = "", stop: Stop | None = None, rooms: Rooms | None = None) -> None:
        self._config, self._work = config, work
        self._data = data or {}
        self._directory, self._resume, self._stop = directory, resume, stop or Stop()
        self._rooms = rooms or Rooms(config.engine.threads, config.engine.gpus, config.engine.actors,
                                     at_least=config.engine.min_actors)
        self._prefix = f"{name}: " if name else ""
        self._checkpoints = checkpoints_of(config, directory)
        self._heart = Heartbeat(directory, updates=config.distill.updates)
        self._horizon = config.distill.horizon
        self._last: str | None = None  # the last good checkpoint
        self._saved = 0  # checkpoints written by this process
        self._unsaved = False  # is an update being done, or done, that no checkpoint has?

    def run(self) -> Outcome:
        """Do the updates that are left.

        Raises ConfigError for a run that is there already or does not fit, ClusterError when there is no room for its actors, EngineError
        when machines fail, StorageError when storage refuses a checkpoint for too long, and whatever a shard raises (ValueError,
        DivergedError, RidgeError, ...) with the last good checkpoint named. Ctrl-C and SIGTERM end it in Stopped, after a checkpoint; a
        second one at once.
        """
        with self._stop.by_signals():
            try:
                return self._finished() or self._with_a_heartbeat()
            except KeyboardInterrupt:
                lost = "the updates since the last checkpoint are lost; " if self._unsaved else ""
                self._say(f"stopped; {lost}{self._how_to_go_on()}")
                raise Stopped(INTERRUPTED if self._unsaved else self._stop.status) from None

    def _finished(self) -> Outcome | None:
        """Before anything is started or written: may this run go on from what is there? Returns its end if it is all there."""
        newest, updates = check_resume(self._config, self._directory, resume=self._resume, data=self._data), self._config.distill.updates
        if newest is None:
            storage.check_writable(self._directory)
            return None
        self._last, self._horizon = newest.uri, newest.facts.decay_updates
        if self._horizon != updates:
            self._say(f"the learning rate falls over {self._horizon} updates, as the run was started, and then stays at its floor")
        if (newest.facts.cpu_capability is None) != (self._facts().cpu_capability is None):
            self._say("a run that was begun on CPUs goes on on GPUs, or the other way round: its rounding will differ")
        if newest.facts.torch != torch.__version__:
            self._say(f"torch {torch.__version__} goes on with what torch {newest.facts.torch} began: its rounding may differ")
        if newest.step == updates:
            return self._end(newest)
        storage.check_writable(self._directory)
        return None

    def _end(self, checkpoint: Checkpoint) -> Outcome | None:
        outer = self._work.outer(self._horizon)
        try:
            outer.load_state_dict(checkpoint.read_outer())
        except ArtifactError:
            return None  # the last updates will be done again
        outcome = Outcome.of(outer, self._directory)
        if self._work.measure is not None and not {0, outer.steps} <= {step for step, _ in outcome.held_out}:
            return None  # the run's table is gone: what it ends with is measured again
        self._say(f"the run in {self._directory} is finished: all {outer.steps} updates are done")
        return outcome

    def _with_a_heartbeat(self) -> Outcome:
        self._heart.start()
        self._metrics = Metrics(self._directory)
        try:
            outcome = self._despite_failures()
        except TakenOverError:
            self._heart.stop()  # the folder is another process's now
            raise
        except KeyboardInterrupt:
            self._heart.end("stopped")
            raise
        except Exception as error:
            self._heart.end("failed", str(error))
            raise
        self._heart.end("finished")
        return outcome

    def _despite_failures(self) -> Outcome:
        failures, saved, first = 0, -1, True
        while True:
            try:
                return self._attempt(first=first)
            except Moved as moved:
                self._say(f"{moved}; going on from {self._last or 'the beginning'}")
            except ClusterError as error:
                if self._last is not None:
                    error.args = (f"{error}; {self._how_to_go_on()}",)
                raise
            except LostActor as lost:
                self._metrics.failure()
                failures = failures + 1 if self._saved == saved else 1
                saved = self._saved
                if failures > len(PAUSES):
                    raise EngineError(f"{lost}; that is {failures} failures in a row without a new checkpoint, so the run stops. If memory "
                                      f"ran out, set distill.chunk_size lower or use more hosts; {self._how_to_go_on()}") from lost
                self._say(f"{lost}; fresh actors go on from {self._last or 'the beginning'}")
                if self._stop.soon.wait(PAUSES[failures - 1]):
                    raise KeyboardInterrupt from None
            first = False

    def _attempt(self, *, first: bool) -> Outcome:
        """All updates that are left, with one set of actors."""
        config = self._config
        replace, patience = (0, 0) if first else (REPLACE, None)
        self._unsaved = False  # what was done since the last checkpoint went with the actors before
        with self._rooms.take(stop=self._must_end, patience=replace, say=self._say) as room, WorkerGroup(
                Layout(config.distill.shards, self._work.slices, room.actors), threads=config.engine.threads, gpus=config.engine.gpus,
                stop=self._must_end, room=room.group, say=self._say) as group:
            self._patiently(self._claim, patience)
            try:
                hosts = group.start()
                require_alike(Host.of_this_process(), hosts, rounding=not config.engine.gpus)
                self._do_chores(group)
                self._patiently(lambda: group.build(self._work.build, self._work.measure, self._work.slice, self._directory), patience)
            except LostActor as lost:
                if not first:
                    raise
                raise EngineError(f"{lost}, while it started; see the lines above, and `krrst doctor`. If memory ran out, lower "
                                  f"engine.actors or distill.pool.size") from lost
            except UnfitHost as unfit:
                if first or not self._rooms.leave_out(unfit.node, str(unfit)):  # at first its user is still there
                    raise
                raise Moved(f"{unfit}; that host is left out of this run") from unfit
            outer, restored = self._patiently(lambda: self._restore(group), patience)
            record = Record(self._directory, start=outer.steps if restored else None)
            try:
                return self._loop(group, outer, record, restored=restored, room=room)
            except ArithmeticError as error:
                error.args = (f"{error}; {self._how_to_begin_anew()}",)
                raise
            except ValueError as error:
                error.args = (f"{error}; {self._how_to_go_on()}",)
                raise
            finally:
                record.close()

    def _loop(self, group: WorkerGroup, outer: Outer, record: Record, *, restored: bool, room: Room) -> Outcome:
        updates, every = self._config.distill.updates, self._config.evaluate.every
        collective = self._config.engine.collective and not group.layout.spread
        aggregator = (CollectiveAggregator if collective else ObjectStoreAggregator)(group, outer, self._work.combine)
        if not restored:
            self._warm_up(group, aggregator)
            self._save(group, aggregator, record, step=0)
            self._draw(outer, aggregator, step=0)
        if outer.steps % every == 0:
            self._measure_held_out(group, aggregator.shared, record, step=outer.steps)
        line = ProgressLine(f"{self._prefix}update", updates, start=outer.steps)
        try:
            for step in range(outer.steps, updates):
                lr, self._unsaved = outer.lr, True
                update = aggregator.update(step, last=step + 1 == updates)
                done = step + 1
                record.update(done, update, lr=lr)
                self._heart.update(done, update.total)
                self._metrics.update(done, update)
                line.show(done, f"loss {update.contribution.loss:.4g}" + (f"  held-out {record.held_out:.4g}" if record.held_out else ""))
                self._draw(outer, aggregator, step=done)
                asked, notice, measured = self._stop.soon.is_set(), group.notice(), done % every == 0 or done == updates
                if done % self._config.engine.checkpoint_every == 0 or measured or asked or notice:  # before measuring, which may take long
                    self._save(group, aggregator, record, step=done)
                    if done < updates and not asked and (notice or room.has_grown()):
                        raise Moved(notice or f"there is room for more than {room.actors} actors now")
                if asked:
                    raise KeyboardInterrupt
                if measured:
                    self._measure_held_out(group, aggregator.shared, record, step=done)
        finally:
            line.close()
        self._measure_held_out(group, aggregator.shared, record, step=updates)
        self._patiently(record.save)
        return Outcome.of(outer, self._directory)

    def _warm_up(self, group: WorkerGroup, aggregator: Aggregator) -> None:
        if not self._work.warm_up:
            return
        self._say(f"warming up: about {self._work.warm_up} training steps")
        line = ProgressLine(f"{self._prefix}warm-up", self._work.warm_up)
        try:
            group.everywhere("warm_up", *aggregator.shared, silence=START, on_pulse=line.show)
        finally:
            line.close()

    def _do_chores(self, group: WorkerGroup) -> None:
        if not self._work.chores:
            return
        self._say(f"computing {len(self._work.chores)} things that the method needs first: {self._work.chores[0]}, ...")
        line = ProgressLine(f"{self._prefix}before the first update", len(self._work.chores))
        try:
            group.spread("do", self._work.chores, self._work.do, silence=START, on_answer=line.show)
        finally:
            line.close()

    def _measure_held_out(self, group: WorkerGroup, shared: tuple[ray.ObjectRef, ...], record: Record, *, step: int) -> None:
        """The held-out loss of (X_s, Y_s) after `step` updates, unless it is known already."""
        if self._work.measure is None or record.knows_held_out(step):
            return
        try:
            losses = group.spread("measure", range(self._config.evaluate.networks), *shared, silence=START)
        except DivergedError as error:
            lr = self._config.evaluate.pretrain.lr
            raise DivergedError(f"update {step}: {error}; evaluate.pretrain.lr = {lr:g} is too high, take a lower one") from None
        record.measured(step, sum(losses) / len(losses))
        self._metrics.measured(record.held_out)
        self._say(f"update {step}: held-out ridge loss {record.held_out:.4g}")

    def _save(self, group: WorkerGroup, aggregator: Aggregator, record: Record, *, step: int) -> None:
        state = aggregator.state_dict()
        if not all(value.isfinite().all() for value in state.values()):
            rates = [f"distill.{name} = {value:g}" for name, value in self._config.distill if name.startswith("lr")]
            raise DivergedError(f"after {step} updates X_s, what is learned beside it, or their optimiser's moments are not finite; "
                                f"{' or '.join(rates)} is too high")
        self._patiently(lambda: self._write(group, aggregator.shared, record, state, step))
        self._unsaved = False

    def _draw(self, outer: Outer, aggregator: Aggregator, *, step: int) -> None:
        """A picture of what is learned after `step` updates, where one is due."""
        if self._work.draw is not None and snapshots.due(step, self._config.distill.updates):
            aggregator.state_dict()  # brings `outer` up to date
            if problem := snapshots.write(self._directory, step, self._work.draw, outer.values):
                self._say(problem)

    def _write(self, group: WorkerGroup, shared: tuple[ray.ObjectRef, ...], record: Record, state: Mapping[str, Tensor], step: int) -> None:
        """The checkpoint of `step`, whole or not at all. May be called again where storage has refused it."""
        try:
            answers = group.everywhere("save", self._checkpoints.folder(step), *shared, silence=START)
            record.save()
            shards = sorted((saved for answer in answers for saved in answer), key=lambda saved: saved.shard)
            self._last = self._checkpoints.finish(step, state, shards, self._facts())
            self._saved += 1
            self._heart.checkpoint(self._last, step)
            self._metrics.checkpoint(step)
        except (storage.StorageError, DivergedError):
            with suppress(EngineError):
                group.everywhere("host", silence=START)  # answered when the others have written their part
            with suppress(storage.StorageError):
                self._checkpoints.discard(step)
            raise

    def _claim(self) -> None:
        """Begin an incarnation. Raises StorageError where storage has lost the run's checkpoints, for a while or for good."""
        self._require_checkpoints(self._checkpoints.whole())
        self._checkpoints.claim()

    def _require_checkpoints(self, names: list[str]) -> None:
        if self._last is not None and not names:
            raise storage.StorageError(f"{self._checkpoints.uri}: no checkpoint is there, though {self._last} was; is the storage mounted?")

    def _patiently(self, work: Callable[[], T], patience: float | None = None) -> T:
        return patiently(work, stop=self._stop, say=self._say, patience=patience)

    def _restore(self, group: WorkerGroup) -> tuple[Outer, bool]:
        """The outer optimiser, and with it all shards, where the newest undamaged checkpoint has them; or at the beginning."""
        outer, names = self._work.outer(self._horizon), self._checkpoints.whole()
        self._require_checkpoints(names)
        for name in names:
            try:
                checkpoint = self._checkpoints.read(name)
                state = checkpoint.read_outer()
                group.everywhere("restore", checkpoint.uri, checkpoint.shards, silence=START)
            except ArtifactError as error:
                self._say(f"damaged checkpoint: {error}; falling back to the one before it")
                continue
            outer.load_state_dict(state)
            self._last = checkpoint.uri
            self._heart.checkpoint(self._last, checkpoint.step)
            return outer, True
        if names:
            raise nothing_readable(self._checkpoints, names)
        return outer, False

    def _facts(self) -> Facts:
        return facts(self._config, self._data, horizon=self._horizon)

    def _must_end(self) -> bool:
        """Must waits end now? Asked once, an update is waited for and its checkpoint."""
        return self._stop.now.is_set() or (self._stop.soon.is_set() and not self._unsaved)

    def _how_to_go_on(self) -> str:
        if self._last is None:
            return "there is no checkpoint yet, start it again"
        return f"the last good checkpoint is {self._last}, go on with --resume"

    def _how_to_begin_anew(self) -> str:
        """After an end that lies in the numbers: the same steps would lead there again."""
        if self._last is None:
            return "there is no checkpoint yet: change that and start it again"
        return (f"the last good checkpoint is {self._last}, but going on from it with --resume would take the same steps to the same end, "
                f"and with that changed it would be another run: start one with another --out")

    def _say(self, line: str) -> None:
        self._heart.says(line)
        print(f"{self._prefix}{line}", flush=True)
