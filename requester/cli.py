"""`plumb request submit | resume | status | fetch | demand | collect`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from contracts.client import Addresses, Chain, ChainError, ContractsError, Status, load_account, model_id
from requester.batch import Batch, BatchError, read_batch
from requester.client import Requester, RequesterError, Terms, lawful, make_job, max_price
from requester.demand import OutputsDemander, posted_outputs, registered_model
from requester.jobs import Notebook, Remembered
from requester.receipt import make_receipt, story_of
from requester.results import error_line, result_line, visible, write_lines, write_whole
from verifier.commit import Output, requests_root
from verifier.program import shape_from_config
from verifier.shape import UnsupportedModel
from verifier.tolerance import InvalidProfile
from verifier.weights import ModelFolderError, tokenizer_hash

app = typer.Typer(help="Open jobs for batches of prompts and fetch their results.", no_args_is_help=True)

REFUSALS = (BatchError, RequesterError, ContractsError, UnsupportedModel, ModelFolderError, OSError, ValueError)
FINAL = (Status.PAID, Status.VOID, Status.REFUNDED)
FOLLOW_SECONDS = 2.0

JobId = Annotated[str, typer.Argument(help="The job's id, hex.")]
Rpc = Annotated[str, typer.Option("--rpc", envvar="PLUMB_RPC", help="The chain's JSON-RPC URL, http(s) or ws(s).")]
AddressFile = Annotated[
    Path, typer.Option("--addresses", envvar="PLUMB_ADDRESSES", help="JSON file of the deployment.")
]
Keystore = Annotated[Path, typer.Option("--keystore", envvar="PLUMB_KEYSTORE", help="Encrypted V3 keystore that pays.")]
Password = Annotated[
    Path, typer.Option("--password", envvar="PLUMB_PASSWORD", help="File with the keystore's password.")
]
Home = Annotated[Path, typer.Option("--home", envvar="PLUMB_HOME", help="Where jobs are remembered.")]
DEFAULT_HOME = Path("~/.plumb/jobs")


def _fail(reason: object) -> typer.Exit:
    typer.echo(f"error: {reason}", err=True)
    return typer.Exit(1)


def _say(text: str) -> None:
    """To standard error: standard output is for what a script reads."""
    typer.echo(text, err=True)


def _read(path: Path, model: Path) -> tuple[Batch, Any]:
    """A batch file and the tokenizer of the model's folder."""
    from transformers import AutoTokenizer  # Rationale: seconds, which `--help` need not wait for

    shape = shape_from_config(json.loads((model / "config.json").read_text(encoding="utf-8")))
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False, local_files_only=True)
    return read_batch(path, tokenizer, shape), tokenizer


@app.command()
def submit(
    batch: Annotated[Path, typer.Argument(help="JSON lines in OpenAI's batch format.")],
    model: Annotated[Path, typer.Option(help="Folder of the model: at least its tokenizer and config.json.")],
    pipeline: Annotated[str, typer.Option(help="Id of the pipeline, hex.")],
    rpc: Rpc,
    addresses: AddressFile,
    keystore: Keystore,
    password: Password,
    home: Home = DEFAULT_HOME,
    prompt_price: Annotated[int, typer.Option(min=0, help="Base units a prompt token.")] = Terms.prompt_price,
    token_price: Annotated[int, typer.Option(min=1, help="Base units an output token.")] = Terms.token_price,
    gas_rate: Annotated[int, typer.Option(min=0, help="Base units a unit of gas, in games.")] = Terms.gas_rate,
    accept_seconds: Annotated[int, typer.Option(min=1, help="For all stages to accept.")] = Terms.accept_seconds,
    serve_seconds: Annotated[int, typer.Option(min=1, help="From then to the last commitment.")] = Terms.serve_seconds,
    window: Annotated[int, typer.Option(min=20, help="Seconds for challenges.")] = Terms.window,
    clock: Annotated[int, typer.Option(min=5, help="Seconds of each side in a game.")] = Terms.clock,
    grace: Annotated[int, typer.Option(min=1, help="Least seconds for one move.")] = Terms.grace,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Run the good lines of a batch that has bad ones.")
    ] = False,
    check_model: Annotated[
        bool, typer.Option(help="Compare the folder with the pipeline's model, if it holds weights and profile.")
    ] = True,
) -> None:
    """Open and fund a job for a batch file, and hand its prompts to the pipeline. Prints the job's id."""
    terms = Terms(prompt_price, token_price, gas_rate, accept_seconds, serve_seconds, window, clock, grace)
    notebook = Notebook(home)
    try:
        parsed, _ = _read(batch, model)
        for bad in parsed.bad:
            _say(str(bad))
        if parsed.bad and not skip_bad:
            raise BatchError(
                f"{len(parsed.bad)} bad lines; nothing was sent and nothing is charged (--skip-bad runs the others)"
            )
        if not parsed.lines:
            raise BatchError("no line of the batch can be run; nothing was sent and nothing is charged")
        chain = Chain(rpc, Addresses.load(addresses), load_account(keystore, password))
        line = _bytes32(pipeline, "pipeline")
        served = chain.workers.pipeline_model(line)
        if not any(served):
            raise RequesterError(f"no pipeline 0x{line.hex()} on this chain")
        if check_model:
            _same_model(model, served)
        requester = Requester(chain)
        job = make_job(chain, served, line, parsed.requests, terms)
        try:
            requester.check(job, parsed.requests)
        except RequesterError as error:
            raise RequesterError(f"{error}; nothing was sent and nothing is charged") from error
        id = chain.escrow.job_id(chain.account, job)
        notebook.remember(id, chain.block_number(), batch.read_bytes(), model)
        try:
            requester.open(job)
        except (RequesterError, ChainError) as error:  # refused: there is no such job
            notebook.forget(id)
            raise RequesterError(f"{error}; nothing is escrowed") from error
        except ContractsError as error:
            raise RequesterError(
                f"{error}; job 0x{id.hex()} may be open all the same: see `plumb request status`"
            ) from error
    except REFUSALS as error:
        raise _fail(error) from error
    typer.echo(f"0x{id.hex()}")
    _say(f"{len(parsed.lines)} requests, at most {max_price(job)} base units escrowed")
    _hand_over(requester, id, parsed)


@app.command()
def resume(job: JobId, rpc: Rpc, addresses: AddressFile, home: Home = DEFAULT_HOME) -> None:
    """Hand a job's prompts over again, after `submit` was interrupted."""
    try:
        requester = Requester(Chain(rpc, Addresses.load(addresses)))
        known, parsed, _ = _recall(requester, job, home)
        status = requester.chain.escrow.status(known.id)
        if status is not Status.OPEN:
            raise RequesterError(f"the job is {status.name.lower()}: nothing is to be handed over")
    except REFUSALS as error:
        raise _fail(error) from error
    _hand_over(requester, known.id, parsed)


@app.command()
def status(
    job: JobId,
    rpc: Rpc,
    addresses: AddressFile,
    home: Home = DEFAULT_HOME,
    follow: Annotated[bool, typer.Option("--follow", help="Until the job is over.")] = False,
) -> None:
    """Say how a job stands, and why."""
    try:
        chain = Chain(rpc, Addresses.load(addresses))
        requester, id = Requester(chain), _bytes32(job, "job")
        block, told = Notebook(home).block(id), [""]
        while True:
            story = story_of(chain, id, block)
            receipt = make_receipt(chain, id, story, "", b"")
            state = Status[receipt["status"].upper()]
            lines = [f"{receipt['status']}: {receipt['why']}"]
            if state not in FINAL:
                stages = enumerate(receipt["pipeline"]["stages"])
                lines += [f"  stage {stage} ({of['worker']}): {requester.phase(id, stage)}" for stage, of in stages]
            for line in lines:
                if line not in told:
                    typer.echo(line)
            told = lines
            if not follow or state in FINAL:
                return
            time.sleep(FOLLOW_SECONDS)
    except REFUSALS as error:
        raise _fail(error) from error


@app.command()
def fetch(
    job: JobId,
    rpc: Rpc,
    addresses: AddressFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="Results file, OpenAI batch shape.")] = Path(
        "results.jsonl"
    ),
    receipt: Annotated[Path, typer.Option(help="Receipt, JSON.")] = Path("receipt.json"),
    home: Home = DEFAULT_HOME,
) -> None:
    """Write a committed job's results and its receipt; every token is checked against the root on chain.

    Of a job without results, only the receipt.
    """
    try:
        chain = Chain(rpc, Addresses.load(addresses))
        requester = Requester(chain)
        known, parsed, tokenizer = _recall(requester, job, home)
        story = story_of(chain, known.id, known.block)
        summary = make_receipt(chain, known.id, story, known.model.name, tokenizer_hash(known.model))
        write_whole(receipt, json.dumps(summary, indent=2) + "\n")
        _say(f"{receipt}: {summary['status']}, {summary['why']}")
        outputs = _outputs(requester, known, parsed)
        created = chain.block_timestamp(story[0].block)
        rows = [(bad.number, error_line(bad.number, bad.custom_id, bad.reason)) for bad in parsed.bad]
        for line, result in zip(parsed.lines, outputs, strict=True):
            text = tokenizer.decode(visible(result))
            rows.append((line.number, result_line(known.id.hex(), known.model.name, line, result, text, created)))
        write_lines(output, [row for _, row in sorted(rows, key=lambda item: item[0])])
    except REFUSALS as error:
        raise _fail(error) from error
    _say(f"{output}: {len(outputs)} results")


@app.command()
def demand(
    job: JobId,
    rpc: Rpc,
    addresses: AddressFile,
    keystore: Keystore,
    password: Password,
    budget: Annotated[int, typer.Option(min=1, help="Most that it may cost, in base units.")],
    home: Home = DEFAULT_HOME,
    deployed_block: Annotated[int, typer.Option(help="Where to look for the model's registration from.")] = 0,
) -> None:
    """Have the outputs posted on chain that the pipeline committed to and does not hand over; then `fetch` has them.

    The last stage posts them before its clock runs out, or is convicted and the price refunded.
    """
    try:
        chain = Chain(rpc, Addresses.load(addresses), load_account(keystore, password))
        known, parsed, _ = _recall(Requester(chain), job, home)
        model = registered_model(chain, chain.escrow.job(known.id).model, deployed_block)
        outputs = OutputsDemander(chain, known.id, parsed.requests, model, known.block).run(budget, _say)
    except REFUSALS as error:
        raise _fail(error) from error
    _say(f"{len(outputs)} outputs are on chain: `plumb request fetch` writes them")


@app.command()
def collect(job: JobId, rpc: Rpc, addresses: AddressFile, keystore: Keystore, password: Password) -> None:
    """Settle, release or expire a job whose time has come, and draw what this account is owed."""
    try:
        chain = Chain(rpc, Addresses.load(addresses), load_account(keystore, password))
        done = Requester(chain).collect(_bytes32(job, "job"))
    except REFUSALS as error:
        raise _fail(error) from error
    typer.echo(", ".join(done) or "nothing to collect yet")


def _recall(requester: Requester, job: str, home: Path) -> tuple[Remembered, Batch, Any]:
    """A job that was submitted from here, its batch and tokenizer, checked against the job on chain."""
    known = Notebook(home).recall(_bytes32(job, "job"))
    if requester.chain.escrow.status(known.id) is Status.NONE:
        raise RequesterError(f"job 0x{known.id.hex()} was never opened on this chain; nothing is charged")
    parsed, tokenizer = _read(known.batch, known.model)
    expected = requester.chain.escrow.job(known.id).requests_root
    if not parsed.requests or requests_root(parsed.requests) != expected:
        raise RequesterError(
            f"{known.batch} and the tokenizer in {known.model} make other requests than the job's: one was changed"
        )
    return known, parsed, tokenizer


def _outputs(requester: Requester, known: Remembered, batch: Batch) -> tuple[Output, ...]:
    """From the pipeline, else from what was posted on chain."""
    try:
        return requester.outputs(known.id, batch.requests)
    except RequesterError as error:
        posted = posted_outputs(requester.chain, known.id, known.block)
        if posted is None:
            raise RequesterError(f"{error}\n`plumb request demand` has outputs posted on chain") from error
    lawful(posted, batch.requests)
    return posted


def _hand_over(requester: Requester, id: bytes, batch: Batch) -> None:
    try:
        requester.hand_over(id, batch.requests)
    except (RequesterError, ContractsError) as error:
        raise _fail(
            f"{error}\njob 0x{id.hex()} is open: `plumb request resume` hands its prompts over again; "
            "if no stage takes them, `plumb request collect` refunds it after its time to accept"
        ) from error


def _same_model(folder: Path, served: bytes) -> None:
    """Raises RequesterError where the folder is surely another model than the pipeline's."""
    from verifier.tolerance import Profile
    from verifier.weights import Weights, identify

    try:
        weights = Weights.open(folder)
        own = model_id(identify(weights, Profile.load(folder, weights.shape)))
    except (ModelFolderError, InvalidProfile, OSError) as error:
        _say(f"note: not checked whether the pipeline serves the model in {folder}: {error}")
        return
    if own != served:
        raise RequesterError(f"the pipeline serves model 0x{served.hex()}, {folder} holds 0x{own.hex()}")


def _bytes32(text: str, name: str) -> bytes:
    try:
        value = bytes.fromhex(text.removeprefix("0x"))
    except ValueError:
        value = b""
    if len(value) != 32:
        raise RequesterError(f"{name}: expected 32 bytes in hex, got {text!r}")
    return value
