"""The arrows of docs/architecture.md section 6, and what else holds for every file."""

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from expertmesh.actors.controller.actor import ControllerActor
from expertmesh.actors.controller.controller import Controller
from expertmesh.actors.shard.actor import ShardActor
from expertmesh.actors.shard.shard import Shard
from expertmesh.actors.worker.actor import WorkerActor
from expertmesh.actors.worker.worker import Worker

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "expertmesh"
MAX_LINES = 400
GENERATED = ("_pb2.py", "_pb2_grpc.py")
# Of the standard library: the clock, the environment, the machine and other processes.
IMPURE = frozenset(
    {"asyncio", "ctypes", "io", "locale", "multiprocessing", "os", "platform", "secrets", "select", "shutil", "signal"}
    | {"socket", "subprocess", "tempfile", "threading", "time", "uuid"}
)
IMPURE_CALLS = frozenset({"open", "input", "print", "datetime.now", "datetime.utcnow", "date.today", "datetime.today"})
SEEDED = frozenset({"Random", "default_rng", "Generator", "SeedSequence", "PCG64", "Philox"})
# /home/ray is the home of the user in Ray's own images.
HOME_PATH = re.compile(r"(?<![\w.:/-])/(?:home/(?!ray\b)|Users/|root/)[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a folder may import: folders of ours, packages of others (None: any). is_pure: no clock, no environment."""

    ours: frozenset[str]
    others: frozenset[str] | None
    is_pure: bool = False


RULES = {
    "cluster": Rule(
        ours=frozenset({"cluster"}), others=frozenset({"numpy", "scipy", "pydantic", "msgpack"}), is_pure=True
    ),
    "kernels": Rule(ours=frozenset({"kernels"}), others=frozenset({"torch", "cupy", "triton", "numpy"})),
    "models": Rule(
        ours=frozenset({"models", "kernels", "cluster"}),
        others=frozenset({"torch", "transformers", "safetensors", "tokenizers", "numpy"}),
    ),
    "oip": Rule(ours=frozenset({"oip"}), others=frozenset({"grpc", "google"})),
    "v1": Rule(ours=frozenset({"v1"}), others=frozenset({"grpc", "google"})),
    "client": Rule(ours=frozenset({"client", "v1"}), others=frozenset({"grpc", "google"})),
    "actors": Rule(ours=frozenset({"actors", "client", "cluster", "kernels", "models", "oip", "v1"}), others=None),
}
NEVER = frozenset({"tests", "benchmarks", "examples"})


def find_breaches(folder: str, source: str) -> list[str]:
    """Return what a file of a folder breaks: "line: what" for each."""
    rule, tree = RULES[folder], ast.parse(source)
    breaches = [f"{line}: imports {module}" for line, module in imported_modules(tree) if not may_import(rule, module)]
    if rule.is_pure:
        breaches += [f"{line}: calls {name}" for line, name in impure_calls(tree)]
    return breaches


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted module) of every import, wherever it stands; a relative one begins with dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            # `from expertmesh import actors` names the folder only here.
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and dotted_name(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, str(a.value)) for a in node.args if isinstance(a, ast.Constant))


def top_of(module: str) -> str:
    return module.partition(".")[0]


def may_import(rule: Rule, module: str) -> bool:
    top, rest = top_of(module), module.partition(".")[2]
    if top == NAMESPACE:
        return top_of(rest) in rule.ours
    if top in sys.stdlib_module_names:
        return not (rule.is_pure and top in IMPURE)
    return bool(top) and top not in NEVER and (rule.others is None or top in rule.others)


def impure_calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of calls that look outside, or draw random numbers without a seed."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted_name(node.func)
        before, _, last = name.rpartition(".")
        draws = before == "random" or before.endswith(".random") or last in {"Random", "default_rng"}
        if (draws and not (last in SEEDED and (node.args or node.keywords))) or any(
            name == call or name.endswith("." + call) for call in IMPURE_CALLS
        ):
            yield node.lineno, name


def dotted_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def setuptools_settings() -> dict[str, Any]:
    settings: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    return settings


def package_roots() -> dict[str, Path]:
    """Map the folders' names in the namespace to where they are."""
    folders = setuptools_settings()["package-dir"]
    return {name.removeprefix(f"{NAMESPACE}."): ROOT / folder for name, folder in folders.items()}


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


@pytest.mark.parametrize("folder", RULES)
def test_the_arrows_hold(folder: str) -> None:
    files = files_of(package_roots()[folder])
    assert files
    breaches = {str(path.relative_to(ROOT)): find_breaches(folder, path.read_text()) for path in files}
    assert not {path: found for path, found in breaches.items() if found}


def test_of_the_actors_the_commands_alone_are_clients() -> None:
    clients = {path for path in files_of(ROOT / "actors") if "expertmesh.client" in path.read_text()}
    assert {path.parent.relative_to(ROOT).as_posix() for path in clients} == {"actors/cli"}


def test_the_way_to_kubernetes_is_a_folder_that_needs_no_fleet() -> None:
    """A laptop brings a fleet up: without Ray's runtime but for Ray's own command, and without what computes."""
    folder = ROOT / "actors" / "kubernetes"
    imported = {
        path: [module for _, module in imported_modules(ast.parse(path.read_text()))] for path in files_of(folder)
    }
    of_ray = {path.name for path, modules in imported.items() if any(top_of(module) == "ray" for module in modules)}
    assert of_ray == {"provider.py", "command_runner.py"}
    ours = {module for modules in imported.values() for module in modules if module.startswith("expertmesh.actors.")}
    assert {module.split(".")[2] for module in ours} == {"kubernetes"}
    users = {path.parent for path in files_of(ROOT / "actors") if "expertmesh.actors.kubernetes" in path.read_text()}
    assert users == {folder, ROOT / "actors" / "cli"}
    code = (
        "import sys, expertmesh.actors.cli.up, expertmesh.actors.cli.down; print({'ray', 'torch'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240)
    assert found.stdout == "set()\n"


def test_every_folder_has_a_rule() -> None:
    assert set(package_roots()) == set(RULES)


@pytest.mark.parametrize(
    ("folder", "line", "breach"),
    [
        ("cluster", "import ray", "imports ray"),
        ("cluster", "import torch.nn", "imports torch.nn"),
        ("cluster", "from expertmesh.kernels import sampling", "imports expertmesh.kernels.sampling"),
        ("cluster", "from expertmesh import models", "imports expertmesh.models"),
        ("cluster", "from ..actors import wire", "imports ..actors.wire"),
        ("cluster", "import os", "imports os"),
        ("cluster", "from os import environ", "imports os.environ"),
        ("cluster", "from time import monotonic", "imports time.monotonic"),
        ("cluster", "import random; random.random()", "calls random.random"),
        ("cluster", "import random; random.Random()", "calls random.Random"),
        ("cluster", "from random import Random; Random()", "calls Random"),
        ("cluster", "import numpy as np; np.random.default_rng()", "calls np.random.default_rng"),
        ("cluster", "import numpy as np; np.random.rand(3)", "calls np.random.rand"),
        ("cluster", "import datetime; datetime.datetime.now()", "calls datetime.datetime.now"),
        ("cluster", "from datetime import datetime; datetime.now()", "calls datetime.now"),
        ("cluster", "open('a')", "calls open"),
        ("kernels", "from expertmesh.cluster.errors import InputError", "imports expertmesh.cluster.errors.InputError"),
        ("kernels", "import transformers", "imports transformers"),
        ("models", "def f():\n    import ray", "imports ray"),
        ("models", "from ray.util import metrics", "imports ray.util.metrics"),
        (
            "models",
            "if TYPE_CHECKING:\n    from expertmesh.actors.state import StateStore",
            "imports expertmesh.actors",
        ),
        ("models", "importlib.import_module('expertmesh.actors.state')", "imports expertmesh.actors.state"),
        ("v1", "import expertmesh.cluster.ids", "imports expertmesh.cluster.ids"),
        ("client", "import ray", "imports ray"),
        ("client", "import expertmesh.cluster.ids", "imports expertmesh.cluster.ids"),
        ("actors", "from tests.fleet import LocalFleet", "imports tests.fleet.LocalFleet"),
    ],
)
def test_a_broken_arrow_is_found(folder: str, line: str, breach: str) -> None:
    """The checker on made-up files: a sound line, the breach, a sound line."""
    (found,) = find_breaches(folder, f"import math\n{line}\nimport json\n")
    assert breach in found


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("cluster", "import numpy as np; np.random.default_rng(3)"),
        ("cluster", "import random; random.Random(seed).random()"),
        ("cluster", "from datetime import timedelta; timedelta(seconds=1)"),
        ("kernels", "from expertmesh.kernels.sampling import sample; import triton.language"),
        ("models", "from expertmesh.cluster import ids"),
        ("actors", "import os, ray, time, expertmesh.v1.inference_pb2"),
    ],
)
def test_what_is_allowed_passes(folder: str, line: str) -> None:
    assert find_breaches(folder, line) == []


def test_kernels_is_no_regular_package_and_the_others_are() -> None:
    """A regular top-level package of that name would shadow Hugging Face's `kernels`."""
    without = {
        str(path.relative_to(ROOT))
        for root in package_roots().values()
        for path in {file.parent for file in files_of(root)}
        if not (path / "__init__.py").is_file()
    }
    assert without == {"kernels"}


def test_the_wheel_has_every_package() -> None:
    listed = setuptools_settings()["packages"]
    found = {
        ".".join([NAMESPACE, name, *file.parent.relative_to(root).parts])
        for name, root in package_roots().items()
        for file in files_of(root)
    }
    assert found == set(listed)


def test_no_file_is_too_long() -> None:
    folders = [*package_roots().values(), ROOT / "benchmarks", ROOT / "examples"]
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for folder in folders
        for path in files_of(folder)
        if not path.name.endswith(GENERATED)
    }
    assert not {path: length for path, length in lengths.items() if length > MAX_LINES}


def test_no_text_names_a_home_folder_or_this_checkout() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files are ours is not known")
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    found: dict[str, list[str]] = {}
    for path in (ROOT / name for name in names if name):
        try:
            text = path.read_text() if path.is_file() else ""
        except UnicodeDecodeError:
            continue  # not a text
        if paths := named_paths(text):
            found[str(path.relative_to(ROOT))] = paths
    assert not found


def named_paths(text: str) -> list[str]:
    # A checkout right under / has a name as common as /app, which may stand anywhere.
    own = [str(ROOT)] if len(ROOT.parts) > 2 and str(ROOT) in text else []
    return HOME_PATH.findall(text) + own


@pytest.mark.parametrize(
    ("text", "is_named"),
    [
        ("see " + "/home" + "/someone/notes", True),
        ('"' + "/Users" + '/someone"', True),
        (f"{ROOT}/tests", True),
        ("https://example.org/home/page", False),
        ("COPY . /home/ray/app", False),
        ("~/.local/state", False),
    ],
)
def test_a_named_path_is_found(text: str, is_named: bool) -> None:
    assert bool(named_paths(text)) == is_named


def test_what_computes_is_imported_by_what_computes_alone() -> None:
    """A process imports the class of every actor that it holds a handle of; torch and transformers take it seconds."""
    light = ["launch", "controller.actor", "controller.controller", "shard.actor", "worker.actor", "gateway.deployment"]
    code = "".join(
        f"import sys, expertmesh.actors.{module}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)));"
        for module in light
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240)
    assert dict(zip(light, found.stdout.splitlines(), strict=True)) == dict.fromkeys(light, "[]")


def public_methods(kind: type) -> dict[str, object]:
    own = {name: member for name, member in vars(kind).items() if not name.startswith("_") or name == "__init__"}
    return {
        name: (inspect.signature(member), inspect.iscoroutinefunction(member))
        for name, member in own.items()
        if inspect.isfunction(member)
    }


@pytest.mark.parametrize(
    ("actor", "inner"), [(ControllerActor, Controller), (ShardActor, Shard), (WorkerActor, Worker)]
)
def test_an_actor_can_be_asked_for_all_that_it_does(actor: type, inner: type) -> None:
    assert public_methods(actor) == public_methods(inner)
