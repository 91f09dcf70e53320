"""Claim: `--preflight TARGET` compiles the run's own step for machines that are not present, and counts its cost."""

import dataclasses
import json
import os
import re
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.commands import command, error_of
from tests.helpers.photos import write_photos
from tests.helpers.repository import ROOT
from train import fitting, preflight, targets
from train.chips import CHIPS, GIB
from train.compiled import Array, Cost, program_cost
from train.config_file import save_or_compare
from train.fitting import MAX_COMPILATIONS, Compiled, Memory, find_largest, needed_bytes
from train.loop import make_parallel_step
from train.presets import parse
from train.roofline import roofline
from train.run import batch_shapes, fresh_state, make_run, open_data, set_up
from train.targets import FAMILIES, Family, Target, description, find_target
from train.utilization import peak_flops

KEYS = [
    *("target", "chips", "compiled", "fits", "hbm_gib_per_chip", "peak_gib_per_chip", "tflop_per_step_per_chip"),
    *("gb_per_step_per_chip", "collectives", "roofline_images_per_second"),
]
SMALL = ["--preset", "imagenet_120", "--num-blocks", "1", "1", "1", "1", "--widths", "8", "8", "8", "8", "16"]
SMALL += ["--image-size", "32", "--batch-size", "32"]


# Cost of a compiled program.


def program(name: str) -> str:
    return (Path(__file__).parent / "programs" / name).read_text(encoding="utf-8")


def test_a_tpu_programs_count_excludes_what_stays_on_the_chip():
    cost = program_cost(program("tpu.txt"), on_chip=True)
    # A 1x1 convolution's gradient: 28 x 28 of the 56 x 56 positions meet one of the spread-out gradient's values.
    assert cost.flops == 2 * 128 * 48 * 96 * 28 * 28
    gradients, result = 2 * 128 * 28 * 28 * 96 * 2, 128 * 56 * 56 * 48 * 2
    sliced = 128 * 14 * 14 * 192 * 2  # two slices, each read once
    vector, kernel = 128 * 4, 48 * 128 * 4  # 96 channels are padded to a row of 128
    classifier = 2 * 1280 * 1000 * 4  # to the chip and back
    assert cost.traffic == gradients + result + sliced + vector + kernel + classifier
    assert (cost.collectives, cost.collective_bytes) == (1, 4 * (96 + 1280 * 1000))


def test_a_gpu_programs_count_includes_only_the_length_of_a_slice():
    cost = program_cost(program("gpu.txt"), on_chip=False)
    inside = 3 * 28 - 2  # of the 3 x 28 pairs of a tap and a position along one axis, 2 are in the padding
    assert cost.flops == 3 * 2 * 128 * 96 * 96 * inside**2 + 2 * 4 * 128 * 1280 * 252
    image, kernel = 128 * 28 * 28 * 96 * 2, 96 * 3 * 3 * 96 * 2
    convolutions = 3 * (2 * image + kernel)
    product = 4 * (128 * 4 * 252 + 1280 * 4 * 252 + 4 * 128 * 1280)
    reduced = 4 * 2211842
    assert cost.traffic == convolutions + product + 2 * reduced + 2 * 4
    assert (cost.collectives, cost.collective_bytes) == (1, reduced)


@pytest.mark.parametrize("says_how_often", [True, False])
def test_a_loop_counts_once_per_iteration(says_how_often):
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def loop(kernel, images):
        return jax.lax.scan(lambda sum_, x: (sum_ + convolve(x, kernel).sum(), None), 0.0, images)[0]

    compiled = jax.jit(loop).lower(jnp.zeros((3, 3, 8, 8)), jnp.zeros((5, 2, 10, 10, 8))).compile()
    text = compiled.as_text() or ""
    assert "known_trip_count" in text
    if not says_how_often:
        text = text.replace("known_trip_count", "unknown")
    assert program_cost(text, on_chip=False).flops == 5 * 2 * 2 * 8 * 8 * 28**2


def test_a_loop_of_unknown_length_counts_once():
    """Like those that draw a Beta distribution's samples for mixup."""

    def loop(x):
        return jax.lax.while_loop(lambda x: (x.sum() > 7) & (x.max() < 12345), lambda x: x @ x, x)

    compiled = jax.jit(loop).lower(jnp.ones((8, 8))).compile()
    assert program_cost(compiled.as_text() or "", on_chip=False).flops == 2 * 8**3


@pytest.mark.parametrize(
    ("shape", "layout", "stored"),
    [
        ((128, 28, 28, 96), "0,3,2,1:T(8,128)(2,1)", 128 * 28 * 28 * 96 * 2),
        ((2, 28, 28, 96), "0,3,2,1:T(8,128)(2,1)", 128 * 28 * 28 * 96 * 2),
        ((48,), "0:T(256)S(1)", 256 * 2),
        ((), ":T(128)", 128 * 2),
        ((3, 5), "1,0", 3 * 5 * 2),
    ],
)
def test_tiles_are_stored_completely(shape, layout, stored):
    assert Array("bf16", shape, layout).stored == stored


def test_text_that_is_not_a_program_is_refused():
    with pytest.raises(ValueError, match="not the text of a compiled program"):
        program_cost("HloModule empty\n", on_chip=False)


# Capabilities of machines.


def test_every_target_has_peak_rates_and_every_gpu_a_description():
    for family in FAMILIES.values():
        chip = CHIPS[family.chip]
        assert None not in (chip.hbm, chip.hbm_bandwidth, chip.link)
        assert (chip.network is None) == (family.platform == "tpu")
        if family.usable is not None:
            assert chip.hbm is not None
            assert 0.9 * chip.hbm < family.usable < chip.hbm
    for name in ("a100", "h100", "h200"):
        text = description(name).read_text(encoding="utf-8")
        assert "xla/backends/gpu/target_config/specs/" in text.partition("gpu_device_info")[0]
        size = re.search(r"device_memory_size: (\d+)", text)
        assert size is not None
        assert int(size[1]) == CHIPS[name.upper()].hbm


@pytest.mark.parametrize(
    ("kind", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 80GB HBM3", "float32", 494.5e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("TPU v5 lite", "float32", 197e12),
        ("TPU v5", "bfloat16", 459e12),
        ("TPU v6 lite", "bfloat16", 918e12),
        ("cpu", "float32", None),
    ],
)
def test_utilization_and_preflight_use_the_same_peak_rates(kind, dtype, peak):
    assert peak_flops(kind, dtype) == peak


def test_a_slice_is_bound_by_the_slowest_of_three_limits():
    target = find_target("v5e:16x16")
    limits = roofline(target, 256, Cost(197e9, 819e6 * 2, 1, 200e6 * 256 / 255), "bfloat16")
    assert [limits.compute, limits.memory, limits.network] == pytest.approx([1e-3, 2e-3, 2e-3])
    assert roofline(target, 256, Cost(197e9, 1), "bfloat16").bound == "compute"
    assert roofline(target, 256, Cost(1, 1, 1, 1e9), "bfloat16").bound == "network"
    assert roofline(target, 256, Cost(1, 1e9), "bfloat16").bound == "memory"


def test_between_nodes_each_gpu_sends_its_share_of_the_sum():
    one, two = find_target("h100:8"), find_target("h100:16")
    cost = Cost(collectives=1, collective_bytes=8e9)
    inside = 2 * 7 / 8 * 8e9 / 450e9
    assert roofline(one, 8, cost, "bfloat16").network == pytest.approx(inside)
    assert roofline(two, 16, cost, "bfloat16").network == pytest.approx(inside + 2 * 1 / 2 * 1e9 / 50e9)
    assert roofline(find_target("h100:1"), 1, cost, "bfloat16").network == 0


def test_float32_runs_at_half_the_rate_on_gpus():
    cost = Cost(flops=989e12)
    assert roofline(find_target("h200:8"), 8, cost, "float32").compute == 2
    assert roofline(find_target("h200:8"), 8, cost, "bfloat16").compute == 1


def test_the_environment_sets_jaxs_share_of_gpu_memory(monkeypatch):
    target = find_target("h100:8")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert target.usable == 0.75 * 84942979072
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".9")
    assert target.usable == 0.9 * 84942979072
    assert target.usable_note.startswith("JAX takes 0.9 of it")
    assert find_target("v5e:2x2").usable == 15.75 * GIB


# The largest batch.


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 23.45G of 15.75G hbm.", 23.45 * GIB),
        ("total memory required for HLO temporaries (400.00M) exceeds available HBM (15.75G).", 401 * 2**20),
        ("RESOURCE_EXHAUSTED: something else", 0),
    ],
)
def test_needed_memory_is_read_from_the_compilers_message(message, needed):
    assert needed_bytes(message, given=2**20) == needed


class Chips:
    """Stands in for a compiler: memory grows a bit less than linearly with the batch."""

    def __init__(self, says_what_it_needs: bool = True, base: float = 100) -> None:
        self.compiled: list[int] = []
        self._says, self._base = says_what_it_needs, base

    def __call__(self, per_chip: int) -> Compiled:
        self.compiled.append(per_chip)
        peak = self._base + per_chip - per_chip**0.5
        if peak > 1000:
            return Compiled(per_chip, peak if self._says else 0, 1)
        return Compiled(per_chip, peak, 1, Memory(peak, 0, 0, 0, 0), Cost())


@pytest.mark.parametrize(("asked", "says"), [(5000, True), (10, True), (900, True), (1500, False)])
def test_the_largest_batch_is_found_in_a_few_compilations_and_verified(asked, says):
    chips = Chips(says)
    result = find_largest(chips, chips(asked), 1000, step=1, most=10**6)
    assert result.fitting is not None
    assert result.fitting.per_chip in chips.compiled
    assert result.fitting.fits(1000)
    assert result.fitting.per_chip >= 15 / 16 * 930  # 930 images take 999.5
    assert len(chips.compiled) <= 5
    assert result.memory_limit


def test_memory_that_grows_in_steps_also_takes_few_compilations():
    """As on TPUs: a share is padded to a multiple of 128, and the messages report less than a fitting step needs."""
    compiled = []

    def chips(per_chip: int) -> Compiled:
        compiled.append(per_chip)
        peak = -(-per_chip // 128) * 128 * 7.0
        if peak > 15750:
            return Compiled(per_chip, peak, 1)
        return Compiled(per_chip, peak + 300, 1, Memory(peak + 300, 0, 0, 0, 0), Cost())

    result = find_largest(chips, chips(4096), 15750, step=1, most=10**6)
    assert result.fitting is not None
    assert result.fitting.per_chip >= 15 / 16 * 2176
    assert len(compiled) <= 5


def test_memory_that_grows_unevenly_is_searched_to_the_end():
    """Like A0's step on an H100: 8192 images need little more than 7424, and 3968 far less than half of that."""
    needs = {3968: 33.2, 7424: 60.1, 8192: 63.35}

    def chips(per_chip: int) -> Compiled:
        peak = float(np.interp(per_chip, [0, *needs], [0.5, *needs.values()]))
        return Compiled(per_chip, peak, 1, Memory(peak, 0, 0, 0, 0), Cost())

    result = find_largest(chips, chips(8192), 59.33, step=1, most=10**5)
    assert result.fitting is not None
    assert result.failing is not None
    assert (
        result.failing.per_chip - result.fitting.per_chip <= result.fitting.per_chip / 16 or result.fitting.peak > 58.1
    )


def test_memory_that_jumps_is_searched_to_within_a_sixteenth():
    compiled = []

    def chips(per_chip: int) -> Compiled:
        compiled.append(per_chip)
        peak = per_chip * 0.1 + 1000 * (per_chip > 777)
        return Compiled(per_chip, peak, 1, Memory(peak, 0, 0, 0, 0), Cost())

    result = find_largest(chips, chips(1024), 500, step=1, most=10**6)
    assert result.fitting is not None
    assert result.fitting.per_chip >= 15 / 16 * 777
    assert len(compiled) <= 1 + MAX_COMPILATIONS


def test_a_share_is_divisible_into_the_portions_of_accumulate():
    chips = Chips()
    result = find_largest(chips, chips(3000), 1000, step=3, most=10**6)
    assert all(images % 3 == 0 for images in chips.compiled)
    assert result.fitting is not None


def test_the_largest_batch_may_be_the_data_set():
    chips = Chips()
    result = find_largest(chips, chips(10), 1000, step=4, most=302)
    assert result.fitting is not None
    assert (result.fitting.per_chip, result.memory_limit) == (300, False)


def test_even_one_image_may_be_too_many():
    chips = Chips(base=2000)
    result = find_largest(chips, chips(4), 1000, step=1, most=100)
    assert result.fitting is None
    assert result.failing is not None
    assert result.failing.per_chip == 1


# The command.


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Allows this process's virtual CPU devices as a target, in an empty current folder."""
    target = Target("cpu:4", Family("cpu", "H100"), (1, jax.device_count()))
    monkeypatch.setattr(preflight, "find_target", lambda name: target if name == "cpu:4" else find_target(name))
    monkeypatch.setattr(preflight, "prepare", lambda _: None)
    monkeypatch.setattr(preflight, "compile_devices", lambda _: jax.devices())
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_reports_what_fits_without_data_and_writes_nothing(here):
    done = command("train.main", *SMALL, "--data-dir", here / "no", "--ema-decay", "0.9", "--preflight", "cpu:4")
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    summary = json.loads(last)
    assert list(summary)[: len(KEYS)] == KEYS
    assert (summary["target"], summary["chips"], summary["compiled"], summary["fits"]) == ("cpu:4", 4, True, True)
    assert summary["batch_size"] == 32
    assert 0 < summary["peak_gib_per_chip"] < summary["usable_gib_per_chip"] < summary["hbm_gib_per_chip"] == 79.11
    assert summary["collectives"]["number"] >= 1
    assert summary["roofline_images_per_second"] > 0
    text = "\n".join(table)
    assert re.search(r"peak memory +\d+\.\d\d GiB of 59\.33 GiB usable on each chip: fits", text)
    assert re.search(r"prefetched +.*2 more batches", text)
    assert re.search("bound +(compute|memory|network)", text)
    assert done.stderr.count("\n") == 1, done.stderr
    assert not list(here.iterdir())


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_reported_with_the_largest_that_does(here, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.00005")  # 4 MB
    done = command("train.main", *SMALL, "--batch-size", "512", "--preflight", "cpu:4")
    assert done.returncode == 1, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["compiled"], summary["fits"]) == (True, False)
    assert 0 < summary["largest_batch_size"] < 512
    assert "DOES NOT FIT" in done.stdout
    assert re.search(rf"largest batch +{summary['largest_batch_size']}, .* on each chip", done.stdout)


def test_a_step_that_the_compiler_cannot_fit_is_reported_with_what_it_needed(here, monkeypatch):
    def compile_step(run, devices, platform):
        del platform
        per_chip = run.recipe.optimizer.batch_size // len(devices)
        return Chips()(per_chip)

    monkeypatch.setattr(preflight, "compile_step", compile_step)
    monkeypatch.setattr(Target, "usable", 1000.0)
    done = command("train.main", *SMALL, "--batch-size", "20000", "--preflight", "cpu:4")
    assert done.returncode == 1
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["compiled"], summary["fits"]) == (False, False)
    assert summary["tflop_per_step_per_chip"] is summary["roofline_images_per_second"] is None
    assert 15 / 16 * 3720 <= summary["largest_batch_size"] <= 3720


def test_the_step_is_exactly_the_runs_own(tmp_path):
    options = ["--data", "digits", "--data-dir", str(tmp_path), "--mixup", "0.2", "--accumulate", "2"]
    recipe = parse([*SMALL, *options, "--ema-decay", "0.9"])

    def text(run):
        def on_devices(tree):
            return jax.tree.map(lambda a: jax.ShapeDtypeStruct((jax.device_count(), *a.shape), a.dtype), tree)

        arguments = jax.eval_shape(lambda: fresh_state(run)), batch_shapes(run, 16)
        return make_parallel_step(run).lower(*map(on_devices, arguments)).as_text()

    assert text(set_up(recipe)) == text(make_run(recipe, open_data(recipe, unopened=True)))
    assert fitting.make_parallel_step is make_parallel_step


def test_shapes_match_the_batches(tmp_path):
    from train.run import training_batches

    run = set_up(parse(["--preset", "digits", "--data-dir", str(tmp_path)]))
    with training_batches(run, 0) as batches:
        batch = next(batches)
    shapes = batch_shapes(run, 16)
    assert {name: (array.shape[1:], array.dtype) for name, array in batch.items()} == {
        name: (shape.shape, shape.dtype) for name, shape in shapes.items()
    }


@pytest.mark.parametrize(("spec", "classes"), [("imagenet2012", 1000), ("imagenet2012:5.1.0", 1000), ("cifar10", 10)])
def test_data_in_the_table_is_not_opened(spec, classes, tmp_path):
    dataset = open_data(parse([*SMALL, "--data", spec, "--data-dir", str(tmp_path / "no")]), unopened=True)
    assert (dataset.num_classes, dataset.has_class_names) == (classes, False)
    assert len(dataset.train) >= 50_000
    with pytest.raises(IndexError, match="is not open"):
        dataset.train[0]


@pytest.mark.parametrize("spec", ["digits", "synthetic"])
def test_the_tables_numbers_match_the_data(spec, tmp_path):
    recipe = parse([*SMALL, "--data", spec, "--data-dir", str(tmp_path)])
    opened, unopened = open_data(recipe), open_data(recipe, unopened=True)
    for one, other in ((opened.train, unopened.train), (opened.test, unopened.test)):
        assert (len(one), len(one.class_names)) == (len(other), len(other.class_names))
    assert dataclasses.replace(opened, train=unopened.train, test=unopened.test) == unopened


def test_a_folders_classes_are_read_from_the_folder(tmp_path):
    write_photos(tmp_path / "train", 8)
    write_photos(tmp_path / "val", 4)
    recipe = parse([*SMALL, "--data", str(tmp_path)])
    assert open_data(recipe, unopened=True).class_names == open_data(recipe).class_names


def test_a_runs_config_does_not_record_it(tmp_path):
    save_or_compare(parse([*SMALL, "--workdir", str(tmp_path)]), tmp_path)
    assert "preflight" not in (tmp_path / "config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ("--preflight", "v9:2x2"),
            "--preflight v9:2x2 is not a target; give a TPU slice, such as v4:2x2x4, v5e:16x16",
        ),
        (("--preflight", "v5e"), "--preflight v5e is not a target"),
        (("--preflight", "v5e:16"), "--preflight v5e:16 is not a target"),
        (("--preflight", "h100:2x4"), "--preflight h100:2x4 is not a target"),
        (("--preflight", "h100:0"), "--preflight h100:0 is not a target"),
        (("--preflight", "h100:12"), "--preflight h100:12: nodes have 8 GPUs; give a multiple of 8"),
        (("--preflight", "v5e:4x4"), "--preflight v5e:4x4 needs the compiler for it: pip install 'jax[tpu]'"),
        (("--preflight", "h100:8"), "--preflight h100:8 needs the compiler for it: pip install 'jax[cuda13]'"),
        (("--preflight-largest",), "--preflight-largest needs --preflight TARGET"),
        (("--preflight", "h100:8", "--data", "nobody_knows_it"), "the number of classes in nobody_knows_it is unknown"),
        (("--preflight", "h100:8", "--data", "./nowhere"), "./nowhere does not exist"),
    ],
)
def test_a_mistake_is_one_line(options, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(preflight, "prepare", lambda _: None)
    error = error_of(command("train.main", *SMALL, "--data-dir", tmp_path / "no", *options))
    assert says in error
    assert not list(tmp_path.iterdir())


def test_a_batch_that_the_chips_cannot_share_is_refused(here):
    error = error_of(command("train.main", *SMALL, "--batch-size", "30", "--preflight", "cpu:4"))
    assert "--batch-size 30 is not a multiple of 4 devices; 28 is" in error


def test_an_invalid_share_of_memory_is_refused(here, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "2")
    error = error_of(command("train.main", *SMALL, "--preflight", "cpu:4"))
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION must be above 0 and at most 1, not 2" in error


# The real compilers.


def rehearse(variable: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the command with a Python that has the compiler, in an environment without JAX settings."""
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no Python with the compiler")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XLA", "JAX", "TPU"))}
    command_line = [python, "-m", "train.main", *SMALL, *options]
    return subprocess.run(command_line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "target", "chips"),
    [
        ("REPVGG_TPU_PYTHON", "v4:2x2x4", 16),
        ("REPVGG_TPU_PYTHON", "v5e:4x4", 16),
        ("REPVGG_TPU_PYTHON", "v5p:2x2x1", 4),
        ("REPVGG_TPU_PYTHON", "v6e:2x2", 4),
        ("REPVGG_CUDA_PYTHON", "a100:8", 8),
        ("REPVGG_CUDA_PYTHON", "h100:16", 16),
        ("REPVGG_CUDA_PYTHON", "h200:4", 4),
    ],
)
def test_the_compiler_of_the_target_compiles_the_step(variable, target, chips):
    done = rehearse(variable, "--batch-size", str(8 * chips), "--dtype", "bfloat16", "--preflight", target)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["chips"], summary["fits"]) == (chips, True)
    assert summary["collectives"]["bytes"] > 4 * 1000 * 16
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("variable", "target"), [("REPVGG_TPU_PYTHON", "v5e:2x2"), ("REPVGG_CUDA_PYTHON", "h100:4")])
def test_accumulation_takes_less_memory_and_as_much_arithmetic(variable, target):
    options = ("--batch-size", "1024", "--preflight", target)
    summaries = []
    for portions in ("1", "4"):
        done = rehearse(variable, *options, "--accumulate", portions)
        assert done.returncode == 0, done.stderr
        summaries.append(json.loads(done.stdout.splitlines()[-1]))
    at_once, in_portions = summaries
    assert in_portions["peak_gib_per_chip"] < at_once["peak_gib_per_chip"]
    flops = "tflop_per_step_per_chip"
    assert in_portions[flops] == pytest.approx(at_once[flops], rel=0.02, abs=1e-4)


@pytest.mark.slow
def test_a_slice_that_does_not_exist_is_one_line():
    done = rehearse("REPVGG_TPU_PYTHON", "--preflight", "v5e:3x5")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: --preflight v5e:3x5: ")
