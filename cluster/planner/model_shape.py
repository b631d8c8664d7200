"""What a model is made of, counted: parameters by part, bytes of weights, bytes of keys and values."""

from dataclasses import dataclass

from expertmesh.cluster.planner.attention_shape import AttentionShape
from expertmesh.cluster.planner.dtypes import Format


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """A decoder with routed experts in num_moe_layers of its num_layers layers.

    expert_width, shared_width, dense_width: columns between the two products of a routed expert, of all shared experts
    of a layer together, and of a layer without experts. num_matrices: of a feed-forward block, 3 with a gate, else 2.
    num_mtp_layers: extra layers that predict further tokens; plain serving does not load them.
    """

    name: str
    hidden_size: int
    vocab_size: int
    num_layers: int
    num_moe_layers: int
    num_experts: int
    top_k: int
    expert_width: int
    attention: AttentionShape
    shared_width: int = 0
    dense_width: int = 0
    num_matrices: int = 3
    has_expert_bias: bool = False
    is_head_tied: bool = False
    num_mtp_layers: int = 0

    @property
    def expert_params(self) -> int:
        """Parameters of one routed expert of one layer."""
        bias = (self.num_matrices - 1) * self.expert_width + self.hidden_size if self.has_expert_bias else 0
        return self.num_matrices * self.hidden_size * self.expert_width + bias

    @property
    def routed_params(self) -> int:
        """Parameters of all routed experts."""
        return self.num_moe_layers * self.num_experts * self.expert_params

    @property
    def attention_params(self) -> int:
        """Parameters of attention in all layers."""
        return self.attention.params(self.hidden_size, self.num_layers)

    @property
    def shared_params(self) -> int:
        """Parameters of all shared experts."""
        return self.num_moe_layers * self.num_matrices * self.hidden_size * self.shared_width

    @property
    def dense_ffn_params(self) -> int:
        """Parameters of the feed-forward blocks of layers without experts."""
        return (self.num_layers - self.num_moe_layers) * self.num_matrices * self.hidden_size * self.dense_width

    @property
    def router_params(self) -> int:
        """Parameters of all routers."""
        return self.num_moe_layers * self.hidden_size * self.num_experts

    @property
    def norm_params(self) -> int:
        """Parameters of the two norms of each layer and of the last."""
        return (2 * self.num_layers + 1) * self.hidden_size

    @property
    def embedding_params(self) -> int:
        """Parameters of the embedding, as many as those of a head that is not tied to it."""
        return self.vocab_size * self.hidden_size

    @property
    def head_params(self) -> int:
        """Parameters that the head adds: none where it is tied to the embedding."""
        return 0 if self.is_head_tied else self.embedding_params

    @property
    def sliced_params(self) -> int:
        """Parameters that attention's tensor parallelism slices, beside embedding and head."""
        return self.attention_params + self.shared_params + self.dense_ffn_params

    @property
    def total_params(self) -> int:
        """All parameters, without the layers that predict further tokens."""
        tables = self.embedding_params + self.head_params + self.router_params + self.norm_params
        return self.routed_params + self.sliced_params + tables

    @property
    def active_params(self) -> int:
        """Parameters that compute a token: all but the experts not chosen and the embedding, which is looked up."""
        chosen = self.num_moe_layers * self.top_k * self.expert_params
        return (
            self.total_params
            - self.routed_params
            + chosen
            - self.embedding_params
            + (self.embedding_params if self.is_head_tied else 0)
        )

    @property
    def mtp_params(self) -> int:
        """Parameters of the layers that predict further tokens: a layer with experts and a product of two hiddens."""
        if not self.num_mtp_layers:
            return 0
        layer = self.attention_params / self.num_layers + self.num_matrices * self.hidden_size * self.shared_width
        experts = self.num_experts * (self.expert_params + self.hidden_size)
        return round(self.num_mtp_layers * (layer + experts + 2 * self.hidden_size**2 + 5 * self.hidden_size))

    def weight_bytes(self, form: Format) -> float:
        """Return the bytes of all weights in a format."""
        tables = self.total_params - self.routed_params - self.sliced_params
        return (
            self.routed_params * form.expert_weight_bytes
            + self.sliced_params * form.dense_weight_bytes
            + tables * form.table_bytes
        )

    def kv_bytes(self, context: int, form: Format) -> float:
        """Return the bytes that a sequence of `context` tokens keeps in all layers."""
        return self.attention.kv_values(context, self.num_layers) * form.kv_bytes
