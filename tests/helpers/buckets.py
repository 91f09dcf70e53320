"""Buckets on loopback: an emulator of Google Cloud Storage and one of S3, behind a proxy that can refuse requests."""

import http.client
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import fsspec
import pytest

from repvgg_jax.paths import place
from repvgg_jax.storage import BucketPath

NAME = "bucket"


def free_port() -> int:
    """Return a port of 127.0.0.1 that is not in use."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Proxy:
    """Forwards HTTP requests to a server on this machine.

    Attributes:
      upstream: the server's port.
      refuses: decides whether to answer a request with 403 instead, by its method and its subject: the path and the
        beginning of the body, which names the object where the path does not.
      requests: method and subject of each request so far.
    """

    upstream: int
    refuses: Callable[[str, str], bool] = lambda method, about: False
    requests: list[tuple[str, str]] = field(default_factory=list)

    def start(self) -> ThreadingHTTPServer:
        """Serve in the background on its own port."""
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self._body()
                about = f"{unquote(self.path)} {body[:1000].decode(errors='replace')}"
                proxy.requests.append((self.command, about))
                if proxy.refuses(self.command, about):
                    self._answer(403, [("Content-Type", "text/plain")], b"not allowed")
                    return
                connection = http.client.HTTPConnection("127.0.0.1", proxy.upstream, timeout=60)
                headers = {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
                connection.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
                response = connection.getresponse()
                self._answer(response.status, response.getheaders(), response.read())
                connection.close()

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = handle_any  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:
                """Print nothing."""

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                body = b""
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
                self.send_response_only(status)
                length = len(body)
                for name, value in headers:
                    if name.lower() == "content-length" and self.command == "HEAD":
                        length = int(value)
                    elif name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Print nothing: a client that is killed drops its connections."""

        server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server


@dataclass
class Bucket:
    """An empty folder in a bucket.

    Attributes:
      url: URL of the folder.
      proxy: the proxy through which it is reached.
    """

    url: str
    proxy: Proxy

    def __truediv__(self, name: str) -> BucketPath:
        where = place(f"{self.url}/{name}")
        assert isinstance(where, BucketPath)
        return where


def _gcs(stack: ExitStack) -> tuple[int, Callable[[str], dict[str, str]]]:
    from gcp_storage_emulator.server import create_server

    port = free_port()
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket=NAME)
    server.start()
    stack.callback(server.stop)

    def variables(url: str) -> dict[str, str]:
        return {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}

    return port, variables


def _s3(stack: ExitStack) -> tuple[int, Callable[[str], dict[str, str]]]:
    from moto.server import ThreadedMotoServer

    port = free_port()
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    stack.callback(server.stop)

    def variables(url: str) -> dict[str, str]:
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
        return keys | {"AWS_ENDPOINT_URL": url}

    return port, variables


SERVICES = {"gs": _gcs, "s3": _s3}
_numbers = iter(range(1_000_000))


@pytest.fixture(scope="session", params=SERVICES)
def service(request) -> Iterator[tuple[str, Proxy]]:
    """A scheme, and the proxy to its emulator, which this process and its children find in the environment."""
    scheme = request.param
    with ExitStack() as stack:
        port, variables = SERVICES[scheme](stack)
        proxy = Proxy(port)
        server = proxy.start()
        stack.callback(server.shutdown)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in variables(f"http://127.0.0.1:{server.server_port}").items():
            patch.setenv(name, value)
        if scheme == "s3":
            fsspec.filesystem("s3").mkdir(NAME)
        yield scheme, proxy


@pytest.fixture
def bucket(service) -> Iterator[Bucket]:
    """An empty folder in a bucket of each service."""
    scheme, proxy = service
    yield Bucket(f"{scheme}://{NAME}/folder {next(_numbers)}-{os.getpid()}", proxy)
    proxy.refuses = lambda method, about: False
