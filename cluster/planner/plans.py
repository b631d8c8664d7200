"""Plans: how many ways each part of a model is split, and which of them the model's sizes allow."""

from collections.abc import Iterator
from dataclasses import dataclass

from expertmesh.cluster.planner.model_shape import ModelShape


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Plan:
    """How a model is spread over GPUs.

    A stage of the pipeline runs on attention_tp * attention_dp GPUs, which are the same as ep * expert_tp: attention
    is sliced attention_tp ways and copied attention_dp times, experts are spread over ep groups, in each of which an
    expert is sliced expert_tp ways. There are pp stages, and `instances` copies of all that, which share the tokens.
    replicas: slots for replicas of hot experts that each group has in each layer, beside its own experts.
    """

    attention_tp: int
    attention_dp: int
    ep: int
    expert_tp: int
    pp: int = 1
    instances: int = 1
    replicas: int = 0

    @property
    def stage_gpus(self) -> int:
        """GPUs of a stage."""
        return self.attention_tp * self.attention_dp

    @property
    def num_gpus(self) -> int:
        """GPUs of all stages of all instances."""
        return self.instances * self.pp * self.stage_gpus

    @property
    def is_tensor_parallel(self) -> bool:
        """Whether every GPU of a stage has a slice of everything, so that nothing is dispatched."""
        return self.ep == 1 and self.attention_dp == 1

    def __str__(self) -> str:
        parts = [
            f"attention TP={self.attention_tp} x DP={self.attention_dp}",
            f"experts EP={self.ep} x TP={self.expert_tp}",
        ]
        parts += [f"PP={self.pp}"] * (self.pp > 1) + [f"{self.instances} instances"] * (self.instances > 1)
        parts += [f"{self.replicas} replica slots"] * (self.replicas > 0)
        return ", ".join(parts)


def why_not(plan: Plan, shape: ModelShape, *, is_elastic: bool = False) -> str | None:
    """Return why a model's sizes do not allow a plan, None if they do.

    is_elastic: experts are placed one by one, as the fleet does it, so that ep need not divide them.
    """
    attention = shape.attention
    if plan.ep * plan.expert_tp != plan.stage_gpus:
        experts = f"ep={plan.ep} x expert_tp={plan.expert_tp}"
        return f"{experts} is not attention_tp={plan.attention_tp} x attention_dp={plan.attention_dp}"
    if plan.pp > shape.num_layers:
        return f"pp={plan.pp} is above the number of layers, {shape.num_layers}"
    if attention.num_heads % plan.attention_tp:
        return f"heads not divisible: {attention.num_heads} by attention_tp={plan.attention_tp}"
    if not attention.latent and attention.num_kv_heads % plan.attention_tp:
        return f"KV heads not divisible: {attention.num_kv_heads} by attention_tp={plan.attention_tp}"
    if shape.num_experts % plan.ep and not is_elastic:
        return f"experts not divisible: {shape.num_experts} by ep={plan.ep}"
    if shape.expert_width % plan.expert_tp:
        return f"width of an expert not divisible: {shape.expert_width} by expert_tp={plan.expert_tp}"
    for what, width in (("a dense layer", shape.dense_width), ("the shared experts", shape.shared_width)):
        if width % plan.attention_tp:
            return f"width of {what} not divisible: {width} by attention_tp={plan.attention_tp}"
    if plan.replicas and (plan.ep == 1 or plan.replicas > shape.num_experts - shape.num_experts // plan.ep):
        return f"replicas={plan.replicas} is above the experts that a group lacks, ep={plan.ep}"
    return None


def enumerate_plans(num_gpus: int, replicas: tuple[int, ...] = (0,)) -> Iterator[Plan]:
    """Yield every plan of so many GPUs, possible or not.

    An instance has a divisor of num_gpus, or a power of two: 4 instances of 16 leave 8 GPUs of 72 idle.

    Args:
        num_gpus: that there are.
        replicas: slots for replicas, a group and layer, to be tried where ep is above 1.
    """
    sizes = {*divisors(num_gpus), *(2**power for power in range(num_gpus.bit_length()))}
    for size in sorted(sizes):
        for pp in divisors(size):
            stage = size // pp
            for attention_tp in divisors(stage):
                for ep in divisors(stage):
                    for slots in replicas if ep > 1 else (0,):
                        yield Plan(
                            attention_tp=attention_tp,
                            attention_dp=stage // attention_tp,
                            ep=ep,
                            expert_tp=stage // ep,
                            pp=pp,
                            instances=num_gpus // size,
                            replicas=slots,
                        )


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, rising."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
