"""`plumb worker`: keys, registration, and the process itself."""

import asyncio
import getpass
import logging
import secrets
from pathlib import Path
from typing import Annotated

import typer
from eth_account import Account
from eth_utils.address import to_checksum_address

from contracts.client import Addresses, Chain, ContractsError, Worker, load_account, save_account
from verifier.weights import ModelFolderError
from worker import config as configuration
from worker import tls
from worker.errors import WorkerError

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
    key = load_account(settings.keystore, settings.password_file)
    addresses = settings.chain.addresses
    chain = Chain(settings.chain.rpc, Addresses(**vars(addresses)), key)
    try:
        chain.workers.register(
            Worker(key.address, tls.fingerprint(settings.tls_certificate.read_bytes()), settings.url)
        )
        if stake:
            chain.token.approve(addresses.workers, stake)
            chain.workers.stake(stake)
        free = chain.workers.free_stake(key.address)
    except ContractsError as error:
        raise _stop(error) from error
    typer.echo(f"registered {key.address} at {settings.url}, free stake {free}")


@app.command()
def propose(
    config: Config,
    workers: Annotated[list[str], typer.Argument(help="accounts of the members, first layers first")],
    share: Annotated[list[int] | None, typer.Option(help="pay of a member in 1/10000, once each; by layers")] = None,
) -> None:
    """Create a pipeline of running workers: each is asked for its signature. Prints the pipeline's id."""
    from worker.pipeline import propose as create

    settings = _load(config)
    try:
        key = load_account(settings.keystore, settings.password_file)
        chain = Chain(settings.chain.rpc, Addresses(**vars(settings.chain.addresses)), key)
        pipeline = create(chain, [to_checksum_address(worker) for worker in workers], share or ())
    except (WorkerError, ContractsError, ValueError) as error:
        raise _stop(error) from error
    typer.echo(f"0x{pipeline.hex()}")


@app.command()
def run(config: Config, verbose: Annotated[bool, typer.Option(help="log every step")] = False) -> None:
    """Serve until interrupted."""
    from worker.agent import build_worker  # torch and transformers take seconds to load

    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s"
    )
    try:
        agent = build_worker(_load(config))
    except (WorkerError, ContractsError, ModelFolderError, OSError) as error:
        raise _stop(error) from error
    asyncio.run(agent.run())


def _load(path: Path) -> configuration.WorkerConfig:
    try:
        return configuration.load(path)
    except WorkerError as error:
        raise _stop(error) from error


def _stop(error: Exception) -> typer.Exit:
    typer.echo(f"{type(error).__name__}: {error}", err=True)
    return typer.Exit(1)
