"""What holds for every test: four virtual devices, and Ctrl-C that reaches the commands that tests start."""

import os
import signal

# Before JAX starts: four virtual devices, so that data parallelism is real in every test that trains.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

# A shell has its background jobs ignore Ctrl-C, and so would every command that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["tests.helpers.runs"]
