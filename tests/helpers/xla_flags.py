"""XLA options for the tests: the number of virtual CPU devices, and how hard the compiler optimises."""

import os
from importlib.metadata import version

# jaxlib 0.11 has no other emitter any more, and XLA aborts on an option that it does not know.
_EMITTER = " --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""
QUICK_TO_COMPILE = f"--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true{_EMITTER}"
"""Most of the suite's time goes into compiling programs that run once. All of XLA's own passes run, but LLVM optimises
less, and XLA emits LLVM code for fusions directly instead of by way of MLIR, which compiles a train step in a quarter
of the time. The slow tests compile as users do."""


def xla_flags(devices: int) -> str:
    """Return `XLA_FLAGS` with that number of virtual CPU devices, and otherwise as in the environment."""
    others = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
    return " ".join([f"--xla_force_host_platform_device_count={devices}", *others])
