"""`expertmesh doctor --measure`: the hardware and the calibration that `plan --hardware this-machine` reads."""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import typer
import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from expertmesh.actors.cli.measure_sizes import Sizes
from expertmesh.actors.cli.plan_files import THIS_MACHINE, measured_calibration, measured_hardware
from expertmesh.cluster.errors import InputError, UnavailableError
from expertmesh.cluster.planner.calibration import Calibration, calibrate
from expertmesh.cluster.planner.cpu_times import CpuTimes, hardware_of
from expertmesh.cluster.planner.hardware import Hardware, complaint, read_hardware
from expertmesh.kernels.cache_folder import keep

# Of a core: what other processes may take of the machine before its times say little.
QUIET_CORES = 0.2


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured, how long that took, cores that other processes used meanwhile, and the files written."""

    hardware: Hardware
    calibration: Calibration
    seconds: float
    others_cores: float
    hardware_file: Path
    calibration_file: Path


def show_measured(*, as_json: bool) -> None:
    """Measure this machine, write the files, and print what was found."""
    say = Console(stderr=True).print
    found = measure(Sizes(), lambda doing: say(f"measuring {doing}"))
    if found.others_cores > QUIET_CORES:
        say(f"other processes used {found.others_cores:.1f} cores meanwhile: measure again when the machine is quiet")
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "hardware": found.hardware.model_dump(mode="json"),
                    "calibration": found.calibration.model_dump(mode="json"),
                    "seconds": found.seconds,
                    "others_cores": found.others_cores,
                    "hardware_file": str(found.hardware_file),
                    "calibration_file": str(found.calibration_file),
                }
            )
        )
        return
    Console().print(_table(calibrate(found.hardware, found.calibration)))
    typer.echo(f"measured in {found.seconds:.0f} s; written to {found.hardware_file} and {found.calibration_file}")
    typer.echo(f"`expertmesh plan MODEL --hardware {THIS_MACHINE}` reads them")


def measure(sizes: Sizes, on_progress: Callable[[str], None]) -> Measured:
    """Measure this machine in processes of their own, and write what `plan` reads.

    Raises:
        InputError: the cache folder cannot be written to.
        UnavailableError: what is timed cannot run here, or a process of the measurement ended.
    """
    hardware_file, calibration_file = measured_hardware(), measured_calibration()
    with _writing(hardware_file), tempfile.TemporaryDirectory(dir=_made(hardware_file.parent)):
        pass  # before a minute is spent
    began_s, began_cpu_s = time.perf_counter(), _others_cpu_s()
    result = _run(sizes, on_progress)
    seconds = time.perf_counter() - began_s
    others_cores = max(0.0, _others_cpu_s() - began_cpu_s) / seconds
    source = f"expertmesh doctor --measure, {time.strftime('%Y-%m-%d', time.gmtime())}"
    try:
        if "hardware" in result:
            hardware = read_hardware(THIS_MACHINE, result["hardware"] | {"sources": {"all": source}})
            calibration = Calibration(source=source, constants={})
        else:
            hardware, calibration = hardware_of(CpuTimes(**result["times"]), source)
    except ValidationError as error:
        raise UnavailableError(f"--measure: {complaint(error)}") from error
    with _writing(hardware_file):
        text = yaml.safe_dump(hardware.model_dump(mode="json"), sort_keys=False)
        keep(hardware_file, lambda path: path.write_text(text))
    with _writing(calibration_file):
        keep(calibration_file, lambda path: path.write_text(calibration.model_dump_json(indent=1) + "\n"))
    return Measured(
        hardware=hardware,
        calibration=calibration,
        seconds=seconds,
        others_cores=others_cores,
        hardware_file=hardware_file,
        calibration_file=calibration_file,
    )


def _others_cpu_s() -> float:
    """Return the processor time of the whole machine but for this process and those that it has waited for."""
    every, own = (
        psutil.cpu_times(),
        [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)],
    )
    used_s = every.user + every.nice + every.system + getattr(every, "steal", 0.0)  # Linux counts guests in user
    return float(used_s - sum(usage.ru_utime + usage.ru_stime for usage in own))


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"--measure: {path} cannot be written: {error.strerror}") from error


def _run(sizes: Sizes, on_progress: Callable[[str], None]) -> dict[str, Any]:
    """Run the process that measures; return its last line."""
    # Here, not above: it imports Ray, which takes a second.
    from expertmesh.actors.runtime import actor_env

    command = [sys.executable, "-m", "expertmesh.actors.cli.measure_process", json.dumps(asdict(sizes))]
    env = {**os.environ, **actor_env(len(os.sched_getaffinity(0))), "TQDM_DISABLE": "1"}
    result: dict[str, Any] = {}
    with (
        tempfile.TemporaryFile("w+") as complaints,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True, env=env) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                result = json.loads(line)
                if "doing" in result:
                    on_progress(result["doing"])
        finally:
            if process.poll() is None and sys.exc_info()[0] is not None:
                process.kill()
        code = process.wait()
        complaints.seek(0)
        last = [line for line in complaints.read().splitlines() if line.strip()][-1:]
    if "error" in result:
        raise UnavailableError(f"--measure: {result['error']}")
    if code or not result.keys() & {"times", "hardware"}:
        raise UnavailableError(f"--measure: its process ended with {code}: {''.join(last)}")
    return result


def _table(found: Hardware) -> Table:
    fleet, table = found.fleet, Table("what", "measured", "of")
    each = "core" if fleet.shares_cores else "GPU"
    table.add_row(f"{each}s", str(found.num_gpus), "this machine")
    table.add_row("memory", f"{found.memory_bytes / 1e9:.1f} GB", f"a {each}'s part")
    table.add_row("reading", f"{found.memory_bytes_per_s / 1e9:.1f} GB/s", f"a {each}, all at once")
    table.add_row("products, bf16", f"{found.flop_per_s['bf16'] / 1e9:.0f} GFLOP/s", f"a {each}, all at once")
    for tier in found.tiers:
        table.add_row("link", f"{tier.latency_s * 1e6:.1f} us, {tier.bytes_per_s / 1e9:.2f} GB/s", tier.name)
        table.add_row("link, further ones", f"{tier.per_peer_s * 1e6:.1f} us", "a message to one more peer")
    if fleet.shares_cores:
        table.add_row("reading alone", f"{fleet.lone_bytes_per_s / 1e9:.1f} GB/s", "a core while the others idle")
        table.add_row("overlap", f"{fleet.product_overlap:.2f}", "of reading and computing a product")
        table.add_row("keys and values", f"{fleet.kv_efficiency:.2f}", "of the reading rate")
        table.add_row("layer", f"{found.kernel_gap_s * 1e6:.1f} us", "beside its products and rows")
        table.add_row("row", f"{fleet.value_s * 1e9 * 1024:.0f} ns", "a layer and 1024 hidden values, one core")
        table.add_row("step", f"{fleet.step_s * 1e3:.2f} ms", "beside its layers and sequences")
        table.add_row("sequence", f"{fleet.sequence_s * 1e6:.0f} us", "a step")
        table.add_row("drawing", f"{fleet.score_s * 1e9:.2f} ns", "a score")
    return table
