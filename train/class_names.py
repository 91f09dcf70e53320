"""Matching of a weight file's classifier with a data set's labels by the names of the classes."""

import unicodedata
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from repvgg_jax.errors import ConfigError, WeightsError
from repvgg_jax.net.variants import AUX_HEADS
from repvgg_jax.trees import flatten, unflatten
from repvgg_jax.weights import WeightsInfo, WeightsWarning
from repvgg_jax.weights.loading import fresh_heads

from .data import DataSet
from .data.sources import Example, Source

CLASSIFIERS = ("linear", *(f"{name}/linear" for name in AUX_HEADS))


def class_order(of_file: Sequence[str], of_data: Sequence[str]) -> list[int] | None:
    """Return each data class's index in the file, or None if the two do not name the same classes.

    Names that differ only in Unicode normalisation, which some file systems change, count as the same.
    """
    file_names, names = (list(map(_composed, side)) for side in (of_file, of_data))
    if file_names == names:  # even if a name occurs twice, as "crane" does in ImageNet
        return list(range(len(names)))
    indices = {name: index for index, name in enumerate(file_names)}
    if len(indices) != len(of_file) or len(set(names)) != len(names) or set(names) != set(indices):
        return None
    return [indices[name] for name in names]


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def difference(of_file: Sequence[str], of_data: Sequence[str]) -> str:
    """Describe how two lists of class names differ: "only in the file: cat, dog; only in the data: car"."""
    sides = (("the file", of_file, of_data), ("the data", of_data, of_file))
    parts = []
    for side, names, others in sides:
        other_side = set(map(_composed, others))
        alone = [name for name in names if _composed(name) not in other_side]
        if alone:
            more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
            parts.append(f"only in {side}: {', '.join(alone[:3])}{more}")
    return "; ".join(parts) or "a name occurs twice"


class Relabelled:
    """A source with its labels mapped to a net's outputs: label i of `source` becomes `order[i]`.

    Args:
      source: the source to read from.
      order: result of `class_order`.
      class_names: names of the net's outputs.
    """

    def __init__(self, source: Source, order: Sequence[int], class_names: Sequence[str]) -> None:
        self._source, self._order, self._class_names = source, list(order), list(class_names)

    @property
    def class_names(self) -> list[str]:
        return self._class_names

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int, /) -> Example:
        example = self._source[index]
        return Example(example.image, self._order[example.label], example.name)


def matched_source(dataset: DataSet, info: WeightsInfo, path: str, *, ignore: bool) -> tuple[Source, str]:
    """Return a data set's evaluation split with labels that are the output indices of the net in a weight file.

    Args:
      dataset: data set with as many classes as the file.
      info: description of the weight file.
      path: path of the weight file, for messages.
      ignore: match by index if the names differ.

    Returns:
      The split, and a note for the user ("" if there is none).

    Raises:
      WeightsError: the file names other classes.
    """
    source = dataset.test
    if info.class_names is None or not dataset.has_class_names:
        return source, ""
    order = class_order(info.class_names, source.class_names)
    if order is None:
        differ = difference(info.class_names, source.class_names)
        problem = f"{path} and {dataset.name} name different classes ({differ})"
        if not ignore:
            raise WeightsError(f"{problem}; --ignore-class-names evaluates by index all the same")
        return source, f"{problem}: evaluated by index"
    if order == sorted(order):
        return source, ""
    matched = Relabelled(source, order, info.class_names)
    return matched, f"{dataset.name} has the classes of {path} in another order: matched by name"


def fit_classifier(
    variables: dict[str, Any], info: WeightsInfo, dataset: DataSet, path: str, *, keep: bool
) -> dict[str, Any]:
    """Return a training form's variables with the classifier that training on `dataset` should start from.

    If the file has the same classes in another order, that is its classifier, reordered; if it has other classes, a
    fresh classifier. In both cases a `WeightsWarning` is issued.

    Args:
      variables: variables from `load_weights`, for the data set's number of classes.
      info: description of the file.
      dataset: data set to train on.
      path: path of the file, for messages.
      keep: keep the file's classifier even if it names other classes.

    Raises:
      ConfigError: `keep` is set, and the file's classifier has another number of classes.
    """
    class_names = dataset.class_names
    if info.num_classes != len(class_names):
        if keep:
            raise ConfigError(f"--keep-classifier: {path} has {info.num_classes} classes, the data {len(class_names)}")
        return variables  # load_weights has made a fresh classifier, and warned about it
    if info.class_names is None or not dataset.has_class_names:
        return variables
    order = class_order(info.class_names, class_names)
    leaves = flatten(variables)
    if order is None:
        problem = f"{path} has other classes than the data ({difference(info.class_names, class_names)})"
        if keep:
            warnings.warn(f"{problem}: its classifier is kept, by index", WeightsWarning, stacklevel=2)
            return variables
        leaves |= fresh_heads(info.variant, info.deploy, info.num_classes)
        fate = "the classifier is newly initialised, everything else is loaded (--keep-classifier keeps it)"
        message = f"{problem}: {fate}"
    elif order != sorted(order):
        for name in CLASSIFIERS:
            for leaf in (f"params/{name}/kernel", f"params/{name}/bias"):
                if leaf in leaves:
                    leaves[leaf] = leaves[leaf][..., np.asarray(order)]
        message = f"{path} has the data's classes in another order: its classifier is reordered by name"
    else:
        return variables
    warnings.warn(message, WeightsWarning, stacklevel=2)
    return unflatten(leaves)
