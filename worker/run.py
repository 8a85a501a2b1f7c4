"""Serving one job at one stage: messages in, rows through the model, messages out.

Stage 0 drives: it schedules, the rows travel down the pipeline, the tokens come back from the last stage. When the
batch is complete a Finish goes round once; each stage seals its trace, signs what it handed on, and checks what its
predecessor signed. An attempt that breaks is dropped by all. Stage 0 begins the next, in which the tokens that it has
are prefilled with the prompts: keys, values and traces of all stages are made anew, and a lost stage leaves no gap.

INVARIANT: a stage signs one hand-off a job. Once sealed it takes no further attempt: rows of two attempts may differ,
and two signatures would let the receiver show the one it did not commit to.

Rationale: more than 400 lines: stage 0 and the others share an attempt's state and its invariant, read together.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence, Set
from concurrent.futures import Executor
from contextlib import asynccontextmanager, suppress

import numpy as np
import torch

from verifier.commit import Request, make_outputs, outputs_root
from worker import ring_pb2 as pb
from worker.attempt import Notary, Step, cancelled, check_all, failure_of, judge, judge_handoff, nobody, seen, take_in
from worker.batch import Batch, Token, sampling
from worker.channel import Peer, Sender, unpack_rows, unpack_tokens
from worker.config import Bounds, Serving
from worker.errors import BadHandoff, BadMessage, JobFailed, Stalled
from worker.handoff import Handoff
from worker.homes import Homes
from worker.inbox import Inbox
from worker.job import JobFolder, JobState, Phase, written
from worker.pace import SMOOTHING, Pace
from worker.pipe import Pipe
from worker.prefix import Prefixes
from worker.pulse import Pulse
from worker.recorder import Recorder, Summary
from worker.retain import new_recorder
from worker.sampler import Draw
from worker.scheduler import Diverged, Scheduler, stopped
from worker.stage import Stage

log = logging.getLogger("plumb.worker.run")

ATTEMPTS = 1000  # whose numbers a ring may use up; those that fail are bounded by Serving.attempts


class Run:
    """One job here. `finished` resolves to the FINISHED state, or raises why this stage can't finish the job."""

    def __init__(
        self,
        folder: JobFolder,
        state: JobState,
        requests: Sequence[Request],
        stage: Stage,
        serving: Serving,
        notary: Notary,
        compute: Executor,
        successor: Sender | None,
        predecessor: str,
        recorder_class: type[Recorder] = Recorder,
        on_state: Callable[[JobState], None] = lambda state: None,
        *,
        ready: Callable[[], Awaitable[Sequence[Bounds]]] | None = None,
        is_well: Callable[[], Awaitable[bool]] = nobody,
        kept: Sequence[Sequence[int]] = (),
        rings: int = 0,
    ) -> None:
        """successor: None if the pipeline is this stage alone; predecessor: its name for errors; compute: one thread,
        shared by all jobs; ready: the bounds of the other stages, once all answer, asked by stage 0 before it tries;
        None: as ours; is_well: asks a predecessor that is silent; kept: each request's tokens of earlier attempts;
        rings: how many served this job before.
        """
        self.folder = folder
        self.state = state
        self.requests = requests
        self._stage = stage
        self._serving = serving
        self._notary = notary
        self._compute = compute
        self._successor = successor
        self._predecessor = predecessor
        self._recorder_class = recorder_class
        self._on_state = on_state
        self._recorder: Recorder | None = None
        self._ready, self._is_well = ready, is_well
        self._first_attempt = rings * ATTEMPTS  # numbers of earlier rings lie below, so their messages count no more
        self._task: asyncio.Task[None] | None = None
        self._inbox = Inbox()
        self._final = False  # sealed, or failed for good
        self._broken = False  # this attempt is given up, the next may come
        self.pace = Pace(state.stages, serving.microbatches)  # of stage 0
        self._kept = [list(tokens) for tokens in kept] or [[] for _ in requests]  # of earlier attempts
        self._tokens: list[list[int]] = [[] for _ in requests]
        self._scheduler: Scheduler | None = None  # while stage 0 drives an attempt
        self._pulse: Pulse
        self._expected: int  # sequence of the predecessor's next message
        self._sending = asyncio.Lock()  # numbers are given in the order of sending
        self._moved = time.monotonic()  # since when no rows were computed
        self.finished: asyncio.Future[JobState] = asyncio.get_running_loop().create_future()
        self.finished.add_done_callback(seen)
        self._reset(max(state.attempt, self._first_attempt))
        if state.phase is Phase.FINISHED:
            self.finished.set_result(state)
            self._final = True

    # ------------------------------------------------------------------------------------------------------------ life

    def start(self) -> None:
        """Stage 0 begins to drive, the others to listen; a sealed job says again what it had said last."""
        if self.state.phase in (Phase.SEALED, Phase.FINISHED):
            self._final = True
            self._task = asyncio.create_task(self._resume())
        elif self.state.stage == 0:
            self._task = asyncio.create_task(self._drive_attempts())

    async def close(self, reason: str) -> None:
        """Gives the job up; a finished one stays finished."""
        self._final = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._drain()
        if not self.finished.done():
            await self._forget_attempt()
            self.finished.set_exception(JobFailed(reason))

    @property
    def tokens(self) -> list[list[int]]:
        """Each request's so far, at stage 0 and the last; what another attempt may begin with."""
        if self._scheduler is not None:
            return self._scheduler.outputs
        return [max(pair, key=len) for pair in zip(self._kept, self._tokens, strict=True)]

    def held_seconds(self) -> float:
        """For how long the oldest microbatch has been here without having been computed."""
        return self._pulse.held_seconds(time.monotonic())

    def rest_seconds(self) -> float:
        """For how long no microbatch was computed here."""
        return time.monotonic() - self._moved

    def hold(self, until: float) -> None:
        """Nothing is sealed before, in unix seconds: the job may be moved to another ring. Not once `sealing`."""
        self._save(self.state.to(self.state.phase, held_until=until))

    async def receive(self, peer: Peer, envelope: pb.Envelope) -> None:
        """One message of the predecessor. Raises BadMessage to have it dropped; returns once the message is queued."""
        body = envelope.WhichOneof("body")
        if envelope.attempt < self._attempt or self.finished.done():
            return
        if self._final:  # a sealed stage 0 still waits for the last stage's signature, whatever it forgot by a restart
            if self.state.phase is Phase.SEALED and body in ("finish", "abort") and self.state.stage == 0:
                await self._inbox.put(envelope)
            return
        if envelope.attempt > self._attempt:
            if self.state.stage == 0:
                raise BadMessage(peer.name, f"attempt {envelope.attempt}, but stage 0 is at {self._attempt}")
            if envelope.attempt > self._first_attempt + ATTEMPTS:
                raise BadMessage(peer.name, f"attempt {envelope.attempt} of at most {self._first_attempt + ATTEMPTS}")
            await self._begin(envelope.attempt)
        if self._broken or (envelope.sequence < self._expected and body != "abort"):
            return  # given up already; or sent again after a lost connection. Who restarted gives up by number 0
        if envelope.sequence > self._expected and body != "abort":
            if self._expected == 0:  # we lost what came before, by a restart
                await self._break(JobFailed("this stage restarted in the middle of an attempt"))
                return
            error = BadMessage(peer.name, f"expected message {self._expected}, came {envelope.sequence}")
            await self._break(error)
            raise error
        if body == "beat":
            self._pulse.beat(envelope.beat.held_ms / 1e3, envelope.beat.last, time.monotonic())
            return
        before, self._expected = self._expected, max(self._expected, envelope.sequence + 1)
        allowed = ("tokens", "finish", "abort") if self.state.stage == 0 else ("rows", "finish", "abort")
        if body not in allowed:
            error = BadMessage(peer.name, f"expected one of {allowed}, came {body}")
            await self._break(error)
            raise error
        (pulse := self._pulse).came(time.monotonic())
        try:
            await self._inbox.put(envelope)
        except asyncio.CancelledError:  # its connection is lost, and brings it again
            self._expected = before if pulse is self._pulse else self._expected
            raise
        finally:
            pulse.queued(time.monotonic())

    def _reset(self, attempt: int) -> None:
        self._attempt = attempt
        self._expected = self._sequence = 0
        self._broken = self.sealing = False  # sealing: all is served: no consent to a move is given any more
        self._own_seconds = 0.0  # a microbatch here, smoothed
        self._pulse = Pulse(self._predecessor, self._serving)
        self._drain()
        self._inbox = Inbox()
        self._homes = Homes(self.requests, self._serving.bounds)
        self._cache = self._stage.cache(self._homes.buffer, self._homes.reserves, self._homes.foreseen)
        self._positions = [0] * len(self.requests)
        self._ended: set[int] = set()
        self._kept = self.tokens
        self._tokens = [[] for _ in self.requests]
        if self._successor is not None:
            self._successor.drop(self.folder.job, attempt)

    def _record(self) -> Recorder:
        """Raises OSError."""
        self.folder.drop_traces()  # what a crash left
        kind, alone = self._recorder_class, self.state.stages == 1
        return new_recorder(kind, self._stage, self.requests, self.folder.path, self._serving, alone=alone)

    async def _begin(self, attempt: int) -> None:
        """Not at stage 0: drops what was, listens to a new attempt."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._forget_attempt()
        self._reset(attempt)
        self._recorder = self._record()
        self._task = asyncio.create_task(self._listen())

    async def _break(self, error: Exception) -> None:
        """This attempt is over: the successor hears of it, and so, round the ring, does stage 0."""
        log.error("job %s attempt %d: %s", self.folder.job.hex()[:8], self._attempt, error)
        if self._recorder is not None:
            self._recorder.close()
        self._broken = True
        self._drain()
        if self.state.stage == 0:  # who drives finds it in place of what was to come
            self._inbox.put_nowait(pb.Envelope(abort=pb.Abort(reason=str(error)[:500])))
        elif self._successor is not None:
            try:
                async with asyncio.timeout(5), self._sending:
                    envelope = self._envelope()
                    envelope.abort.reason = str(error)[:500]
                    await self._successor.send(envelope)
            except (JobFailed, TimeoutError) as failure:
                log.warning("job %s: the successor could not be told: %s", self.folder.job.hex()[:8], failure)

    async def _forget_attempt(self) -> None:
        """Its traces leave the disk before another's come: they can't replace the new, nor take their room."""
        if self._recorder is not None and self.state.phase is not Phase.SEALED:
            self._recorder.close()
            self._pulse.over()
            self._cache = self._stage.cache()  # keys and values go: there may never be another attempt
            await asyncio.to_thread(self._recorder.join)
            self.folder.drop_traces()
            self._recorder = None  # last: who is cancelled before is followed by another that waits

    def _drain(self) -> None:
        """Lets go whoever waits to put into the inbox."""
        while not self._inbox.empty():
            self._inbox.get_nowait()

    def _fail(self, error: Exception) -> None:
        self._final = True
        failed = self.state.to(Phase.FAILED, reason=str(error))
        with suppress(OSError):  # where the disk is full, it is the reason; started again, the job is tried again
            self.folder.save_state(failed)
        self._note(failed)
        if not self.finished.done():
            self.finished.set_exception(error)

    def _save(self, state: JobState) -> None:
        self.folder.save_state(state)
        self._note(state)

    async def _write(self, state: JobState) -> None:
        await written(self.folder, state, self.state, self._note)

    def _note(self, state: JobState) -> None:
        self.state = state
        self._on_state(state)

    def _envelope(self) -> pb.Envelope:
        envelope = pb.Envelope(job=self.folder.job, attempt=self._attempt, sequence=self._sequence)
        self._sequence += 1
        return envelope

    # --------------------------------------------------------------------------------------------------------- stage 0

    async def _drive_attempts(self) -> None:
        failures = 0
        while True:
            try:
                others = await self._ready() if self._ready is not None else ()
                self._reset(self._attempt + 1)
                self._save(self.state.to(Phase.SERVING, attempt=self._attempt))
                self._recorder = self._record()
                kept = sum(map(len, self._kept))
                log.info("job %s attempt %d begins with %d tokens", self.folder.job.hex()[:8], self._attempt, kept)
                await self._drive({self._serving.bounds, *others})
                return
            except Exception as error:
                if cancelled():
                    raise asyncio.CancelledError from error
                failure = failure_of(error)
                log.error("job %s attempt %d: %s", self.folder.job.hex()[:8], self._attempt, failure)
                await self._forget_attempt()
                failures += not isinstance(failure, Diverged)
                if self.state.phase is Phase.SEALED or failures >= self._serving.attempts:
                    self._fail(failure)
                    return
                self.sealing = False
                await asyncio.sleep(min(2.0, 0.2 * 2**failures))

    async def _drive(self, bounds: Set[Bounds]) -> None:
        """Rows go out and tokens come back at the same time: nothing here waits for a round to end. bounds: of all
        stages.
        """
        homes = [Homes(self.requests, each) for each in bounds]
        self.pace = Pace(self.state.stages, self._serving.microbatches, any(each.guests for each in homes))
        scheduler = Scheduler(
            self.requests,
            max_rows=min(each.rows for each in bounds),
            pace=self.pace,
            homes=homes,
            kept=self._kept,
            prefixes=Prefixes([request.prompt for request in self.requests]) if self._serving.share_prefixes else None,
        )
        self._scheduler = scheduler
        began: deque[float] = deque()  # of the microbatches in flight
        sent, came = asyncio.Semaphore(0), asyncio.Event()

        async def deliver(step: Step) -> None:
            if self._successor is None:
                scheduler.returned(step.tokens)
                came.set()
                return
            began.append(step.began_seconds)
            await self._send_rows(step)

        async def collect() -> None:
            while not scheduler.done:
                await sent.acquire()
                tokens, times = await self._returned_tokens()
                scheduler.returned(tokens)
                if missing := scheduler.unanswered:
                    raise BadMessage(self._predecessor, f"no token came of {missing} requests whose rows it had")
                now = time.perf_counter()
                if began:
                    self.pace.returned(now - began.popleft(), times.busy / 1e6, times.slowest / 1e6)
                came.set()

        pipe = Pipe(self._compute, deliver)
        try:
            async with self._beating() as group:
                group.create_task(pipe.run())
                if self._successor is not None:
                    group.create_task(collect())
                while not scheduler.done:
                    came.clear()
                    batch = scheduler.next()
                    if batch is None:
                        await came.wait()
                        continue
                    ended = scheduler.ended()
                    self._ended.update(ended)
                    ids = np.array(scheduler.token_ids(batch), np.int64)
                    await pipe.put(self._step(batch, ended, lambda ids=ids: self._stage.embed(ids)))  # type: ignore[misc]
                    sent.release()
                await pipe.end()
        finally:
            self._kept, self._scheduler = scheduler.kept, None
        if scheduler.diverged:
            raise Diverged("an earlier attempt's tokens are not all what this one's rows yield")
        log.info("job %s: %d positions were shared", self.folder.job.hex()[:8], scheduler.taken_positions)
        self._tokens = scheduler.outputs
        self.sealing = True
        assert self._recorder is not None
        await self._seal(await asyncio.to_thread(self._recorder.finish), None)
        if self._successor is not None:
            await self._await_finish()
        await self._finish()

    async def _returned_tokens(self) -> tuple[list[Token], pb.Times]:
        envelope = await self._next(self._serving.stall_seconds)
        if (body := envelope.WhichOneof("body")) != "tokens":
            raise BadMessage(self._predecessor, f"expected tokens, came {body}")
        tokens = unpack_tokens(self._predecessor, envelope.tokens, self._stage.shape.vocabulary, self._serving.max_rows)
        assert self._recorder is not None
        self._recorder.tokens(tokens)
        return tokens, envelope.tokens.times

    async def _next(self, patience_seconds: float | None) -> pb.Envelope:
        """The predecessor's next message at stage 0. Raises Stalled; JobFailed if it is an abort."""
        try:
            async with asyncio.timeout(patience_seconds):
                envelope = await self._inbox.get()
        except TimeoutError:
            raise Stalled(self._predecessor, f"no message for {patience_seconds:g} s") from None
        if envelope.WhichOneof("body") == "abort":
            raise JobFailed(f"a stage gave up: {envelope.abort.reason[:500]}")
        return envelope

    async def _await_finish(self) -> None:
        """Waits as long as the job lives: the other stages may still be hashing, and there is no other attempt."""
        envelope = await self._next(None)
        if envelope.WhichOneof("body") != "finish":
            raise BadMessage(self._predecessor, f"expected finish, came {envelope.WhichOneof('body')}")
        root, leaves = bytes.fromhex(self.state.extra["received_root"]), int(self.state.extra["received_leaves"])
        received = await asyncio.to_thread(self._judge_handoff, envelope.finish, root, leaves)
        await self._write(self.state.to(Phase.SEALED, received=received))

    # ---------------------------------------------------------------------------------------------------- other stages

    async def _listen(self) -> None:
        try:
            pipe = Pipe(self._compute, self._hand_on)
            async with self._beating() as group:
                group.create_task(pipe.run())
                while True:
                    envelope = await self._inbox.get()
                    match envelope.WhichOneof("body"):
                        case "rows":
                            await pipe.put(self._received_rows(envelope.rows))
                        case "finish":
                            self.sealing = True
                            await pipe.end()
                            break
                        case _:
                            raise JobFailed(f"an earlier stage gave up: {envelope.abort.reason[:500]}")
            await self._received_finish(envelope.finish)
        except Exception as error:
            if cancelled():
                raise asyncio.CancelledError from error
            failure = failure_of(error)
            await self._break(failure)
            await self._forget_attempt()
            if isinstance(failure, BadHandoff) or self.state.phase is Phase.SEALED:
                self._fail(failure)
            self.sealing = self._final

    def _received_rows(self, rows: pb.Rows) -> Callable[[], Step]:
        shape = self._stage.shape
        batch, hidden = unpack_rows(self._predecessor, rows, shape.hidden, int(shape.served_dtype))
        take_in(self._predecessor, batch, rows.ended, self.requests, self._positions, self._ended, self._homes)
        return self._step(batch, list(rows.ended), lambda: hidden, rows.times)

    async def _hand_on(self, step: Step) -> None:
        if not self._stage.is_last:
            await self._send_rows(step)
            return
        assert self._recorder is not None
        tokens = []
        for token in step.tokens:
            known = self._tokens[token.request]
            # One that has stopped was fed tokens beyond its end: see _received_finish.
            if not stopped(self.requests[token.request], known):
                known.append(token.token)
                tokens.append(token)
        self._recorder.tokens(tokens)
        said = (pb.Token(request=t.request, index=t.index, token=t.token) for t in tokens)
        await self._send(pb.Envelope(tokens=pb.Tokens(tokens=said, times=step.times())))

    async def _received_finish(self, finish: pb.Finish) -> None:
        chosen = self._tokens if self._stage.is_last else None
        check_all(self._predecessor, self.requests, self._positions, chosen)
        assert self._recorder is not None
        summary = await asyncio.to_thread(self._recorder.finish)
        assert summary.received is not None
        received = await asyncio.to_thread(self._judge_handoff, finish, *summary.received)
        await self._seal(summary, received)
        await self._finish()

    # ------------------------------------------------------------------------------------------------------- all stages

    def _step(
        self, batch: Batch, ended: Sequence[int], hidden: Callable[[], torch.Tensor], before: pb.Times | None = None
    ) -> Callable[[], Step]:
        """The microbatch's work for the compute thread, which takes them in this order. before: the stages' times."""
        recorder, stage, cache = self._recorder, self._stage, self._cache
        assert recorder is not None
        counts = [len(request.prompt) for request in self.requests]
        sampled = sampling(batch, counts) if stage.is_last else []
        draws = [Draw(self.requests[request], request, position) for request, position, _ in sampled]
        busy, slowest = (before.busy / 1e6, before.slowest / 1e6) if before is not None else (0.0, 0.0)
        for piece in batch.pieces:
            self._positions[piece.request] = piece.end
        pulse = self._pulse
        pulse.took(time.monotonic())
        cache.coming(batch, self._homes.visiting(batch))

        def work() -> Step:
            with pulse.computing():
                began = time.perf_counter()
                for request in ended:
                    cache.drop(request)
                recorder.ended(ended)
                with cache.holding(batch):
                    cache.share(batch)
                    out, captured = stage.forward(hidden(), batch, cache)
                ids = stage.tokens(out[[row for _, _, row in sampled]], draws) if sampled else []
                recorder.rows(batch, captured, None if stage.is_last else out)
                tokens = [Token(r, t + 1 - counts[r], token) for (r, t, _), token in zip(sampled, ids, strict=True)]
                self._moved = time.monotonic()
                own = time.perf_counter() - began
                # Smoothed here, not at stage 0: the largest of many times is no stage's, and makes the ring too small.
                self._own_seconds += (own - self._own_seconds) * (SMOOTHING if self._own_seconds else 1.0)
                return Step(batch, ended, out, tokens, began, busy + own, max(slowest, self._own_seconds))

        return work

    async def _send_rows(self, step: Step) -> None:
        await self._send(pb.Envelope(rows=step.rows(int(self._stage.shape.served_dtype))))

    async def _send(self, envelope: pb.Envelope) -> None:
        """Numbers the message, unless it has its number, and sends it. Raises Stalled."""
        assert self._successor is not None
        try:
            async with asyncio.timeout(self._serving.stall_seconds), self._sending:
                if not envelope.job:
                    envelope.MergeFrom(self._envelope())
                await self._successor.send(envelope)
        except TimeoutError:
            raise Stalled("the successor", f"took no message for {self._serving.stall_seconds:g} s") from None

    @asynccontextmanager
    async def _beating(self) -> AsyncIterator[asyncio.TaskGroup]:
        """A group of tasks that lasts as long as neighbours tell each other that they live."""
        async with asyncio.TaskGroup() as group:
            beats = group.create_task(self._beat())
            yield group
            # Sealing takes its time: what is final can wait for a stage that comes back.
            if self._successor is not None:
                await self._send_beat(last=True)
            beats.cancel()

    async def _beat(self) -> None:
        while True:
            await judge(self._pulse, self._is_well)
            if self._successor is not None and not self._sending.locked():
                await self._send_beat()
            await asyncio.sleep(self._serving.beat_seconds)

    async def _send_beat(self, last: bool = False) -> None:
        async with self._sending:
            assert self._successor is not None
            beat = pb.Beat(held_ms=int(1e3 * self.held_seconds()), last=last)
            where = {"job": self.folder.job, "attempt": self._attempt, "sequence": self._sequence}
            await self._successor.send(pb.Envelope(**where, beat=beat))

    async def _seal(self, summary: Summary, received: Handoff | None) -> None:
        """The trace is final: writes down its roots, signs what was handed on, tells the successor."""
        # SAFETY: `sealing` was set before, so that nothing is signed to prolong this.
        while (left := self.state.held_until - time.time()) > 0:
            await asyncio.sleep(left)
        self._cache = self._stage.cache()
        tokens = tuple(tuple(ids) for ids in self._tokens) if self._stage.is_last or self.state.stage == 0 else ()
        sent = None
        if summary.sent is not None:
            root, leaves = summary.sent
            job, stage = self.folder.job, self.state.stage
            sent = Handoff(root, leaves, await asyncio.to_thread(self._notary.sign_handoff, job, stage, root, leaves))
        outputs = outputs_root(make_outputs(tokens, self.requests)) if self._stage.is_last else bytes(32)
        await self._write(
            self.state.to(
                Phase.SEALED,
                attempt=self._attempt,
                nodes=summary.nodes,
                root=summary.root,
                sent=sent,
                sent_sequence=self._sequence,
                received=received,
                tokens=tokens,
                outputs=outputs,
                extra={}
                if summary.received is None
                else {"received_root": summary.received[0].hex(), "received_leaves": str(summary.received[1])},
            )
        )
        self._final = True
        if sent is not None:
            await self._send(self.state.finish_message(self.folder.job))

    def _judge_handoff(self, finish: pb.Finish, root: bytes, leaves: int) -> Handoff:
        sender = (self.state.stage - 1) % self.state.stages
        return judge_handoff(self._notary, self.folder.job, sender, self._predecessor, finish, root, leaves)

    async def _finish(self) -> None:
        await self._write(self.state.to(Phase.FINISHED, reason=""))
        if not self.finished.done():
            self.finished.set_result(self.state)

    async def _resume(self) -> None:
        """After a restart of a sealed job."""
        try:
            if self.state.sent is not None:
                await self._send(self.state.finish_message(self.folder.job))
            if self.state.phase is Phase.SEALED:
                if self.state.stage == 0 and self.state.stages > 1:
                    await self._await_finish()
                await self._finish()
        except JobFailed as error:
            if self.state.phase is Phase.SEALED:
                self._fail(error)
