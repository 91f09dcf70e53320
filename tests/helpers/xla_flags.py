"""XLA's options for the tests: how many virtual CPU devices, and how much work the compiler puts into a program."""

import os

QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
"""Two thirds of the suite's time is compilation of programs that run once. XLA's own passes all run; LLVM optimises
less. The slow tests compile as users do."""


def xla_flags(devices: int) -> str:
    """Return `XLA_FLAGS` for so many virtual CPU devices, and otherwise as the environment has them."""
    others = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
    return " ".join([f"--xla_force_host_platform_device_count={devices}", *others])
