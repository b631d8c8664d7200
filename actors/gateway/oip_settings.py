"""What do a request's parameters, its sampling_parameters and its tensors set?"""

import json
import math
from collections.abc import Mapping
from typing import Any

from expertmesh.actors.gateway.oip_schema import SAMPLING_PARAMETERS, SETTINGS, Kind, Setting
from expertmesh.actors.gateway.oip_tensors import Tensor
from expertmesh.cluster.errors import InputError
from expertmesh.oip.open_inference_pb2 import InferParameter

# As tritonclient names it on the wire; the other parameters with this prefix are not served.
EMPTY_FINAL_RESPONSE = "triton_enable_empty_final_response"

Value = bool | int | float | list[str] | list[int]


def read_settings(parameters: Mapping[str, InferParameter], tensors: Mapping[str, Tensor]) -> dict[str, Value]:
    """Return the settings that a request gives. A tensor wins over sampling_parameters, these over `parameters`.

    Args:
        parameters: of the request.
        tensors: its inputs; those that are no settings are left alone.

    Raises:
        InputError: a name is unknown or a value of the wrong kind; the message names it.
    """
    given: dict[str, object] = {}
    for name, parameter in parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        if choice is None:
            raise InputError(f"{name}: the parameter has no value", field=name)
        given[name] = getattr(parameter, choice)
    given.pop(EMPTY_FINAL_RESPONSE, None)
    if SAMPLING_PARAMETERS.name in tensors:
        given |= _parse(tensors[SAMPLING_PARAMETERS.name])
    for name in SETTINGS.keys() & tensors.keys():
        values = tensors[name].values
        given[name] = values if SETTINGS[name].kind in (Kind.STRINGS, Kind.INTS) else values[0]
    return {name: _value(name, value) for name, value in given.items()}


def wants_empty_final_response(parameters: Mapping[str, InferParameter]) -> bool:
    """Say whether a request of a stream is to end with a response without tensors."""
    return EMPTY_FINAL_RESPONSE in parameters and parameters[EMPTY_FINAL_RESPONSE].bool_param


def to_text(name: str, content: bytes) -> str:
    """Return the text of an element of BYTES.

    Raises:
        InputError: it is not UTF-8.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8: {error}", field=name) from error


def _parse(tensor: Tensor) -> dict[str, object]:
    """Return what the JSON of sampling_parameters holds."""
    (content,) = tensor.values
    assert isinstance(content, bytes)
    text = to_text(tensor.name, content)
    try:
        fields: Any = json.loads(text)
    # RecursionError: brackets nested a thousand deep.
    except (ValueError, RecursionError) as error:
        raise InputError(f"{tensor.name} is no JSON: {error}", field=tensor.name) from error
    if not isinstance(fields, dict):
        raise InputError(f"{tensor.name} must be a JSON object, found {type(fields).__name__}", field=tensor.name)
    return {name: value for name, value in fields.items() if value is not None}


def _value(name: str, given: object) -> Value:
    if name not in SETTINGS:
        raise InputError(f"{name} is not served; settings are {', '.join(SETTINGS)}", field=name)
    setting = SETTINGS[name]
    try:
        return _convert(setting, given)
    except ValueError as error:
        wanted = str(error) or setting.kind
        raise InputError(f"{name} is {_shown(given)}; it must be {wanted}", field=name) from error


def _convert(setting: Setting, given: object) -> Value:
    """Return a value of the setting's kind; ValueError, with what it must be where that is more than its kind."""
    match setting.kind:
        case Kind.BOOL:
            return _bool(given)
        case Kind.INT:
            return _int(setting, given)
        case Kind.FLOAT:
            return _float(given)
        case Kind.STRINGS:
            return [_string(item) for item in (given if isinstance(given, list) else [given])]
        case Kind.INTS:
            return [_int(setting, item) for item in (given if isinstance(given, list) else [given])]


def _bool(given: object) -> bool:
    if isinstance(given, bool):
        return given
    if isinstance(given, str) and given.lower() in ("true", "false"):
        return given.lower() == "true"
    raise ValueError


def _int(setting: Setting, given: object) -> int:
    """Return a whole number; as parameters are often strings or doubles, these may say one."""
    if isinstance(given, bool) or not isinstance(given, int | float | str):
        raise ValueError
    number = _float(given) if isinstance(given, float) else _whole(given)
    if number != math.floor(number):
        raise ValueError
    if not setting.low <= number <= setting.high:
        raise ValueError(f"from {setting.low} to {setting.high}")
    return int(number)


def _whole(given: int | str) -> int:
    try:
        return int(given)
    except ValueError:
        raise ValueError from None


def _float(given: object) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float | str):
        raise ValueError
    try:
        number = float(given)
    except (ValueError, OverflowError):
        raise ValueError from None
    if not math.isfinite(number):
        raise ValueError("finite")
    return number


def _string(given: object) -> str:
    if isinstance(given, bytes):
        return to_text("stop", given)
    if not isinstance(given, str):
        raise ValueError
    try:
        given.encode()
    except UnicodeEncodeError:
        raise ValueError("valid Unicode") from None
    return given


def _shown(given: object) -> str:
    shown = repr(given)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
