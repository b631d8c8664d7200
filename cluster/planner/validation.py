"""The model beside what others measured or derived: a table of what the source says, what the model says, their ratio.

The same table is printed by `expertmesh plan --validate` and held by the tests; what is not met stays in it.
"""

from expertmesh.cluster.planner.validation_check import Check, Machines, Shapes
from expertmesh.cluster.planner.validation_links import all_reduce_checks, deepep_checks, volume_checks
from expertmesh.cluster.planner.validation_plans import plan_checks

__all__ = ["Check", "validate"]


def validate(shapes: Shapes, machines: Machines) -> tuple[Check, ...]:
    """Return all comparisons.

    Args:
        shapes: the shipped cards, by name.
        machines: the shipped machines, by name.
    """
    return (
        *volume_checks(shapes, machines),
        *deepep_checks(machines),
        *all_reduce_checks(),
        *plan_checks(shapes, machines),
    )
