"""What holds for every test: four virtual devices, and Ctrl-C that reaches the commands that tests start."""

import os
import signal

# Before JAX starts: four virtual devices, so that data parallelism is real in every test that trains.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

# A shell has its background jobs ignore Ctrl-C, and `nohup` the end of the terminal; so would every command that a test
# starts and sends such a signal.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

pytest_plugins = ["tests.helpers.runs"]
