"""Sizes of attention: parameters of a layer, bytes of keys and values, what a token attends to.

H hidden size, N heads, K key-value heads.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearAttention:
    """Gated delta net layers (qwen3_next): a state of fixed size in place of keys and values."""

    num_layers: int
    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_width: int

    def layer_params(self, hidden_size: int) -> int:
        """Count a layer's parameters: projections of q, k, v, z, beta, alpha; a causal convolution; the output."""
        keys = self.num_key_heads * self.key_head_dim
        values = self.num_value_heads * self.value_head_dim
        projections = hidden_size * (2 * keys + 2 * values + 2 * self.num_value_heads)
        return projections + (2 * keys + values) * self.conv_width + values * hidden_size


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1); query_rank 0: queries are whole.

    Keys and values are one latent of kv_rank and a rotary key of rope_dim, which all heads share.
    """

    query_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int

    def layer_params(self, hidden_size: int, num_heads: int) -> int:
        """Count a layer's parameters."""
        query_width = num_heads * (self.nope_dim + self.rope_dim)
        queries = (hidden_size + query_width) * self.query_rank if self.query_rank else hidden_size * query_width
        down = hidden_size * (self.kv_rank + self.rope_dim)
        up = self.kv_rank * num_heads * (self.nope_dim + self.value_dim)
        return queries + down + up + num_heads * self.value_dim * hidden_size


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionShape:
    """Attention of a decoder.

    latent None: grouped queries. window: tokens that num_window_layers of the layers look back on; 0 of both: none do.
    index_top_k: tokens that sparse attention picks (0: all), by an indexer of index_heads times index_head_dim.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    latent: LatentAttention | None = None
    linear: LinearAttention | None = None
    has_bias: bool = False
    has_output_gate: bool = False
    num_window_layers: int = 0
    window: int = 0
    index_top_k: int = 0
    index_heads: int = 0
    index_head_dim: int = 0

    def params(self, hidden_size: int, num_layers: int) -> int:
        """Count the parameters of all layers."""
        num_linear = self.linear.num_layers if self.linear else 0
        linear = num_linear * self.linear.layer_params(hidden_size) if self.linear else 0
        return linear + (num_layers - num_linear) * (
            self._layer_params(hidden_size) + self._indexer_params(hidden_size)
        )

    def _layer_params(self, hidden_size: int) -> int:
        if self.latent:
            return self.latent.layer_params(hidden_size, self.num_heads)
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        gate = queries * hidden_size if self.has_output_gate else 0
        bias = queries + 2 * keys + hidden_size if self.has_bias else 0
        return 2 * hidden_size * (queries + keys) + gate + bias

    def _indexer_params(self, hidden_size: int) -> int:
        """Count the projections of queries, of the one key, and of the heads' weights (DeepSeek-V3.2-Exp report)."""
        if not self.index_top_k:
            return 0
        queries = (self.latent.query_rank if self.latent else hidden_size) * self.index_heads * self.index_head_dim
        return queries + hidden_size * (self.index_head_dim + self.index_heads)

    @property
    def kv_values_per_layer(self) -> int:
        """Values that a full-attention layer keeps for a token."""
        if self.latent:
            return self.latent.kv_rank + self.latent.rope_dim + self.index_head_dim
        return 2 * self.num_kv_heads * self.head_dim

    def kv_values(self, context: int, num_layers: int) -> int:
        """Count the values that a sequence of `context` tokens keeps in all layers."""
        num_linear = self.linear.num_layers if self.linear else 0
        full = num_layers - num_linear - self.num_window_layers
        kept = full * context + self.num_window_layers * min(self.window, context)
        state = 0
        if self.linear:
            heads = self.linear.num_value_heads
            state = num_linear * heads * self.linear.key_head_dim * self.linear.value_head_dim
        return kept * self.kv_values_per_layer + state

    def attended_tokens(self, context: int, num_layers: int) -> float:
        """Return how many tokens a token attends to in a layer, on average over the layers; linear layers count 0."""
        num_linear = self.linear.num_layers if self.linear else 0
        full = num_layers - num_linear - self.num_window_layers
        seen = min(context, self.index_top_k) if self.index_top_k else context
        return (full * seen + self.num_window_layers * min(self.window, context)) / num_layers

    def flop_per_pair(self, *, on_latent: bool) -> int:
        """Return the operations of one token attending to one, all heads: scores and weighted sum.

        on_latent: latent attention as decoding computes it, on the latent itself (the up-projections absorbed); else as
        prefill does, on each head's keys and values.
        """
        if not self.latent:
            return 4 * self.num_heads * self.head_dim
        if on_latent:
            return 2 * self.num_heads * (2 * self.latent.kv_rank + self.latent.rope_dim)
        return 2 * self.num_heads * (self.latent.nope_dim + self.latent.rope_dim + self.latent.value_dim)
