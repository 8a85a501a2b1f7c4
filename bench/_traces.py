"""A worker's HTTP side over traces that lie on disk, as a process of its own; and one whole layer at its real size."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench._layer import LayerWeights, _write
from contracts.wire import request_json
from verifier.linear import Bits
from verifier.program import WeightLayout, build_program
from verifier.safetensors_file import SafetensorsFile
from verifier.shape import ModelShape
from verifier.trace import RequestTrace
from verifier.weights import Weights
from worker.job import JobFolder
from worker.recorder import load_roots, trace_path

ANSWER_BYTES = 4 << 20


def serve(home: str, job: str, stages: int, model: str, outputs: str, port: int) -> None:
    """Answers for all stages of one job at /sN, until the process ends. outputs: the JSON of that document."""
    id, shape = bytes.fromhex(job), Weights.open(model).shape
    folders = [JobFolder(Path(home) / str(stage), id) for stage in range(stages)]
    asked = json.dumps({"requests": [request_json(request) for request in folders[0].load_requests()]}).encode()
    nodes = [_nodes(folder, shape) for folder in folders]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            stage, rest = int(path[2]), path.split("/")[4:]
            body = {"requests": asked, "outputs": outputs.encode(), "trace": nodes[stage]}.get("/".join(rest))
            if body is None:
                body = self.rows(stage, int(rest[1]), rest[2], int(query.split("&")[0].split("=")[1]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def rows(self, stage: int, request: int, key: str, first: int) -> bytes:
            array = RequestTrace.load(trace_path(folders[stage].path, request), shape).arrays[key]
            return array[first : first + max(1, ANSWER_BYTES // (array.shape[1] * array.itemsize))].tobytes()

        def log_message(self, format: str, *args: Any) -> None:
            return

    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


def _nodes(folder: JobFolder, shape: ModelShape) -> bytes:
    told, keys = [], RequestTrace.load(trace_path(folder.path, 0), shape).keys
    for node, roots in zip(folder.load_state().nodes, load_roots(folder.path, keys), strict=True):
        told.append(
            {
                "positions": node.positions,
                "tensors_root": node.tensors_root.hex(),
                "roots": {key: root.hex() for key, root in roots.items()},
            }
        )
    return json.dumps({"requests": told}).encode()


class WholeLayer(LayerWeights):
    """All weights of one layer, random, on disk."""

    def __init__(self, shape: ModelShape, layer: int, folder: Path, seed: int = 1) -> None:
        self.shape, self.layout, self.program = shape, WeightLayout(shape), build_program(shape)
        prefix = f"model.layers.{layer}."
        self._places = [place for place in self.layout.tensors if place.name.startswith(prefix)]
        path = folder / "weights.safetensors"
        _write(path, self._places, np.random.default_rng(seed))
        file = SafetensorsFile(path)
        self._bits = {place.name: file.floats(place.name)[1] for place in self._places}

    def raw(self, name: str, rows: slice = slice(None)) -> Bits:
        return self._bits[self.layout.place(name).name][rows]

    def float64(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        return torch.from_numpy((self.raw(name, rows).astype(np.uint32) << 16).view(np.float32).astype(np.float64))
