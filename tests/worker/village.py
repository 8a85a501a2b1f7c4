"""A local chain with a deployment, and workers of one pipeline as agents in this process."""

import asyncio
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from eth_account.signers.local import LocalAccount

from contracts.client import Addresses, Chain, Job, Status, Worker
from contracts.wire import request_json
from deploy.deployment import deploy
from deploy.devnet import Devnet
from deploy.keys import dev_account, write_keystore
from verifier.commit import Request, requests_root
from verifier.tolerance import Profile, uniform_profile
from verifier.weights import Weights, identify
from worker import tls
from worker.agent import Agent, build_worker
from worker.config import ChainConfig, Contracts, Policy, Serving, WorkerConfig
from worker.pipeline import propose

WINDOW_SECONDS = 600
CLOCK_SECONDS = 300
STAKE = 10**24


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@dataclass
class Village:
    """`requester` and `challenger` are accounts with tokens; the workers are accounts 1, 2 ..."""

    devnet: Devnet
    folder: Path
    model_folder: Path
    parts: int = 2
    build: Callable[[int, WorkerConfig], Agent] = lambda index, config: build_worker(config)
    profile: Profile | None = None  # None: a wide one, the same everywhere
    agents: list[Agent] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    configs: list[WorkerConfig] = field(default_factory=list)
    pipeline: bytes = b""
    model_id: bytes = b""
    nonce: int = 0

    def settle_in(self) -> None:
        """Contracts, money, registered and staked workers. Blocking."""
        self.addresses: Addresses = deploy(self.devnet.url, dev_account(0), withdrawal_seconds=1)
        weights = Weights.open(self.model_folder)
        profile = self.profile or uniform_profile(weights.shape, 1, 4, 1 << 20, 1 << 30)
        profile.save(self.model_folder)
        self.requester = self.chain(dev_account(10))
        self.challenger = self.chain(dev_account(11))
        for chain in (self.requester, self.challenger):
            chain.token.mint(chain.account, STAKE)
            chain.token.approve(self.addresses.escrow, STAKE)
            chain.token.approve(self.addresses.disputes, STAKE)
            chain.token.approve(self.addresses.demands, STAKE)
        self.model_id = self.requester.models.register(identify(weights, profile))
        layers = weights.shape.layers
        bounds = [round(i * layers / self.parts) for i in range(self.parts + 1)]
        for index in range(self.parts):
            self.configs.append(self._enrol(index, bounds[index], bounds[index + 1]))

    def chain(self, account: LocalAccount) -> Chain:
        return Chain(self.devnet.url, self.addresses, account)

    def _enrol(self, index: int, first: int, end: int) -> WorkerConfig:
        account = dev_account(1 + index)
        home = self.folder / f"worker{index}"
        keys = write_keystore(account, home, "key")
        fingerprint = tls.create(home / "tls.pem", home / "tls.key")
        http = free_address()
        chain = self.chain(account)
        chain.token.mint(account.address, STAKE)
        chain.token.approve(self.addresses.workers, STAKE)
        chain.workers.register(Worker(account.address, fingerprint, f"http://{http}"))
        chain.workers.stake(STAKE)
        return WorkerConfig(
            model=self.model_folder,
            data=home / "data",
            first_layer=first,
            end_layer=end,
            keystore=keys.path,
            password_file=keys.password,
            tls_certificate=home / "tls.pem",
            tls_key=home / "tls.key",
            http=http,
            url=f"http://{http}",
            grpc=free_address(),
            chain=ChainConfig(self.devnet.url, Contracts(**vars(self.addresses)), poll_seconds=0.1),
            policy=Policy(min_token_price=1),
            serving=Serving(max_rows=16, claim_seconds=2.0, stall_seconds=20.0, threads=1),
        )

    async def wake(self) -> None:
        """Starts the agents and their pipeline, once."""
        for index, config in enumerate(self.configs):
            agent = await asyncio.to_thread(self.build, index, config)
            self.agents.append(agent)
            self.tasks.append(asyncio.create_task(agent.run()))
        for config in self.configs:
            await self.answers(config)
        if not self.pipeline:
            self.pipeline = await self.join(self.parts)

    async def answers(self, config: WorkerConfig) -> None:
        async with httpx.AsyncClient(trust_env=False) as client:
            for _ in range(100):
                try:
                    if (await client.get(f"{config.url}/info")).status_code == 200:
                        return
                except httpx.HTTPError:
                    pass
                await asyncio.sleep(0.1)
        raise AssertionError(f"{config.url} does not answer")

    async def join(self, parts: int) -> bytes:
        """A pipeline of the first `parts` workers."""
        members = [dev_account(1 + i).address for i in range(parts)]
        return await asyncio.to_thread(propose, self.requester, members, (), 7)

    async def sleep(self) -> None:
        """Stops the agents as SIGTERM would."""
        for agent in self.agents:
            agent.server.should_exit = True
        await asyncio.gather(*self.tasks)
        self.agents.clear()
        self.tasks.clear()

    def job(self, requests: Sequence[Request], **changes: Any) -> Job:
        self.nonce += 1
        prompts, limits = sum(len(r.prompt) for r in requests), sum(r.limit for r in requests)
        now = max(self.requester.block_timestamp(), int(time.time()))
        job = Job(
            model=self.model_id,
            pipeline=self.pipeline,
            requests_root=requests_root(requests),
            requests=len(requests),
            prompt_tokens=prompts,
            max_tokens=limits,
            prompt_price=1000,
            token_price=2000,
            lock=0,
            gas_rate=1,
            accept_by=now + 300,
            commit_by=now + 600,
            window=WINDOW_SECONDS,
            clock=CLOCK_SECONDS,
            grace=60,
            nonce=self.nonce,
        )
        return replace(job, **{"lock": self.requester.escrow.least_lock(job), **changes})

    async def open(self, requests: Sequence[Request], **changes: Any) -> bytes:
        """Opens a job and sends its prompts to stage 0."""
        id = await asyncio.to_thread(lambda: self.requester.escrow.open(self.job(requests, **changes)))
        answer = await self.send(id, requests)
        assert answer.status_code == 200, answer.text
        return id

    async def send(self, id: bytes, requests: Sequence[Request]) -> httpx.Response:
        async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
            body = {"requests": [request_json(request) for request in requests]}
            return await client.put(f"{self.configs[0].url}/jobs/{id.hex()}", json=body)

    async def get(self, stage: int, path: str) -> httpx.Response:
        async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
            return await client.get(f"{self.configs[stage].url}{path}")

    async def reaches(self, id: bytes, status: Status, seconds: float = 300.0) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            actual = await asyncio.to_thread(self.requester.escrow.status, id)
            if actual is status:
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"expected {status.name} within {seconds} s, it is {Status(actual).name}")
