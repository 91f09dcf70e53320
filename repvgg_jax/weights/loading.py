"""Loading a model and its variables from a weight file, a training run, a bucket or the Hugging Face hub."""

import dataclasses
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..errors import WeightsError, shown
from ..machine import cores
from ..net.layout import check_finite, check_shapes, constants, head_layers
from ..net.model import RepVGG, checked_count
from ..net.variants import AUX_HEADS, Variant, checked_epsilon, get_variant
from ..paths import expand_home, in_bucket, is_folder, is_url
from ..processes import check_not_forked
from ..trees import unflatten
from . import native, quantized_tensors
from .bucket_files import copied
from .containers import open_file, read_container
from .hub import explaining_damage, fetch, is_hub_address
from .identify import Identification, identify, part_of, same_network, with_block, with_stated_epsilon
from .info import WeightsInfo, WeightsWarning, default_preprocessing
from .key_maps import QAREPVGG
from .side_file import with_side_file
from .state_dict import Item, items, to_leaf
from .tensor_file import TensorFile
from .training_run import FACTS, find_checkpoint, read_checkpoint

HEAD_SEED = 0
"""Fixed, so that a newly initialised classifier is reproducible."""

MAX_THREADS = 4
"""Tensors read and transposed in parallel; each thread holds one in the file's layout."""

HEADS = ("linear", *(f"{name}/linear" for name in AUX_HEADS))


@dataclasses.dataclass(frozen=True)
class Contents:
    """An identified weight file.

    Attributes:
      file: the open file, with keys without wrappers' prefixes.
      info: the file's description.
      items: all entries of the complete model; empty if it is quantised.
    """

    file: TensorFile
    info: WeightsInfo
    items: list[Item]


def load_weights(
    path: str | os.PathLike,
    name: str | Variant | None = None,
    num_classes: int | None = None,
    *,
    ema: bool = False,
    tensors_only: bool = False,
    epsilon: float | None = None,
    prefix: str = "",
) -> tuple[RepVGG, dict[str, Any]]:
    """Return the model and the variables in a weight file of any supported format.

    Reads native files and those of the authors, timm and MMPretrain, in training or deploy form, in safetensors or
    PyTorch format. The kind of file is determined from its keys and shapes. Code in a file is never run.

    Args:
      path: a weight file, read together with its `PATH.json` if `save_weights` wrote one; a training run, for its best
        checkpoint; or a single checkpoint. Each may be in a bucket (`gs://…`, `s3://…`), from which it is copied to the
        local disk first. Or an address on the Hugging Face hub: `hf://OWNER/REPOSITORY`, or `hf://RepVGG-A0` for a
        variant's ImageNet weights.
      name: expected variant; needed only if the file does not determine it, otherwise checked against the file. A
        `Variant` that fits the weights is used as it is, since PyTorch files do not contain a network's activation,
        stem stride and output stride. (The epsilon in a native or side file is used if the `Variant` has the default.)
      num_classes: number of classes. If the file has another number, the classifier is newly initialised, with a
        `WeightsWarning`, and everything else is loaded.
      ema: load the moving average of the weights, if a training checkpoint has one.
      tensors_only: skip pickled objects of unknown classes next to the weights instead of refusing the file.
      epsilon: epsilon of the BatchNorms that the weights were trained with. Only native files contain it; for others
        the default is 1e-5, as in PyTorch. YOLO trainers and Keras use 1e-3.
      prefix: load only the entries whose keys begin with this, such as `encoder.`, from a larger model. A net without
        classifier needs `num_classes`.

    Returns:
      `model, variables`, in the form (training or deploy) that the file has; float32.

    Raises:
      UnknownModelError: no variant is called `name`.
      WeightsError: the file is unreadable, unsafe, quantised, of another variant, or not exactly one complete RepVGG.
      ValueError: `num_classes` is not positive, or `epsilon` not above 0 and below 1.
    """
    options: dict[str, Any] = dict(ema=ema, tensors_only=tensors_only, epsilon=epsilon, prefix=prefix)
    model, variables, _ = load_with_info(path, name, num_classes, stacklevel=3, **options)
    return model, variables


def load_with_info(
    path: str | os.PathLike,
    name: str | Variant | None = None,
    num_classes: int | None = None,
    *,
    stacklevel: int = 2,
    **options: Any,
) -> tuple[RepVGG, dict[str, Any], WeightsInfo]:
    """Return the results of `load_weights` and `inspect_weights`, opening the file once."""
    if num_classes is not None:
        num_classes = checked_count("num_classes", num_classes)
    check_not_forked()
    with open_weights(path, name, num_classes, **options) as contents:
        info, file = contents.info, contents.file
        check_float(path, info)
        wanted = num_classes or info.num_classes
        fresh = wanted != info.num_classes

        def leaf_of(item: Item) -> jax.Array:
            leaf = to_leaf(file.read(file.tensors[item.key]), item)
            check_finite(leaf, item.key, f"{path}")
            return jax.device_put(leaf)

        chosen = {i.leaf: i for i in contents.items if i.leaf is not None and not (fresh and _is_head(i.leaf))}
        with ThreadPoolExecutor(min(MAX_THREADS, cores())) as pool:
            leaves: dict[str, Any] = dict(zip(chosen, pool.map(leaf_of, chosen.values()), strict=True))
        for note in file.notes:
            warnings.warn(note, WeightsWarning, stacklevel=stacklevel)
    leaves = {leaf: jax.device_put(one) for leaf, one in constants(info.variant, info.deploy).items()} | leaves
    if fresh:
        leaves |= fresh_heads(info.variant, info.deploy, wanted)
        had = f"{info.num_classes} classes" if info.num_classes else "no classifier"
        message = f"{path} has {had}, not {wanted}: the classifier is newly initialised, everything else is loaded"
        warnings.warn(message, WeightsWarning, stacklevel=stacklevel)
    return RepVGG(info.variant, wanted, info.deploy), unflatten(leaves), info


def check_float(path: str | os.PathLike, info: WeightsInfo) -> None:
    """Raise WeightsError if `path`, described by `info`, holds a quantised net."""
    if info.quantized:
        raise WeightsError(
            f"{path} holds a quantised net (INT8), and float weights are needed here: rounded ones cannot be "
            "trained, fused or rewritten; take the file that it was made from"
        )


def inspect_weights(
    path: str | os.PathLike,
    name: str | Variant | None = None,
    *,
    ema: bool = False,
    tensors_only: bool = False,
    epsilon: float | None = None,
    prefix: str = "",
) -> WeightsInfo:
    """Return a weight file's description (family, variant, form, classes, dtype, preprocessing) without its weights.

    Arguments as for `load_weights`.

    Raises:
      UnknownModelError: no variant is called `name`.
      WeightsError: the file is not a valid weight file, or not exactly one complete RepVGG.
      ValueError: `epsilon` is not above 0 and below 1.
    """
    options: dict[str, Any] = dict(ema=ema, tensors_only=tensors_only, epsilon=epsilon, prefix=prefix)
    with open_weights(path, name, headless=True, **options) as contents:
        return contents.info


@contextmanager
def open_weights(
    path: str | os.PathLike,
    name: str | Variant | None = None,
    num_classes: int | None = None,
    *,
    ema: bool = False,
    tensors_only: bool = False,
    epsilon: float | None = None,
    prefix: str = "",
    headless: bool = False,
) -> Iterator[Contents]:
    """Yield the open file after checking that its keys and shapes are exactly those of one model.

    Arguments as for `load_weights`; `headless` accepts a file without classifier even if `num_classes` is None.

    Raises:
      UnknownModelError, WeightsError: as `load_weights`.
    """
    if epsilon is not None:
        epsilon = checked_epsilon(epsilon)
    expected = get_variant(name) if isinstance(name, str) else name
    exact = name if isinstance(name, Variant) else None
    address, config, note, copy = os.fspath(path), None, None, None
    with ExitStack() as stack:
        if is_hub_address(address):
            hub_file = fetch(address)
            local, config, note = hub_file.path, hub_file.config, hub_file.note
            stack.enter_context(explaining_damage(local))
        elif in_bucket(address):
            copy = stack.enter_context(copied(address))
            local, note = copy.path, copy.note
        else:
            if is_url(address):
                raise WeightsError(f"{shown(address)} is not fetched: download it first, and give the file")
            local = Path(expand_home(address))
        is_run = is_folder(local)
        if is_run and note is None:
            local, note = find_checkpoint(local)
        handle = stack.enter_context(open_file(local / FACTS if is_run else local, f"{path}"))
        file = read_checkpoint(handle, local, ema) if is_run else read_container(handle, local, ema, tensors_only)
        file.notes += [note] if note else []
        info = native.read_info(file, exact)
        if info is None:
            file = part_of(file, prefix, f"{path}")
            contents = _foreign_contents(file, expected, exact, headless or num_classes is not None, f"{path}")
            info = contents.info
            if not is_hub_address(address):
                info, note = with_side_file(info, local, exact, len(file.tensors))
                file.notes += [copy.naming_original(note) if copy else note] if note else []
        else:
            if prefix:
                raise WeightsError(f"{path} is a native file, which holds one net: prefix {prefix!r} does not apply")
            _check_expected(info.variant, expected, f"{path}")
            if exact is not None:
                info = dataclasses.replace(info, variant=with_stated_epsilon(exact, info.variant))
            contents = _native_contents(file, info, f"{path}")
        if config is not None and info.family != native.FAMILY:
            info = config.apply(info)
        if epsilon is not None:
            info = dataclasses.replace(info, variant=dataclasses.replace(info.variant, epsilon=epsilon))
        yield dataclasses.replace(contents, info=info)


def _native_contents(file: TensorFile, info: WeightsInfo, where: str) -> Contents:
    if info.quantized:
        quantized_tensors.check_tensors(file, info, where)
        return Contents(file, info, [])
    entries = items(None, info.variant, info.deploy, info.num_classes, info.in_channels)
    _check_entries(file, entries, where, info.variant)
    return Contents(file, info, entries)


def _foreign_contents(
    file: TensorFile, expected: Variant | None, exact: Variant | None, headless: bool, where: str
) -> Contents:
    """Return the contents of a file of another family.

    `exact` is the `Variant` that the caller passed, if any; a note on a custom variant is then omitted.
    """
    identity = identify({key: tensor.shape for key, tensor in file.tensors.items()}, where)
    if identity.variant is not None and identity.variant.name != "custom":
        _check_expected(identity.variant, expected, where)
    variant = expected or identity.variant
    if variant is None:
        raise WeightsError(
            f"{where} has {identity.family.name} keys, but not all of a RepVGG's"
            + (f": {identity.gaps}" if identity.gaps else "; with a variant's name, what is wrong with them is listed")
        )
    if exact is None:
        variant = with_block(variant, "qarepvgg" if identity.family is QAREPVGG else "repvgg")
    if variant.name == "custom" and exact is None:
        blocks, widths = (", ".join(map(str, numbers)) for numbers in (variant.num_blocks, variant.widths))
        file.notes.append(
            f"{where} is not a published variant: blocks {blocks}; widths {widths}; groups {variant.groups}"
        )
    entries = items(identity.family, variant, identity.deploy, identity.num_classes, identity.in_channels or 3)
    if not identity.num_classes and headless:
        entries = [item for item in entries if item.leaf is None or not _is_head(item.leaf) or item.key in file.tensors]
    try:
        _check_entries(file, entries, where, variant)
        if not identity.num_classes and not headless:
            raise WeightsError(f"{where} has no classifier")
    except WeightsError as error:
        raise WeightsError(f"{error}{_advice(file, identity, headless)}") from None
    return Contents(file, _info_of(file, entries, identity, variant), entries)


def _advice(file: TensorFile, identity: Identification, headless: bool) -> str:
    """Return advice on a file that does not hold exactly one complete network."""
    advice = ""
    if identity.strangers:
        firsts = {key.partition(".")[0] for key in file.tensors.keys() - set(identity.strangers)}
        if len(firsts) == 1:
            (name,) = firsts
            advice = f'; a RepVGG in a larger model is taken out of it with prefix="{name}." (--prefix {name}.)'
    if not identity.num_classes and not headless:
        advice += "; a net without classifier gets a fresh one with num_classes=N (--num-classes N)"
    return advice


def _check_expected(held: Variant, expected: Variant | None, where: str) -> None:
    if expected is not None and not same_network(expected, held):
        raise WeightsError(f"{where} holds {held.name}, not {expected.name}")


def _check_entries(file: TensorFile, entries: list[Item], where: str, variant: Variant) -> None:
    """Check that a file has exactly a model's entries; only BN counters may be absent."""
    expected = {item.key: item.file_shape for item in entries if item.leaf is not None or item.key in file.tensors}
    shapes = {key: tensor.shape for key, tensor in file.tensors.items()}
    check_shapes(shapes, expected, where, "a custom RepVGG" if variant.name == "custom" else variant.name)
    for item in entries:
        kinds, what = ("iu", "integers") if item.leaf is None else ("fV", "floats")  # V: bfloat16, to numpy
        tensor = file.tensors.get(item.key)
        if tensor is not None and tensor.dtype.kind not in kinds:
            raise WeightsError(f"{where}: {shown(item.key)} has {tensor.dtype} values, not {what}")


def _info_of(file: TensorFile, entries: list[Item], identity: Identification, variant: Variant) -> WeightsInfo:
    counters = [int(file.read(file.tensors[i.key])) for i in entries if i.leaf is None and i.key in file.tensors]
    learned = [item for item in entries if item.leaf is not None and item.leaf.startswith("params/")]
    return WeightsInfo(
        family=identity.family.name,
        variant=variant,
        deploy=identity.deploy,
        num_classes=identity.num_classes,
        in_channels=identity.in_channels,
        dtype=file.tensors[learned[0].key].dtype.name,
        num_parameters=sum(int(np.prod(item.shape)) for item in learned),
        preprocessing=default_preprocessing(variant, identity.in_channels),
        num_batches_tracked=max(counters, default=None),
    )


def _is_head(leaf: str) -> bool:
    return leaf.removeprefix("params/").rpartition("/")[0] in HEADS


def fresh_heads(variant: Variant, deploy: bool, num_classes: int) -> dict[str, jax.Array]:
    """Return newly initialised classifiers, including auxiliary ones: PyTorch's default initialisation, fixed seed."""
    leaves = {}
    for layer in head_layers(variant, deploy, num_classes):
        if layer.kind != "linear":
            continue
        bound = layer.shape[0] ** -0.5
        for leaf, shape in layer.leaves():
            key = jax.random.fold_in(jax.random.key(HEAD_SEED), len(leaves))
            leaves[leaf] = jax.random.uniform(key, shape, minval=-bound, maxval=bound)
    return leaves
