"""A compiled call's helpers keep off the core of the thread that calls them."""

import json
import os
import subprocess
import sys

import pytest

from expertmesh.kernels.cpu.build import find_compiler

CORES = sorted(os.sched_getaffinity(0))
if find_compiler() is None:
    pytest.skip("the CPU kernels cannot be built here: no C++ compiler", allow_module_level=True)
if len(CORES) < 2:
    pytest.skip("one core: helpers have no other to go to", allow_module_level=True)

# In a process of its own: the helpers' number and cores are a process's.
CALLS = """
import json, os, sys
import torch
from expertmesh.kernels.cpu.expert_mlp import Activation, Kind, PackedSlots, pack_expert
from expertmesh.kernels.cpu.threads import set_num_threads

set_num_threads(2)
experts = [pack_expert(torch.randn(128, 64).bfloat16(), torch.randn(64, 64).bfloat16(), Activation(kind=Kind.SWIGLU))]
slots = PackedSlots(experts, 64, 64, Activation(kind=Kind.SWIGLU))
row_P = torch.zeros(1, dtype=torch.int64)
before = set(os.listdir("/proc/self/task"))
for cores in json.loads(sys.argv[1]):
    os.sched_setaffinity(0, cores)
    slots.run(torch.randn(1, 64).bfloat16(), row_P, row_P, torch.ones(1))
    helpers = set(os.listdir("/proc/self/task")) - before
    print(json.dumps([sorted(os.sched_getaffinity(int(helper))) for helper in helpers]))
"""


def calls_from(*cores: list[int]) -> list[list[list[int]]]:
    """Call while the caller may use these cores; return the cores of each helper after each call."""
    command = [sys.executable, "-c", CALLS, json.dumps(cores)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_helpers_may_use_all_cores_but_their_callers() -> None:
    first, second = CORES[:2]
    _, *later = calls_from(CORES, [second], [first])
    assert later == [[[core for core in CORES if core != own]] for own in (second, first)]


def test_helpers_of_a_process_with_one_core_stay_there() -> None:
    first = CORES[0]
    assert calls_from([first], [first]) == [[[first]], [[first]]]
