"""Claims of cores: none is claimed twice, not by another process either, and a claim ends with its holder."""

import os
import secrets
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from expertmesh.actors.cores import (
    can_resume,
    claim_cores,
    give_way,
    in_background,
    python_that_gives_way,
    resume,
    step_back,
    use_cores,
)

# A deployment that runs on this machine has claims of its own.
REALM = f"test-{secrets.token_hex(8)}"
CLAIM_ONE = """
import sys
from expertmesh.actors.cores import claim_cores
claimed = claim_cores(1, sys.argv[1])
print(claimed.cores[0] if claimed else "none", flush=True)
sys.stdin.read()
"""


def usable() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def test_each_core_is_claimed_once() -> None:
    claims = [claim_cores(1, REALM) for _ in usable()]
    try:
        assert [claim.cores[0] for claim in claims if claim] == usable()
        assert claim_cores(1, REALM) is None
        assert claims[0] is not None
        claims[0].release()
        claims[0] = claim_cores(1, REALM)
        assert claims[0] is not None
        assert claims[0].cores == (usable()[0],)
    finally:
        for claim in claims:
            if claim:
                claim.release()


def test_too_many_are_refused_and_none_is_kept() -> None:
    assert claim_cores(len(usable()) + 1, REALM) is None
    claim = claim_cores(len(usable()), REALM)
    assert claim is not None
    claim.release()


def test_a_killed_process_gives_its_core_back() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CLAIM_ONE, REALM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == str(usable()[0])
        assert claim_cores(len(usable()), REALM) is None
        other.kill()
        other.wait(timeout=10)
    claim = claim_cores(len(usable()), REALM)
    assert claim is not None
    claim.release()


@pytest.mark.parametrize("pin", [True, False])
def test_threads_started_later_use_the_cores_and_do_not_preempt(pin: bool) -> None:
    seen: list[tuple[set[int], int]] = []

    def look() -> None:
        seen.append((os.sched_getaffinity(0), os.sched_getscheduler(0)))

    def start() -> None:
        use_cores(claim)
        later = threading.Thread(target=look)
        later.start()
        later.join()

    claim = claim_cores(1, REALM) if pin else None
    before = os.sched_getaffinity(0), os.sched_getscheduler(0)
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert seen == [({usable()[0]} if pin else set(usable()), os.SCHED_BATCH)]
    assert (os.sched_getaffinity(0), os.sched_getscheduler(0)) == before
    if claim:
        claim.release()


def test_a_thread_that_gave_way_resumes_where_that_is_allowed(tmp_path: Path) -> None:
    before = os.sched_getscheduler(0)
    seen: list[int] = []

    def work() -> None:
        give_way()
        seen.append(os.sched_getscheduler(0))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [os.SCHED_IDLE]
    assert in_background(lambda: os.sched_getscheduler(0)) == os.SCHED_IDLE
    assert os.sched_getscheduler(0) == before, "only threads of its own give way"
    if not can_resume():
        pytest.skip("this container lets no thread come back from SCHED_IDLE")
    code = """
import os
import subprocess
import sys
import threading
import time
from expertmesh.actors.giving_way import take_part
child = subprocess.Popen(["sleep", "60"])
other = threading.Thread(target=child.wait)
other.start()
def show():
    print(*(os.sched_getscheduler(pid) for pid in (0, other.native_id, child.pid)))
show()
if sys.argv[1:] == ["wait"]:
    while os.sched_getscheduler(child.pid) == os.SCHED_IDLE:
        time.sleep(0.01)
take_part()
show()
child.kill()
"""
    program = tmp_path / "program.py"
    program.write_text(code)
    idle, usual = (" ".join(3 * [str(policy)]) for policy in (os.SCHED_IDLE, os.SCHED_OTHER))
    for how, limit_s in (("at once", 60.0), ("wait", 0.5)):
        command = f"{python_that_gives_way(limit_s)} {shlex.quote(str(program))} {shlex.quote(how)}"
        found = subprocess.run(command, shell=True, capture_output=True, text=True, check=True, timeout=60)  # noqa: S602
        assert found.stdout.splitlines() == [idle, usual]
    found = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.splitlines() == [usual, usual], "what never gave way"


def test_what_gives_way_takes_part_in_time_where_no_core_is_idle(tmp_path: Path) -> None:
    if not can_resume():
        pytest.skip("this container lets no thread come back from SCHED_IDLE")
    program = tmp_path / "program.py"
    program.write_text("print(sum(range(20_000_000)))")  # half a second that no other thread of its own interrupts
    command = f"{python_that_gives_way(limit_s=1.0)} {shlex.quote(str(program))}"
    ended: list[subprocess.CompletedProcess[str]] = []

    def run() -> None:
        os.sched_setaffinity(0, {usable()[0]})
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
            try:
                ended.append(
                    subprocess.run(command, shell=True, capture_output=True, text=True, timeout=40, check=True)  # noqa: S602
                )
            finally:
                busy.kill()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert ended
    assert ended[0].stdout == f"{sum(range(20_000_000))}\n"


def test_who_watches_what_gives_way_ends_with_it(tmp_path: Path) -> None:
    if not can_resume():
        pytest.skip("this container lets no thread come back from SCHED_IDLE")
    program = tmp_path / "program.py"
    program.write_text("import psutil, time; print(psutil.Process().children()[0].pid, flush=True); time.sleep(60)")
    command = shlex.split(f"{python_that_gives_way(60.0)} {shlex.quote(str(program))}")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        watcher = psutil.Process(int(process.stdout.readline()))
        process.kill()
    watcher.wait(20)


def test_a_process_steps_back_with_all_its_threads() -> None:
    code = (
        "import os, threading, time;"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start();"
        "print('up', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            step_back(process.pid)
            threads = [int(thread) for thread in os.listdir(f"/proc/{process.pid}/task")]
            assert len(threads) == 2
            assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads} == {10}
        finally:
            process.kill()
    step_back(process.pid)  # it has ended


def test_a_process_that_has_ended_needs_not_resume() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(30)
    resume(process.pid)
