"""Search for the model's state dict in a training checkpoint."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import WeightsError, first_ten
from .key_maps import EMA_KEYS, MODEL_KEYS
from .safe_pickle import Opaque, TensorRecord

MAX_ENTRIES = 1_000_000
"""Maximum number of entries examined: a hostile pickle may refer to the same dict any number of times."""

MAX_PATH = 500
"""Maximum length of a tensor's name in a pickled network; stops at networks that contain themselves."""


def find_state_dict(root: Any, path: Path, ema: bool) -> tuple[Mapping[str, TensorRecord], list[str]]:
    """Return the state dict of the model, or of its moving average, and notes for the user on the choice.

    Accepts a bare state dict, one under a usual name, or the only one under any name. A pickled network that was not
    restored (`tensors_only`) gives the parameters and buffers of its modules.

    Raises:
      WeightsError: there is no state dict, there are several, or it has entries that are not tensors.
    """
    search = _Search(path)
    entries = search.entries(root)
    models, averages = search.states(entries, MODEL_KEYS), search.states(entries, EMA_KEYS)
    if not models and not averages:
        # The root comes last: trainers keep other tensors, such as the best accuracy, next to the weights.
        models = search.states(entries, entries) or search.states({"": root}, [""])
        if len(models) > 1:
            raise WeightsError(f"cannot read {path}: several of its entries hold tensors: {first_ten(models)}")
    if ema and not averages:
        raise WeightsError(f"{path} has no moving average (EMA) of the weights")
    if not models and not averages:
        kinds = {dict: "an empty dict", TensorRecord: "a tensor without a name", Opaque: "an object"}
        what = first_ten(entries) if entries else kinds.get(type(root), f"a {type(root).__name__}")
        raise WeightsError(f"cannot read {path}: it holds no weights, only {what}")
    notes = [] if models or ema else [f"{path} has only a moving average (EMA) of the weights; loaded that"]
    state = next(iter((averages if ema or not models else models).values()))
    strangers = [key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, TensorRecord)]
    if strangers:
        raise WeightsError(f"cannot read {path}: entries that are not dense tensors: {first_ten(strangers)}")
    return state, notes


class _Search:
    """Search for state dicts that examines a bounded number of entries."""

    def __init__(self, path: Path):
        self.path = path
        self.left = MAX_ENTRIES

    def entries(self, value: Any) -> Mapping[Any, Any]:
        """Return the entries of a dict or of an object that was not restored; an empty dict for any other value."""
        contents = value.contents if isinstance(value, Opaque) else value
        entries = contents if isinstance(contents, dict) else {}
        self.left -= 1 + len(entries)
        if self.left < 0:
            raise WeightsError(f"cannot read {self.path}: a checkpoint of absurd size")
        return entries

    def states(self, entries: Mapping[Any, Any], keys: Iterable[Any]) -> dict[Any, Mapping[Any, Any]]:
        """Return the entries under `keys` that are state dicts."""
        states = {key: self._state(entries[key]) for key in keys if key in entries}
        return {key: state for key, state in states.items() if any(isinstance(t, TensorRecord) for t in state.values())}

    def _state(self, value: Any) -> Mapping[Any, Any]:
        entries = self.entries(value)
        return self._module_state(value) if isinstance(value, Opaque) and "_modules" in entries else entries

    def _module_state(self, network: Opaque) -> dict[str, Any]:
        """Return the state dict of a pickled `torch.nn.Module`, from its modules' pickled attributes."""
        state: dict[str, Any] = {}
        waiting: list[tuple[str, Any]] = [("", network)]
        while waiting:
            prefix, module = waiting.pop()
            attributes = self.entries(module)
            for part in ("_parameters", "_buffers", "_modules"):
                for name, value in self.entries(attributes.get(part)).items():
                    if not isinstance(name, str) or len(prefix) + len(name) > MAX_PATH:
                        raise WeightsError(f"cannot read {self.path}: a pickled network of absurd depth")
                    if part == "_modules":
                        waiting.append((f"{prefix}{name}.", value))
                    elif value is not None:
                        state[f"{prefix}{name}"] = value
        return state
