"""Cost of `pmap`: the training step under `pmap`, compared with the same step under `jit`.

Run `python -m benchmarks.pmap_cost [--devices N]`. On one device, the comparison is with plain `jit`. On several (CPUs
are split into virtual devices), it is with `jit` and a batch that is sharded over them. BN statistics are then those of
the whole batch, which takes more communication and less memory per device. Runs alternate in one process.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from repvgg_jax.cli import run_command

from .arguments import Parser, positive_int


def main() -> None:
    """Measure both, and print them and their ratio."""
    parser = Parser("python -m benchmarks.pmap_cost", description=__doc__)
    parser.add_argument("--devices", type=positive_int, default=1, help="number of devices (default: 1)")
    parser.add_argument("--model", default="RepVGG-A0", help="name of a variant (default: RepVGG-A0)")
    parser.add_argument("--batch-size", type=positive_int, default=32, help="global batch size (default: 32)")
    parser.add_argument("--image-size", type=positive_int, default=96, help="height and width in pixels (default: 96)")
    parser.add_argument("--rounds", type=positive_int, default=20, help="measurements of each (default: 20)")
    arguments = parser.parse_args()
    os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={arguments.devices}")

    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import repvgg_jax as rv
    from repvgg_jax.preprocess import Preprocessing
    from train.optimizer import learning_rate_schedule, make_optimizer
    from train.parallel import AXIS, parallel, replicate
    from train.presets import PRESETS
    from train.state import create_state
    from train.step import make_train_step

    count, size = jax.local_device_count(), arguments.image_size
    model, options = rv.create_model(arguments.model, 1000), PRESETS["imagenet_120"].optimizer
    schedule = learning_rate_schedule(options, 5000)
    optimizer = make_optimizer(options, schedule)
    state = create_state(model, optimizer, 0, (size, size, 3))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (arguments.batch_size, size, size, 3), np.uint8)
    labels = rng.integers(0, 1000, arguments.batch_size).astype(np.int32)

    def step(axis_name: str | None) -> Callable[..., Any]:
        return make_train_step(model, optimizer, schedule, Preprocessing(size), axis_name=axis_name)

    mesh = Mesh(np.array(jax.local_devices()), (AXIS,))
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(AXIS))
    pmapped, jitted = parallel(step(AXIS), donate=True), jax.jit(step(None), donate_argnums=0)
    shape = (count, -1)
    contestants: dict[str, tuple[Callable[..., Any], Any, Any]] = {
        "pmap": (
            pmapped,
            replicate(state),
            {"image": images.reshape(*shape, *images.shape[1:]), "label": labels.reshape(shape)},
        ),
        "jit": (jitted, jax.device_put(state, everywhere), jax.device_put({"image": images, "label": labels}, split)),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(arguments.rounds + 2):  # the first two compile and warm up
        for name, (function, held, inputs) in contestants.items():
            start = time.perf_counter()
            held, metrics = function(held, inputs)
            jax.block_until_ready(metrics)
            times[name].append(time.perf_counter() - start)
            contestants[name] = (function, held, inputs)
    median = {name: statistics.median(seconds[2:]) for name, seconds in times.items()}
    least = {name: min(seconds[2:]) for name, seconds in times.items()}
    device = jax.devices()[0].device_kind
    print(f"{arguments.model}, {count} {device} device(s), batch {arguments.batch_size} at {size}x{size}")
    for name in contestants:
        print(f"{name:5} median {1e3 * median[name]:8.1f} ms  least {1e3 * least[name]:8.1f} ms")
    print(f"pmap / jit: median {median['pmap'] / median['jit']:.3f}, least {least['pmap'] / least['jit']:.3f}")


if __name__ == "__main__":
    run_command(main)
