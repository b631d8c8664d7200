"""What a step computes, and how that is shared among the GPUs of a plan."""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from expertmesh.cluster.planner.plans import Plan


class Workload(BaseModel):
    """A step of the whole deployment.

    decode: each token is of another sequence, of `context` tokens so far. prefill: the tokens are of prompts of
    `context` tokens each. skew is the exponent of Zipf's law by which experts are chosen: 0 is uniform.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    tokens_per_step: int = Field(default=64, ge=1, le=2**24, description="tokens of a step, of all GPUs together")
    context: int = Field(default=4096, ge=1, le=2**24, description="tokens of a sequence")
    phase: Literal["decode", "prefill"] = "decode"
    # 0.6: the exponent at which 256 experts on 32 ranks are as unbalanced as TensorRT-LLM measured (validation.py).
    skew: float = Field(default=0.6, ge=0, le=4, description="exponent of Zipf's law by which experts are chosen")
    overlap: float = Field(default=0.0, ge=0, le=1, description="part of the computing that hides communication")
    slo_itl_s: float | None = Field(default=None, gt=0, description="longest step that is wanted")

    def microbatch_tokens(self, plan: Plan) -> int:
        """Return the tokens that a stage computes at a time: one of pp parts of what an instance has."""
        return math.ceil(math.ceil(self.tokens_per_step / plan.instances) / plan.pp)

    def attention_tokens(self, plan: Plan) -> int:
        """Return the tokens of a part that one copy of attention computes."""
        return math.ceil(self.microbatch_tokens(plan) / plan.attention_dp)

    def sequences(self, plan: Plan) -> int:
        """Return the sequences whose keys and values one copy of attention keeps."""
        tokens = math.ceil(math.ceil(self.tokens_per_step / plan.instances) / plan.attention_dp)
        return tokens if self.phase == "decode" else math.ceil(tokens / self.context)

    @property
    def attended(self) -> int:
        """Tokens before a token, on average: all in decode, half of a prompt in prefill."""
        return self.context if self.phase == "decode" else math.ceil(self.context / 2)
