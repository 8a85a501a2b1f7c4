"""`plumb challenger run | audit`."""

from __future__ import annotations

import json
import secrets
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

import challenger.patience  # noqa: F401
from challenger.config import Config, ConfigError, load_config
from challenger.database import StoreError
from challenger.logs import set_up
from challenger.strategy import parse_strategy
from contracts.client import Addresses, Chain, ContractsError, load_account
from verifier.shape import UnsupportedModel
from verifier.tolerance import InvalidProfile
from verifier.weights import ModelFolderError

app = typer.Typer(help="Watch pipelines: audit committed jobs and convict what is wrong.", no_args_is_help=True)

AUDIT_SECONDS = 3600.0  # of download
PATIENCE_SECONDS = 10.0  # with a node that does not answer, before the loop looks around again
RECEIPT_SECONDS = 60.0  # clocks of other games run while one waits for a block

ConfigFile = Annotated[Path, typer.Option("--config", help="TOML file; see docs/operating.md.")]
RayAddress = Annotated[str, typer.Option("--ray", help="Spread audits over this Ray cluster; 'local' starts one here.")]
REFUSALS = (ConfigError, ContractsError, ModelFolderError, UnsupportedModel, InvalidProfile, StoreError, OSError)


def _fail(reason: object) -> typer.Exit:
    typer.echo(f"error: {reason}", err=True)
    return typer.Exit(1)


def open_chain(config: Config) -> Chain:
    account = load_account(config.keystore, config.password)
    chain = Chain(config.rpc_urls, Addresses.load(config.addresses), account, PATIENCE_SECONDS, RECEIPT_SECONDS)
    chain.check_addresses()
    return chain


@app.command()
def run(config: ConfigFile, ray: RayAddress = "") -> None:
    """Watch the chain until stopped."""
    from challenger.agent import Agent  # Rationale: torch, only where it is needed

    try:
        settings = load_config(config)
        settings = replace(settings, ray=ray or settings.ray)
        set_up(settings.log_format)
        agent = Agent.build(settings, open_chain(settings))
        if settings.metrics_port:
            try:
                agent.metrics.serve(settings.metrics_host, settings.metrics_port)
            except OSError as error:
                raise ConfigError(
                    f"metrics_port: {settings.metrics_port} of {settings.metrics_host}: {error}"
                ) from error
    except REFUSALS as error:
        raise _fail(error) from error
    typer.echo(f"watching {', '.join(settings.rpc_urls)} as {agent.chain.account}")
    agent.run()


@app.command()
def audit(
    job: str,
    config: ConfigFile,
    strategy: Annotated[
        str, typer.Option(help="full, sweep:N, cells:N, tokens, auto; default: the configuration's.")
    ] = "",
    ray: RayAddress = "",
) -> None:
    """Audit one committed job now, put nothing at stake, and print the receipt.

    Exit status 0: nothing is wrong; 3: something is; 1: it cannot be said, for instance because a stage withholds its
    trace.
    """
    from challenger.evidence import Archive, Unavailable, read_facts
    from challenger.fetch import Ask, Fetcher
    from challenger.fleet import Fleet
    from challenger.judge import Judge
    from challenger.look import Look

    try:
        settings = load_config(config)
        chain = open_chain(settings)
        id = _job_id(job)
        if not any(chain.escrow.job(id).model):
            raise ConfigError(f"no job 0x{id.hex()} on this chain")
        judges = {judge.id: judge for judge in map(Judge, settings.models)}
        model = chain.escrow.job(id).model
        judge = judges.get(model)
        if judge is None:
            ours = ", ".join(f"0x{judge.id.hex()} in {judge.folder}" for judge in judges.values())
            raise ConfigError(f"expected the job's model, 0x{model.hex()}; this watchtower has {ours}")
        with tempfile.TemporaryDirectory(prefix="plumb-audit-") as folder:
            fetcher = Fetcher(Archive(Path(folder)), settings.max_stage_bytes)
            plan, seed = parse_strategy(strategy or settings.strategy), secrets.token_bytes(16)
            ask = Ask(plan, settings.audit_seconds, seed)
            facts, shape = read_facts(chain, id), judge.weights.shape
            work = Fleet(judge, ray or settings.ray).work if ray or settings.ray else None
            evidence, findings = Look().go_on(
                lambda closer, seconds: fetcher.fetch(facts, shape, seconds, replace(ask, closer=closer)),
                lambda evidence: judge.audit(evidence, work),
                AUDIT_SECONDS,
                final=True,
            )
            assert findings is not None
    except (*REFUSALS, Unavailable, ValueError) as error:
        raise _fail(error) from error
    typer.echo(json.dumps({"job": id.hex(), **findings.receipt(), "missing": list(evidence.missing)}, indent=2))
    raise typer.Exit(3 if findings.wrong else 1 if evidence.missing else 0)


@app.command()
def status(config: ConfigFile) -> None:
    """Show what this watchtower has audited and how its games stand."""
    from challenger.store import GameState, JobState, Store

    try:
        settings = load_config(config)
        store = Store(settings.database_url)
        jobs = store.jobs(*JobState)
        games = store.games(*GameState)
    except REFUSALS as error:
        raise _fail(error) from error
    for job in jobs:
        typer.echo(f"job 0x{job.id} {job.state} {json.dumps(job.receipt)}")
    for game in games:
        typer.echo(f"game 0x{game.id} {game.state} {json.dumps(game.segment)} {game.note}".rstrip())


def _job_id(text: str) -> bytes:
    try:
        id = bytes.fromhex(text.removeprefix("0x"))
    except ValueError:
        id = b""
    if len(id) != 32:
        raise ConfigError(f"expected a job id of 32 bytes in hex, got {text!r}")
    return id
