"""GGUF files taken apart and put together again without a check, so that anything can stand in them."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
FORMATS = {
    UINT8: "B", INT8: "b", UINT16: "H", INT16: "h", UINT32: "I", INT32: "i", FLOAT32: "f", BOOL: "B", UINT64: "Q",
    INT64: "q", FLOAT64: "d",
}  # fmt: skip
F32 = 0  # ggml's number of the type


@dataclass
class Value:
    """A key-value: a number, bytes, or a list of them where `element` is the type of an array's elements."""

    type: int
    value: Any
    element: int | None = None


@dataclass
class Tensor:
    """What the header says of a tensor: ggml's number of its type, and where its data begin behind the header."""

    shape: list[int]
    type: int
    offset: int


@dataclass
class Gguf:
    """`Gguf.parse(data).bytes()` is `data`, for files with the usual alignment of 32."""

    keys: list[tuple[bytes, Value]]
    tensors: list[tuple[bytes, Tensor]]
    data: bytes
    magic: bytes = b"GGUF"
    version: int = 3
    n_keys: int | None = None  # another number than there are
    n_tensors: int | None = None
    order: str = "<"
    ends: dict[str, int] = field(default_factory=dict)  # of each section, in the bytes made last

    @classmethod
    def parse(cls, data: bytes) -> Gguf:
        at = 4

        def take(form: str) -> tuple[Any, ...]:
            nonlocal at
            values = struct.unpack_from("<" + form, data, at)
            at += struct.calcsize("<" + form)
            return values

        def text() -> bytes:
            nonlocal at
            (n,) = take("Q")
            at += n
            return data[at - n : at]

        version, n_tensors, n_keys = take("IQQ")
        keys = []
        for _ in range(n_keys):
            key, (kind,) = text(), take("I")
            if kind == ARRAY:
                element, n = take("IQ")
                values = [text() for _ in range(n)] if element == STRING else list(take(f"{n}{FORMATS[element]}"))
                keys.append((key, Value(kind, values, element)))
            else:
                keys.append((key, Value(kind, text() if kind == STRING else take(FORMATS[kind])[0])))
        tensors = []
        for _ in range(n_tensors):
            name, (n_dims,) = text(), take("I")
            *shape, kind, offset = take(f"{n_dims}QIQ")
            tensors.append((name, Tensor(shape, kind, offset)))
        return cls(keys, tensors, data[at + -at % 32 :], data[:4], version)

    def bytes(self) -> bytes:
        def text(value: bytes) -> bytes:
            return struct.pack(self.order + "Q", len(value)) + value

        def many(values: Any, kind: int) -> bytes:
            if kind == STRING:
                return b"".join(map(text, values))
            return struct.pack(f"{self.order}{len(values)}{FORMATS[kind]}", *values)

        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_keys = len(self.keys) if self.n_keys is None else self.n_keys
        out = bytearray(self.magic + struct.pack(self.order + "IQQ", self.version, n_tensors, n_keys))
        self.ends["counts"] = len(out)
        for key, v in self.keys:
            out += text(key) + struct.pack(self.order + "I", v.type)
            if v.type == ARRAY and v.element is not None:
                out += struct.pack(self.order + "IQ", v.element, len(v.value)) + many(v.value, v.element)
            else:
                out += many([v.value], v.type)
        self.ends["key-values"] = len(out)
        for name, t in self.tensors:
            out += text(name) + struct.pack(f"{self.order}I{len(t.shape)}QIQ", len(t.shape), *t.shape, t.type, t.offset)
        self.ends["tensors"] = len(out)
        out += bytes(-len(out) % 32)
        return bytes(out) + self.data

    def __getitem__(self, key: str) -> Value:
        return next(v for k, v in self.keys if k == key.encode())

    def tensor(self, name: str) -> Tensor:
        return next(t for k, t in self.tensors if k == name.encode())

    def set(self, key: str, kind: int, value: Any, element: int | None = None) -> None:
        """A key-value, in the place of the one that is there, or at the end."""
        new = Value(kind, value, element)
        for i, (known, _) in enumerate(self.keys):
            if known == key.encode():
                self.keys[i] = known, new
                return
        self.keys.append((key.encode(), new))

    def remove(self, name: str) -> None:
        """Key-value or tensor."""
        self.keys = [(k, v) for k, v in self.keys if k != name.encode()]
        self.tensors = [(k, t) for k, t in self.tensors if k != name.encode()]
