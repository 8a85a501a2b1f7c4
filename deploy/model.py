"""`plumb model id | check | calibrate | register | demo`: everything one does with a model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from contracts.client import Addresses, Chain, ContractsError, load_account, model_id
from verifier.calibration import MARGIN, UnseparableModel
from verifier.shape import UnsupportedModel
from verifier.tolerance import InvalidProfile, Profile
from verifier.weights import ModelFolderError, Weights, identify, tokenizer_hash

app = typer.Typer(help="Check, calibrate, identify and register a model's folder.", no_args_is_help=True)
console = Console()

REFUSALS = (ModelFolderError, UnsupportedModel, InvalidProfile, UnseparableModel, ContractsError, OSError)
Folder = Annotated[Path, typer.Argument(help="A Hugging Face model folder with safetensors weights.")]


def _fail(reason: object) -> typer.Exit:
    typer.echo(f"error: {reason}", err=True)
    return typer.Exit(1)


@app.command()
def check(folder: Folder) -> None:
    """Say whether the law covers this model: architecture, shapes, every weight."""
    try:
        weights = Weights.open(folder)
        weights.check()
    except REFUSALS as error:
        raise _fail(error) from error
    shape = weights.shape
    console.print(f"{folder}: {shape.layers} layers, hidden {shape.hidden}, {weights.leaves} weight leaves, usable")


@app.command()
def calibrate(
    folder: Folder,
    margin: Annotated[
        float, typer.Option(help="Least threshold over the worst honest distance, 1.25 to 1.4.")
    ] = MARGIN,
    settings: Annotated[
        str, typer.Option(help="Which honest ways to serve: full, or quick (a quarter of them).")
    ] = "full",
) -> None:
    """Serve the model honestly in many settings and write its tolerance profile beside it."""
    if not 1.25 <= margin <= 1.4:
        raise _fail(f"expected a margin of 1.25 to 1.4, got {margin}")
    if settings not in ("full", "quick"):
        raise _fail(f"expected settings full or quick, got {settings}")
    from deploy.serving import ServingFailed

    try:
        measure(folder, margin, settings)
    except (*REFUSALS, ServingFailed) as error:
        raise _fail(error) from error


def measure(folder: Path, margin: float = MARGIN, settings: str = "quick") -> None:
    """Writes tolerance.json and calibration.json and tells what was measured. settings: full or quick.

    Raises ModelFolderError, UnsupportedModel, UnseparableModel, ServingFailed.
    """
    from deploy.calibrate import calibrate as serve_and_measure

    found = serve_and_measure(folder, margin, settings=settings, progress=lambda name: console.print(f"  {name}"))
    path = found.save(folder)
    table = Table("tensor", "pieces", "median", "99.9 %", "worst", "margin", "tolerances")
    table.caption = "median, 99.9 % and worst in usual honest distances of each head or block"
    for kind, row in found.calibration.report(margin).items():
        numbers = (row.quantiles[0.5], row.quantiles[0.999], row.quantiles[1.0], row.margin)
        least, largest = (end(row.thresholds) * usual for end, usual in zip((min, max), row.usual, strict=True))
        told = (*(f"{number:.2f}" for number in numbers), f"{least:.5f} to {largest:.5f}")
        table.add_row(kind.name.lower(), str(row.pieces), *told)
    console.print(table)
    if found.absent:
        console.print(f"not covered, for this machine can't run it: {', '.join(s.name for s in found.absent)}")
    console.print(f"token margin {found.profile.margin / 2**30:.5f}; wrote {path}", soft_wrap=True)


@app.command()
def id(folder: Folder) -> None:
    """Print the model's id, recomputed from the folder: weights, program, profile, dimensions."""
    try:
        weights = Weights.open(folder)
        model = identify(weights, Profile.load(folder, weights.shape))
        tokenizer = tokenizer_hash(folder)
    except REFUSALS as error:
        raise _fail(error) from error
    console.print(f"weights root  0x{model.weights_root.hex()} ({model.weights_leaves} leaves)")
    console.print(f"program root  0x{model.program_root.hex()} ({model.program_leaves} leaves)")
    console.print(f"profile root  0x{model.profile_root.hex()} ({model.profile_leaves} leaves)")
    console.print(f"tokenizer     0x{tokenizer.hex()} (SHA-256, not part of the id)")
    typer.echo(f"0x{model_id(model).hex()}")


@app.command()
def register(
    folder: Folder,
    rpc: Annotated[str, typer.Option("--rpc", envvar="PLUMB_RPC")],
    addresses: Annotated[Path, typer.Option("--addresses", envvar="PLUMB_ADDRESSES")],
    keystore: Annotated[Path, typer.Option("--keystore", envvar="PLUMB_KEYSTORE")],
    password: Annotated[Path, typer.Option("--password", envvar="PLUMB_PASSWORD")],
) -> None:
    """Register the model on chain. Anybody may; the id says what was hashed, not that it is good."""
    try:
        weights = Weights.open(folder)
        model = identify(weights, Profile.load(folder, weights.shape))
        chain = Chain(rpc, Addresses.load(addresses), load_account(keystore, password))
        chain.models.register(model)
    except REFUSALS as error:
        raise _fail(error) from error
    typer.echo(f"0x{model_id(model).hex()}")


@app.command()
def demo(folder: Folder, steps: Annotated[int, typer.Option(help="Training steps; 0: the demo's own.")] = 0) -> None:
    """Train the demo's small Llama from text that ships with Python, and calibrate it."""
    try:
        make_demo(folder, steps)
    except REFUSALS as error:
        raise _fail(error) from error


def make_demo(folder: Path, steps: int = 0) -> None:
    """steps: 0 for the recipe's own. Raises what `measure` raises."""
    from dataclasses import replace

    from deploy.demo.train import Recipe, train

    recipe = replace(Recipe(), steps=steps) if steps else Recipe()
    loss = train(folder, recipe, lambda step, mean: console.print(f"  step {step}/{recipe.steps}, loss {mean:.2f}"))
    console.print(f"{folder}: trained to {loss:.2f} nats a token")
    measure(folder)
