"""The process: follows the chain, and drives jobs, games and money of one worker."""

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import uvicorn
from eth_account.signers.local import LocalAccount

from contracts.client import Addresses, Chain, Claim, ContractsError, Job, Stage, Status, load_account, model_id
from contracts.events import (
    DemandAnswered,
    DemandLapsed,
    DemandOpened,
    Event,
    GameEnded,
    GameMoved,
    JobAccepted,
    JobCommitted,
    JobOpened,
    JobPaid,
    JobRefunded,
    JobReleased,
    JobVoided,
)
from verifier.commit import Request
from verifier.tolerance import Profile
from verifier.weights import Weights, identify
from worker import ring_pb2 as pb
from worker.admission import check_join, own_stage
from worker.channel import Peer, Ring
from worker.config import WorkerConfig, split_address
from worker.demand import Answerer
from worker.engagement import Engagement
from worker.errors import BadMessage, ConfigError, Refused, UnknownJob
from worker.job import JobFolder
from worker.notary import Notary
from worker.peers import Links, Peers
from worker.recorder import Recorder
from worker.repeat import RepeatableStage
from worker.respond import Responder
from worker.retain import Traces
from worker.settle import Settler, stage_name
from worker.stage import Stage as ModelStage

log = logging.getLogger("plumb.worker.agent")


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
        self.compute = ThreadPoolExecutor(1, "compute")
        self._key = key
        self._max_message_bytes = config.serving.max_message_bytes
        self._engagements: dict[bytes, Engagement] = {}
        self._pipelines: dict[bytes, tuple[Stage, ...]] = {}
        self._next_block = config.chain.start_block
        self._event_lock = asyncio.Lock()

    def folder(self, job: bytes) -> JobFolder:
        return JobFolder(self.config.data, job)

    def now(self) -> int:
        """Unix seconds: the chain's, or this machine's if no block has come for a while. Blocking."""
        return max(self.chain.block_timestamp(), int(time.time()))

    # ------------------------------------------------------------------------------------------------------------ life

    async def run(self) -> None:
        from worker.server import (
            create_app,
        )  # the server knows the agent's class, so the agent can't import it at the top

        self.peers = Peers(self.chain, self.config.peer_hosts, self.config.serving.max_body_bytes)
        self.links = Links(self.certificate, self._key, self._max_message_bytes)
        self.ring = Ring(self.certificate, self._key, self._receive, self._max_message_bytes)
        await self.ring.start(self.config.grpc)
        host, port = split_address(self.config.http, "http")
        settings = uvicorn.Config(create_app(self), host=host, port=port, log_level="warning", access_log=False)
        self.server = uvicorn.Server(settings)
        watch = asyncio.create_task(self._watch())
        log.info(
            "worker %s, layers %d .. %d, model 0x%s",
            self.account,
            self.stage.first_layer,
            self.stage.end_layer,
            self.model_id.hex(),
        )
        try:
            await self.server.serve()
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            await self.responder.stop()
            await self.answerer.stop()
            for engagement in self._engagements.values():
                await engagement.stop()
            await self.links.close()
            await self.ring.stop()
            await self.peers.close()
            self.compute.shutdown(wait=False, cancel_futures=True)

    async def _watch(self) -> None:
        while True:
            try:
                await self.follow()
                now = await asyncio.to_thread(self.now)
                for engagement in list(self._engagements.values()):
                    if not engagement.closed:
                        engagement.advance(now)
                self.responder.tick(now)
                self.answerer.tick(now)
            except ContractsError as error:
                log.warning("chain: %s", error)
            except Exception:  # the loop must outlive a fault in one job; the trace in the log says which
                log.exception("watch")
            await asyncio.sleep(self.config.chain.poll_seconds)

    async def follow(self) -> None:
        """Takes in the chain's events up to the head."""
        async with self._event_lock:
            last = await asyncio.to_thread(self.chain.block_number)
            if last < self._next_block:
                return
            events = await asyncio.to_thread(lambda: list(self.chain.events(self._next_block, last)))
            for event in events:
                await self._event(event)
            self._next_block = last + 1

    async def _event(self, event: Event) -> None:
        match event:
            case JobOpened(id=id, job=job):
                await self._opened(id, job)
            case GameMoved() | GameEnded():
                self.responder.feed(event)
            case DemandOpened():
                self.answerer.opened(event)
            case DemandAnswered() | DemandLapsed():
                self.answerer.closed(event)
            case JobAccepted() | JobCommitted() | JobPaid() | JobVoided() | JobRefunded() | JobReleased():
                engagement = self._engagements.get(event.id)
                if engagement is None:
                    return
                engagement.status = {
                    JobAccepted: Status.ACCEPTED,
                    JobCommitted: Status.COMMITTED,
                    JobPaid: Status.PAID,
                    JobVoided: Status.VOID,
                    JobRefunded: Status.REFUNDED,
                    JobReleased: Status.REFUNDED,  # as far as this worker is concerned: nothing is left to do
                }[type(event)]
                if isinstance(event, JobCommitted):
                    engagement.window_end = event.window_end

    async def _opened(self, id: bytes, job: Job) -> None:
        if job.pipeline not in self._pipelines:
            self._pipelines[job.pipeline] = await asyncio.to_thread(self.chain.workers.pipeline_stages, job.pipeline)
        stages = self._pipelines[job.pipeline]
        if not any(stage.worker.lower() == self.account.lower() for stage in stages):
            return
        try:
            index = own_stage(stages, self.account, self.config.first_layer, self.config.end_layer)
        except Refused as error:
            log.warning("job %s is not for us: %s", id.hex()[:8], error)
            return
        self._engagements[id] = Engagement(self, id, job, stages, index)
        log.info("job %s opened on our pipeline, we are stage %d of %d", id.hex()[:8], index, len(stages))

    # ------------------------------------------------------------------------------------------------- asked by others

    async def engagement(self, job: bytes) -> Engagement:
        """Raises UnknownJob."""
        if job not in self._engagements:
            await self.follow()  # somebody was faster than our next look at the chain
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

    async def claim(self, job: bytes) -> Claim:
        return await (await self.engagement(job)).claim()

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
            raise BadMessage(peer.name, str(error)) from error
        before = (engagement.index - 1) % len(engagement.stages)
        expected = engagement.stages[before]
        if peer.account != expected.worker:
            raise BadMessage(
                peer.name,
                f"sent a message of job {engagement.name}, whose {stage_name(before, expected)} is our predecessor",
            )
        await engagement.receive(peer, envelope)


def build_worker(
    config: WorkerConfig,
    *,
    stage_class: type[ModelStage] = ModelStage,
    responder_class: type[Responder] = Responder,
    settler_class: type[Settler] = Settler,
    recorder_class: type[Recorder] = Recorder,
) -> Agent:
    """Everything of one process, from its configuration. Raises ConfigError, ModelFolderError, KeystoreError."""
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
        widened=config.serving.widened,
    )
    return Agent(config, chain, signer, stage, profile, responder_class, settler_class, recorder_class)
