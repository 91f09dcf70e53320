"""Requests per second, and latencies, of a net behind HTTP: gunicorn with several processes, threads, and batches.

`python -m benchmarks.serving [--model RepVGG-A0] [--clients 8]`; needs gunicorn. Each client sends a JPEG file of
500x375 pixels and waits for the answer before it sends the next one. The server decodes, resizes, predicts and answers
with the three most likely classes, as in the example of docs/deployment.md. The configurations are measured
alternately, in several rounds, and the figures are medians.
"""

import http.client
import io
import json
import os
import queue
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from repvgg_jax.cli import run_command

from .arguments import Parser, positive_float, positive_int

WAYS = {
    "1 process, 1 thread": (1, 1, 1),
    "1 process, 8 threads": (1, 8, 1),
    "2 processes, 4 threads": (2, 4, 1),
    "1 process, 8 threads, batches of up to 8": (1, 8, 8),
}
"""Processes, threads of each, and the largest batch."""
WAIT_SECONDS = 0.002
"""How long the first request of a batch waits for others."""


class Batcher:
    """Collect the images of concurrent requests, and predict them together."""

    def __init__(self, predict: Callable[[np.ndarray], np.ndarray], largest: int):
        self._predict, self._largest = predict, largest
        self._waiting: queue.Queue[tuple[np.ndarray, Future[np.ndarray]]] = queue.Queue()
        threading.Thread(target=self._serve, daemon=True).start()

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Return the logits of one image `[H, W, C]`."""
        answer: Future[np.ndarray] = Future()
        self._waiting.put((image, answer))
        return answer.result()

    def _serve(self) -> None:
        while True:
            batch = [self._waiting.get()]
            end = time.monotonic() + WAIT_SECONDS
            while len(batch) < self._largest:
                try:
                    batch.append(self._waiting.get(timeout=max(0.0, end - time.monotonic())))
                except queue.Empty:
                    break
            try:
                logits = self._predict(np.stack([image for image, _ in batch]))
                for row, (_, answer) in zip(logits, batch, strict=True):
                    answer.set_result(row)
            except Exception as error:
                for _, answer in batch:
                    answer.set_exception(error)


def make_app(weights: str, largest: int) -> Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]:
    """Return a WSGI application that answers a JPEG file with its three most likely classes."""
    import repvgg_jax as rv
    from repvgg_jax.preprocess import decode_image, eval_transform

    preprocessing = rv.inspect_weights(weights).preprocessing
    assert preprocessing is not None
    model, variables = rv.load_weights(weights)
    predict = rv.make_predictor(model, variables, largest, preprocessing.image_size, preprocessing=preprocessing)
    classify = (lambda image: predict(image[None])[0]) if largest == 1 else Batcher(predict, largest)

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        logits = classify(eval_transform(decode_image(body, "request"), preprocessing))
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(logits.argsort()[:-4:-1].tolist()).encode()]

    return app


def write_weights(path: Path, name: str) -> None:
    """Write a net with random weights, on which speed does not depend."""
    import repvgg_jax as rv
    from tests.helpers.random_weights import random_variables

    model = rv.create_model(name, deploy=True)
    rv.save_weights(path, model, random_variables(model), preprocessing=rv.Preprocessing())


def jpeg() -> bytes:
    """Return a photograph of 500x375 pixels."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    buffer = io.BytesIO()
    Image.fromarray(load_sample_image("flower.jpg")).resize((500, 375)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def free_port() -> int:
    """Return a port of this machine that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(port: int, body: bytes) -> float:
    """Return the seconds that one request took."""
    begin = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/", body)
        answer = connection.getresponse()
        classes = json.loads(answer.read())
    finally:
        connection.close()
    assert answer.status == 200
    assert len(classes) == 3
    return time.perf_counter() - begin


def load(port: int, body: bytes, clients: int, seconds: float) -> tuple[float, list[float]]:
    """Return requests per second, and the seconds of each request, under so many clients at a time."""
    begin = time.perf_counter()

    def client() -> list[float]:
        taken = []
        while time.perf_counter() - begin < seconds:
            taken.append(ask(port, body))
        return taken

    with ThreadPoolExecutor(clients) as pool:
        taken = [one for client in [pool.submit(client) for _ in range(clients)] for one in client.result()]
    return len(taken) / (time.perf_counter() - begin), taken


def measure(way: tuple[int, int, int], weights: Path, clients: int, seconds: float) -> tuple[float, list[float]]:
    """Start a server, warm it up, and return what `load` measures."""
    processes, threads, largest = way
    port = free_port()
    factory = f"benchmarks.serving:make_app({str(weights)!r}, {largest})"
    options = ["--bind", f"127.0.0.1:{port}", "--workers", f"{processes}", "--threads", f"{threads}"]
    command = [sys.executable, "-m", "gunicorn", "--log-level", "error", "--timeout", "120", *options, factory]
    server = subprocess.Popen(command, cwd=Path(__file__).parent.parent, env=os.environ)
    try:
        body, deadline = jpeg(), time.monotonic() + 120
        while True:
            try:
                ask(port, body)
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("error: gunicorn did not start; is it installed?") from None
                time.sleep(0.2)
        load(port, body, 4 * processes, 2.0)  # every process has predicted by then
        return load(port, body, clients, seconds)
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    """Measure every way in turn, and print a table."""
    parser = Parser("python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--model", default="RepVGG-A0", help="name of a variant (default: RepVGG-A0)")
    parser.add_argument("--clients", type=positive_int, default=8, help="number of concurrent clients (default: 8)")
    parser.add_argument(
        "--seconds", type=positive_float, default=5.0, help="length of a measurement in seconds (default: 5)"
    )
    parser.add_argument(
        "--rounds", type=positive_int, default=3, help="measurements of each configuration (default: 3)"
    )
    arguments = parser.parse_args()
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    taken: dict[str, list[float]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "net.safetensors"
        write_weights(weights, arguments.model)
        for _ in range(arguments.rounds):
            for name, way in WAYS.items():
                rate, times = measure(way, weights, arguments.clients, arguments.seconds)
                rates[name].append(rate)
                taken[name] += times
    print("| served by | requests/s | median, ms | 99 %, ms |\n|---|---|---|---|")
    for name in WAYS:
        middle, late = np.percentile(taken[name], [50, 99]) * 1e3
        print(f"| {name} | {statistics.median(rates[name]):.1f} | {middle:.0f} | {late:.0f} |")


if __name__ == "__main__":
    run_command(main)
