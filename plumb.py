"""The front door:

the `plumb` command. Each party keeps its own sub-commands; here they only meet, and are imported when they are called.
"""

import importlib
import json
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated, NoReturn

import typer

# command -> (module with a typer `app`, help). Nothing of it is imported to show `plumb --help`, and a party that is
# not installed breaks no other.
_PARTIES: dict[str, tuple[str, str]] = {
    "worker": ("worker.cli", "Stake, join pipelines and serve a stage."),
    "challenger": ("challenger.cli", "Watch jobs, re-execute them and dispute what is wrong."),
    "request": ("requester.cli", "Open jobs from batch files, fetch their results and receipts."),
    "model": ("deploy.model", "A model's id: compute, check, register, calibrate; make a demo model."),
    "demo": ("deploy.demo.cli", "The whole protocol on this machine, honest and dishonest."),
}

_DEV_PORT = 8545

app = typer.Typer(
    help="LLM inference served by a pipeline of staked workers, judged on chain by one exact integer step.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def devnet(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Loopback port of the JSON-RPC.")] = _DEV_PORT,
    block_time: Annotated[int, typer.Option(help="Seconds between blocks; 0: a block for each transaction.")] = 1,
    state: Annotated[Path | None, typer.Option(help="Keep the chain in this file across runs.")] = None,
    addresses: Annotated[
        Path | None,
        typer.Option(help="Deploy the contracts too, and write their addresses here; those that are there are kept."),
    ] = None,
) -> None:
    """Run a local chain with funded accounts until interrupted."""
    from contracts.client import ContractsError
    from deploy.deployment import deploy_once
    from deploy.devnet import Devnet, DevnetError
    from deploy.keys import DEV_PHRASE, dev_account

    stopped = threading.Event()
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, lambda *_: stopped.set())
    try:
        with Devnet(block_seconds=block_time or None, port=port, state=state) as chain:
            typer.echo(f'chain at {chain.url}, accounts of the phrase "{DEV_PHRASE}"')
            if addresses is not None:
                typer.echo("looking for the contracts; the first time they are compiled, a minute or two")
                new = deploy_once(chain.url, dev_account(0), addresses, withdrawal_seconds=60)
                typer.echo(f"contracts {'deployed' if new else 'already there'}, addresses in {addresses}")
            stopped.wait()
    except (DevnetError, ContractsError) as error:
        _refuse(str(error))
    typer.echo("stopped")


@app.command()
def deploy(
    rpc: Annotated[str, typer.Option(help="URL of the chain's JSON-RPC, http(s) or ws(s).")],
    keystore: Annotated[Path, typer.Option(help="V3 keystore of the deployer.")],
    password: Annotated[Path, typer.Option(help="File with its password.")],
    addresses: Annotated[Path, typer.Option(help="Where to write the contracts' addresses.")],
    token: Annotated[
        str | None, typer.Option(help="The plain ERC-20 to use; default: a worthless development token.")
    ] = None,
    withdrawal_seconds: Annotated[int, typer.Option(help="Delay of stake withdrawals.")] = 86_400,
) -> None:
    """Deploy the contracts. Nobody owns them afterwards."""
    from contracts.client import ContractsError, load_account
    from deploy.deployment import deploy as deploy_contracts

    try:
        found = deploy_contracts(rpc, load_account(keystore, password), withdrawal_seconds, token)
    except ContractsError as error:
        _refuse(str(error))
    found.save(addresses)
    typer.echo(addresses.read_text(encoding="utf-8"), nl=False)


@app.command()
def plan(
    measured: Annotated[Path, typer.Argument(help="TOML of measured devices and links: docs/operating.md.")],
    margin: Annotated[float, typer.Option(min=1, help="Microbatches over those that just fill the ring.")] = 1.25,
) -> None:
    """Assign a model's layers to measured devices: the slowest stage as fast as their memory allows."""
    from worker import planner
    from worker.errors import WorkerError

    try:
        typer.echo(planner.text(planner.plan(planner.load(measured), margin)))
    except WorkerError as error:
        _refuse(str(error))


@app.command()
def profit(
    measured: Annotated[Path | None, typer.Argument(help="As for `plumb plan`: its speed and devices.")] = None,
    tokens_per_second: Annotated[
        float | None, typer.Option(help="Of the whole ring, where nothing was measured; none: the bar alone.")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="In the ring, where nothing was measured.")] = 8,
    price: Annotated[float, typer.Option(help="Dollars a million tokens.")] = 0.30,
    elsewhere: Annotated[float, typer.Option(help="Dollars a device earns in a day elsewhere, power paid.")] = 0.82,
    power: Annotated[float, typer.Option(help="Dollars a day of power for a device that serves.")] = 0.0,
) -> None:
    """Compare what a ring earns with what its devices earn elsewhere."""
    from worker import planner
    from worker import profit as earnings
    from worker.errors import WorkerError

    try:
        if measured is not None:
            found = planner.plan(planner.load(measured))
            tokens_per_second, devices = found.tokens_per_second, len(found.shares)
        typer.echo(earnings.text(tokens_per_second, devices, earnings.Prices(price, elsewhere, power)))
    except WorkerError as error:
        _refuse(str(error))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="The benchmark; none: list them.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write the result as JSON here.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="key=value, handed to the benchmark; may be repeated.")
    ] = None,
) -> None:
    """Run one benchmark and show what it measured. `--key value` is short for `--option key=value`.

    Fails where what must never happen happened ("failed" in the report).
    """
    import bench as benchmarks

    if name is None:
        for known, first_line in benchmarks.names().items():
            typer.echo(f"{known:24} {first_line}")
        return
    try:
        result = benchmarks.run(name, benchmarks.parse_options((option or []) + benchmarks.pairs(context.args)))
    except benchmarks.BenchError as error:
        _refuse(str(error))
    benchmarks.show(name, result)
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        typer.echo(f"report: {report}")
    if result.get("failed"):
        _refuse(f"bench {name}: {result['failed']} failed, see `failures`")


def compose(called: str | None) -> typer.Typer:
    """The whole command, with the called party's own sub-commands and a mere name for each of the others."""
    whole = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    whole.info = app.info
    whole.registered_commands = app.registered_commands
    for name, (module, text) in _PARTIES.items():
        party = _load(name, module) if name == called else typer.Typer()
        whole.add_typer(party, name=name, help=text)
    return whole


def main() -> None:
    called = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), None)
    compose(called)()


def _load(name: str, module: str) -> typer.Typer:
    try:
        party = importlib.import_module(module).app
    except ModuleNotFoundError as error:
        _refuse(f"`plumb {name}` is not installed here: {error}")
    if not isinstance(party, typer.Typer):
        _refuse(f"`plumb {name}`: expected {module}.app to be a typer.Typer, got {type(party).__name__}")
    return party


def _refuse(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
