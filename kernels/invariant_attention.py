"""Attention in which a token's output is the same to the bit however its sequence was cut and whatever is beside it.

A logit is a product of one query and one key. The largest of a row has no rounding. A key that a query may not see has
weight exactly 0, and `invariant_product` sums by position, so that zeros change nothing: neither padding, nor keys of
later tokens, nor those before a window matter.

Shape suffixes: N sequences, A attention heads, G KV heads, Q queries, L keys, D key size, V value size.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from expertmesh.kernels.cpu.invariant_product import product_across, product_along

if TYPE_CHECKING:
    from expertmesh.kernels.paged_attention import AttentionOptions


def invariant_attention(
    query_NAQD: Tensor, key_NGLD: Tensor, value_NGLV: Tensor, allowed: Tensor, options: "AttentionOptions"
) -> Tensor:
    """Masked attention, in float32 throughout. Either N or Q is 1.

    Args:
        query_NAQD: any floating dtype, as are the others; A is a multiple of G.
        key_NGLD: keys.
        value_NGLV: values; finite also where no query may look.
        allowed: bool, broadcast to [N, A, Q, L]: what a query may look at, one key at least.
        options: how the layer attends.

    Returns:
        [N, A, Q, V], dtype of the query.
    """
    num_sequences, num_heads, num_queries, _ = query_NAQD.shape
    num_kv, num_keys = key_NGLD.shape[1:3]
    # The product has two batch dimensions. Many sequences: N and G, with the heads of a group as rows. One: G and the
    # heads of a group, with the queries as rows, over the same keys.
    query, key, value = query_NAQD.float(), key_NGLD.float(), value_NGLV.float()
    if num_queries == 1:
        query = torch.unflatten(query[:, :, 0], 1, (num_kv, -1))
    else:
        query = torch.unflatten(query[0], 0, (num_kv, -1))
        key, value = (x[0].unsqueeze(1).expand(-1, query.shape[1], -1, -1) for x in (key, value))
    logits = product_along(query, key) * options.scale
    batch = logits.shape
    logits_NAQL = logits.view(num_sequences, num_heads, num_queries, num_keys)
    if options.softcap is not None:
        logits_NAQL = torch.tanh(logits_NAQL / options.softcap) * options.softcap
    logits_NAQL = logits_NAQL.masked_fill(~allowed, float("-inf"))
    top_NAQ1 = logits_NAQL.amax(dim=-1, keepdim=True)
    if options.sinks_A is not None:
        sinks_A11 = options.sinks_A.float().reshape(-1, 1, 1)
        top_NAQ1 = torch.maximum(top_NAQ1, sinks_A11)
    weights = (logits_NAQL - top_NAQ1).exp_().view(batch)
    total_NAQ1 = product_along(weights, weights.new_ones(()).expand(*batch[:2], 1, num_keys)).view(top_NAQ1.shape)
    if options.sinks_A is not None:
        total_NAQ1 = total_NAQ1 + torch.exp(sinks_A11 - top_NAQ1)
    sums_NAQV = product_across(weights, value).view(num_sequences, num_heads, num_queries, -1)
    return (sums_NAQV / total_NAQ1).to(query_NAQD.dtype)
