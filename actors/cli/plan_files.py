"""What `expertmesh plan` reads: models' configurations, hardware, calibrations; shipped ones and the user's."""

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from expertmesh.cluster.errors import InputError, UnknownNameError
from expertmesh.cluster.planner.calibration import Calibration, calibrate, read_calibration
from expertmesh.cluster.planner.config_reader import read_shape
from expertmesh.cluster.planner.hardware import Hardware, read_hardware
from expertmesh.cluster.planner.model_shape import ModelShape
from expertmesh.kernels.cache_folder import cache_folder
from expertmesh.models.config_file import read_config_file

THIS_MACHINE = "this-machine"
_SHIPPED = files("expertmesh.cluster.planner")


def measured_hardware() -> Path:
    """Return where `expertmesh doctor --measure` writes this machine's Hardware (YAML)."""
    return cache_folder() / "planner" / "this-machine.yaml"


def measured_calibration() -> Path:
    """Return where it writes what it measured beyond that (JSON, a Calibration)."""
    return cache_folder() / "planner" / "calibration.json"


def card_names() -> list[str]:
    """Return the names of the shipped models."""
    return _names("cards", ".json")


def machine_names() -> list[str]:
    """Return the names of the shipped machines."""
    return _names("machines", ".yaml")


def load_shape(model: str) -> ModelShape:
    """Count a checkpoint directory's, a config.json's or a card's model.

    Raises:
        CheckpointError: a directory without a readable config.json.
        InputError: the file cannot be read, or a field is missing; the name is not among the cards'.
    """
    path = Path(model)
    if path.is_dir():
        return read_shape(path.resolve().name, read_config_file(path))
    if path.is_file():
        return read_shape(model, _read_json(path))
    if model not in card_names():
        raise UnknownNameError(f"no file {model}, and no such card; cards are {', '.join(card_names())}")
    return read_shape(model, load_card(model)["config"])


def load_card(name: str) -> dict[str, Any]:
    """Return a shipped card: `config` (fields of the public config.json), `source`, `published` counts."""
    card: dict[str, Any] = json.loads(_SHIPPED.joinpath("cards", f"{name}.json").read_text())
    return card


def load_hardware(name: str, num_gpus: int | None = None) -> Hardware:
    """Read a YAML file's, this machine's or a shipped machine's hardware.

    Raises:
        InputError: the file is missing or cannot be read, or a field is wrong; the name is not among the shipped.
    """
    path = measured_hardware() if name == THIS_MACHINE else Path(name)
    if name == THIS_MACHINE and not path.is_file():
        raise InputError(f"--hardware {THIS_MACHINE}: not measured yet; run `expertmesh doctor --measure` first")
    if path.is_file():
        return read_hardware(name, _read_yaml(path), num_gpus)
    if name not in machine_names():
        known = ", ".join([*machine_names(), THIS_MACHINE])
        raise UnknownNameError(f"--hardware: no file {name}, and no such machine; machines are {known}")
    return read_hardware(name, _shipped_machine(name), num_gpus)


def load_calibration(hardware: str, file: Path | None) -> Calibration | None:
    """Read the calibration asked for; None: that of this machine if it is planned for and was measured.

    Raises:
        InputError: the file cannot be read, or a field is wrong.
    """
    if file is None:
        file = measured_calibration()
        if hardware != THIS_MACHINE or not file.is_file():
            return None
    return read_calibration(str(file), _read_json(file))


def this_machine() -> Hardware | None:
    """Return this machine as it was measured, constants of the calibration in their places; None: it was not.

    Raises:
        InputError: a file of the measurement cannot be read, or a field is wrong.
    """
    if not measured_hardware().is_file():
        return None
    hardware, calibration = load_hardware(THIS_MACHINE), load_calibration(THIS_MACHINE, None)
    return hardware if calibration is None else calibrate(hardware, calibration)


def shipped_shapes() -> dict[str, ModelShape]:
    """Return the models of all cards."""
    return {name: read_shape(name, load_card(name)["config"]) for name in card_names()}


def shipped_machines() -> dict[str, Hardware]:
    """Return all shipped machines."""
    return {name: read_hardware(name, _shipped_machine(name)) for name in machine_names()}


def _names(folder: str, suffix: str) -> list[str]:
    entries = (entry.name for entry in _SHIPPED.joinpath(folder).iterdir())
    return sorted(name.removesuffix(suffix) for name in entries if name.endswith(suffix))


def _shipped_machine(name: str) -> Mapping[str, Any]:
    content: Mapping[str, Any] = yaml.safe_load(_SHIPPED.joinpath("machines", f"{name}.yaml").read_text())
    return content


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from error
    return _mapping(path, content)


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML: {error}") from error
    return _mapping(path, content)


def _mapping(path: Path, content: Any) -> Mapping[str, Any]:
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{path}: must hold fields by name, found {type(content).__name__}")
    return content
