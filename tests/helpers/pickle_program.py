"""Pickles written by hand, instruction by instruction.

A pickle is a program for a machine with a stack and a memo; its instructions are named as in the `pickle` module.
"""

import struct
from pickle import BININT, BININT1, BINUNICODE, EMPTY_DICT, GLOBAL, MARK, PROTO, SETITEMS

START = PROTO + b"\x02"


def text(value: str) -> bytes:
    """Push a string."""
    return BINUNICODE + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    """Push an integer of 32 bits."""
    return BININT + struct.pack("<i", value)


def small_number(value: int) -> bytes:
    """Push an integer below 256."""
    return BININT1 + bytes([value])


def name_of(module: str, name: str) -> bytes:
    """Push the function or class `module.name`."""
    return GLOBAL + f"{module}\n{name}\n".encode()


def dict_of(*items: bytes) -> bytes:
    """Push a dict; each item pushes a key and its value."""
    return EMPTY_DICT + MARK + b"".join(items) + SETITEMS
