"""Runs a Python program that gives way to all others at first: `python -m expertmesh.actors.giving_way FILE ARGS`.

See `cores.python_that_gives_way`.
"""

import runpy
import sys

from expertmesh.actors.cores import give_way_at_most

# Starting takes 3 to 10 s of one core; a machine without any to spare gives it after this.
_LIMIT_S = 20.0


def main() -> None:
    """Run the program as if it had been named to Python itself."""
    give_way_at_most(_LIMIT_S)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
