"""`expertmesh serve`: bring a deployment up, stay with it, take it down."""

import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from expertmesh.actors.cli import running
from expertmesh.actors.cli.configuration import read_settings
from expertmesh.actors.metrics_target import metrics_target
from expertmesh.actors.ray_env import calm_local_serve, require_auth_mode, secure_local_ray
from expertmesh.actors.tracing import with_endpoint
from expertmesh.cluster.errors import UnavailableError
from expertmesh.cluster.settings import ServeSettings

_POLL_S = 0.1


def serve(
    model: Annotated[Path, typer.Argument(help="Checkpoint directory, as save_pretrained writes it.")],
    shards: Annotated[int | None, typer.Option(help="Expert shards; 2 unless given.")] = None,
    workers: Annotated[int | None, typer.Option(help="Attention workers; 1 unless given.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Shards that hold each expert; 1 unless given.")] = None,
    grpc_host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 unless given.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Port of gRPC, 0: a free one; 50051 unless given.")] = None,
    http_host: Annotated[str | None, typer.Option(help="Address that HTTP listens on; 127.0.0.1 unless given.")] = None,
    http_port: Annotated[int | None, typer.Option(help="Port of HTTP, 0: a free one; 8000 unless given.")] = None,
    http: Annotated[bool | None, typer.Option(help="Serve OpenAI's HTTP beside gRPC; yes unless told not to.")] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Certificate chain (PEM) of gRPC and HTTP; reloaded by gRPC.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Private key of --tls-cert (PEM).")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Have gRPC's clients show a certificate of these authorities.")
    ] = None,
    keys: Annotated[Path | None, typer.Option(help="File of API keys; see `expertmesh keys`.")] = None,
    state: Annotated[str | None, typer.Option(help="redis://..; an embedded server unless given.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join; start one here unless given.")] = None,
    autoscale: Annotated[bool | None, typer.Option(help="Let the load decide how many there are.")] = None,
    min_shards: Annotated[int | None, typer.Option(help="Fewest shards of --autoscale; 1 unless given.")] = None,
    max_shards: Annotated[int | None, typer.Option(help="Most shards of --autoscale.")] = None,
    min_workers: Annotated[int | None, typer.Option(help="Fewest workers of --autoscale; 1 unless given.")] = None,
    max_workers: Annotated[int | None, typer.Option(help="Most workers of --autoscale.")] = None,
    plan: Annotated[
        str | None, typer.Option(help="How experts are spread: ep, tp, tpxep, auto, or a file of `plan --json`.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16; auto unless given.")] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="The same bits whatever the batch, the shards, the faults.")
    ] = False,
    capacity_factor: Annotated[
        float | None, typer.Option(help="Drop tokens beyond so many even shares of an expert; none unless given.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with any of these and more settings.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return when ready; `expertmesh stop` ends it.")] = False,
) -> None:
    """Serve a checkpoint from expert shards on Ray until Ctrl-C.

    Options win over the file given by --config; docs/operations.md lists every setting.
    """
    given = {
        "model": model,
        "shards": shards,
        "workers": workers,
        "replicas": replicas,
        "grpc_host": grpc_host,
        "grpc_port": grpc_port,
        "http_host": http_host,
        "http_port": http_port,
        "http": http,
        "keys": keys,
        "state": state,
        "dtype": dtype,
        "deterministic": deterministic or None,
        "capacity_factor": capacity_factor,
    }
    bounds = {
        "min_shards": min_shards,
        "max_shards": max_shards,
        "min_workers": min_workers,
        "max_workers": max_workers,
    }
    tls = {"tls_cert": tls_cert, "tls_key": tls_key, "tls_client_ca": tls_client_ca}
    settings = read_settings(
        config, _without_none(given), autoscale=autoscale, bounds=_without_none(bounds), tls=_without_none(tls)
    )
    if detach:
        _run_detached()
        return
    if plan is not None:
        from expertmesh.actors.cli.serving_plan import with_plan  # numpy and YAML for those who ask

        settings = with_plan(settings, plan, lambda line: typer.echo(line, err=True))
    ready_line = sys.stdout
    with redirect_stdout(sys.stderr):  # where Ray prints what its processes warn of
        _run(with_endpoint(settings, os.environ), address, ready_line)


def _without_none(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _run(settings: ServeSettings, address: str | None, ready_line: TextIO) -> None:
    """Serve until a signal comes; ready_line is for that line alone, which scripts read."""
    if address is None:
        secure_local_ray()
        calm_local_serve()
    else:
        require_auth_mode()
    from expertmesh.actors.launch import Deployment  # after the environment is set: it imports Ray

    started_s = time.monotonic()

    def say(line: str) -> None:
        sys.stderr.write(f"[{time.monotonic() - started_s:6.1f} s] {line}\n")
        sys.stderr.flush()

    deployment = Deployment(settings, address, say, on_ray=_raise_on_signals)
    _raise_on_signals()
    try:
        deployment.start()
        with (
            running.registered(deployment.grpc_address, settings.model, deployment.log_folder),
            metrics_target(running.state_home(), deployment.metrics_address),
        ):
            ready_line.write(" ".join(["ready", deployment.grpc_address, deployment.http_url]).rstrip() + "\n")
            ready_line.flush()
            while True:
                signal.pause()
    except KeyboardInterrupt:
        say("stopping")
    finally:
        deployment.stop()
        say("stopped")


def _raise_on_signals() -> None:
    """Let SIGTERM and SIGINT raise KeyboardInterrupt, once: a second one while stopping changes nothing."""

    def interrupt(_number: int, _frame: object) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupt)


def _run_detached() -> None:
    """Run the same command without --detach in the background, and follow it until it is ready or has failed."""
    log = running.new_log_file()
    command = [sys.executable, "-m", "expertmesh.actors.cli.main", *(a for a in sys.argv[1:] if a != "--detach")]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, env=os.environ
        )
    with log.open() as text:
        while True:
            ended = process.poll() is not None
            for line in text:
                if line.startswith("ready "):
                    sys.stdout.write(f"{line}pid {process.pid}, log {log}; `expertmesh stop` ends it\n")
                    return
                if line.startswith("error: "):
                    raise UnavailableError(line.removeprefix("error: ").strip())
                sys.stderr.write(line)
            if ended:
                raise UnavailableError(f"the server ended with exit code {process.returncode}; see {log}")
            time.sleep(_POLL_S)
