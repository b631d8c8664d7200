"""The command runner of `ray up`, with a program in kubectl's place that notes how it was called."""

from pathlib import Path
from typing import Any

import click
import psutil
import pytest

from expertmesh.actors.kubernetes.command_runner import CommandFailedError, KubectlCommandRunner
from expertmesh.actors.kubernetes.kubectl import Kubectl
from expertmesh.cluster.kubernetes.settings import ProviderSettings

POD = {"metadata": {"name": "p"}, "spec": {"containers": [{"name": "ray-head"}, {"name": "autoscaler"}]}}
EXEC = ["exec", "p", "--container=ray-head", "--", "bash", "-c"]
STUB = """#!/bin/sh
for word in "$@"; do printf '%s\\0' "$word"; done >> {calls}
printf '\\n' >> {calls}
cat > /dev/null
echo output
if [ -f {failing} ]; then cat {failing} >&2; exit 3; fi
"""


class Recorded:
    """A runner, and the calls of kubectl that it has made."""

    def __init__(self, folder: Path) -> None:
        self._calls, self.failing = folder / "calls", folder / "failing"
        program = folder / "kubectl"
        program.write_text(STUB.format(calls=self._calls, failing=self.failing))
        program.chmod(0o755)
        settings = ProviderSettings(namespace="ml", context="lab", manifests="m", kubectl=str(program))
        self.runner = KubectlCommandRunner(Kubectl(settings), POD)

    def calls(self) -> list[list[str]]:
        """Return the words of each call, without the way to the cluster that all begin with."""
        lines = self._calls.read_text().removesuffix("\n").split("\0\n") if self._calls.exists() else []
        words = [line.removesuffix("\0").split("\0") for line in lines if line]
        assert all(call[:2] == ["--context=lab", "--namespace=ml"] for call in words)
        return [call[2:] for call in words]


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    return Recorded(tmp_path)


def test_a_command_runs_in_ray_s_container_with_its_environment(recorded: Recorded) -> None:
    output = recorded.runner.run("echo $A", environment_variables={"A": "it's", "B": 1}, with_output=True)
    assert output == "output\n"
    assert recorded.calls() == [[*EXEC, "export A='it'\"'\"'s'; export B=1; echo $A"]]


def test_a_person_s_command_has_stdin_and_no_limit(recorded: Recorded) -> None:
    assert recorded.runner.run("top", exit_on_fail=True) == ""
    (call,) = recorded.calls()
    assert call == ["exec", "--stdin", *EXEC[1:], "top"], "a terminal only where there is one"


def test_only_ray_s_own_question_is_limited(recorded: Recorded) -> None:
    recorded.runner.run("uptime", timeout=10)
    assert recorded.calls() == [["--request-timeout=15s", *EXEC, "uptime"]]


@pytest.mark.parametrize(
    "cmd",
    [
        "ray start --head --autoscaling-config=~/ray_bootstrap_config.yaml",
        "export RAY_enable_autoscaler_v2=1; export RAY_CLOUD_INSTANCE_ID=p; ray start --head",
        "ulimit -n 65536; ray start --head",
        "ray stop",
        "ray stop && ray start --head",
    ],
)
def test_starting_and_stopping_ray_is_done_already(recorded: Recorded, cmd: str) -> None:
    assert recorded.runner.run(cmd) == ""
    assert recorded.calls() == []


@pytest.mark.parametrize("cmd", ["ray status", "ray stack", "echo ray stop", "python ray_start.py", "ray startup"])
def test_other_commands_are_run(recorded: Recorded, cmd: str) -> None:
    recorded.runner.run(cmd)
    assert recorded.calls() == [[*EXEC, cmd]]


@pytest.mark.parametrize(
    ("cmd", "complaint"),
    [
        ("echo a; ray stop; ray teardown ~/ray_bootstrap_config.yaml --yes --workers-only", "`ray stop` is KubeRay's"),
        ("pip list && ray start --head", "`ray start --head` is KubeRay's matter in this pod"),
        ("tmux new -d bash -c 'sleep 1; exec bash'", "--tmux and --screen cannot be"),
        ("screen -L -dm bash -c 'sleep 1; exec bash'", "--tmux and --screen cannot be"),
        ("tmux attach || tmux new", "--tmux and --screen cannot be"),
        ("tmux new", "--tmux and --screen cannot be"),
        ("screen -L -xRR", "--tmux and --screen cannot be"),
        ("screen -L", "--tmux and --screen cannot be"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(recorded: Recorded, cmd: str, complaint: str) -> None:
    with pytest.raises(click.ClickException, match=complaint) as caught:
        recorded.runner.run(cmd)
    assert "\n" not in caught.value.message
    assert recorded.calls() == []


def test_a_failure_is_one_that_ray_prints_without_a_traceback(
    recorded: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded.failing.write_text(
        "E1128 17:20:07.519270 1 memcache.go:265] x\nerror: You must be logged in to the server\n"
    )
    with pytest.raises(CommandFailedError) as caught:
        recorded.runner.run("pip install x")
    error = caught.value
    # What Ray's updater looks at.
    assert isinstance(error, click.ClickException)
    assert (error.cmd, error.returncode, error.msg_type) == ("pip install x", 3, "ssh_command_failed")
    assert error.stderr.startswith("the server does not know these credentials (401)")
    assert "You must be logged in" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"with_output": True}, {}])
def test_a_person_s_failing_command_has_its_exit_code(recorded: Recorded, options: dict[str, Any]) -> None:
    recorded.failing.write_text("no\n")
    with pytest.raises(click.exceptions.Exit) as caught:
        recorded.runner.run("false", exit_on_fail=True, **options)
    assert caught.value.exit_code == 3


def test_ports_are_forwarded(recorded: Recorded) -> None:
    recorded.runner.run(None, port_forward=[(8265, 80), (1, 2)])
    assert recorded.calls() == [["port-forward", "pod/p", "8265:80", "1:2"]]


def test_ports_are_forwarded_as_long_as_a_command_runs(recorded: Recorded, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    forward = f"echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}; exec sleep 600"
    command = f"until [ -f {pid_file} ]; do sleep 0.05; done; echo done"
    stub = f'#!/bin/sh\ncase "$*" in *port-forward*5:6*) {forward};; *) {command};; esac\n'
    (tmp_path / "kubectl").write_text(stub)
    assert recorded.runner.run("echo", port_forward=(5, 6), with_output=True) == "done\n"
    assert not psutil.pid_exists(int(pid_file.read_text()))


def test_files_are_copied_and_ray_s_configuration_is_not(recorded: Recorded, tmp_path: Path) -> None:
    recorded.runner.run_rsync_up("here", "~/ray_bootstrap_config.yaml", {"docker_mount_if_possible": True})
    assert recorded.calls() == []
    recorded.runner.run_rsync_up("here", "/tmp/there", {"rsync_exclude": [], "rsync_filter": None})  # noqa: S108
    recorded.runner.run_rsync_down("/tmp/there", "here")  # noqa: S108
    recorded.runner.run_rsync_up("folder/", "/tmp/there/")  # noqa: S108
    assert recorded.calls() == [
        ["cp", "here", "p:/tmp/there", "--container=ray-head"],
        ["cp", "p:/tmp/there", "here", "--container=ray-head"],
        ["cp", "folder/.", "p:/tmp/there", "--container=ray-head"],
    ]
    with pytest.raises(click.ClickException, match="rsync_filter cannot be heeded: files are copied by kubectl cp"):
        recorded.runner.run_rsync_up("here", "there", {"rsync_filter": [".gitignore"]})


def test_the_shell_that_a_person_may_open(recorded: Recorded) -> None:
    expected = "kubectl --context=lab --namespace=ml exec --stdin --tty p --container=ray-head -- bash"
    assert recorded.runner.remote_shell_command_str() == expected
