"""Reading what `torch.save` wrote without running it: tensors, plain containers, inert stubs."""

from __future__ import annotations

import io
import math
import os
import pickletools
import re
import struct
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from steerrec.errors import CheckpointError, ModelError

# The first five bound the memory, for a few bytes of pickle make an object of hundreds.
_MAX_STEPS = 5_000_000  # opcodes and copied elements
_MAX_OBJECTS = 2_000_000
_MAX_TENSORS = 200_000  # and storages
_MAX_PICKLE = 1 << 28
_MAX_DIRECTORY = 1 << 24  # of the zip; a tensor takes about 100 bytes of it
_SLACK = 1 << 24  # bytes of views and of copies that a file of any size may ask for
_MAX_SECONDS = 60.0  # keys made to collide in a dict cost quadratic time
_MAX_INTEGER = 1024  # bytes; Python does not print what is much longer
_MAX_NAME = 256
_MAX_DEPTH = 100  # far below the recursion limit of whoever walks through the result
_MAX_WRITTEN_OUT = 20_000_000  # values, if shared containers were written out at every mention

_AGAIN = "download it or save it again"
_LESS = "save the state_dict() alone"
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # how files in the format before zip begin
_KINDS = re.compile(r"u?int(8|16|32|64)|b?float\d+\w*|complex\d+|bool")
_DTYPES = {
    name: value
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype) and _KINDS.fullmatch(name)
}
_STORAGES = {
    f"{module}.{name}Storage": dtype
    for module in ("torch", "torch.cuda", "torch.storage")
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "ComplexDouble": torch.complex128,
        "ComplexFloat": torch.complex64,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "Untyped": torch.uint8,
    }.items()
}
# To hash and compare these takes no recursion; a tuple of tuples of tuples may take for ever.
_KEYS = frozenset({str, bytes, int, float, bool, type(None), torch.dtype, torch.device})
_NUMPY = re.compile(r"[iu][1248]|b1|f[248]|c8|c16|[SU]\d{1,7}|O8")
_WRAPPINGS = ("state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("model.", "_model.", "torch_model.", "module.")


@dataclass(eq=False, repr=False, slots=True)
class Stub:
    """What stands for a class, a function, or what a call of it would have given; it does nothing.

    Attributes
    ----------
    qualified_name
        Module and name, as the checkpoint gives them; ``(call)`` for a call of what another call
        gave, which is then the first of `args`.
    args, kwargs
        What it would have been called with; `args` is None for the class or function itself.
    state
        What its attributes would have been set from: for most objects, a dict.
    items
        What would have been appended to it, and as (key, value) what would have been set in it.
    """

    qualified_name: str
    args: tuple[Any, ...] | None = None
    kwargs: Any = None
    state: Any = None
    items: list[Any] = field(default_factory=list)

    def __repr__(self) -> str:
        args = "" if self.args is None else f"({len(self.args)} arguments)"
        state = "" if self.state is None else f", state: {type(self.state).__name__}"
        items = f", {len(self.items)} items" if self.items else ""
        return f"<Stub {_shown(self.qualified_name)}{args}{state}{items}>"


@dataclass(eq=False, repr=False, slots=True)
class _Storage(Stub):
    """The storage of tensors; as a value by itself it is one more stub."""

    raw: Tensor | None = None


@dataclass(eq=False, repr=False, slots=True)
class _Array(Stub):
    """A numpy array whose content the next BUILD brings; `slot` is its place in the memo."""

    slot: int | None = None


class _Refused(Exception):
    """Why a checkpoint is not read; `read_checkpoint` adds the path."""


def read_checkpoint(path: str | Path) -> Any:
    """What `torch.save` wrote into a file, read without importing or calling what it names.

    Tensors and Parameters come out on the CPU, with their strides and shared storages; dicts,
    lists, tuples, sets, strings, numbers, dtypes, devices, sizes and numpy's arrays as they are,
    numpy's scalars as plain ones, a `defaultdict` as a dict, and everything else as a `Stub`.
    Attributes set on a tensor or an OrderedDict are left out.

    Raises
    ------
    CheckpointError
        If the file is damaged, is none that `torch.save` wrote, holds sparse or quantised
        tensors, or would cost more than its size warrants.
    """
    try:
        if not Path(path).is_file():
            _refuse("there is no such file; expected what torch.save wrote")
        with _File(path) as file:
            value = _read_zip(file) if file.peek(4)[:4] == b"PK\3\4" else _read_legacy(file)
        _check_nesting(value)
        return value
    except _Refused as refusal:
        raise CheckpointError(f"{path} is not read: {refusal}") from None
    except Exception as error:  # whatever zipfile, pickletools, numpy or torch found wrong
        reason = _one_line(f"{type(error).__name__}: {error}")
        raise CheckpointError(
            f"{path} is damaged, or not what torch.save wrote ({reason}); {_AGAIN}"
        ) from error


def find_state_dict(checkpoint: Any) -> dict[str, Tensor]:
    """The model's tensors by name, out of the wrappings that libraries save them in.

    Taken is a dict of tensors, or one under ``state_dict``, ``model_state_dict``, ``model`` or
    ``net``, without the prefixes that all its names share (``model.``, ``_model.``,
    ``torch_model.``, ``module.``) and without what modules add as ``_extra_state``.

    Raises
    ------
    ModelError
        If there is none, or its names have prefixes without end.
    """
    found = checkpoint
    for _ in range(4):  # a wrapping in a wrapping
        if not isinstance(found, Mapping):
            break
        tensors = {k: v for k, v in found.items() if not str(k).endswith("_extra_state")}
        if tensors and all(
            isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items()
        ):
            return _unprefixed({name: tensor.detach() for name, tensor in tensors.items()})
        found = next((found[key] for key in _WRAPPINGS if key in found), None)
    what = repr(checkpoint) if isinstance(checkpoint, Stub) else f"a {type(checkpoint).__name__}"
    if isinstance(checkpoint, Mapping):
        what += f" of {', '.join(_shown(str(k), 40) for k in list(checkpoint)[:8]) or 'nothing'}"
    raise ModelError(
        f"the checkpoint holds {what}; expected tensors by name, or a dict that has them under "
        f"{', '.join(_WRAPPINGS)}: {_LESS}"
    )


def _unprefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for _ in range(_MAX_DEPTH):
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) and name != prefix for name in tensors):
                tensors = {name.removeprefix(prefix): t for name, t in tensors.items()}
                break
        else:
            return tensors
    raise ModelError(f"the names of its tensors have over {_MAX_DEPTH} prefixes; {_LESS}")


def _shown(text: str, limit: int = 100) -> str:
    """A text from a file, such that it can neither flood nor garble a terminal."""
    return text[:limit].encode("unicode_escape").decode() + "…" * (len(text) > limit)


def _one_line(text: str) -> str:
    return _shown(" ".join(text[:1000].split()), 200)


def _refuse(reason: str) -> NoReturn:
    raise _Refused(reason)


# --- the two formats


class _File(io.BufferedReader):
    """A file that refuses a read of more than `limit` before any memory is taken for it."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(io.FileIO(path))
        self.size = os.fstat(self.fileno()).st_size
        self.limit = _MAX_DIRECTORY

    def read(self, size: int | None = -1, /) -> bytes:
        wanted = self.limit if size is None or size < 0 else size
        if wanted > self.limit:
            _refuse(f"a part of it claims {wanted} bytes; expected at most {self.limit}; {_AGAIN}")
        return super().read(wanted)

    def readline(self, size: int | None = -1, /) -> bytes:
        return super().readline(self.limit)


def _read_zip(file: _File) -> Any:
    with zipfile.ZipFile(file) as archive:
        file.limit = file.size
        members = _members(archive, file.size)
        roots = [name for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(roots) != 1:
            _refuse("it is a zip without one data.pkl; expected what torch.save wrote")
        root = roots[0].removesuffix("data.pkl")
        if f"{root}constants.pkl" in members:
            _refuse("it is a TorchScript archive; expected a state_dict() that torch.save wrote")
        order = members.get(f"{root}byteorder")
        if order is not None and archive.open(order).read(8) != sys.byteorder.encode():
            _refuse(f"its byte order is not {sys.byteorder}; save it again on a machine like this")
        if members[roots[0]].file_size > _MAX_PICKLE:
            _refuse(f"its pickle has more than {_MAX_PICKLE} bytes; {_LESS}")

        def storage(key: str, count: int, itemsize: int) -> Tensor:
            member = members.get(f"{root}data/{key}")
            if member is None:
                _refuse(f"storage {_shown(key)} is missing; {_AGAIN}")
            raw = torch.empty(member.file_size, dtype=torch.uint8)
            with archive.open(member) as stream:
                _fill(raw, stream)
            return raw

        return _Machine(storage, file.size).load(io.BytesIO(archive.read(members[roots[0]])))


def _members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The members by name, none compressed, which together are no larger than the file."""
    members: dict[str, zipfile.ZipInfo] = {}
    end = 0
    for member in sorted(archive.infolist(), key=lambda member: member.header_offset):
        name = member.filename
        if name in members:
            _refuse(f"it holds {_shown(name)} twice; {_AGAIN}")
        if name != member.orig_filename or "\\" in name or {"", "..", "."} & {*name.split("/")}:
            _refuse(f"it holds a member named {_shown(member.orig_filename)}; expected plain names")
        if member.flag_bits & 1 or member.compress_type != zipfile.ZIP_STORED:
            _refuse(f"{_shown(name)} is compressed or encrypted; save it again with torch.save")
        if member.file_size != member.compress_size or member.header_offset < end:
            _refuse(f"{_shown(name)} overlaps another member or has two sizes; {_AGAIN}")
        end = member.header_offset + 30 + len(name) + member.file_size  # 30: a member's header
        members[name] = member
    if end > size:
        _refuse(f"its members reach beyond its end; {_AGAIN}")
    return members


def _read_legacy(file: _File) -> Any:
    """What torch.save wrote before it wrote zips: pickles, and after them all storages."""
    if file.peek(1)[:1] != b"\x80":
        _refuse(f"it begins with {file.peek(16)[:16]!r}; expected what torch.save wrote")
    file.limit = min(file.size, _MAX_PICKLE)
    storages: dict[str, tuple[Tensor, int]] = {}
    total = 0

    def storage(key: str, count: int, itemsize: int) -> Tensor:
        nonlocal total
        total += count * itemsize
        if total > file.size:
            _refuse(f"its tensors claim {total} bytes or more; the file has {file.size}; {_AGAIN}")
        storages[key] = torch.zeros(count * itemsize, dtype=torch.uint8), count
        return storages[key][0]

    machine = _Machine(storage, file.size)
    for expected in (_MAGIC, _PROTOCOL):
        found = machine.load(file)
        if type(found) is not int or found != expected:
            _refuse("it is a pickle of something else; expected what torch.save wrote")
    system = machine.load(file)
    if type(system) is not dict or system.get("little_endian") is not (sys.byteorder == "little"):
        _refuse(f"its byte order is not {sys.byteorder}; save it again on a machine like this")
    value, keys = machine.load(file), machine.load(file)
    if type(keys) is not list or {*map(type, keys)} - {str} or sorted(keys) != sorted(storages):
        _refuse(f"its list of storages does not fit its tensors; {_AGAIN}")
    for key in keys:
        raw, count = storages[key]
        if struct.unpack("<q" if sys.byteorder == "little" else ">q", file.read(8)) != (count,):
            _refuse(f"storage {_shown(key)} is not as large as its tensors say; {_AGAIN}")
        _fill(raw, file)
    return value


def _fill(raw: Tensor, stream: IO[bytes]) -> None:
    """Read the tensor's bytes, in parts: all at once they would take the memory twice."""
    array = raw.numpy()
    for start in range(0, len(array), 1 << 20):
        room = array[start : start + (1 << 20)]
        part = stream.read(len(room))
        if len(part) != len(room):
            _refuse(f"it ends in the middle of a tensor; {_AGAIN}")
        room[:] = np.frombuffer(part, np.uint8)


# --- the pickle machine


class _Machine:
    """Runs pickles, but knows no class and no function: a global is a `Stub`, a mere name.

    What a call gives is looked up by that name in `_CALLS`, whose functions handle plain values
    only; a call of any other gives a stub. Python's own unpickler offers no such bounds of time
    and memory, which is why this is none. `storage` gives the bytes of a storage by its key,
    number of elements and size of an element.
    """

    def __init__(self, storage: Callable[[str, int, int], Tensor], file_size: int) -> None:
        self.storage = storage
        self.file_size = file_size
        self.raws: dict[str, Tensor] = {}
        self.globals: dict[str, Stub] = {}
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.steps = self.objects = self.tensors = self.viewed = self.copied = 0
        self.deadline = time.monotonic() + _MAX_SECONDS

    def load(self, stream: IO[bytes]) -> Any:
        """The value of the pickle that begins where the stream is, which is left at its end."""
        self.stack, self.marks, self.memo = [], [], {}
        start = stream.tell()
        for opcode, argument, position in pickletools.genops(stream):
            if position is not None and position - start > _MAX_PICKLE:
                _refuse(f"its pickle has more than {_MAX_PICKLE} bytes; {_LESS}")
            self.spend()
            self.step(opcode.name, argument)
        return self.stack.pop()

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(self.memo[argument])
            case "MEMOIZE" | "BINPUT" | "LONG_BINPUT" | "PUT":
                self.store(len(self.memo) if argument is None else argument)
            case "MARK":
                self.marks.append(len(stack))
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.push(tuple(self.take(int(name[-1]) if name[-1].isdigit() else 0)))
            case "TUPLE":
                self.push(tuple(self.take()))
            case "EMPTY_LIST" | "LIST":
                self.push(self.take(None if name == "LIST" else 0))
            case "EMPTY_DICT" | "DICT":
                items = self.take(None if name == "DICT" else 0)
                self.push(self.set_items({}, items))
            case "EMPTY_SET":
                self.push(set())
            case "FROZENSET":
                self.push(frozenset(self.add(set(), self.take())))
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = self.take(1 if name == "APPEND" else None)
                self.add(stack[-1], items)
            case "SETITEM" | "SETITEMS":
                items = self.take(2 if name == "SETITEM" else None)
                self.set_items(stack[-1], items)
            case "GLOBAL":
                stack.append(self.named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(self.named(*self.take(2)))
            case "INST":
                self.push(self.call(self.named(*argument.split(" ", 1)), tuple(self.take())))
            case "OBJ":
                function, *args = self.take()
                self.push(self.call(function, tuple(args)))
            case "REDUCE" | "NEWOBJ" | "NEWOBJ_EX":
                self.push(self.call(*self.take(3 if name == "NEWOBJ_EX" else 2)))
            case "BUILD":
                self.build(stack.pop())
            case "BINPERSID":
                self.push(self.persistent(stack.pop()))
            case "POP" if self.marks and self.marks[-1] == len(stack):
                self.marks.pop()
            case "POP":
                stack.pop()
            case "POP_MARK":
                self.take()
            case "DUP":
                stack.append(stack[-1])
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "PERSID" | "EXT1" | "EXT2" | "EXT4" | "NEXT_BUFFER" | "READONLY_BUFFER":
                _refuse(f"it uses the pickle opcode {name}, which torch.save never does; {_AGAIN}")
            case _:  # the others are a value by themselves
                if isinstance(argument, int) and argument.bit_length() > 8 * _MAX_INTEGER:
                    _refuse(f"it holds an integer of over {_MAX_INTEGER} bytes; {_LESS}")
                stack.append(argument)

    # --- bounds

    def spend(self) -> None:
        self.steps += 1
        if self.steps > _MAX_STEPS:
            _refuse(f"its pickle takes more than {_MAX_STEPS} steps; {_LESS}")
        if self.steps % 256 == 0 and time.monotonic() > self.deadline:
            _refuse(f"its pickle takes over {_MAX_SECONDS:.0f} seconds; {_LESS}")

    def count_tensor(self) -> None:
        self.tensors += 1
        if self.tensors > _MAX_TENSORS:
            _refuse(f"it holds more than {_MAX_TENSORS} tensors; {_LESS}")

    def copied_bytes(self, size: int) -> None:
        self.copied += size
        if self.copied > 4 * self.file_size + _SLACK:
            _refuse(f"it copies the same bytes over and over; {_LESS}")

    # --- stack, memo, containers

    def push(self, value: Any) -> None:
        """Put a new object onto the stack."""
        self.objects += 1
        if self.objects > _MAX_OBJECTS:
            _refuse(f"it holds more than {_MAX_OBJECTS} objects; {_LESS}")
        self.stack.append(value)

    def take(self, count: int | None = None) -> list[Any]:
        """The topmost `count` values, or those since the last mark, off the stack."""
        start = self.marks.pop() if count is None else len(self.stack) - count
        if start < 0:
            _refuse(f"its pickle takes more from the stack than there is; {_AGAIN}")
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def store(self, slot: int) -> None:
        if not 0 <= slot <= _MAX_STEPS:
            _refuse(f"its pickle numbers its values as no pickler does; {_AGAIN}")
        value = self.memo[slot] = self.stack[-1]
        if isinstance(value, _Array):
            value.slot = slot

    def add(self, target: Any, items: list[Any]) -> Any:
        if isinstance(target, (list, Stub)):
            (target if isinstance(target, list) else target.items).extend(items)
        elif type(target) is set:
            for item in items:
                self.spend()
                target.add(_key(item))
        else:
            _refuse(f"its pickle adds to {type(target).__name__}; expected a list or set; {_LESS}")
        return target

    def set_items(self, target: Any, items: list[Any]) -> Any:
        if not isinstance(target, (dict, Stub)):
            _refuse(f"its pickle sets items of {type(target).__name__}; expected a dict; {_LESS}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.spend()
            if isinstance(target, Stub):
                target.items.append((key, value))
            else:
                target[_key(key)] = value
        return target

    # --- names, calls, states, storages

    def named(self, module: Any, name: Any) -> Any:
        if type(module) is not str or type(name) is not str or len(module + name) > _MAX_NAME:
            _refuse(f"a class has no name of up to {_MAX_NAME} characters; {_AGAIN}")
        module = {"copy_reg": "copyreg", "__builtin__": "builtins"}.get(module, module)
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        return self.globals.setdefault(f"{module}.{name}", Stub(f"{module}.{name}"))

    def call(self, function: Any, args: Any, kwargs: Any = None) -> Any:
        """What a call gives: of a function in `_CALLS` its value, of any other a stub."""
        if not isinstance(function, Stub) or type(args) is not tuple:
            _refuse(f"its pickle calls {type(function).__name__}; expected a class; {_LESS}")
        if function.args is not None:
            return Stub("(call)", (function, *args), kwargs)
        name = function.qualified_name
        value: Any = NotImplemented
        if name in _CALLS and not kwargs:
            try:
                value = _CALLS[name](self, *args)
            except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as error:
                _refuse(f"{name} is given what it cannot take ({_one_line(str(error))}); {_AGAIN}")
        elif name.startswith("torch._utils._rebuild_"):
            _refuse(
                f"it holds a sparse, quantised or other special tensor ({_shown(name)}); {_LESS}"
            )
        return Stub(name, args, kwargs) if value is NotImplemented else value

    def build(self, state: Any) -> None:
        target = self.stack[-1]
        array = self.content(state) if isinstance(target, _Array) else NotImplemented
        if array is not NotImplemented:
            self.stack[-1] = array
            if target.slot is not None:
                self.memo[target.slot] = array
        elif isinstance(target, Stub):
            target.state = state
        elif type(target) is not OrderedDict:  # which may bring the `_metadata` of a state dict
            _refuse(f"its pickle sets attributes of {type(target).__name__}; {_LESS}")

    def persistent(self, reference: Any) -> Any:
        match reference:
            case ("module", Stub() as kind, *_):  # the class of a whole module, before zip
                return kind
            case ("storage", Stub() as kind, str(key), str(location), int(count), *view):
                dtype = _STORAGES.get(kind.qualified_name)
            case _:
                _refuse(f"it refers to what is neither in it nor a storage of tensors; {_LESS}")
        if dtype is None or location == "meta" or any(part is not None for part in view):
            _refuse(
                f"storage {_shown(key)} is of {_shown(kind.qualified_name)} on {_shown(location)}; "
                f"expected dense tensors; {_LESS}"
            )
        size = count * dtype.itemsize
        if not 0 <= size <= self.file_size:
            _refuse(f"storage {_shown(key)} claims {count} elements, more than the file; {_AGAIN}")
        self.count_tensor()
        if key not in self.raws:
            self.raws[key] = self.storage(key, count, dtype.itemsize)
        raw = self.raws[key]
        if size > raw.numel():
            _refuse(f"storage {_shown(key)} claims {size} bytes, and has {raw.numel()}; {_AGAIN}")
        return _Storage(kind.qualified_name, (key, location, count), raw=raw)

    # --- what the known functions give

    def tensor(
        self,
        storage: Any,
        offset: Any,
        size: Any,
        stride: Any,
        requires_grad: Any = False,
        hooks: Any = None,
        metadata: Any = None,
        dtype: Any = None,
    ) -> Tensor:
        self.count_tensor()
        if not isinstance(storage, _Storage) or storage.raw is None:
            _refuse(f"a tensor has no storage; {_AGAIN}")
        dtype = _STORAGES[storage.qualified_name] if dtype is None else dtype
        if not isinstance(dtype, torch.dtype) or dtype not in _DTYPES.values():
            _refuse(f"a tensor is of type {_shown(str(type(dtype)))}; expected a plain dtype")
        if metadata is not None and (type(metadata) is not dict or metadata):
            _refuse("a tensor is lazily conjugated or negated; save it resolved")
        size, stride, (offset,) = _counts(size), _counts(stride), _counts((offset,))
        reach = sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if not all(size):  # an empty slice may well begin beyond the end
            offset, reach = 0, -1
        if offset + reach >= storage.raw.numel() // dtype.itemsize:
            _refuse(f"a tensor of shape {size} reaches outside its storage; {_AGAIN}")
        self.viewed += math.prod(max(length, 1) for length in size) * dtype.itemsize
        if self.viewed > 16 * self.file_size + _SLACK:
            _refuse("its tensors stand for far more bytes than it has; save them contiguous")
        view = torch.empty(0, dtype=dtype)
        view.set_(storage.raw.untyped_storage(), offset, size, stride)
        return view.requires_grad_() if requires_grad is True else view

    def parameter(self, data: Any, requires_grad: Any, *_: Any) -> Any:
        self.count_tensor()
        if not isinstance(data, Tensor):
            _refuse(f"a parameter has no tensor; {_AGAIN}")
        return torch.nn.Parameter(data, requires_grad is True)

    def typed_tensor(self, function: Any, kind: Any, args: Any, state: Any) -> Any:
        """A tensor that has attributes or is of a subclass, without the one and the other."""
        if not isinstance(function, Stub) or function.qualified_name not in _TENSORS:
            return NotImplemented
        return self.call(function, args)

    def set_of(self, items: Any = None) -> Any:
        return self.add(set(), items) if type(items) is list else NotImplemented

    def encode(self, text: Any, encoding: Any) -> Any:
        """Bytes, as protocol 2 writes them."""
        if type(text) is not str or type(encoding) is not str or encoding != "latin1":
            return NotImplemented
        self.copied_bytes(len(text))
        return text.encode("latin-1")

    def content(self, state: Any) -> Any:
        """The array whose state this is."""
        match state:
            case (int(), tuple(shape), Stub() as dtype, fortran, bytes() | list() as data):
                return self.array(data, dtype, shape, "F" if fortran is True else "C")
        return NotImplemented

    def array(self, data: Any, kind: Any, shape: Any, order: Any = "C") -> Any:
        """The array, if its elements are numbers, texts, or of the values that are read here."""
        dtype = _numpy_dtype(kind)
        if dtype is None or type(data) not in ((list,) if dtype.hasobject else (bytes, bytearray)):
            return NotImplemented
        shape, order = _counts(shape), "F" if order == "F" else "C"
        if math.prod(shape) * (1 if dtype.hasobject else dtype.itemsize) != len(data):
            _refuse(f"a numpy array of shape {shape} has not the content for it; {_AGAIN}")
        if dtype.hasobject:
            array = np.empty(len(data), dtype)
            for place, item in enumerate(data):  # one by one, or numpy would look into them
                self.spend()
                array[place] = item
            return array.reshape(shape, order=order)
        self.copied_bytes(len(data))
        if dtype.kind == "U":
            letters = np.ndarray(len(data) // 4, dtype.str[0] + "u4", data)
            if letters.max(initial=0) > sys.maxunicode:
                _refuse(f"a numpy array holds what is no text; {_AGAIN}")
        return np.ndarray(shape, dtype, data, order=order).copy(order="K")

    def scalar(self, kind: Any, data: Any = None) -> Any:
        array = self.array(data, kind, ()) if type(data) is bytes else NotImplemented
        return NotImplemented if array is NotImplemented else array.item()


def _key(key: Any) -> Any:
    parts = key if type(key) is tuple and len(key) <= 64 else (key,)
    if not all(type(part) in _KEYS or isinstance(part, Stub) for part in parts):
        _refuse(f"a dict has a key, or a set an element, of {type(key).__name__}; {_LESS}")
    return key


def _counts(numbers: Any) -> tuple[int, ...]:
    """Lengths, strides or an offset, checked."""
    if not isinstance(numbers, (tuple, list)) or len(numbers) > 64:
        _refuse(f"a tensor or array has no shape of up to 64 dimensions; {_AGAIN}")
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
        _refuse(f"a length, stride or offset is not a number from 0 to 2^62; {_AGAIN}")
    return tuple(numbers)


def _numpy_dtype(kind: Any) -> np.dtype[Any] | None:
    match kind:
        case Stub("numpy.dtype", (str(code), *_), state=(int(), "<" | ">" | "|" as order, *_)):
            if _NUMPY.fullmatch(code):
                dtype: np.dtype[Any] = np.dtype(order + code)
                return dtype
    return None


def _check_nesting(root: Any) -> None:
    """Refuse what would exhaust whoever walks through it: depth, cycles, endless sharing.

    A stub is looked at for itself, for objects do refer to each other in circles.
    """
    measured: dict[int, tuple[int, int]] = {}  # by id: depth, values when written out
    opened: set[int] = set()
    roots = [root]
    while roots:
        pending = [roots.pop()]
        while pending:
            node = pending[-1]
            children = _children(node)
            if children is None or id(node) in measured:
                pending.pop()
                if isinstance(node, Stub) and id(node) not in opened:
                    opened.add(id(node))
                    roots += [node.args, node.kwargs, node.state, node.items]
            elif id(node) not in opened:
                opened.add(id(node))
                for child in children:
                    if id(child) in opened and _children(child) is not None:
                        if id(child) not in measured:
                            _refuse(
                                f"it holds a {type(child).__name__} that contains itself; {_LESS}"
                            )
                    else:
                        pending.append(child)
            else:
                pending.pop()
                inside = [measured.get(id(child), (0, 1)) for child in children]
                depth = 1 + max((depth for depth, _ in inside), default=0)
                size = 1 + sum(size for _, size in inside)
                if depth > _MAX_DEPTH or size > _MAX_WRITTEN_OUT:
                    _refuse(
                        f"its containers are {depth} deep with {size} values, at least; expected "
                        f"at most {_MAX_DEPTH} and {_MAX_WRITTEN_OUT}; {_LESS}"
                    )
                measured[id(node)] = depth, size


def _children(value: Any) -> Iterable[Any] | None:
    """What a container holds, its keys aside, which are flat; None for anything else."""
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, np.ndarray) and value.dtype == object:
        return list(value.flat)
    return None


_TENSORS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _Machine.tensor,
    "torch._utils._rebuild_tensor_v2": _Machine.tensor,
    "torch._utils._rebuild_tensor_v3": lambda self, *a: self.tensor(*a[:6], *a[7:], dtype=a[6]),
    "torch._utils._rebuild_parameter": _Machine.parameter,
    "torch._utils._rebuild_parameter_with_state": _Machine.parameter,
}
_CALLS: dict[str, Callable[..., Any]] = {
    **_TENSORS,
    "torch._tensor._rebuild_from_type_v2": _Machine.typed_tensor,
    "torch.device": lambda _, *args: torch.device(*args),
    "torch.Size": lambda _, lengths: torch.Size(_counts(lengths)),
    "collections.OrderedDict": lambda _, *args: NotImplemented if args else OrderedDict(),
    "collections.defaultdict": lambda _, *factory: {},
    "builtins.set": _Machine.set_of,
    "builtins.frozenset": lambda self, items: frozenset(self.set_of(items)),
    "builtins.bytes": lambda _, *args: NotImplemented if args else b"",
    "_codecs.encode": _Machine.encode,
    # an object as protocols 0 and 1 write it, and a numpy array still without its content
    "copyreg._reconstructor": lambda self, kind, base, state: self.call(kind, ()),
}
for _numpy in ("numpy.core", "numpy._core"):
    _CALLS[f"{_numpy}.multiarray._reconstruct"] = lambda _, kind, *args: (
        _Array("numpy.ndarray", (kind, *args))
        if getattr(kind, "qualified_name", None) == "numpy.ndarray"
        else NotImplemented
    )
    _CALLS[f"{_numpy}.multiarray.scalar"] = _Machine.scalar
    _CALLS[f"{_numpy}.numeric._frombuffer"] = _Machine.array
