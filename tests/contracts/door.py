"""Nodes that misbehave: doors in front of a real one."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

Answer = dict[str, Any]
Twist = Callable[[str, list[Any], Callable[[], Answer]], Answer | None]  # None: no answer


class Door:
    """A node that passes questions on to a real one, and twists its answers."""

    def __init__(self, url: str, twist: Twist) -> None:
        self.twist, self.asked = twist, [""]
        self._client = httpx.Client(trust_env=False, timeout=30)  # made once: it reads all certificates
        door = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                question = json.loads(body)
                door.asked.append(question["method"])

                def ask() -> Answer:
                    kind = {"Content-Type": "application/json"}
                    found: Answer = door._client.post(url, content=body, headers=kind).json()
                    return found

                told = door.twist(question["method"], question["params"], ask)
                data = json.dumps(told).encode() if told is not None else b""
                self.send_response(200 if told is not None else 404)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._client.close()
