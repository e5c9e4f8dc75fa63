"""Spans as OpenTelemetry sends them: a protobuf ExportTraceServiceRequest (opentelemetry-proto 1.x), written by hand to need no library."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Any

CONTENT_TYPE = "application/x-protobuf"


def export_request(resource: Mapping[str, str], spans: Iterable[tuple[str, int, Mapping[str, Any]]]) -> bytes:
    """One request with all `spans` (name, number, attributes) of one trace."""
    scope = b"".join(_field(2, _span(*span)) for span in spans)
    return _field(1, _field(1, _attributes(1, resource)) + _field(2, scope))


def _span(name: str, number: int, attributes: Mapping[str, Any]) -> bytes:
    ids = _field(1, b"\1" * 16) + _field(2, number.to_bytes(8, "big"))
    return ids + _field(5, name.encode()) + _attributes(9, attributes)


def _attributes(number: int, values: Mapping[str, Any]) -> bytes:
    return b"".join(_field(number, _field(1, key.encode()) + _field(2, _value(value))) for key, value in values.items())


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return _field(1, value.encode())
    if isinstance(value, int):
        return b"\x18" + _varint(value)
    if isinstance(value, float):
        return b"\x21" + struct.pack("<d", value)
    return _field(5, b"".join(_field(1, _value(item)) for item in value))


def _field(number: int, content: bytes) -> bytes:
    return bytes((number << 3 | 2,)) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    written = bytearray()
    while value > 127:
        written.append(value & 127 | 128)
        value >>= 7
    return bytes((*written, value))
