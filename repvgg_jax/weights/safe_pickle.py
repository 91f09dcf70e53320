"""Reader of the pickles in PyTorch files that runs none of their code.

A pickle is a program. `torch.load(weights_only=True)` refuses pickles that call unknown functions; this reader calls
no function at all. It iterates over the opcodes (`pickletools.genops`, which only parses) and builds plain records for
a small set of names. No name in the file is ever imported.

Time and memory are bounded by the number of instructions. An instruction that takes an existing list counts once for
each of the list's entries, since it could otherwise do much work at little cost.
"""

import dataclasses
import io
import pickletools
from collections.abc import Callable, Sized
from typing import Any

from .pickle_names import HARMLESS, STORAGE_DTYPES, python3_name

MAX_STEPS = 1_000_000
"""A checkpoint with optimizer state and a moving average needs a few hundred thousand; this many take 1 to 2 s."""

MAX_NAME = 300
"""Maximum total length of a module and class name; real ones are far shorter."""

MAX_KEY_BITS = 64
"""Maximum size of an integer dict key: hashing one of millions of digits takes long, every time."""


class PickleError(ValueError):
    """The bytes are not a valid pickle of PyTorch tensors."""


class RefusedError(PickleError):
    """The pickle holds an object that cannot be restored without running code; `args[0]` is its class."""


@dataclasses.dataclass(frozen=True, slots=True)
class Global:
    """A name in the pickle, `module.class`, which is never imported."""

    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """A reference to a block of numbers stored outside the pickle: its key, element type and element count."""

    key: str
    dtype: str
    count: int


@dataclasses.dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor as described in the pickle, unchecked; offset, size and stride in elements of `storage`."""

    storage: Storage
    offset: Any
    size: Any
    stride: Any


class Opaque:
    """Placeholder for an unrestored object; `contents` holds its attributes and, for a mapping, its items."""

    __slots__ = ("contents",)

    def __init__(self) -> None:
        self.contents: dict[Any, Any] | None = None


_MARK = object()


class Reader:
    """A stack machine for the opcodes that create plain data.

    Args:
      tensors_only: represent objects of unknown classes by `Opaque` instead of refusing the pickle.

    Attributes:
      storages: all storages that the pickles read so far refer to.
    """

    def __init__(self, tensors_only: bool = False):
        self.tensors_only = tensors_only
        self.storages: set[Storage] = set()

    def load(self, file: io.BufferedIOBase) -> Any:
        """Return the object in the pickle at the file's current position, and move the position past the pickle.

        Raises:
          RefusedError: the pickle has an object of an unknown class, and `tensors_only` is not set.
          PickleError: the pickle is damaged or too long.
        """
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.steps = 0
        try:
            for opcode, argument, _ in pickletools.genops(file):  # type: ignore[arg-type]  # needs read, readline
                self._count_steps(1)
                if opcode.name == "STOP":
                    return self.stack.pop()
                self._step(opcode.name, argument)
        except PickleError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, EOFError, Warning) as error:
            raise PickleError(f"damaged pickle ({type(error).__name__})") from error
        raise PickleError("damaged pickle (no end)")

    def _count_steps(self, count: int) -> None:
        self.steps += count
        if self.steps > MAX_STEPS:
            raise PickleError(f"more than {MAX_STEPS} pickle instructions")

    def _step(self, name: str, argument: Any) -> None:
        if name in _PUSHES:
            self.stack.append(argument)
        elif name in _MAKERS:
            self.stack.append(_MAKERS[name](self))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        else:
            handler = getattr(self, f"_{name.lower()}", None)
            if handler is None:
                raise PickleError(f"the pickle instruction {name} has no place in a weight file")
            handler(argument)

    def _take(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise PickleError("damaged pickle (empty stack)")
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def _to_mark(self) -> list[Any]:
        position = len(self.stack) - 1
        while self.stack[position] is not _MARK:
            position -= 1
            if position < 0:
                raise PickleError("damaged pickle (no mark)")
        values = self.stack[position + 1 :]
        del self.stack[position:]
        return values

    def _proto(self, version: int) -> None:
        if version > 5:
            raise PickleError(f"pickle protocol {version} is unknown")

    def _frame(self, _: Any) -> None: ...

    def _pop_mark(self, _: Any) -> None:
        self._to_mark()

    def _memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _append(self, _: Any) -> None:
        self._extend(self._take(1))

    def _appends(self, _: Any) -> None:
        self._extend(self._to_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self._target(list)
        if target is not None:
            target.extend(values)

    def _dict(self, _: Any) -> None:
        values = self._to_mark()
        self.stack.append({})
        self._update(values)

    def _setitem(self, _: Any) -> None:
        self._update(self._take(2))

    def _setitems(self, _: Any) -> None:
        self._update(self._to_mark())

    def _update(self, values: list[Any]) -> None:
        target = self._target(dict)
        if target is not None:
            target.update(_with_plain_keys(zip(values[::2], values[1::2], strict=True)))

    def _target(self, kind: type) -> Any:
        """Return the list or dict to add items to; None if the items belong to an object that is not restored."""
        target = self.stack[-1]
        if isinstance(target, kind):
            return target
        if isinstance(target, Opaque) and self.tensors_only:
            return self._contents(target) if kind is dict else None
        raise PickleError(f"damaged pickle (items of no {kind.__name__})")

    _additems = _pop_mark  # sets do not contain tensors

    def _frozenset(self, _: Any) -> None:
        self._to_mark()
        self.stack.append(Opaque())

    def _pop(self, _: Any) -> None:
        self._take(1)

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._push_global(module, name)

    def _stack_global(self, _: Any) -> None:
        module, name = self._take(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleError("damaged pickle (a name that is not text)")
        self._push_global(module, name)

    def _push_global(self, module: str, name: str) -> None:
        if len(module) + len(name) > MAX_NAME:
            raise PickleError("a class name of absurd length")
        full_name = python3_name(module, name)
        if full_name not in REBUILDERS and full_name not in HARMLESS and not self.tensors_only:
            raise RefusedError(full_name)
        self.stack.append(Global(full_name))

    def _call(self, function: Any, arguments: Any) -> None:
        if not isinstance(arguments, list | tuple):
            raise PickleError("damaged pickle (call without arguments)")
        self._count_steps(len(arguments))
        if not isinstance(function, Global) and not (isinstance(function, Opaque) and self.tensors_only):
            raise PickleError("damaged pickle (a call of something that is not a function)")
        rebuild = REBUILDERS.get(function.name) if isinstance(function, Global) else None
        if rebuild is None:  # harmless, or skipped because of tensors_only: others were refused in _push_global
            self.stack.append(Opaque())
            return
        if rebuild is _ordered_dict and arguments and isinstance(arguments[0], Sized):
            self._count_steps(len(arguments[0]))
        self.stack.append(rebuild(*arguments))

    def _reduce(self, _: Any) -> None:
        self._call(*self._take(2))

    _newobj = _reduce

    def _newobj_ex(self, _: Any) -> None:
        function, arguments, _keywords = self._take(3)
        self._call(function, arguments)

    def _inst(self, argument: str) -> None:
        arguments = self._to_mark()
        self._global(argument)
        self._call(self._take(1)[0], arguments)

    def _obj(self, _: Any) -> None:
        function, *arguments = self._to_mark()
        self._call(function, arguments)

    def _build(self, _: Any) -> None:
        """Set an object's attributes. Those of a dict, such as a state dict's `_metadata`, are not weights."""
        (attributes,) = self._take(1)
        target = self.stack[-1]
        if isinstance(target, Opaque) and isinstance(attributes, dict):
            self._count_steps(len(attributes))
            self._contents(target).update(attributes)
        elif not isinstance(target, Opaque | dict):
            raise PickleError("damaged pickle (attributes of plain data)")

    @staticmethod
    def _contents(target: Opaque) -> dict[Any, Any]:
        if target.contents is None:
            target.contents = {}
        return target.contents

    def _binpersid(self, _: Any) -> None:
        """Push the storage described by `("storage", type, key, location, count[, view])`.

        Older files with pickled networks also have `("module", class, file, source)`.
        """
        (identity,) = self._take(1)
        if self.tensors_only and isinstance(identity, tuple) and identity[:1] == ("module",):
            self.stack.append(identity[1])
            return
        if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
            raise PickleError("a storage that is not PyTorch's")
        storage_type, key, _location, count = identity[1:5]
        if not isinstance(storage_type, Global) or not isinstance(key, str) or type(count) is not int or count < 0:
            raise PickleError("a storage that is not PyTorch's")
        dtype = STORAGE_DTYPES.get(storage_type.name)
        if dtype is None and self.tensors_only:
            self.stack.append(Opaque())
            return
        if dtype is None or identity[5:] not in ((), (None,)):
            raise PickleError("a storage of an unknown kind")
        storage = Storage(key, dtype, count)
        self.storages.add(storage)
        self.stack.append(storage)


def _with_plain_keys(pairs: Any) -> dict[Any, Any]:
    """Return a dict of the pairs whose keys are cheap to hash; weights and wrappers have only such keys."""
    return {key: value for key, value in pairs if _is_plain_key(key)}


def _is_plain_key(key: Any) -> bool:
    if isinstance(key, int):
        return key.bit_length() <= MAX_KEY_BITS
    return key is None or isinstance(key, str | float | bytes)


def _tensor(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    _requires_grad: Any = False,
    _hooks: Any = None,
    _more: Any = None,
) -> TensorRecord | Opaque:
    if isinstance(storage, Opaque):
        return Opaque()
    if not isinstance(storage, Storage):
        raise PickleError("a tensor without a storage")
    return TensorRecord(storage, offset, size, stride)


def _parameter(data: Any, _requires_grad: Any, _hooks: Any, _state: Any = None) -> Any:
    return data


def _with_attributes(function: Any, _class: Any, arguments: Any, _state: Any) -> Any:
    """Return a tensor that has Python attributes or is of a subclass."""
    if function not in (Global("torch._utils._rebuild_tensor_v2"), Global("torch._utils._rebuild_parameter")):
        return Opaque()
    return REBUILDERS[function.name](*arguments)


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    if not isinstance(pairs, list | tuple):
        raise PickleError("a dict of something other than pairs")
    return _with_plain_keys(pairs)


REBUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
    "collections.OrderedDict": _ordered_dict,
}
"""Calls that create tensors -> this reader's replacements for them."""

_PUSHES = frozenset(
    op.name
    for op in pickletools.opcodes
    if op.name.startswith(("INT", "BININT", "LONG", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BIN"))
    or op.name.startswith(("UNICODE", "BINUNICODE", "BINBYTES", "BYTEARRAY8"))
) - {"LONG_BINPUT", "LONG_BINGET"}
_MAKERS: dict[str, Callable[[Reader], Any]] = {
    "NONE": lambda reader: None,
    "NEWTRUE": lambda reader: True,
    "NEWFALSE": lambda reader: False,
    "EMPTY_LIST": lambda reader: [],
    "EMPTY_DICT": lambda reader: {},
    "EMPTY_TUPLE": lambda reader: (),
    "EMPTY_SET": lambda reader: Opaque(),
    "MARK": lambda reader: _MARK,
    "DUP": lambda reader: reader.stack[-1],
    "TUPLE1": lambda reader: tuple(reader._take(1)),
    "TUPLE2": lambda reader: tuple(reader._take(2)),
    "TUPLE3": lambda reader: tuple(reader._take(3)),
    "TUPLE": lambda reader: tuple(reader._to_mark()),
    "LIST": lambda reader: reader._to_mark(),
}
"""Instructions that push a value, some of them made from values on the stack."""
