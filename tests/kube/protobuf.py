"""Reads the few kinds that kubectl makes itself and sends as protobuf: `create configmap` and the like, can-i, drain.

The numbers are those of the generated.proto files of Kubernetes' API.
"""

import base64
from collections.abc import Iterator
from typing import Any

from tests.kube.status import ApiError, Manifest

MAGIC = b"k8s\x00"
STRING, BYTES, QUANTITY = "string", "bytes", "quantity"
_META: dict[int, tuple[str, Any]] = {1: ("name", STRING), 2: ("generateName", STRING), 3: ("namespace", STRING)}
_META |= {11: ("labels", {STRING}), 12: ("annotations", {STRING})}
_ATTRIBUTES = ("namespace", "verb", "group", "version", "resource", "subresource", "name")
_ACCESS = {number: (name, STRING) for number, name in enumerate(_ATTRIBUTES, 1)}
# Field by number: its name and what it is: a scalar, a message (a dict like this one), or a map to what is in the set.
_KINDS: dict[str, Any] = {
    "ConfigMap": {2: ("data", {STRING}), 3: ("binaryData", {BYTES})},
    "Eviction": {},
    "Namespace": {},
    "ResourceQuota": {2: ("spec", {1: ("hard", {QUANTITY})})},
    "Secret": {2: ("data", {BYTES}), 3: ("type", STRING), 4: ("stringData", {STRING})},
    "SelfSubjectAccessReview": {2: ("spec", {1: ("resourceAttributes", _ACCESS)})},
    "ServiceAccount": {},
}


def decode(data: bytes) -> Manifest:
    """Return an object.

    Raises:
        ApiError: 415 for a kind that is not known here.
    """
    if not data.startswith(MAGIC):
        raise ApiError(415, "no protobuf of Kubernetes'")
    envelope = dict(_fields(data[len(MAGIC) :]))
    types = {number: text.decode() for number, text in _fields(envelope[1])}
    kind = types[2]
    if kind not in _KINDS:
        raise ApiError(415, f"this server reads {kind} as JSON alone")
    message = {1: ("metadata", _META), **_KINDS[kind]}
    return {"apiVersion": types[1], "kind": kind, "metadata": {}, **_message(envelope[2], message)}


def _message(data: bytes, known: dict[int, tuple[str, Any]]) -> Manifest:
    found: Manifest = {}
    for number, value in _fields(data):
        if number not in known or not value:
            continue
        name, kind = known[number]
        if isinstance(kind, set):
            (inner,) = kind
            entry = dict(_fields(value))
            found.setdefault(name, {})[entry[1].decode()] = _value(entry.get(2, b""), inner)
        else:
            found[name] = _value(value, kind)
    return found


def _value(data: bytes, kind: Any) -> Any:
    match kind:
        case "string":
            return data.decode()
        case "bytes":
            return base64.b64encode(data).decode()
        case "quantity":
            return dict(_fields(data))[1].decode()
    return _message(data, kind)


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of the fields that have a length; numbers are passed over."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        if tag & 7 == 0:
            _, at = _varint(data, at)
            continue
        length, at = _varint(data, at)
        yield tag >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
