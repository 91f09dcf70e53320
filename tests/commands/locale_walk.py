"""`python -m tests.commands.locale_walk {short,whole}`, run by `test_locales.py` in a folder with `photos/`."""

import importlib
import json
import locale
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

import repvgg_jax as rv
from repvgg_jax.cli import run_command
from repvgg_jax.compiler import load_library
from tests.helpers.architecture import write_variant

TINY = rv.Variant((1, 1, 2, 1), (8, 8, 8, 16, 16), name="Tiny")
SEVEN = '// 七, sieben, 七つ: a comment, as the sources have them\nextern "C" int seven() { return 7; }\n'


def run(module: str, *words: str) -> None:
    """Run `python -m MODULE WORDS` with this process's stdout and stderr."""
    sys.argv = [module, *words]
    run_command(importlib.import_module(module).main)


def main() -> None:
    """Go from C++ source and photographs to predictions, by way of training; the last line of stdout is JSON."""
    is_whole = sys.argv[1] == "whole"
    source = Path("sieben") / "seven.cc"
    source.parent.mkdir()
    source.write_bytes(SEVEN.encode())
    library = load_library(source, "numbers")
    if is_whole:
        net = str(write_variant(Path(), TINY))
        words = ["--preset", "digits", "--model", net, "--data", "photos", "--workdir", "run", "--batch-size", "8"]
        words += ["--epochs", "1", "--warmup-epochs", "0", "--image-size", "32", "--test-image-size", "32"]
        for _ in range(2):  # the second time, it reads what the first wrote
            run("train.main", *words)
        run("train.evaluate", "photos", "train", "run/final.safetensors", "-a", net)
        run("convert.__main__", "run/final.safetensors", "net.safetensors")
        run("convert.__main__", "net.safetensors", "net.onnx")
    else:
        model = rv.create_model(TINY, 2)
        variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
        preprocessing = rv.Preprocessing(image_size=32)
        rv.save_weights(
            "net.safetensors", model, variables, preprocessing=preprocessing, class_names=("garden", "pagoda")
        )
    photos = sorted(map(str, Path("photos/val").rglob("*.jpg")))[:2]
    run("repvgg_jax.__main__", "predict", "net.safetensors", *photos, "--top", "1")
    print(
        json.dumps(
            {
                "encoding": locale.getencoding(),
                "seven": "no compiler" if library is None else library.seven(),
                "classes": rv.inspect_weights("net.safetensors").class_names,
            }
        )
    )


if __name__ == "__main__":
    main()
