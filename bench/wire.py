"""Whether packing rows pays: their size on the wire, bytes a second of a core, rows a second over a slow link.

Hidden states between the layers of a model that was trained, the demo's or one that is given, over text; and for
comparison of a random Llama of width 2048, and numbers of one Gaussian. Beside the worker's own packing stand general
compressors: deflate, and zstd where it is installed. The link: the worker's Link and Ring over mutual TLS, with a relay
between them that lets so many bits a second through.
"""

import asyncio
import importlib.util
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from bench._models import write_llama
from bench._ring import relay
from deploy.demo.train import corpus, train
from worker import ring_pb2 as pb
from worker import tls
from worker.batch import Batch, Piece
from worker.channel import Peer, pack_tensor
from worker.grpc_channel import Link, Ring
from worker.packing import BITS, pack, unpack
from worker.stage import Stage

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
POSITIONS = 384
TRIES = 7
MESSAGE_ROWS = 16
MESSAGE_BYTES = 64 * 2**20
LATENCY_SECONDS = 0.02


def run(model: str = "", megabits: list[float] | None = None, seconds: float = 10.0, rounds: int = 3) -> dict[str, Any]:
    """model: a folder with a tokenizer; without one the demo's is trained, which takes minutes. megabits: a second, of
    the links; seconds: of traffic on each.

    Returns {"packing": [{name, dtype, packing, ratio, ...}], "results": [{name, megabits, compress, ...}]}.
    """
    torch.set_num_threads(1)
    packing, results = [], []
    with tempfile.TemporaryDirectory(prefix="plumb-wire-") as name:
        home = Path(name)
        folder = Path(model) if model else home / "demo"
        if not model:
            train(folder)
        write_llama(home / "random", torch.bfloat16, hidden=2048, layers=2)
        trained = hidden_states(folder, text(folder))
        sources: Mapping[str, torch.Tensor] = {
            Path(model).name or "demo": trained,
            "random": hidden_states(home / "random", [i * i % 1024 for i in range(POSITIONS)]),
            "gaussian": torch.randn(POSITIONS, 2048),
        }
        for source, rows in sources.items():
            for dtype in range(len(DTYPES)):
                data = pack_tensor(rows.to(DTYPES[dtype]), dtype).data
                packing += [{"name": source, "dtype": str(DTYPES[dtype])[6:], **row} for row in measured(data, dtype)]
        for rate in megabits if megabits is not None else [10.0, 50.0, 1000.0]:
            for compress in (False, True):
                found = sorted(asyncio.run(sent(trained, rate, compress, seconds, home)) for _ in range(rounds))
                results.append(
                    {
                        "name": "link",
                        "megabits": rate,
                        "compress": compress,
                        "hidden_size": trained.shape[1],
                        "rows_per_second": round(found[len(found) // 2], 1),
                    }
                )
    return {"packing": packing, "results": results}


# ---- rows


def text(folder: Path) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = [int(token) for piece in corpus()[:64] for token in tokenizer.encode(piece)]
    return ids[:POSITIONS]


def hidden_states(folder: Path, ids: list[int]) -> torch.Tensor:
    """What the stages of an even split in four would hand on, one after another, in float32."""
    layers = Stage(folder, 0, 1).shape.layers
    ends = sorted({max(1, layers * part // 4) for part in (1, 2, 3)})
    found = []
    for end in ends:
        stage = Stage(folder, 0, end)
        hidden, _ = stage.forward(stage.embed(np.array(ids)), Batch((Piece(0, 0, len(ids)),)), stage.cache())
        found.append(hidden.float())
    return torch.cat(found)


def measured(data: bytes, dtype: int) -> Iterator[dict[str, Any]]:
    """Megabytes are of plain rows, by one core."""
    kind = BITS[dtype]
    count = len(data) // kind.itemsize
    planes = np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(-1, kind.itemsize).T).tobytes()
    ways: dict[str, tuple[bytes, Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
        "exponents": (data, lambda plain: pack(plain, dtype), lambda small: unpack(small, count, dtype)),
        "deflate": (data, lambda plain: zlib.compress(plain, 1), zlib.decompress),
        "deflate of planes": (planes, lambda plain: zlib.compress(plain, 1), zlib.decompress),
    }
    if importlib.util.find_spec("zstandard"):
        zstd = importlib.import_module("zstandard")
        ways["zstd"] = (data, zstd.ZstdCompressor(1).compress, zstd.ZstdDecompressor().decompress)
        ways["zstd of planes"] = (planes, zstd.ZstdCompressor(1).compress, zstd.ZstdDecompressor().decompress)
    for name, (plain, there, back) in ways.items():
        small, packing = timed(there, plain)
        again, unpacking = timed(back, small)
        if again != plain:
            raise AssertionError(f"{name}: expected the same bytes back")
        yield {
            "packing": name,
            "ratio": round(len(plain) / len(small), 4),
            "packed_megabytes_per_second": round(len(plain) / packing / 1e6, 1),
            "unpacked_megabytes_per_second": round(len(plain) / unpacking / 1e6, 1),
        }


def timed(work: Callable[[bytes], bytes], given: bytes) -> tuple[bytes, float]:
    """(what it makes, seconds of the quickest of several)."""
    made, best = b"", float("inf")
    for _ in range(TRIES):
        began = time.perf_counter()
        made = work(given)
        best = min(best, time.perf_counter() - began)
    return made, best


# ---- a link


async def sent(rows: torch.Tensor, megabits: float, compress: bool, seconds: float, home: Path) -> float:
    """Rows a second over a link of that speed."""
    for name in ("sender", "receiver"):
        if not (home / f"{name}.pem").exists():
            tls.create(home / f"{name}.pem", home / f"{name}.key")
    (certificate, key), (theirs, their_key) = (
        ((home / f"{name}.pem").read_bytes(), (home / f"{name}.key").read_bytes()) for name in ("sender", "receiver")
    )
    messages = [message(rows, sequence) for sequence in range(len(rows) // MESSAGE_ROWS)]
    count = max(20, int(seconds * megabits * 1e6 / 8 / messages[0].ByteSize()))
    done, came = asyncio.Event(), 0

    async def handler(peer: Peer, envelope: pb.Envelope) -> None:
        nonlocal came
        came += 1
        if came == 1 + count:
            done.set()

    ring = Ring(theirs, their_key, handler, MESSAGE_BYTES)
    ring.admit(Peer("sender", "sender", certificate))
    slow, port = await relay(await ring.start("127.0.0.1:0"), LATENCY_SECONDS, megabits * 1e6 / 8)
    link = Link(Peer("receiver", "", theirs), f"127.0.0.1:{port}", certificate, key, MESSAGE_BYTES, compress)
    try:
        await link.send(pb.Envelope(job=bytes(32), attempt=1, beat=pb.Beat()))  # shakes hands
        while not came:
            await asyncio.sleep(0.01)
        began = time.perf_counter()
        for i in range(count):
            await link.send(messages[i % len(messages)])
        await done.wait()
        return count * MESSAGE_ROWS / (time.perf_counter() - began)
    finally:
        await link.close()
        await ring.stop()
        slow.close()


def message(rows: torch.Tensor, place: int) -> pb.Envelope:
    hidden = pack_tensor(rows[place * MESSAGE_ROWS : (place + 1) * MESSAGE_ROWS].to(torch.bfloat16), 0)
    pieces = [pb.Piece(request=r, first=place, count=1) for r in range(MESSAGE_ROWS)]
    return pb.Envelope(job=bytes(32), attempt=1, rows=pb.Rows(pieces=pieces, hidden=hidden))
