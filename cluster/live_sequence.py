"""A sequence as the scheduler has it: its tokens, what is computed of them, its pages."""

from expertmesh.cluster.kv_pages import TokenChain
from expertmesh.cluster.requests import SequenceRequest


class LiveSequence:
    """A live sequence. pages is a tuple, so that a plan shares it instead of copying it each step."""

    __slots__ = ("chain", "max_tokens", "num_computed", "num_prompt", "pages", "sequence_id", "tokens")

    def __init__(self, request: SequenceRequest, page_size: int) -> None:
        """Begin with nothing computed; output_ids of a resumed one are known tokens."""
        self.sequence_id = request.sequence_id
        self.chain = TokenChain(request.prompt_ids + request.output_ids, page_size=page_size)
        self.tokens = self.chain.tokens
        self.num_prompt = len(request.prompt_ids)
        self.max_tokens = request.sampling.max_tokens
        self.num_computed = 0
        self.pages: tuple[int, ...] = ()

    @property
    def num_left(self) -> int:
        """Known tokens that are not computed yet."""
        return len(self.tokens) - self.num_computed

    @property
    def num_generated(self) -> int:
        """Tokens of the output so far."""
        return len(self.tokens) - self.num_prompt
