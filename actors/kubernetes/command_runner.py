"""Ray's command runner on Kubernetes: `kubectl exec` into Ray's container of a pod, `kubectl cp`, `port-forward`."""

import contextlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import click
from ray.autoscaler._private.cli_logger import cli_logger
from ray.autoscaler._private.subprocess_output_util import ProcessRunnerError
from ray.autoscaler.command_runner import CommandRunnerInterface

from expertmesh.actors.kubernetes.head import exec_words
from expertmesh.actors.kubernetes.kubectl import Kubectl
from expertmesh.cluster.errors import ExpertMeshError
from expertmesh.cluster.kubernetes.complaints import read_complaint
from expertmesh.cluster.kubernetes.objects import Manifest

# The configuration that Ray's own autoscaler would read on the head; KubeRay's reads the RayCluster.
BOOTSTRAP_FILE = "~/ray_bootstrap_config.yaml"
# How Ray writes `--tmux` and `--screen` of exec and attach.
_SESSIONS = re.compile(r"(tmux new( -d bash -c .*)?|tmux attach \|\| tmux new|screen -L( -xRR| -dm .*)?)$", re.DOTALL)

# What the updater of `ray up` asks until it succeeds, for a quarter of an hour.
_QUESTION = "uptime"
_QUESTION_TIMEOUT_S = 60.0


class CommandFailedError(ProcessRunnerError, click.ClickException):  # type: ignore[misc]
    """A command failed in the pod. Ray's updater prints cmd, returncode and stderr, and no traceback."""

    def __init__(self, cmd: str, returncode: int, stderr: str, special_case: str | None = None) -> None:
        ProcessRunnerError.__init__(
            self, stderr, "ssh_command_failed", code=returncode, command=cmd, special_case=special_case
        )
        self.cmd = cmd
        self.returncode = returncode
        self.stderr = stderr


class KubectlCommandRunner(CommandRunnerInterface):  # type: ignore[misc]
    """Runs commands in a pod. `ray start` and `ray stop` are done already, or not to be done: KubeRay's matter."""

    def __init__(self, kubectl: Kubectl, pod: Manifest) -> None:
        self._kubectl = kubectl
        self._pod = pod

    def run(
        self,
        cmd: str | None = None,
        timeout: int = 120,
        exit_on_fail: bool = False,
        port_forward: Any = None,
        with_output: bool = False,
        environment_variables: dict[str, object] | None = None,
        run_env: str = "auto",
        ssh_options_override_ssh_key: str = "",
        shutdown_after_run: bool = False,
    ) -> str:
        """Run a command with bash; see CommandRunnerInterface. A person's has the terminal, one of `ray up` has not.

        Raises:
            ClickException: it cannot be run here.
            Exit: exit_on_fail, and it failed: with its exit code.
            CommandFailedError: it failed, or did not end in time.
        """
        ports = [port_forward] if isinstance(port_forward, tuple) else list(port_forward or ())
        if cmd is None:
            self._forward(ports)
            return ""
        if _SESSIONS.match(cmd.strip()):
            _refuse("--tmux and --screen cannot be: a session would end with the head's pod, and the image has neither")
        if self._is_ray_s_life(cmd):
            return ""
        if environment_variables:
            exports = (f"export {key}={shlex.quote(str(value))}; " for key, value in environment_variables.items())
            cmd = "".join(exports) + cmd
        with self._forwarding(ports):
            if exit_on_fail and not with_output:
                return self._run_for_a_person(cmd)
            # Ray's limit is for the way to the node; only its own question whether there is one is short.
            output = self._run(cmd, _QUESTION_TIMEOUT_S if cmd == _QUESTION else None, exit_on_fail=exit_on_fail)
        if not with_output:
            sys.stdout.write(output)
        return output if with_output else ""

    def run_rsync_up(self, source: str, target: str, options: dict[str, Any] | None = None) -> None:
        """Copy a file or folder into the pod, by `kubectl cp`, which needs tar there; `folder/` is what is in it."""
        if target == BOOTSTRAP_FILE:
            return
        self._copy(source, f"{self._pod['metadata']['name']}:{self._expanded(target)}", options)

    def run_rsync_down(self, source: str, target: str, options: dict[str, Any] | None = None) -> None:
        """Copy a file or folder out of the pod."""
        self._copy(f"{self._pod['metadata']['name']}:{self._expanded(source)}", target, options)

    def remote_shell_command_str(self) -> str:
        """Return the command that opens a shell in the pod."""
        words = exec_words(self._pod, ["bash"], options=["--stdin", "--tty"])
        return f"{self._kubectl.shown()} {' '.join(words)}"

    def _is_ray_s_life(self, cmd: str) -> bool:
        """Return whether a command does nothing but start or stop Ray; refuse one that does more beside it."""
        parts = [part.strip() for part in re.split(r"&&|\|\||;|\n", cmd)]
        parts = [part for part in parts if part and not re.match(r"(export|ulimit|true)\b", part)]
        matching = [part for part in parts if re.match(r"ray (start|stop)\b", part)]
        if not matching:
            return False
        if len(matching) < len(parts):
            _refuse(f"`{matching[0]}` is KubeRay's matter in this pod: leave it, and --stop, out of the command")
        cli_logger.print("`{}` is KubeRay's matter in this pod: nothing to do", matching[0])
        return True

    def _run(self, cmd: str, timeout_s: float | None, *, exit_on_fail: bool = False) -> str:
        """Run a command without a terminal, for as long as it takes unless told, and return its output."""
        is_long = timeout_s is None
        words = self._command(*exec_words(self._pod, ["bash", "-c", cmd]), is_long=is_long)
        try:
            ended = subprocess.run(  # noqa: S603 - words, not a shell's line
                words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired:
            raise CommandFailedError(cmd, 1, f"no end within {timeout_s:g} s", "ssh_timeout") from None
        if not ended.returncode:
            return ended.stdout
        sys.stderr.write(ended.stderr)
        if exit_on_fail:
            raise click.exceptions.Exit(ended.returncode)
        raise CommandFailedError(cmd, ended.returncode, read_complaint(ended.stderr, self._kubectl.shown()).line)

    def _run_for_a_person(self, cmd: str) -> str:
        """Run a command with this process's stdin and stdout, in a terminal if they are one."""
        options = ["--stdin", *(["--tty"] if sys.stdin.isatty() and sys.stdout.isatty() else [])]
        # No limit to how long it may be silent: kubectl's would break it off.
        words = self._command(*exec_words(self._pod, ["bash", "-c", cmd], options=options), is_long=True)
        sys.stdout.flush()
        code = subprocess.run(words, check=False).returncode  # noqa: S603 - words, not a shell's line
        if code:
            raise click.exceptions.Exit(code)
        return ""

    def _forward(self, ports: list[tuple[int, int]]) -> None:
        """Forward ports until Ctrl-C, or until the pod is gone."""
        code = subprocess.run(self._forward_words(ports), check=False).returncode  # noqa: S603
        if code:
            raise click.exceptions.Exit(code)

    @contextlib.contextmanager
    def _forwarding(self, ports: list[tuple[int, int]]) -> Iterator[None]:
        """Forward ports while a command runs."""
        if not ports:
            yield
            return
        process = subprocess.Popen(self._forward_words(ports), stdout=subprocess.DEVNULL)  # noqa: S603
        try:
            yield
        finally:
            process.terminate()
            process.wait()

    def _forward_words(self, ports: list[tuple[int, int]]) -> list[str]:
        pairs = [f"{local}:{remote}" for local, remote in ports]
        return self._command("port-forward", f"pod/{self._pod['metadata']['name']}", *pairs, is_long=True)

    def _command(self, *args: str, is_long: bool) -> list[str]:
        try:
            return self._kubectl.command(*args, is_long=is_long)
        except ExpertMeshError as error:
            _refuse(str(error))

    def _copy(self, source: str, target: str, options: dict[str, Any] | None) -> None:
        for key in ("rsync_exclude", "rsync_filter"):
            if (options or {}).get(key):
                _refuse(f"{key} cannot be heeded: files are copied by kubectl cp")
        container = self._pod["spec"]["containers"][0]["name"]
        timeout_s = self._kubectl.settings.timeout_s
        # As rsync has it: a slash at the end of the source means what is in the folder.
        source, target = (f"{source}." if source.endswith("/") else source), target.rstrip("/")
        try:
            self._kubectl.run("cp", source, target, f"--container={container}", timeout_s=timeout_s)
        except ExpertMeshError as error:
            _refuse(f"kubectl cp {source} {target}: {error}")

    def _expanded(self, path: str) -> str:
        if path != "~" and not path.startswith("~/"):
            return path
        return self._run('printf %s "$HOME"', _QUESTION_TIMEOUT_S) + path[1:]


def _refuse(line: str) -> NoReturn:
    raise click.ClickException(" ".join(line.split()))
