"""Reads pickles of tensors and plain values, constructs nothing else, and does no more work than a checkpoint needs.

PyTorch's `weights_only` reader calls what a list of its own allows, and trusts the numbers that it is called with: a
file of 500 bytes may have it set aside gigabytes, or show memory that was never written. Here each name that a pickle
may ask for stands for a function of this file, and whatever else it asks for is refused by name.
"""

from __future__ import annotations

import math
import pickle
import struct
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

MOST_STEPS = 500_000
"""Most operations of a pickle; the training state of ViT-B/16 takes 30,000."""
_LONGEST_NAME = 512

STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
_NUMPY_TYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_CODES = {"b1": "?", "f2": "e", "f4": "f", "f8": "d", "i1": "b", "i2": "h", "i4": "i", "i8": "q"} | {
    "u1": "B",
    "u2": "H",
    "u4": "I",
    "u8": "Q",
}


class Module:
    """Stands in for every scripted class: keeps its attributes, runs nothing."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}


class Function(NamedTuple):
    """What a name in a pickle stands for where it is called."""

    call: Callable[..., Any]


class _NumpyType:
    """The type of a numpy scalar, whose byte order the pickle says later."""

    def __init__(self, code: Any, *_: Any) -> None:
        if code not in _NUMPY_TYPES:
            raise pickle.UnpicklingError("it holds a numpy scalar that is not a number")
        self.code = "<" + _CODES[code]

    def build(self, state: Any) -> None:
        self.code = (">" if state[1] == ">" else "<") + self.code[1:]


_MODULE, _TENSOR = object(), object()


def view(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any) -> Tensor:
    """A tensor in a storage (n,), of no more elements than the storage holds.

    Raises:
        UnpicklingError: it would reach beyond the storage, or read elements more than once.
    """
    if any(isinstance(more, Mapping) and more for more in rest[2:]):  # conjugated or negated in memory
        raise pickle.UnpicklingError("it holds a tensor that is stored conjugated or negated")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
        raise pickle.UnpicklingError("it holds a tensor whose shape is damaged")
    numel = math.prod(size)
    if numel == 0:
        return storage.new_empty(size)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if numel > len(storage) or last >= len(storage):
        raise pickle.UnpicklingError(f"a tensor of {numel} elements in a storage of {len(storage)}")
    return storage.as_strided(size, stride, offset)


def _view_of_type(storage: Tensor, offset: int, size: Any, stride: Any, _: Any, hooks: Any, *rest: Any) -> Tensor:
    dtype, *metadata = rest
    if not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("it holds a tensor of no known dtype")
    return view(storage.view(dtype), offset, size, stride, False, hooks, *metadata)


def _of_type(function: Any, kind: Any, arguments: tuple[Any, ...], _: Any) -> Any:
    if not isinstance(function, Function) or kind is not _TENSOR:
        raise pickle.UnpicklingError("it holds a tensor of a class of its own")
    return function.call(*arguments)


def _first(value: Any, *_: Any) -> Any:
    return value


def _dictionary(items: Any = ()) -> dict[Any, Any]:
    return dict(items)


def _bytes(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it holds bytes in {encoding!r:.20}")
    return text.encode("latin1")


def _number(kind: Any, content: Any = b"") -> Any:
    if not isinstance(kind, _NumpyType) or not isinstance(content, bytes):
        raise pickle.UnpicklingError("it holds a numpy scalar that is damaged")
    return struct.unpack(kind.code, content)[0]


def _device(name: Any, index: Any = None) -> str:
    return str(name)[:20] if index is None else f"{str(name)[:20]}:{index!r:.8}"


def _names() -> dict[str, Any]:
    names: dict[str, Any] = {f"torch.{name}": dtype for name, dtype in STORAGES.items()}
    dtypes = [value for value in vars(torch).values() if isinstance(value, torch.dtype)]
    names |= {str(dtype): dtype for dtype in dtypes if not str(dtype).startswith("torch.q")}
    names |= dict.fromkeys(("torch.storage.UntypedStorage", "torch.UntypedStorage"), torch.uint8)
    names |= dict.fromkeys(("torch.Tensor", "torch.nn.parameter.Parameter"), _TENSOR)
    functions: dict[str, Callable[..., Any]] = {
        "torch._utils._rebuild_tensor": view,
        "torch._utils._rebuild_tensor_v2": view,
        "torch._utils._rebuild_tensor_v3": _view_of_type,
        "torch._utils._rebuild_parameter": _first,
        "torch._utils._rebuild_parameter_with_state": _first,
        "torch._tensor._rebuild_from_type_v2": _of_type,
        "torch.Size": tuple,
        "torch.device": _device,
        "collections.OrderedDict": _dictionary,
        "_codecs.encode": _bytes,
        "numpy.dtype": _NumpyType,
        "numpy.core.multiarray.scalar": _number,
        "numpy._core.multiarray.scalar": _number,
    }
    return names | {name: Function(function) for name, function in functions.items()}


_SCRIPTED = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")
"""How a TorchScript archive marks lists and dictionaries among a module's attributes."""


class Unpickler:
    """Reads one pickle.

    Args:
        file: where it begins.
        size: bytes of the file.
        storage: gives the storage (n,) that a persistent id names.
        scripted: whether modules of TorchScript may be in it.
    """

    def __init__(self, file: BinaryIO, size: int, storage: Callable[[Any], Tensor], scripted: bool = False) -> None:
        self._file, self._size, self._storage, self._scripted = file, size, storage, scripted
        self._names = _names()
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """What the pickle holds: numbers, text, tensors, and tuples, lists and dictionaries of these.

        Raises:
            UnpicklingError: it asks for anything else, whose name the message gives after GLOBAL, or is too long.
            Exception: it is damaged.
        """
        for _ in range(MOST_STEPS):
            code = self._take(1)
            if code == pickle.STOP:
                return self._stack.pop()
            step = _STEPS.get(code)
            if step is None:
                raise pickle.UnpicklingError(f"opcode {code[0]} is not part of a checkpoint")
            step(self)
        raise pickle.UnpicklingError(f"its pickle is longer than {MOST_STEPS} steps")

    def _take(self, count: int) -> bytes:
        if count > _LONGEST_NAME and count > self._size - self._file.tell():
            raise EOFError("its pickle ends early")
        content = self._file.read(count)
        if len(content) != count:
            raise EOFError("its pickle ends early")
        return content

    def _unpack(self, format: str) -> Any:
        return struct.unpack(format, self._take(struct.calcsize(format)))[0]

    def _line(self) -> str:
        return self._file.readline(_LONGEST_NAME).decode().removesuffix("\n")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop_marked(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _protocol(self) -> None:
        self._take(1)

    def _mark(self) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _global(self) -> None:
        module, name = self._line(), self._line()
        if self._scripted and module.startswith("__torch__"):
            self._push(_MODULE)
        elif self._scripted and module == "torch.jit._pickle" and name in _SCRIPTED:
            self._push(Function(_first))
        elif f"{module}.{name}" in self._names:
            self._push(self._names[f"{module}.{name}"])
        else:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not part of a tree of tensors")

    def _reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, Function) or type(arguments) is not tuple:
            raise pickle.UnpicklingError(f"it calls a {type(function).__name__}")
        self._push(function.call(*arguments))

    def _new(self) -> None:
        self._stack.pop()
        if self._stack.pop() is not _MODULE:
            raise pickle.UnpicklingError("it makes an object that is not part of a tree of tensors")
        self._push(Module())

    def _build(self) -> None:
        """Keep attributes of a module, drop those of a dictionary (`_metadata` of a state dict), refuse others."""
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, Module):
            target.attributes = state if isinstance(state, dict) else {}
        elif isinstance(target, _NumpyType):
            target.build(state)
        elif type(target) is not dict:
            raise pickle.UnpicklingError(f"it sets attributes of a {type(target).__name__}")

    def _append(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise pickle.UnpicklingError(f"it appends to a {type(self._stack[-1]).__name__}")
        self._stack[-1].extend(items)

    def _set(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not dict:
            raise pickle.UnpicklingError(f"it sets items of a {type(self._stack[-1]).__name__}")
        self._stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _text(self, format: str) -> None:
        self._push(self._take(self._unpack(format)).decode("utf-8", "surrogatepass"))

    def _last(self, count: int) -> list[Any]:
        items, self._stack[-count:] = self._stack[-count:], []
        if len(items) != count:
            raise pickle.UnpicklingError("its pickle is damaged")
        return items


def _constant(value: Any) -> Callable[[Unpickler], None]:
    return lambda self: self._push(value)


_STEPS: dict[bytes, Callable[[Unpickler], None]] = {
    pickle.PROTO: Unpickler._protocol,
    pickle.GLOBAL: Unpickler._global,
    pickle.REDUCE: Unpickler._reduce,
    pickle.NEWOBJ: Unpickler._new,
    pickle.BUILD: Unpickler._build,
    pickle.BINPERSID: lambda self: self._push(self._storage(self._stack.pop())),
    pickle.MARK: Unpickler._mark,
    pickle.APPEND: lambda self: self._append(self._last(1)),
    pickle.APPENDS: lambda self: self._append(self._pop_marked()),
    pickle.SETITEM: lambda self: self._set(self._last(2)),
    pickle.SETITEMS: lambda self: self._set(self._pop_marked()),
    pickle.TUPLE: lambda self: self._push(tuple(self._pop_marked())),
    pickle.TUPLE1: lambda self: self._push(tuple(self._last(1))),
    pickle.TUPLE2: lambda self: self._push(tuple(self._last(2))),
    pickle.TUPLE3: lambda self: self._push(tuple(self._last(3))),
    pickle.NONE: _constant(None),
    pickle.NEWTRUE: _constant(True),
    pickle.NEWFALSE: _constant(False),
    pickle.EMPTY_TUPLE: _constant(()),
    pickle.EMPTY_LIST: lambda self: self._push([]),
    pickle.EMPTY_DICT: lambda self: self._push({}),
    pickle.BININT: lambda self: self._push(self._unpack("<i")),
    pickle.BININT1: lambda self: self._push(self._unpack("<B")),
    pickle.BININT2: lambda self: self._push(self._unpack("<H")),
    pickle.BINFLOAT: lambda self: self._push(self._unpack(">d")),
    pickle.LONG1: lambda self: self._push(pickle.decode_long(self._take(self._unpack("<B")))),
    pickle.BINUNICODE: lambda self: self._text("<I"),
    pickle.SHORT_BINSTRING: lambda self: self._text("<B"),
    pickle.BINPUT: lambda self: self._memo.__setitem__(self._unpack("<B"), self._stack[-1]),
    pickle.LONG_BINPUT: lambda self: self._memo.__setitem__(self._unpack("<I"), self._stack[-1]),
    pickle.BINGET: lambda self: self._push(self._memo[self._unpack("<B")]),
    pickle.LONG_BINGET: lambda self: self._push(self._memo[self._unpack("<I")]),
}
