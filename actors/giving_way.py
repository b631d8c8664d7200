"""Runs a Python program that gives way to all others at first: `python -m expertmesh.actors.giving_way S FILE ARGS`.

It takes part like any other after S seconds, or when it calls `take_part`. See `cores.python_that_gives_way`.
"""

import os
import runpy
import select
import sys
import traceback
from contextlib import suppress

# Of the process that gives way: closing it tells the watcher that nothing is left to do. And the watcher.
_watched: tuple[int, int] | None = None


def give_way_at_most(limit_s: float) -> None:
    """Have this process, while it has one thread, run only where no other wants the core, for limit_s at most.

    Another process ends it: where all cores are wanted, this one's threads run for some milliseconds in a second, and
    one that wants to end it would wait for those to hand on the interpreter.

    Raises:
        PermissionError: this container does not allow it.
    """
    global _watched
    pid = os.getpid()
    until, alive = os.pipe()
    watcher = os.fork()
    if not watcher:
        os.close(alive)
        _end_after(limit_s, until, pid)
    os.close(until)
    _watched = alive, watcher
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _end_after(limit_s: float, until: int, pid: int) -> None:
    """Wait for limit_s, or until the process takes part or ends; then end its giving way, and this copy of it."""
    try:
        if not select.select([until], [], [], limit_s)[0] and os.getppid() == pid:
            from expertmesh.actors.cores import resume_tree  # most never get here

            resume_tree(pid)
    finally:
        if sys.exc_info()[0]:
            traceback.print_exc()
        os._exit(0)


def take_part() -> None:
    """End what `give_way_at_most` began, for this process and its children; for any other this does nothing."""
    global _watched
    if _watched is None:
        return
    alive, watcher = _watched
    _watched = None
    os.close(alive)
    with suppress(ChildProcessError):  # a program may have its children reaped by itself
        os.waitpid(watcher, 0)
    from expertmesh.actors.cores import resume_tree

    resume_tree(os.getpid())


def main() -> None:
    """Run the program as if it had been named to Python itself."""
    from expertmesh.actors import giving_way  # not __main__: the program finds this one

    giving_way.give_way_at_most(float(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
