"""Reading the pickles inside PyTorch files without running anything they ask for.

A pickle is a program. `torch.load(weights_only=True)` refuses programs that call what it does not know; this
reader goes further and calls nothing at all: it walks the opcodes (`pickletools.genops`, which only parses) and
knows a handful of names, for which it builds plain records itself. No name in the file is ever imported.
"""

import dataclasses
import io
import pickletools
from collections.abc import Callable
from typing import Any

MAX_OPCODES = 3_000_000
"""Checkpoints with optimizer state need tens of thousands; this many take some seconds."""

STORAGE_DTYPES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


class PickleError(ValueError):
    """The bytes are no sound pickle, or no pickle of PyTorch tensors."""


class RefusedError(PickleError):
    """The pickle holds an object that only running code could restore; `args[0]` is its class."""


@dataclasses.dataclass(frozen=True)
class Global:
    """A name that the pickle refers to. It stays a name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclasses.dataclass(frozen=True)
class Storage:
    """A reference to a block of numbers stored beside the pickle: its key, element type and count."""

    key: str
    dtype: str
    count: int


@dataclasses.dataclass(frozen=True)
class TensorRecord:
    """A tensor as the pickle describes it, unchecked: sizes and strides in elements of `storage`."""

    storage: Storage
    offset: Any
    size: Any
    stride: Any


class Opaque:
    """What stands for an object that was not restored."""


OPAQUE = Opaque()


def _tensor(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    _requires_grad: Any = False,
    _hooks: Any = None,
    _more: Any = None,
) -> Any:
    if storage is OPAQUE:
        return OPAQUE
    if not isinstance(storage, Storage):
        raise PickleError("a tensor without a storage")
    return TensorRecord(storage, offset, size, stride)


def _parameter(data: Any, _requires_grad: Any, _hooks: Any, _state: Any = None) -> Any:
    return data


def _dict(pairs: Any = ()) -> dict:
    if not isinstance(pairs, list | tuple):
        raise PickleError("a dict of something other than pairs")
    return {key: value for key, value in pairs if isinstance(key, _SIMPLE)}


def _opaque(*_: Any) -> Opaque:
    return OPAQUE


REBUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "collections.OrderedDict": _dict,
    "collections.Counter": _opaque,
    "torch.Size": _opaque,
    "torch.device": _opaque,
    "_codecs.encode": _opaque,
}
"""The calls a pickle of tensors makes, and what this reader builds instead of calling."""

_KNOWN_VALUES = {f"torch.{name}" for name in (*STORAGE_DTYPES.values(), "complex64", "complex128", "strided")}
_SIMPLE = (str, int, float, bool, bytes, type(None))
_MARK = Opaque()


class Reader:
    """A stack machine for the opcodes that make plain data.

    Args:
      tensors_only: let objects of unknown classes stand as `OPAQUE` instead of refusing the pickle.

    Attributes:
      storages: every storage that the pickles read so far refer to.
    """

    def __init__(self, tensors_only: bool = False):
        self.tensors_only = tensors_only
        self.storages: set[Storage] = set()

    def load(self, file: io.BufferedIOBase) -> Any:
        """The object of the pickle that starts at the file's position; the position moves behind it.

        Raises:
          RefusedError: an object of an unknown class, unless `tensors_only`.
          PickleError: a damaged pickle, or one too long.
        """
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        count = 0
        try:
            for opcode, argument, _ in pickletools.genops(file):  # type: ignore[arg-type]  # needs read, readline
                count += 1
                if count > MAX_OPCODES:
                    raise PickleError(f"more than {MAX_OPCODES} pickle instructions")
                if opcode.name == "STOP":
                    return self.stack.pop()
                self._step(opcode.name, argument)
        except PickleError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, EOFError, Warning) as error:
            raise PickleError(f"damaged pickle ({type(error).__name__})") from error
        raise PickleError("damaged pickle (no end)")

    def _step(self, name: str, argument: Any) -> None:
        if name in _PUSHES:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
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

    def _mark(self, _: Any) -> None:
        self.stack.append(_MARK)

    def _pop_mark(self, _: Any) -> None:
        self._to_mark()

    def _dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def _memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._to_mark()))

    def _tuple1(self, _: Any) -> None:
        self.stack.append(tuple(self._take(1)))

    def _tuple2(self, _: Any) -> None:
        self.stack.append(tuple(self._take(2)))

    def _tuple3(self, _: Any) -> None:
        self.stack.append(tuple(self._take(3)))

    def _list(self, _: Any) -> None:
        self.stack.append(self._to_mark())

    def _append(self, _: Any) -> None:
        self._extend(self._take(1))

    def _appends(self, _: Any) -> None:
        self._extend(self._to_mark())

    def _extend(self, values: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)
        elif self.stack[-1] is not OPAQUE:
            raise PickleError("damaged pickle (append to no list)")

    def _dict(self, _: Any) -> None:
        values = self._to_mark()
        self.stack.append({})
        self._update(values)

    def _setitem(self, _: Any) -> None:
        self._update(self._take(2))

    def _setitems(self, _: Any) -> None:
        self._update(self._to_mark())

    def _update(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if target is OPAQUE:
            return
        if not isinstance(target, dict):
            raise PickleError("damaged pickle (item of no dict)")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if isinstance(key, _SIMPLE):  # hashing a nested key may take for ever; no weight has one
                target[key] = value

    def _additems(self, _: Any) -> None:
        self._to_mark()  # sets have no tensors

    def _frozenset(self, _: Any) -> None:
        self._to_mark()
        self.stack.append(OPAQUE)

    def _pop(self, _: Any) -> None:
        self._take(1)

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._push_global(module, name)

    def _stack_global(self, _: Any) -> None:
        module, name = self._take(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleError("damaged pickle (a name that is no text)")
        self._push_global(module, name)

    def _push_global(self, module: str, name: str) -> None:
        found = Global(module, name)
        known = str(found) in REBUILDERS or str(found) in _KNOWN_VALUES or _is_storage(found)
        if not known and not self.tensors_only:
            raise RefusedError(str(found))
        self.stack.append(found)

    def _call(self, function: Any, arguments: Any) -> None:
        if not isinstance(arguments, list | tuple):
            raise PickleError("damaged pickle (call without arguments)")
        rebuild = REBUILDERS.get(str(function)) if isinstance(function, Global) else None
        if rebuild is None and not self.tensors_only:
            raise RefusedError(str(function) if isinstance(function, Global) else "no class")
        self.stack.append(OPAQUE if rebuild is None else rebuild(*arguments))

    def _reduce(self, _: Any) -> None:
        self._call(*self._take(2))

    def _newobj(self, _: Any) -> None:
        self._call(*self._take(2))

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
        self._take(1)  # attributes of an object, such as a state dict's `_metadata`: not weights

    def _binpersid(self, _: Any) -> None:
        """`("storage", type, key, location, count[, view])`, all that PyTorch ever stores beside a pickle."""
        identity = self._take(1)[0]
        kind, storage_type, key, _location, count, *view = identity
        if kind != "storage" or not isinstance(storage_type, Global) or not isinstance(key, str):
            raise PickleError("a storage that is none of PyTorch's")
        if type(count) is not int or count < 0 or view not in ([], [None]):
            raise PickleError("a storage of an unknown kind")
        dtype = STORAGE_DTYPES.get(storage_type.name) if storage_type.module == "torch" else None
        if dtype is None and self.tensors_only:
            self.stack.append(OPAQUE)
            return
        if dtype is None:
            raise PickleError(f"tensors of type {storage_type} are no weights")
        storage = Storage(key, dtype, count)
        self.storages.add(storage)
        self.stack.append(storage)


def _is_storage(found: Global) -> bool:
    return found.module in ("torch", "torch.storage") and found.name.endswith("Storage")


_PUSHES = frozenset(
    op.name
    for op in pickletools.opcodes
    if op.name.startswith(("INT", "BININT", "LONG", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BIN"))
    or op.name.startswith(("UNICODE", "BINUNICODE", "BINBYTES", "BYTEARRAY8"))
) - {"LONG_BINPUT", "LONG_BINGET"}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": _opaque,
}
