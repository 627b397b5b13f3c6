"""Servers for tests: a file server that is a process of its own and can be killed, and a proxy that misbehaves.

    python -m tests.proxy FOLDER PORT    # serves a folder over HTTP, with ranges

The proxy stands between a client and any HTTP server (the file server, or moto's S3), takes every answer whole, and does
to it what is wanted. It counts what is asked for.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.processes import ROOT, environment

# What can happen to an answer. All but WRONG and SLOW are failures of the network or the server.
CUT, CUT_BEFORE = "cut in the body", "cut before the answer"
STALL, STALL_BEFORE = "stall in the body", "stall before the answer"
LONG_LENGTH = "a Content-Length that is too large"
SHORT, SHORT_WITHOUT_LENGTH = "half a body", "half a body without a length"
ERROR_500, ERROR_503, ERROR_429, FORBIDDEN_403 = "500", "503", "429", "403"
GARBAGE = "no HTTP at all"
WHOLE_FILE = "the range is ignored"
WRONG = "other bytes"
SLOW = "a body in pieces, over a second"  # and no fault
FAILURES = (
    CUT, CUT_BEFORE, STALL, STALL_BEFORE, LONG_LENGTH, SHORT, SHORT_WITHOUT_LENGTH, ERROR_500, ERROR_503, ERROR_429,
    FORBIDDEN_403, GARBAGE, WHOLE_FILE,
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    span: str | None  # of the header Range


class Proxy:
    """Passes requests on to `upstream` (host, port); the next answers that `disturb` names get a fault."""

    def __init__(self, upstream: tuple[str, int]):
        self.upstream = upstream
        self.requests: list[Request] = []
        self.fault, self.times, self.match, self.method = None, 0, ".tar", "GET"
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def disturb(self, fault: str, times: int = 10**9, match: str = ".tar", method: str | None = "GET") -> None:
        """What happens to the next `times` answers to such a request (None: to any) for a path with `match` in it."""
        with self._lock:
            self.fault, self.times, self.match, self.method = fault, times, match, method

    def behave(self) -> None:
        self.disturb("", 0)

    def reads(self, match: str = ".tar") -> list[Request]:
        """The requests so far for the content of such files."""
        return [request for request in self.requests if request.method == "GET" and match in request.path]

    def close(self) -> None:
        self._closed.set()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            client.settimeout(60)
            try:
                while (message := read_message(client)) and self._answer(client, *message):
                    pass
            except OSError:  # either end went away
                pass

    def _answer(self, client: socket.socket, head: bytes, body: bytes) -> bool:
        """Whether the connection goes on."""
        lines = head.decode("latin-1").split("\r\n")
        method, path, _ = lines[0].split(" ", 2)
        headers = dict(line.split(": ", 1) for line in lines[1:] if line)
        span = next((value for name, value in headers.items() if name.lower() == "range"), None)
        with self._lock:
            self.requests.append(Request(method, path, span))
            fault = self.fault if self.method in (method, None) and self.match in path and self.times > 0 else None
            self.times -= bool(fault)
        if fault == STALL_BEFORE:
            self._wait(client)
        if fault in (STALL_BEFORE, CUT_BEFORE):
            return False
        if fault == GARBAGE:
            client.sendall(b"\0\1\2 what is this?\r\n\r\n")
            return False
        if fault in (ERROR_500, ERROR_503, ERROR_429, FORBIDDEN_403):
            client.sendall(f"HTTP/1.1 {fault} No\r\nContent-Length: 0\r\n\r\n".encode())
            return True
        dropped = {"connection", "keep-alive"} | ({"range"} if fault == WHOLE_FILE else set())
        asked = [lines[0], *(f"{n}: {v}" for n, v in headers.items() if n.lower() not in dropped), "Connection: close"]
        try:
            status, answer = self._ask("\r\n".join(asked).encode("latin-1") + b"\r\n\r\n" + body)
        except OSError:
            return False
        status = [line for line in status.decode("latin-1").split("\r\n") if line]
        kept = [line for line in status if not line.lower().startswith(("connection:", "transfer-encoding:"))]
        if method != "HEAD":  # the length of an answer to HEAD is that of the body which does not come
            kept = [line for line in kept if not line.lower().startswith("content-length:")]
            length = {LONG_LENGTH: len(answer) + 100, SHORT: len(answer) // 2}.get(fault, len(answer))
            kept += [f"Content-Length: {length}"] if fault != SHORT_WITHOUT_LENGTH else ["Connection: close"]
        if fault == WRONG:
            answer = bytes(byte ^ 0x55 for byte in answer)
        if fault in (CUT, STALL, SHORT, SHORT_WITHOUT_LENGTH):
            answer = answer[: len(answer) // 2]
        client.sendall("\r\n".join(kept).encode("latin-1") + b"\r\n\r\n")
        pieces = 10 if fault == SLOW else 1
        for piece in range(pieces if method != "HEAD" else 0):
            client.sendall(answer[len(answer) * piece // pieces : len(answer) * (piece + 1) // pieces])
            time.sleep(0.1 if fault == SLOW else 0)
        if fault == STALL:
            self._wait(client)
        return fault not in (CUT, STALL, SHORT_WITHOUT_LENGTH, LONG_LENGTH)

    def _wait(self, client: socket.socket) -> None:
        """Until the client gives up."""
        client.settimeout(0.2)
        while not self._closed.is_set():
            try:
                if not client.recv(4096):
                    return
            except TimeoutError:
                continue

    def _ask(self, request: bytes) -> tuple[bytes, bytes]:
        with socket.create_connection(self.upstream, timeout=30) as server:
            server.sendall(request)
            answer = b"".join(iter(lambda: server.recv(2**16), b""))
        head, _, body = answer.partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" in head.lower():
            body = unchunked(body)
        return head, body


def read_message(connection: socket.socket) -> tuple[bytes, bytes] | None:
    """Head and body of one request; None when no more come."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (part := connection.recv(2**16)):
            return None
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    fields = dict(line.split(b":", 1) for line in head.lower().split(b"\r\n")[1:])
    length = int(fields.get(b"content-length", b"0"))
    if fields.get(b"expect", b"").strip() == b"100-continue":
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        head = b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(b"expect:"))
    while len(body) < length:
        if not (part := connection.recv(2**16)):
            return None
        body += part
    return head, body


def unchunked(body: bytes) -> bytes:
    parts = []
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size.split(b";")[0], 16)
        if not length:
            break
        parts.append(body[:length])
        body = body[length + 2 :]
    return b"".join(parts)


@contextmanager
def object_store(bucket: str) -> Iterator[dict]:
    """The storage options of a real S3 server on loopback, which has the bucket. Servers of one process share what they hold."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    options = s3_options(server.get_host_and_port())
    s3fs.S3FileSystem(**options, skip_instance_cache=True).mkdir(bucket)
    yield options
    server.stop()


def s3_options(address: tuple[str, int]) -> dict:
    """Storage options for the server, or a proxy before it, at (host, port)."""
    host, port = address
    return {"key": "test", "secret": "test", "client_kwargs": {"endpoint_url": f"http://{host}:{port}"}}


def address(options: dict) -> tuple[str, int]:
    host, _, port = options["client_kwargs"]["endpoint_url"].removeprefix("http://").partition(":")
    return host, int(port)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.05)


class FileServer:
    """A folder over HTTP, from a process of its own; `kill` it and `start` it again on the same port."""

    def __init__(self, folder: str):
        self.folder, self.port = str(folder), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.address = ("127.0.0.1", self.port)
        self.process = None
        self.start()

    def start(self, wait: bool = True) -> None:
        command = [sys.executable, "-m", "tests.proxy", self.folder, str(self.port)]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment())
        if wait:
            wait_for_port(self.port)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def serve(folder: str, port: int) -> None:
    from aiohttp import web

    app = web.Application()
    app.router.add_static("/", folder, show_index=True)
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
