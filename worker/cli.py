"""`plumb worker`: keys, registration, and the process itself."""

import asyncio
import getpass
import logging
import secrets
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from eth_account import Account
from eth_utils.address import is_address, to_checksum_address

from contracts.client import Addresses, Chain, ContractsError, Worker, load_account, save_account
from verifier.tolerance import InvalidProfile
from verifier.weights import ModelFolderError
from worker import config as configuration
from worker import tls
from worker.errors import ConfigError, Refused, WorkerError

app = typer.Typer(help="Serve one stage of a pipeline.", no_args_is_help=True)

Config = Annotated[Path, typer.Option("--config", help="the stage's TOML file")]


@app.command()
def keys(config: Config) -> None:
    """Create the keystore, its password file and the TLS certificate that the configuration names, where they are
    missing.
    """
    settings = _load(config)
    if not settings.password_file.exists():
        settings.password_file.parent.mkdir(parents=True, exist_ok=True)
        settings.password_file.touch(mode=0o600)
        settings.password_file.write_text(secrets.token_hex(16) + "\n")
    if not settings.keystore.exists():
        password = settings.password_file.read_text().split("\n", 1)[0] or getpass.getpass("password: ")
        save_account(Account.create(), settings.keystore, password)
    if not settings.tls_certificate.exists():
        tls.create(settings.tls_certificate, settings.tls_key)
    account = load_account(settings.keystore, settings.password_file)
    typer.echo(f"account {account.address}")
    typer.echo(f"certificate {tls.fingerprint(settings.tls_certificate.read_bytes()).hex()}")


@app.command()
def register(
    config: Config, stake: Annotated[int, typer.Option(help="base units of the token to stake besides")] = 0
) -> None:
    """Write URL, signing key and certificate fingerprint to the chain, and stake."""
    settings = _load(config)
    try:
        chain = _open(settings)
        fingerprint = tls.fingerprint(settings.tls_certificate.read_bytes())
        chain.workers.register(Worker(chain.account, fingerprint, settings.url))
        if stake:
            chain.token.approve(chain.workers.address, stake)
            chain.workers.stake(stake)
        free = chain.workers.free_stake(chain.account)
    except (ContractsError, OSError, ValueError) as error:
        raise _stop(error) from error
    typer.echo(f"registered {chain.account} at {settings.url}, free stake {free}")


@app.command()
def unstake(
    config: Config,
    amount: Annotated[int, typer.Argument(min=0, help="base units that shall leave in all; 0: none after all")],
) -> None:
    """Ask for free stake back. It backs no job any more, and `withdraw` draws it after the contract's delay.

    Asking again replaces what was asked for before, and the delay begins anew.
    """
    settings = _load(config)
    try:
        chain = _open_staked(settings)
        chain.workers.request_withdrawal(amount)
        leaving, available_at = chain.workers.withdrawal_of(chain.account)
        free = chain.workers.free_stake(chain.account)
    except (WorkerError, ContractsError) as error:
        raise _stop(error) from error
    until = f", to be withdrawn from {_date(available_at)} on" if leaving else ""
    typer.echo(f"leaving {leaving}{until}, free stake {free}")


@app.command()
def withdraw(config: Config) -> None:
    """Draw the stake that `unstake` asked for, once the contract's delay is over."""
    settings = _load(config)
    try:
        chain = _open_staked(settings)
        leaving, available_at = chain.workers.withdrawal_of(chain.account)
        if not leaving:
            raise Refused("no stake is leaving: `plumb worker unstake AMOUNT` asks for it")
        now = chain.block_timestamp()
        if now < available_at:
            raise Refused(f"{leaving} may be withdrawn from {_date(available_at)} on, it is {_date(now)}")
        chain.workers.withdraw()
    except (WorkerError, ContractsError) as error:
        raise _stop(error) from error
    typer.echo(f"withdrew {leaving} to {chain.account}")


@app.command()
def propose(
    config: Config,
    workers: Annotated[list[str], typer.Argument(help="accounts of the members, first layers first")],
    share: Annotated[list[int] | None, typer.Option(help="pay of a member in 1/10000, once each; by layers")] = None,
) -> None:
    """Create a pipeline of running workers: each is asked for its signature. Prints the pipeline's id."""
    from worker.pipeline import propose as create

    for worker in workers:
        if not is_address(worker):
            raise _stop(ConfigError(f"workers: expected accounts of 20 bytes in hex, got {worker[:80]!r}"))
    settings = _load(config)
    try:
        pipeline = create(_open(settings), [to_checksum_address(worker) for worker in workers], share or ())
    except (WorkerError, ContractsError, ValueError) as error:
        raise _stop(error) from error
    typer.echo(f"0x{pipeline.hex()}")


@app.command()
def run(
    config: Config,
    verbose: Annotated[bool, typer.Option(help="log every step")] = False,
    retain: Annotated[str, typer.Option(help="traces: store or regenerate; left out: the file's")] = "",
) -> None:
    """Serve until interrupted."""
    from worker.agent import build_worker  # torch and transformers take seconds to load

    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s"
    )
    try:
        settings = _load(config)
        if retain:
            settings = replace(settings, serving=replace(settings.serving, retain=retain))
        agent = build_worker(settings)
    except (WorkerError, ContractsError, ModelFolderError, InvalidProfile, OSError) as error:
        raise _stop(error) from error
    try:
        asyncio.run(agent.run())
    except WorkerError as error:
        raise _stop(error) from error


def _open(settings: configuration.WorkerConfig) -> Chain:
    key = load_account(settings.keystore, settings.password_file)
    return Chain(settings.chain.rpc, Addresses(**vars(settings.chain.addresses)), key)


def _open_staked(settings: configuration.WorkerConfig) -> Chain:
    """With the staked account's own key: to no other is stake given back. Raises Refused."""
    chain = _open(settings)
    staked = settings.account or chain.account
    if staked.lower() != chain.account.lower():
        raise Refused(f"expected the keystore of the staked account {staked}, got that of its signer {chain.account}")
    return chain


def _date(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _load(path: Path) -> configuration.WorkerConfig:
    try:
        return configuration.load(path)
    except WorkerError as error:
        raise _stop(error) from error


def _stop(error: Exception) -> typer.Exit:
    typer.echo(f"error: {error}", err=True)
    return typer.Exit(1)
