"""A server for a while: reached by the end of its command alone, and with the client's share of the cores."""

import os
import sys
from pathlib import Path

import pytest

from expertmesh.actors.cli.child_server import child_server


def test_ctrl_c_does_not_reach_it_and_the_kernel_does_not_set_it_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "python"
    program.write_text(
        f"#!{sys.executable}\n"
        "import os, signal\n"
        "print('ready', f'{os.getsid(0)}/{os.getpgid(0)}', flush=True)\n"
        "signal.pause()\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with child_server(tmp_path, []) as where:
        session, group = map(int, where.split("/"))
    assert session == os.getsid(0), "Linux divides the cores between sessions first"
    assert group != os.getpgid(0), "Ctrl-C goes to the group in the foreground"
