"""Claim: importing the library changes no process-wide state, such as other libraries' settings."""

import json
import os
import subprocess
import sys

from tests.helpers.repository import ROOT

FOLDERS = ("repvgg_jax", "train", "convert")

SCRIPT = """
import importlib, json, locale, logging, os, signal, sys, threading, warnings

# What we import, before us: what they change of their own accord is theirs.
import absl.logging, array_record.python.array_record_data_source, cv2, flax.linen, huggingface_hub, jax
import jax.experimental.multihost_utils, matplotlib.figure, numpy, onnx, optax, orbax.checkpoint, PIL.Image
import PIL.ImageFile, orbax.checkpoint.checkpoint_managers, rich.progress, simplejpeg, sklearn.datasets
import tensorboardX.event_file_writer, tensorboardX.summary, tensorflow_datasets, tyro
import tensorflow_datasets.core.read_only_builder

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGPIPE, signal.SIGUSR1)


def state():
    loggers = [logging.root, *(logging.getLogger(name) for name in ("absl", "asyncio", "jax", "orbax", "PIL"))]
    hooks = ("excepthook", "unraisablehook", "displayhook", "breakpointhook")
    return {
        "environment": dict(os.environ),
        "working directory": os.getcwd(),
        "warnings filters": [repr(entry) for entry in warnings.filters],
        "warnings format": [repr(warnings.formatwarning), repr(warnings.showwarning)],
        "signal handlers": {number.name: repr(signal.getsignal(number)) for number in SIGNALS},
        "wakeup descriptor": wakeup(),
        "locale": locale.setlocale(locale.LC_ALL),
        "PIL": [PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES, PIL.ImageFile.MAXBLOCK],
        "OpenCV": [cv2.getNumThreads(), cv2.useOptimized()],
        "JAX": {name: repr(value) for name, value in jax.config.values.items()},
        "matplotlib": repr(dict(matplotlib.rcParams.items())),
        "pyplot": "matplotlib.pyplot" in sys.modules,
        "NumPy": [repr(numpy.geterr()), repr(numpy.get_printoptions())],
        "loggers": [[logger.level, repr(logger.handlers), logger.disabled] for logger in loggers],
        "logging": logging.root.manager.disable,
        "hooks": {name: repr(getattr(sys, name)) for name in hooks} | {"threading": repr(threading.excepthook)},
        "interpreter": [sys.getrecursionlimit(), sys.getswitchinterval(), repr(sys.stdout), repr(sys.stderr)],
        "float printing": sys.float_repr_style,
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "umask": umask(),
    }


def umask():
    current = os.umask(0)
    os.umask(current)
    return current


def wakeup():
    current = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(current)
    return current


before = json.loads(json.dumps(state()))
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
exec(sys.argv[2])
after = json.loads(json.dumps(state()))
print(json.dumps({name: [before[name], after[name]] for name in before if before[name] != after[name]}))
"""


def modules() -> list[str]:
    """Return the names of all our modules."""
    paths = [path.relative_to(ROOT).with_suffix("") for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    names = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    assert len(names) > 80
    return sorted(names)


def changed_by(names: list[str], then: str = "") -> dict:
    """Return what importing these modules, and running the code `then`, has changed: before and after."""
    words = [sys.executable, "-c", SCRIPT, json.dumps(names), then]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_every_module_changes_nothing():
    assert changed_by(modules()) == {}


def test_the_state_that_is_compared_can_change():
    """Shows that the other test can fail."""
    meddling = """
os.environ["A_NEW_ONE"] = "1"
warnings.simplefilter("ignore")
warnings.formatwarning = print
signal.signal(signal.SIGTERM, signal.SIG_IGN)
PIL.ImageFile.LOAD_TRUNCATED_IMAGES = True
cv2.setNumThreads(cv2.getNumThreads() + 1)
jax.config.update("jax_enable_x64", True)
matplotlib.rcParams["lines.linewidth"] = 77
logging.getLogger("absl").setLevel(logging.CRITICAL)
sys.unraisablehook = print
numpy.seterr(all="ignore")
"""
    changed = changed_by([], meddling)
    names = "environment|warnings filters|warnings format|signal handlers|PIL|OpenCV|JAX|matplotlib|loggers|hooks|NumPy"
    assert set(changed) == set(names.split("|"))
