"""Names that `safe_pickle` accepts in pickles of tensors. They are compared as text; none is imported.

`torch.load(weights_only=True)` allows them too, so both accept the same files.
"""

_STORAGES = {
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
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt32Storage": "int32",
    "QInt8Storage": "int8",
    "QUInt8Storage": "uint8",
    "QUInt4x2Storage": "uint8",
    "QUInt2x4Storage": "uint8",
}
STORAGE_DTYPES = {f"torch.{name}": dtype for name, dtype in _STORAGES.items()}
STORAGE_DTYPES["torch.storage.UntypedStorage"] = "uint8"
"""Storage class -> numpy dtype of its elements. For quantized storages only the element size matters."""

_DTYPES = (
    *("float16", "float32", "float64", "bfloat16", "bool", "complex32", "complex64", "complex128"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("qint8", "qint32", "quint8", "quint4x2", "quint2x4"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
)
_SCHEMES = ("per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric")
_OTHER_TENSORS = ("qtensor", "sparse_tensor", "tensor_v3", "meta_tensor_no_storage", "nested_tensor")

HARMLESS = frozenset(
    {
        *STORAGE_DTYPES,
        *(f"torch.{name}" for name in (*_DTYPES, *_SCHEMES, "Size", "Tensor", "device")),
        *(f"torch._utils._rebuild_{name}" for name in _OTHER_TENSORS),
        "torch.nn.parameter.Parameter",
        "torch.serialization._get_layout",
        "_codecs.encode",
        "builtins.bytearray",
        "builtins.complex",
        "builtins.set",
        "collections.Counter",
    }
)
"""Names of plain values, and of calls that do not create weights. Their results are skipped."""


def python3_name(module: str, name: str) -> str:
    """Return `module.name` with Python 2's `__builtin__`, which older pickle protocols write, as `builtins`."""
    return f"{'builtins' if module == '__builtin__' else module}.{name}"
