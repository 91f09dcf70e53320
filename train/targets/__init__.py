"""Machines that can be compiled for without having them: TPU slices by topology, GPUs by the files in this folder."""

import dataclasses
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from repvgg_jax.errors import ConfigError

from ..chips import CHIPS, GIB, Chip

GPUS_PER_NODE = 8
DEFAULT_GPU_FRACTION = 0.75
"""Share of a GPU's memory that a JAX process takes, unless XLA_PYTHON_CLIENT_MEM_FRACTION is set."""


@dataclasses.dataclass(frozen=True)
class Family:
    """Machines that differ only in their number of chips.

    Attributes:
      platform: JAX's name of the platform, "tpu" or "cuda".
      chip: row of `CHIPS`.
      usable: bytes of a TPU's memory that the compiler uses, as it reports them (libtpu 0.0.42); None for GPUs.
      arguments: arguments of JAX's topology description.
    """

    platform: str
    chip: str
    usable: float | None = None
    arguments: tuple[tuple[str, str], ...] = ()


FAMILIES = {
    # A v4 chip's two cores are one device, as on Cloud TPU.
    "v4": Family("tpu", "TPU v4", 30.75 * GIB, (("chip_config_name", "megacore"),)),
    "v5e": Family("tpu", "TPU v5 lite", 15.75 * GIB),
    "v5p": Family("tpu", "TPU v5p", 95.74 * GIB),
    "v6e": Family("tpu", "TPU v6", 31.25 * GIB),
    "a100": Family("cuda", "A100"),
    "h100": Family("cuda", "H100"),
    "h200": Family("cuda", "H200"),
}

_EXAMPLES = (
    "a TPU slice, such as v4:2x2x4, v5e:16x16, v5p:4x4x4 or v6e:8x8, or a number of GPUs, such as h100:8, h200:8 or "
    "a100:8"
)


@dataclasses.dataclass(frozen=True)
class Target:
    """Chips to compile for.

    Attributes:
      name: value of `--preflight`, such as "v5e:16x16".
      family: family of the chips.
      shape: arrangement of the chips: a slice's grid, or the number of nodes and of GPUs per node.
    """

    name: str
    family: Family
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """Peak rates of one chip."""
        return CHIPS[self.family.chip]

    @property
    def usable(self) -> float:
        """Bytes of one chip's memory that a run can use.

        Raises:
          ConfigError: XLA_PYTHON_CLIENT_MEM_FRACTION is not above 0 and at most 1.
        """
        if self.family.usable is not None:
            return self.family.usable
        assert self.chip.hbm is not None
        return self.chip.hbm * gpu_fraction()

    @property
    def usable_note(self) -> str:
        """Reason why `usable` is less than the chip's memory."""
        if self.family.usable is not None:
            return "the compiler keeps the rest"
        return f"JAX takes {gpu_fraction():g} of it; XLA_PYTHON_CLIENT_MEM_FRACTION changes that"

    @property
    def per_node(self) -> int | None:
        """GPUs per node; None for TPUs, whose links reach the whole slice."""
        return None if self.family.platform == "tpu" else self.shape[1]


def gpu_fraction() -> float:
    """Return the share of a GPU's memory that a JAX process takes.

    Raises:
      ConfigError: XLA_PYTHON_CLIENT_MEM_FRACTION is not above 0 and at most 1.
    """
    value = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "")
    try:
        fraction = float(value) if value else DEFAULT_GPU_FRACTION
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise ConfigError(f"XLA_PYTHON_CLIENT_MEM_FRACTION must be above 0 and at most 1, not {value}")
    return fraction


def find_target(name: str) -> Target:
    """Return the target of `--preflight NAME`.

    Raises:
      ConfigError: there is no such target.
    """
    kind, _, size = name.partition(":")
    family = FAMILIES.get(kind)
    pattern = r"[1-9]\d{0,4}" if family and family.platform == "cuda" else r"[1-9]\d{0,3}(x[1-9]\d{0,3}){1,2}"
    if family is None or not re.fullmatch(pattern, size):
        raise ConfigError(f"--preflight {name} is not a target; give {_EXAMPLES}")
    if family.platform == "tpu":
        return Target(name, family, tuple(map(int, size.split("x"))))
    count = int(size)
    if count > GPUS_PER_NODE and count % GPUS_PER_NODE:
        raise ConfigError(f"--preflight {name}: nodes have {GPUS_PER_NODE} GPUs; give a multiple of {GPUS_PER_NODE}")
    return Target(name, family, (-(-count // GPUS_PER_NODE), min(count, GPUS_PER_NODE)))


def prepare(target: Target) -> None:
    """Restrict JAX to the CPU, whatever accelerators this machine has, and silence the target's compiler.

    Must run before JAX starts its backends, which loads the compilers; they read the environment then.
    """
    jax.config.update("jax_platforms", "cpu")
    if os.environ.get(_LOG_LEVEL, "1") == "1":  # JAX sets this value when it is imported
        os.environ[_LOG_LEVEL] = "3"  # fatal errors only
    for name, value in _ENVIRONMENT[target.family.platform].items():
        os.environ.setdefault(name, value)


def compile_devices(target: Target) -> list[Any]:
    """Return a target's devices, which can only be compiled for.

    Raises:
      ConfigError: the compiler is not installed, or does not support this machine.
    """
    _check_compiler(target)
    try:
        if target.family.platform == "tpu":
            arguments = dict(target.family.arguments)
            topology = topologies.get_topology_desc(target.name, "tpu", **arguments)
        else:
            config = description(target.name.partition(":")[0]).read_text(encoding="utf-8")
            shape = "x".join(map(str, (1, *target.shape)))
            topology = topologies.get_topology_desc(shape, "cuda", target_config=config, topology=shape)
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"--preflight {target.name}: {' '.join(str(error).split())[:300]}") from error
    return list(topology.devices)


_LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"
_ENVIRONMENT = {
    "tpu": {
        # Otherwise libtpu asks Google's metadata server for the machine's type, for minutes where there is no server.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5e-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        # Otherwise other processes cannot compile at the same time.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    },
    "cuda": {"CUDA_VISIBLE_DEVICES": "-1"},
}

COMPILER_OPTIONS = {
    "tpu": {},
    "cuda": {"xla_gpu_autotune_level": 0},  # autotuning would time kernels on the GPU, which is not here
}


def description(gpu: str) -> Path:
    """Return the file that describes a GPU to XLA."""
    return Path(__file__).parent / f"{gpu}.txtpb"


def _check_compiler(target: Target) -> None:
    if target.family.platform == "tpu":
        modules, wheel = ("libtpu",), "jax[tpu]"
    else:
        modules, wheel = ("jax_cuda13_plugin", "jax_cuda12_plugin"), "jax[cuda13]"
    if not any(importlib.util.find_spec(module) for module in modules):
        raise ConfigError(f"--preflight {target.name} needs the compiler for it: pip install '{wheel}'")
