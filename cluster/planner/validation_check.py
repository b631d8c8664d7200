"""One comparison of the model with what others measured or derived."""

from collections.abc import Mapping
from dataclasses import dataclass

from expertmesh.cluster.planner.hardware import Hardware
from expertmesh.cluster.planner.model_shape import ModelShape

Shapes = Mapping[str, ModelShape]
Machines = Mapping[str, Hardware]

DEEPEP = "DeepEP, docs/legacy.md: low-latency kernels, H800, 128 tokens a rank"
WIKI = "Blackwell GPU wiki, interconnect/moe-parallelism"
RTX6KPRO = "rtx6kpro wiki, hardware/pcie-bandwidth"
QWEN3 = "estimates for Qwen3-235B, 128 experts, a prefill of 6,000 tokens; hardware, format and skew are not told"
YES = "yes"
TENSORRT = "TensorRT-LLM, expert load balancing: 256 experts, 32 ranks, (max - mean) / mean"


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line of the table.

    said None: the source gives no figure, the model's is shown beside. tolerance: largest relative deviation that is
    meant by agreement, None where nothing is claimed. unit YES: 1 is yes, 0 is no.
    """

    group: str
    what: str
    model: float
    source: str
    said: float | None = None
    unit: str = ""
    tolerance: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """The model's over the source's."""
        return None if self.said is None or self.said == 0 else self.model / self.said

    @property
    def is_met(self) -> bool | None:
        """Whether they agree, None where nothing is claimed."""
        if self.said is None or self.tolerance is None:
            return None
        return abs(self.model - self.said) <= self.tolerance * abs(self.said) + 1e-12
