"""The project's pages as tests see them: their code blocks, and a sandbox where those run in seconds."""

import dataclasses
import importlib
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from PIL import Image
from sklearn.datasets import load_sample_images

import repvgg_jax as rv
from repvgg_jax.net.variants import VARIANTS
from tests.helpers.commands import command
from tests.helpers.random_weights import random_variables
from tests.helpers.repository import ROOT
from train import main as train_main
from train.presets import parse
from train.recipe import Recipe

PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]
PAGES += sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("examples/**/*.md"))

_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\S*)\n(?P<code>.*?)^```$", re.M | re.S
)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
      page, line: where it begins.
      language: the word after the fence.
      code: its contents.
      reason: why it is not run, from a comment `<!-- not run: REASON -->` right before it.
    """

    page: str
    line: int
    language: str
    code: str
    reason: str | None

    @property
    def place(self) -> str:
        """Page and line, for messages."""
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    """Return all fenced blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    all_blocks = [
        Block(page, text[: m.start("code")].count("\n"), m["language"], m["code"], m["reason"])
        for m in _BLOCK.finditer(text)
    ]
    fences = len(re.findall(r"^\s*```", text, re.M))
    assert fences == 2 * len(all_blocks), f"{page}: {fences} fences, {len(all_blocks)} blocks at the left margin"
    return all_blocks


def command_lines(code: str) -> Iterator[list[str]]:
    """Yield the words of each command in a shell block, without comments and empty lines."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def module_call(words: list[str]) -> tuple[str, list[str]] | None:
    """Return the module and arguments of a command that ends in `python -m MODULE …`, whatever launches it."""
    for position, word in enumerate(words[:-2]):
        if re.fullmatch(r"(\S*/)?python3?", word) and words[position + 1] == "-m":
            return words[position + 2], words[position + 3 :]
    return None


def _tyro(module: str, name: str = "Arguments") -> Callable[[list[str]], Any]:
    return lambda words: tyro.cli(getattr(importlib.import_module(module), name), args=words)


def _library(words: list[str]) -> Any:
    main = importlib.import_module("repvgg_jax.__main__")
    commands = {"summary": main.Summary, "predict": main.Predict, "show": main.Show}
    return tyro.extras.subcommand_cli_from_dict(commands, args=words)


PARSERS: dict[str, Callable[[list[str]], Any]] = {
    "train.main": parse,
    "train.evaluate": _tyro("train.evaluate"),
    "train.plot": _tyro("train.plot"),
    "convert": _tyro("convert.__main__"),
    "repvgg_jax": _library,
    "benchmarks.cifar10_pytorch": _tyro("benchmarks.cifar10_pytorch"),
    "benchmarks.int8_accuracy": _tyro("benchmarks.int8_accuracy"),
    "examples.cifar10": _tyro("examples.cifar10"),
    "examples.digits": _tyro("examples.digits"),
    "examples.finetune.split": _tyro("examples.finetune.split"),
    "examples.nnx_backbone": _tyro("examples.nnx_backbone"),
}
"""The real parser of every command that a page may name."""

_ENTRY_POINTS = {"convert": "convert.__main__", "repvgg_jax": "repvgg_jax.__main__"}


def use_small_nets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a small net of the same kind (groups, squeeze-and-excite, auxiliary heads) under each published name."""
    for number, (name, variant) in enumerate(list(VARIANTS.items())):
        small = dataclasses.replace(variant, num_blocks=(1, 1, 2, 1), widths=(8, 8, 8, 16, 16 + 4 * number))
        monkeypatch.setitem(VARIANTS, name, small)


def write_dahlias_and_pagodas(folder: Path, count: int = 8) -> None:
    """Write `folder/dahlia/*.jpg` and `folder/pagoda/*.jpg`: crops of scikit-learn's two photographs."""
    pictures = dict(zip(("pagoda", "dahlia"), load_sample_images().images, strict=True))
    for name, pixels in pictures.items():
        (folder / name).mkdir(parents=True)
        for number in range(1, count + 1):
            crop = pixels[20 * number : 20 * number + 120, 30 * number : 30 * number + 160]
            Image.fromarray(crop).save(folder / name / f"{number}.jpg")


class Trainer:
    """Stands in for the authors' configuration object in `ckpt_epoch_299.pth`, whose class no library has."""


class Sandbox:
    """A folder with what the pages' blocks expect: weights, photographs, and a hub without a network.

    Args:
      folder: where to create it; the current directory while blocks run.
      trains: run training commands, for one epoch of a few small images. Otherwise only parse them, and write what a
        finished run leaves, with random weights.
    """

    def __init__(self, folder: Path, *, trains: bool):
        self.folder, self.trains = folder, trains
        model = rv.create_model("RepVGG-A0")
        variables = random_variables(model)
        rv.save_weights(folder / "RepVGG-A0-train.pth", model, variables)
        rv.save_weights(folder / "repvgg-A0_8xb32_in1k.pth", model, variables, family="mmpretrain")
        rv.save_weights(folder / "final.safetensors", model, variables)
        state = torch.load(folder / "RepVGG-A0-train.pth", weights_only=True)
        torch.save({"state_dict": state, "epoch": 119}, folder / "RepVGG-A0_run_best.pth.tar")
        torch.save({"model": state, "config": Trainer()}, folder / "ckpt_epoch_299.pth")
        self._fill_hub(model, variables)
        write_dahlias_and_pagodas(folder / "photos")
        for side in ("train", "val"):
            write_dahlias_and_pagodas(folder / "imagenet" / side)
        for name, source in {"cat.jpg": "photos/dahlia/1.jpg", "dog.jpg": "photos/pagoda/1.jpg"}.items():
            (folder / name).write_bytes((folder / source).read_bytes())

    def _fill_hub(self, model: rv.RepVGG, variables: Any) -> None:
        repository = self.folder / "hub" / "models--timm--repvgg_a0.rvgg_in1k"
        snapshot = repository / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40, encoding="utf-8")
        rv.save_weights(snapshot / "model.safetensors", model, variables, family="timm")
        (snapshot / "config.json").write_text(json.dumps({"architecture": "repvgg_a0"}), encoding="utf-8")

    def run(self, block: Block, namespace: dict[str, Any]) -> None:
        """Run a block; `namespace` holds the page's Python names."""
        if block.language == "python":
            # At the line where it is on the page, so that a traceback names that line.
            code = compile("\n" * block.line + block.code, str(ROOT / block.page), "exec")
            exec(code, namespace)
            return
        for words in command_lines(block.code):
            self._run_command(words, block.place)

    def _run_command(self, words: list[str], place: str) -> None:
        call = module_call(words)
        if call is None:
            check_tool(words, place)
            return
        module, arguments = call
        arguments = [expanded for word in arguments for expanded in self._expand(word)]
        if module == "train.main":
            config = parse(arguments)
            if self.trains:
                train_main.train(shortened(config))
            else:
                leave_finished_run(config)
            return
        done = command(_ENTRY_POINTS.get(module, module), *arguments)
        assert done.returncode == 0, f"{place}: {' '.join(words)}\n{done.stderr}"

    def _expand(self, word: str) -> list[str]:
        word = word.replace("/data/imagenet", str(self.folder / "imagenet"))
        return sorted(str(p) for p in self.folder.glob(word)) if "*" in word else [word]


def check_tool(words: list[str], place: str) -> None:
    """Check what can be checked of a third-party command without running it: `make` targets, extras to install."""
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert set(words[1:]) <= set(targets), f"{place}: no such target: {' '.join(words)}"
        return
    if words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "optional-dependencies"
        ]
        for wanted in re.findall(r"\[([\w,]+)\]", " ".join(words)):
            assert set(wanted.split(",")) <= set(extras), f"{place}: no such extra: {' '.join(words)}"
        return
    raise AssertionError(f"{place}: neither run nor marked '<!-- not run: REASON -->': {' '.join(words)}")


def shortened(config: Recipe) -> Recipe:
    """Return the recipe for one epoch of a few small images, with all other options unchanged."""
    return dataclasses.replace(
        config,
        input=dataclasses.replace(config.input, image_size=32, test_image_size=32, workers=1),
        optimizer=dataclasses.replace(config.optimizer, epochs=1, batch_size=8, warmup_epochs=0),
    )


def leave_finished_run(config: Recipe) -> None:
    """Write what later commands of a page look for in the run's folder."""
    model, workdir = rv.create_model(config.model.model, num_classes=2), Path(config.run.workdir)
    variables = random_variables(model)
    workdir.mkdir(parents=True)
    rv.save_weights(workdir / "final.safetensors", model, variables, class_names=("dahlia", "pagoda"))
    rv.save_weights(workdir / "deploy.safetensors", *rv.to_deploy(model, variables), class_names=("dahlia", "pagoda"))
    row = {"step": 1, "epoch": 1.0, "loss": 0.5, "top1": 0.5, "learning_rate": 0.1}
    (workdir / "metrics.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")


def run_page(page: str, sandbox: Sandbox) -> None:
    """Run a page's blocks in order, except those that say why they are not run."""
    namespace = {"__name__": page}
    for block in blocks(page):
        if block.reason is None:
            sandbox.run(block, namespace)
