"""The process: follows the chain, and drives jobs, games and money of one worker."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
import uvicorn
from eth_account.signers.local import LocalAccount

from contracts.client import (
    Addresses,
    Chain,
    Claim,
    Consent,
    ContractsError,
    Job,
    Stage,
    Status,
    load_account,
    model_id,
)
from contracts.events import (
    DemandAnswered,
    DemandLapsed,
    DemandOpened,
    Event,
    GameEnded,
    GameMoved,
    JobAccepted,
    JobCommitted,
    JobMoved,
    JobOpened,
    JobPaid,
    JobRefunded,
    JobReleased,
    JobVoided,
    PipelineCreated,
)
from verifier.commit import Request
from verifier.tolerance import Profile
from verifier.weights import Weights, identify
from worker import ring_pb2 as pb
from worker.admission import check_join, check_terms, own_stage
from worker.channel import Channel, Handler, Peer
from worker.config import WorkerConfig
from worker.consent import place
from worker.demand import Answerer
from worker.engagement import Engagement
from worker.errors import BadMessage, ConfigError, Refused, UnknownJob
from worker.follow import Follower
from worker.grpc_channel import GrpcChannel
from worker.job import JobFolder, JobState, Phase
from worker.notary import Notary
from worker.peers import Peers
from worker.preflight import check_chain, listen
from worker.recorder import Recorder
from worker.repeat import RepeatableStage
from worker.respond import Responder
from worker.retain import Traces
from worker.room import Room
from worker.settle import Settler, stage_name
from worker.spare import Spare
from worker.stage import Stage as ModelStage

log = logging.getLogger("plumb.worker.agent")

# Of our certificate and key, who hears of messages, their largest size, and whether to compress rows.
MakeChannel = Callable[[bytes, bytes, Handler, int, bool], Channel]


class Agent:
    """Built by `build_worker`; `run` returns when the HTTP server is told to stop."""

    def __init__(
        self,
        config: WorkerConfig,
        chain: Chain,
        signer: LocalAccount,
        stage: ModelStage,
        profile: Profile,
        responder_class: type[Responder],
        settler_class: type[Settler],
        recorder_class: type[Recorder],
        channel_class: MakeChannel,
    ) -> None:
        self.config = config
        self.chain = chain
        self.signer = signer
        self.account = config.account or signer.address
        self.stage = stage
        self.model = identify(stage.weights, profile)
        self.model_id = model_id(self.model)
        self.certificate = config.tls_certificate.read_bytes()
        key = config.tls_key.read_bytes()
        self.recorder_class = recorder_class
        self.notary = Notary(chain, signer)
        self.settler = settler_class(chain, self.notary, self.account)
        self.traces = Traces(stage, config.serving.regenerated_bytes)
        self.responder = responder_class(
            chain, self.account, self.model, stage.weights, profile, self.traces, self.folder
        )
        self.answerer = Answerer(chain, self.model, self.traces, self.folder)
        self.room = Room(stage, config.serving, config.data)
        self.compute = ThreadPoolExecutor(1, "compute")
        self._key = key
        self._channel_class = channel_class
        self._engagements: dict[bytes, Engagement] = {}
        self._spares: dict[bytes, Spare] = {}
        self._pipelines: dict[bytes, tuple[Stage, ...]] = {}  # ours, and those of jobs
        self._moves: dict[bytes, list[tuple[bytes, bytes]]] = {}  # of jobs: transaction and pipeline of each
        self.follower = Follower(chain, config.chain.start_block, self._event)

    def folder(self, job: bytes) -> JobFolder:
        return JobFolder(self.config.data, job)

    def check_room(self, id: bytes, job: Job) -> None:
        """Whether it has room beside the jobs that are being served. Blocking. Raises Refused."""
        others = [other for other in list(self._engagements.values()) if other.id != id]
        held = [other.job for other in others if other.state.phase in (Phase.SIGNED, Phase.SERVING)]
        self.room.check_jobs([job, *held])

    async def check_terms(self, job: Job) -> None:
        """Raises Refused."""
        stake = await asyncio.to_thread(self.chain.workers.free_stake, self.account)
        least = await asyncio.to_thread(self.chain.escrow.least_lock, job)
        check_terms(job, self.config.policy, self.model_id, stake, least, await asyncio.to_thread(self.now))

    def now(self) -> int:
        """Unix seconds: the chain's, or this machine's if no block has come for a while. Blocking."""
        return max(self.chain.block_timestamp(), int(time.time()))

    # ------------------------------------------------------------------------------------------------------------ life

    async def run(self) -> None:
        # The server knows the agent's class, so the agent can't import it at the top.
        from worker.server import create_app

        listener = listen(self.config.http, "http")
        self.peers = Peers(self.chain, self.config.peer_hosts, self.config.serving.max_body_bytes)
        serving = self.config.serving
        self.channel = self._channel_class(
            self.certificate, self._key, self._receive, serving.max_message_bytes, serving.compress
        )
        await self.channel.start(self.config.grpc)
        self.server = uvicorn.Server(uvicorn.Config(create_app(self), log_level="warning", access_log=False))
        watch = asyncio.create_task(self._watch())
        log.info(
            "worker %s, layers %d .. %d, model 0x%s",
            self.account,
            self.stage.first_layer,
            self.stage.end_layer,
            self.model_id.hex(),
        )
        try:
            await self.server.serve([listener])
            if watch.done():
                watch.result()
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            await self.responder.stop()
            await self.answerer.stop()
            for engagement in self._engagements.values():
                await engagement.stop()
            for spare in self._spares.values():
                await spare.stop()
            await self.channel.close()
            await self.peers.close()
            self.compute.shutdown(wait=False, cancel_futures=True)

    async def _watch(self) -> None:
        try:
            await check_chain(self.chain, self.account, self.config.chain.poll_seconds)
        except ConfigError:
            self.server.should_exit = True
            raise
        while True:
            for work in (self.follower.follow, self._tick):
                try:
                    await work()
                except ContractsError as error:
                    log.warning("chain: %s", error)
                except Exception:  # the loop must outlive a fault in one job; the trace in the log says which
                    log.exception("watch")
            await asyncio.sleep(self.config.chain.poll_seconds)

    async def _tick(self) -> None:
        now = await asyncio.to_thread(self.now)
        self.responder.tick(now)
        self.answerer.tick()
        for id, engagement in list(self._engagements.items()):
            if engagement.closed:
                await self._forget(id)
            else:
                engagement.advance(now)
        for spare in list(self._spares.values()):
            spare.advance(now)

    async def _event(self, event: Event) -> None:
        match event:
            case PipelineCreated(id=id, stages=stages):
                if any(stage.worker == self.account for stage in stages):
                    self._pipelines[id] = stages
            case JobOpened(id=id, job=job):
                await self._opened(id, job)
            case JobMoved(id=id, pipeline=pipeline):
                move = event.transaction, pipeline
                if move not in self._moves.get(id, []):  # else in another block now
                    await self._moved(id, pipeline)
                    self._moves.setdefault(id, []).append(move)
            case GameMoved() | GameEnded():
                self.responder.feed(event)
            case DemandOpened():
                self.answerer.opened(event)
            case DemandAnswered() | DemandLapsed():
                self.answerer.closed(event)
            case JobAccepted() | JobCommitted() | JobPaid() | JobVoided() | JobRefunded() | JobReleased():
                found = self._engagements.get(event.id) or self._spares.get(event.id)
                if found is None:
                    return
                found.status = {
                    JobAccepted: Status.ACCEPTED,
                    JobCommitted: Status.COMMITTED,
                    JobPaid: Status.PAID,
                    JobVoided: Status.VOID,
                    JobRefunded: Status.REFUNDED,
                    JobReleased: Status.REFUNDED,  # as far as this worker is concerned: nothing is left to do
                }[type(event)]
                if isinstance(found, Spare):
                    if found.status is not Status.ACCEPTED:
                        await self._spares.pop(event.id).stop()
                        self.notary.forget(event.id)
                elif isinstance(event, JobCommitted):
                    found.window_end = event.window_end

    async def _opened(self, id: bytes, job: Job) -> None:
        if id in self._engagements or id in self._spares:
            return  # in another block now
        stages = await self.stages(job.pipeline)
        if not any(stage.worker == self.account for stage in stages):
            self._offer(id, job, stages)
            return
        try:
            index = own_stage(stages, self.account, self.config.first_layer, self.config.end_layer)
        except Refused as error:
            log.warning("job %s is not for us: %s", id.hex()[:8], error)
            return
        self._engagements[id] = Engagement(self, id, job, stages, index)
        log.info("job %s opened on our pipeline, we are stage %d of %d", id.hex()[:8], index, len(stages))

    async def stages(self, pipeline: bytes, keep: bool = True) -> tuple[Stage, ...]:
        """Of a pipeline on chain, none if there is no such. keep: in memory, not for what strangers ask."""
        found = self._pipelines.get(pipeline)
        if found is None:
            found = await asyncio.to_thread(self.chain.workers.pipeline_stages, pipeline)
            if keep and found:
                self._pipelines[pipeline] = found
        return found

    def _offer(self, id: bytes, job: Job, stages: tuple[Stage, ...]) -> None:
        """Watches over a job that is not ours, if a pipeline of ours may relieve its own. job: with its pipeline."""
        if not self.config.policy.replaceable:
            return
        for relief, ours in self._pipelines.items():
            index = place(stages, ours)
            if index is not None and ours[index].worker == self.account:
                self._spares[id] = Spare(self, id, job, stages, relief, index)
                log.info("job %s: we are a spare for %s", id.hex()[:8], stage_name(index, stages[index]))
                return

    async def _moved(self, id: bytes, pipeline: bytes) -> None:
        """A job goes on with another pipeline: we come, stay or leave, or become a spare for it."""
        stages = await self.stages(pipeline)
        engagement, spare = self._engagements.get(id), self._spares.get(id)
        if spare is not None and spare.task is not asyncio.current_task():
            await spare.stop()  # before there is an engagement: it writes the job's state too
        rings = len(self._moves.get(id, [])) + 1
        index = next((i for i, stage in enumerate(stages) if stage.worker == self.account), None)
        if engagement is not None:
            await engagement.moved(pipeline, stages, rings, index)
        elif index is not None:
            log.warning("job %s: we are its stage %d from now on", id.hex()[:8], index)
            job = replace(await asyncio.to_thread(self.chain.escrow.job, id), pipeline=pipeline)
            engagement = self._engagements[id] = Engagement(self, id, job, stages, index, rings)
            engagement.status = Status.ACCEPTED
            engagement.advance(await asyncio.to_thread(self.now))
        self._spares.pop(id, None)  # last: what fails before is told again
        if engagement is None and spare is not None:
            self._offer(id, replace(spare.job, pipeline=pipeline), stages)
            if id in self._spares:
                self._spares[id].status = Status.ACCEPTED

    async def _forget(self, id: bytes) -> None:
        """A job that is over: what is asked about it later is on disk. Also after a restart, which hears of it anew."""
        await self._engagements.pop(id).stop()
        self.notary.forget(id)
        try:
            await asyncio.to_thread(self.folder(id).drop_traces)
        except OSError as error:
            log.warning("job %s: its traces could not be removed: %s", id.hex()[:8], error)

    # ------------------------------------------------------------------------------------------------- asked by others

    async def engagement(self, job: bytes) -> Engagement:
        """Raises UnknownJob."""
        if job not in self._engagements:
            await self.follower.follow()  # somebody was faster than our next look at the chain
        try:
            return self._engagements[job]
        except KeyError:
            raise UnknownJob(job) from None

    async def take_requests(self, job: bytes, requests: Sequence[Request]) -> None:
        await (await self.engagement(job)).take_requests(requests)

    async def accept(self, job: bytes) -> tuple[int, bytes]:
        """(our stage, our signature). Raises Refused."""
        engagement = await self.engagement(job)
        return engagement.index, await engagement.accept()

    async def consent(self, job: bytes, pipeline: bytes) -> Consent:
        """Ours to the job's move to `pipeline`. Raises Refused."""
        return await (await self.engagement(job)).consents.give(pipeline)

    def state(self, job: bytes) -> JobState:
        """Raises UnknownJob."""
        engagement = self._engagements.get(job)
        return engagement.state if engagement is not None else self.folder(job).load_state()

    def held_seconds(self, job: bytes) -> float:
        """For how long we have had a microbatch of the job that is not computed."""
        engagement = self._engagements.get(job)
        return engagement.run.held_seconds() if engagement is not None and engagement.run is not None else 0.0

    async def claim(self, job: bytes) -> Claim:
        return await (await self.engagement(job)).claims.own()

    async def join(self, model: bytes, stages: tuple[Stage, ...], nonce: int) -> bytes:
        """Our signature under a pipeline. Raises Refused."""
        config = self.config
        check_join(model, stages, config.policy, self.model_id, self.account, config.first_layer, config.end_layer)
        pipeline = await asyncio.to_thread(self.chain.workers.pipeline_id, model, stages, nonce)
        return await asyncio.to_thread(self.notary.sign_join, pipeline)

    async def _receive(self, peer: Peer, envelope: pb.Envelope) -> None:
        """A message from the ring: only the job's own predecessor may send it."""
        try:
            engagement = await self.engagement(envelope.job)
        except UnknownJob as error:
            if await asyncio.to_thread(lambda: self.folder(envelope.job).over):
                return  # said again after a restart
            raise BadMessage(peer.name, str(error)) from error
        if not await self.peers.is_stage(peer, *engagement.predecessor):
            await self.follower.follow()  # the job may have moved
        before, expected = engagement.predecessor
        name = stage_name(before, expected)
        if not await self.peers.is_stage(peer, before, expected):
            raise BadMessage(peer.name, f"sent a message of job {engagement.name}, whose {name} is our predecessor")
        await engagement.receive(Peer(name, expected.worker, peer.certificate), envelope)


def build_worker(
    config: WorkerConfig,
    *,
    stage_class: type[ModelStage] = ModelStage,
    responder_class: type[Responder] = Responder,
    settler_class: type[Settler] = Settler,
    recorder_class: type[Recorder] = Recorder,
    channel_class: MakeChannel = GrpcChannel,
) -> Agent:
    """All of one process. Raises ConfigError, ModelFolderError, InvalidProfile, KeystoreError."""
    if config.serving.threads:
        torch.set_num_threads(config.serving.threads)
    config.data.mkdir(parents=True, exist_ok=True)
    signer = load_account(config.keystore, config.password_file)
    chain = Chain(
        config.chain.rpc,
        Addresses(**vars(config.chain.addresses)),
        signer,
    )
    weights = Weights.open(config.model)
    if config.end_layer > weights.shape.layers:
        raise ConfigError(f"end_layer: expected at most {weights.shape.layers}, came {config.end_layer}")
    profile = Profile.load(config.model, weights.shape)
    if config.serving.retain == "regenerate" and stage_class is ModelStage:
        stage_class = RepeatableStage
    stage = stage_class(
        config.model,
        config.first_layer,
        config.end_layer,
        device=config.serving.device,
        weights=weights,
        products=config.serving.products,
    )
    return Agent(config, chain, signer, stage, profile, responder_class, settler_class, recorder_class, channel_class)
