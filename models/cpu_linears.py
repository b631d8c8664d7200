"""Let linear layers use the compiled CPU products where they are the faster way: bf16."""

from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from expertmesh.kernels.cpu.grouped_linear import grouped_linear, is_supported
from expertmesh.kernels.cpu.linear import can_pack_linear, pack_linear


def speed_up_linears(model: nn.Module) -> None:
    """Give every plain linear layer of a model a forward that chooses by the number of rows."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def pack_linears(model: nn.Module) -> None:
    """Pack the weights of every plain linear layer that can be, for good. What an embedding shares stays as it is."""
    modules: list[Any] = list(model.modules())
    own = {id(module) for module in modules if type(module) is nn.Linear}
    shared = {p.data_ptr() for m in modules if id(m) not in own for p in m.parameters(recurse=False)}
    for module in modules:
        if id(module) not in own or module.weight is None or module.weight.data_ptr() in shared:
            continue
        if can_pack_linear(module.weight):
            module.forward = pack_linear([module.weight], [module.bias])
            module.weight = None


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    rows = x.shape[:-1].numel()
    weight_1OI = module.weight.unsqueeze(0)
    if not is_supported(x, weight_1OI, rows):
        return F.linear(x, module.weight, module.bias)
    out = grouped_linear(x.reshape(rows, -1), weight_1OI, [rows]).view(*x.shape[:-1], -1)
    # torch's stubs say that a linear layer always has a bias.
    return out if module.bias is None else out + module.bias  # type: ignore[redundant-expr]
