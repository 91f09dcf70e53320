"""Cost of one run of a compiled program, read from its HLO text: arithmetic, memory traffic, collectives.

XLA's own cost analysis exists only for some compilers, and counts a loop's body once. All compilers write the text
(`Compiled.as_text()`) in the same language.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) .*->.*\{$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')

_FREE = {
    *("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "iota", "opt-barrier"),
    *("partition-id", "replica-id", "add-dependency"),
}
_SLICES = {"slice", "dynamic-slice", "gather"}
_COLLECTIVES = {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all"}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one run of a program, or of a part of it, on one device.

    Attributes:
      flops: floating-point operations of convolutions and matrix products, two per multiply-add, without padding.
      traffic: bytes read from and written to the device's memory, assuming that each instruction reads its operands
        from there and writes its result there. On-chip memory (TPU's VMEM) is not counted.
      collectives: number of collective operations.
      collective_bytes: bytes of their operands on this device.
    """

    flops: float = 0
    traffic: float = 0
    collectives: float = 0
    collective_bytes: float = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def times(self, count: int) -> "Cost":
        """Return the cost of `count` runs."""
        return Cost(*(count * value for value in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class Array:
    """An array type in the text, such as `bf16[128,56,56,48]{0,3,2,1:T(8,128)(2,1)S(1)}`."""

    dtype: str
    shape: tuple[int, ...]
    layout: str

    @property
    def bytes(self) -> float:
        """Size of the elements, without the padding of tiles."""
        return math.prod(self.shape) * _bits(self.dtype) / 8

    @property
    def stored(self) -> float:
        """Bytes in memory, with every tile of the layout padded to its full size."""
        tile = re.search(r"T\(([\d,]+)\)", self.layout)
        if tile is None:
            return self.bytes
        sides = [int(side) for side in tile[1].split(",")]
        order = [int(axis) for axis in self.layout.partition(":")[0].split(",") if axis]
        sizes = [1] * len(sides) + [self.shape[axis] for axis in reversed(order)]
        for place, side in zip(range(-len(sides), 0), sides, strict=True):
            sizes[place] = -(-sizes[place] // side) * side
        return math.prod(sizes) * _bits(self.dtype) / 8

    @property
    def space(self) -> int:
        """Number of the memory space; 0 is the device's memory."""
        space = re.search(r"S\((\d+)\)", self.layout)
        return int(space[1]) if space else 0


def _bits(dtype: str) -> int:
    """Return the bits of an element; 0 for tokens and other opaque types."""
    digits = re.search(r"\d+", dtype)
    return 8 if dtype == "pred" else int(digits[0]) if digits else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `name = type operation(inside), attributes`."""

    name: str
    type: str
    operation: str
    inside: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands."""
        return tuple(re.findall(r"%([\w.\-]+)", self.inside))

    @functools.cached_property
    def arrays(self) -> list[Array]:
        """Arrays of the result; those of a tuple in order."""
        shapes = _ARRAY.findall(self.type)
        return [Array(dtype, tuple(int(n) for n in sizes.split(",") if n), layout) for dtype, sizes, layout in shapes]

    @property
    def is_number(self) -> bool:
        """Whether this is a constant with one integer."""
        return self.operation == "constant" and self.inside.isdigit()

    def attribute(self, pattern: str | re.Pattern[str]) -> str:
        """Return the first group of `pattern` in the attributes; "" if it does not match."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else ""


Computation = dict[str, Instruction]


def program_cost(text: str, *, on_chip: bool) -> Cost:
    """Return the cost of one run of a compiled program.

    Args:
      text: optimised HLO from `jax.stages.Compiled.as_text`.
      on_chip: whether memory spaces other than the first are on the chip, as on TPUs; on GPUs they are parts of the
        device's memory.

    Raises:
      ValueError: `text` is not the text of a compiled program.
    """
    computations, entry = _parse(text)
    return _Reader(computations, on_chip).cost(entry)


def entry_arrays(text: str) -> list[Array]:
    """Return the arrays that the instructions of a compiled program's entry write to memory."""
    computations, entry = _parse(text)
    written = (i for i in computations[entry].values() if i.operation not in _FREE)
    return [array for instruction in written for array in instruction.arrays]


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    computations, current, entry = {}, None, None
    for line in text.splitlines():
        if line.startswith("}"):
            current = None
        elif not line.startswith(" "):
            head = _HEAD.match(line.rstrip())
            if head:
                current = computations.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
        elif current is not None and (match := _LINE.match(line)):
            instruction = _instruction(match)
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY")
    return computations, entry


def _instruction(line: re.Match[str]) -> Instruction:
    rest = line[3]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    result, call = rest[:end], rest[end:].lstrip()
    start = call.index("(")
    stop = _closing(call, start)
    return Instruction(line[2], result, call[:start], call[start + 1 : stop], call[stop + 1 :], bool(line[1]))


def _closing(text: str, start: int) -> int:
    """Return the index of the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    raise ValueError(f"a parenthesis is not closed: {text[:100]}")


class _Reader:
    def __init__(self, computations: dict[str, Computation], on_chip: bool) -> None:
        self._computations, self._on_chip = computations, on_chip
        self._inside: dict[str, Cost] = {}

    def cost(self, name: str) -> Cost:
        """Return the cost of a computation whose instructions run one by one: the entry, a loop's body, a branch."""
        total = Cost()
        for instruction in self._computations[name].values():
            total += self._instruction(instruction, self._computations[name])
        return total

    def _instruction(self, instruction: Instruction, around: Computation) -> Cost:
        operation = instruction.operation
        if operation == "while":
            return self._loop(instruction)
        if operation in ("call", "async-start"):
            return self.cost(instruction.attribute(_CALLED))
        if operation == "conditional":
            names = re.findall(r"[\w.\-]+", ",".join(a or b for a, b in _BRANCHES.findall(instruction.attributes)))
            return max(map(self.cost, names), key=lambda cost: (cost.flops, cost.traffic))
        return self._within(instruction, around) + Cost(traffic=self._traffic(instruction, around))

    def _loop(self, instruction: Instruction) -> Cost:
        count = instruction.attribute(_TRIPS)
        trips = int(count) if count else self._limit(instruction.attribute(r"condition=%?([\w.\-]+)"))
        return self.cost(instruction.attribute(r"body=%?([\w.\-]+)")).times(trips)

    def _limit(self, name: str) -> int:
        """Return the number with which a condition compares the loop's counter; 1 for any other condition.

        Other conditions belong to rejection sampling, as for a Beta distribution: short loops over single numbers.
        """
        condition = self._computations[name]
        root = next(i for i in condition.values() if i.is_root)
        if root.operation == "fusion":
            root = next(i for i in self._computations[root.attribute(_CALLED)].values() if i.is_root)
        limits = [int(i.inside) for i in condition.values() if i.is_number]
        return limits[0] if root.operation == "compare" and len(limits) == 1 else 1

    def _within(self, instruction: Instruction, around: Computation) -> Cost:
        """Return the arithmetic and collectives of an instruction and of the computations that it fuses."""
        cost = Cost(flops=_flops(instruction, around))
        if instruction.operation.removesuffix("-start") in _COLLECTIVES:
            sources = [array for name in instruction.operands for array in around[name].arrays]
            cost += Cost(collectives=1, collective_bytes=sum(array.bytes for array in sources))
        for name in _CALLED.findall(instruction.attributes):
            cost += self._fused(name)
        return cost

    def _fused(self, name: str) -> Cost:
        if name not in self._inside:
            inside = self._computations[name]
            self._inside[name] = sum((self._within(i, inside) for i in inside.values()), Cost())
        return self._inside[name]

    def _traffic(self, instruction: Instruction, around: Computation) -> float:
        operation, arrays = instruction.operation, instruction.arrays
        if operation in _FREE or operation.endswith(("-done", "-update")):  # counted at their "-start"
            return 0
        if operation == "custom-call" and "Bitcast" in instruction.attribute(r'custom_call_target="([^"]*)"'):
            return 0
        sources = [around[name].arrays for name in instruction.operands]
        if operation == "copy-start":  # its result holds the copy, the source and a context
            return self._moved(arrays[:2])
        if operation.removesuffix("-start") in _SLICES:
            # The result of a start holds the source, the slice and a context.
            piece = arrays[1] if operation.endswith("-start") else arrays[0]
            return self._moved([piece, dataclasses.replace(piece, layout=sources[0][0].layout)])
        if operation == "dynamic-update-slice":
            return 2 * self._moved(sources[1])
        if operation.endswith("-start") and operation != "all-reduce-start":  # its result holds both source and target
            return self._moved(arrays)
        if operation == "fusion":
            return self._fusion_traffic(instruction, sources)
        return self._moved([*arrays, *(array for source in sources for array in source)])

    def _fusion_traffic(self, instruction: Instruction, sources: list[list[Array]]) -> float:
        """Return the traffic of a fusion.

        If it only reads slices of a parameter, or updates one in place, only the slices count.
        """
        inside = self._computations[instruction.attribute(r"calls=%?([\w.\-]+)")]
        parameters = {int(i.inside): i for i in inside.values() if i.operation == "parameter"}
        root = next(i for i in inside.values() if i.is_root)
        updates = root.operation == "dynamic-update-slice"
        total = self._moved(inside[root.operands[1]].arrays if updates else instruction.arrays)
        for number, arrays in enumerate(sources):
            readers = list(_readers(parameters[number].name, inside))
            if readers and all(i.operation in _SLICES and i.operands[0] == name for i, name in readers):
                pieces = [array for reader, _ in readers for array in reader.arrays]
                total += self._moved([dataclasses.replace(piece, layout=arrays[0].layout) for piece in pieces])
            elif not (updates and [(i.is_root, i.operands[0] == name) for i, name in readers] == [(True, True)]):
                total += self._moved(arrays)
        return total

    def _moved(self, arrays: list[Array]) -> float:
        return sum(array.stored for array in arrays if not (self._on_chip and array.space))


def _readers(name: str, inside: Computation) -> Iterator[tuple[Instruction, str]]:
    """Yield the instructions that read `name` in a fusion, also through bitcasts, each with the name it reads."""
    for instruction in inside.values():
        if name in instruction.operands:
            if instruction.operation == "bitcast" and not instruction.is_root:
                yield from _readers(instruction.name, inside)
            else:
                yield instruction, name


def _flops(instruction: Instruction, around: Computation) -> float:
    target = instruction.attribute(r'custom_call_target="([^"]*)"')
    if instruction.operation == "convolution" or target.startswith("__cudnn$conv"):
        return _convolution_flops(instruction, around, target)
    if instruction.operation == "dot" or target.startswith("__cublas$"):
        shape = around[instruction.operands[0]].arrays[0].shape
        sums = re.search(r'lhs_contracting_dim(?:s=\{|ension_?s":\[)"?([\d,"]*)', instruction.attributes)
        axes = re.findall(r"\d+", sums[1]) if sums else []
        return 2 * math.prod(instruction.arrays[0].shape) * math.prod(shape[int(axis)] for axis in axes)
    return 0


def _convolution_flops(instruction: Instruction, around: Computation, target: str) -> float:
    """Return the operations of a convolution, or of cuDNN's gradients of one, which have the convolution's window."""
    first, second = (around[name].arrays[0].shape for name in instruction.operands[:2])
    result = instruction.arrays[0].shape
    x, kernel, y = first, second, result
    if target.endswith("BackwardInput"):
        x, kernel, y = result, second, first
    elif target.endswith("BackwardFilter"):
        x, kernel, y = first, result, second
    of_x, of_kernel, of_y = re.split("_|->", instruction.attribute(r"dim_labels=([\w?]+->[\w?]+)"))
    places = _places(instruction, of_x, of_kernel, of_y)
    products = math.prod(_window_products(x[a], kernel[b], y[c], *how) for a, b, c, how in places)
    batches = int(instruction.attribute(r"batch_group_count=(\d+)") or 1)
    size = kernel[of_kernel.index("o")] * kernel[of_kernel.index("i")]
    return 2 * x[of_x.index("b")] // batches * size * products


def _places(
    instruction: Instruction, of_x: str, of_kernel: str, of_y: str
) -> Iterator[tuple[int, int, int, tuple[int, ...]]]:
    """Yield each spatial axis of input, kernel and output, with its stride, leading padding and both dilations."""
    window = instruction.attribute(r"window=\{([^}]*)\}")
    values = dict(word.split("=") for word in window.split())
    for axis in range(len(values["size"].split("x")) if "size" in values else 0):
        label = str(axis)

        def value(name: str, default: str, axis: int = axis) -> str:
            return values[name].split("x")[axis] if name in values else default

        before = int(value("pad", "0_0").split("_")[0])
        how = (int(value("stride", "1")), before, int(value("lhs_dilate", "1")), int(value("rhs_dilate", "1")))
        yield of_x.index(label), of_kernel.index(label), of_y.index(label), how


@functools.cache
def _window_products(x: int, kernel: int, y: int, stride: int, before: int, spread: int, dilation: int) -> int:
    """Count the pairs of output and kernel positions along one axis that fall on an element of the input."""
    starts = (out * stride - before + tap * dilation for out in range(y) for tap in range(kernel))
    return sum(0 <= place < (x - 1) * spread + 1 and place % spread == 0 for place in starts)
