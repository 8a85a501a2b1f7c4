"""`plumb demo`: the whole protocol on this machine, honest and dishonest."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from deploy.demo.run import STAGES, Demo, Result, make_requests, report, write_report
from deploy.demo.scenarios import select
from deploy.demo.village import DemoError, Village
from deploy.devnet import DevnetError
from verifier.shape import UnsupportedModel
from verifier.tolerance import InvalidProfile
from verifier.weights import ModelFolderError, Weights

app = typer.Typer(invoke_without_command=True)
console = Console()

DEFAULT_MODEL = Path(".plumb/models/demo")


@app.callback()
def demo(
    report_file: Annotated[Path | None, typer.Option("--report", help="Write the result as JSON here.")] = None,
    only: Annotated[str | None, typer.Option(help="Run one scenario, a to h.")] = None,
    stage: Annotated[int | None, typer.Option(help="Where the dishonest worker stands, from 0.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="Any supported model folder; default: a small one, trained here.")
    ] = None,
    home: Annotated[Path | None, typer.Option(help="Keep logs, keys and traces here.")] = None,
) -> None:
    """Run an honest batch and seven frauds on a local chain; print who was paid and who was slashed."""
    try:
        scenarios = select(only, stage, STAGES)
        folder = prepare_model(model)
        shape = Weights.open(folder).shape
        started = time.monotonic()
        with (
            tempfile.TemporaryDirectory(prefix="plumb-demo-") as scratch,
            Village(folder, home or Path(scratch)) as village,
        ):
            requests = make_requests(folder, shape.vocabulary)
            results = Demo(village, requests, lambda line: console.print(line, highlight=False)).play(scenarios)
    except (DemoError, DevnetError, ModelFolderError, UnsupportedModel, InvalidProfile, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    show(results)
    elsewhere = [result.scenario.name for result in results if not result.as_expected]
    console.print(
        f"{len(results) - len(elsewhere)} of {len(results)} as expected, in {time.monotonic() - started:.0f} s"
    )
    if elsewhere:
        console.print(
            f"not as expected: {', '.join(elsewhere)}. Where the watchtower cannot audit within a job's window, on a "
            "machine too busy, a fraud is paid: --home FOLDER keeps its log, --only runs one alone"
        )
    if report_file is not None:
        write_report(report_file, results)
        console.print(f"report: {report_file}")
    if not all(result.as_expected for result in results):
        raise typer.Exit(1)


def prepare_model(given: Path | None) -> Path:
    """The folder to run on, trained and calibrated if need be. A given folder is calibrated, never trained.

    Raises ModelFolderError, UnsupportedModel, UnseparableModel.
    """
    from deploy import model as tools

    folder = given or DEFAULT_MODEL
    if given is None and not (folder / "model.safetensors").exists():
        console.print(f"training the demo model in {folder}, one to two minutes of an idle machine")
        tools.make_demo(folder)
    Weights.open(folder)  # a folder that is none is refused here, as the caller expects it
    if not (folder / "tolerance.json").exists():
        console.print(f"calibrating {folder}")
        tools.measure(folder)
    return folder


def show(results: list[Result]) -> None:
    """The table at the end."""
    table = Table("", "scenario", "expected", "actual", "stage", "segment", "distance / tolerance", "s")
    for result in results:
        segment = result.row()["segment"]
        where = f"{segment['kind']} layer {segment['layer']} position {segment['position']}" if segment else ""
        verdict = "[green]" if result.as_expected else "[red]"
        table.add_row(
            result.scenario.name,
            result.scenario.title,
            str(result.scenario.expected),
            f"{verdict}{result.outcome.ending}",
            "" if result.outcome.stage is None else str(result.outcome.stage),
            where,
            _margin(result),
            f"{result.seconds:.0f}",
        )
    console.print(table)
    money = Table("", "party", "before", "after", "change")
    for result in results:
        for party, balance in result.balances.items():
            change = int(balance["after"]) - int(balance["before"])
            money.add_row(result.scenario.name, party, balance["before"], balance["after"], f"{change:+d}")
    console.print(money)
    margins = report(results)["margins"]
    console.print(
        f"margins (distance / tolerance): worst honest {margins['worst_honest']}, "
        f"smallest convicting {margins['smallest_convicting']}"
    )


def _margin(result: Result) -> str:
    if result.margin is not None:
        return "exact" if result.margin == float("inf") else f"{result.margin:.2f}"
    if result.worst:
        return "honest " + ", ".join(f"{kind} {ratio:.2f}" for kind, ratio in result.worst.items() if ratio)
    return ""
