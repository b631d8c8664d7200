"""llama.cpp through llama-cpp-python, bf16, one batch for all sequences. usage: ... FILE.gguf."""

import sys

import llama_cpp  # type: ignore[import-not-found]
import numpy as np
from protocol import Generate, serve  # type: ignore[import-not-found]

_CONTEXT, _SEQUENCES, _THREADS = 8192, 32, 2


def load() -> Generate:
    """Load the model file."""
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), llama_cpp.llama_model_default_params())
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = _CONTEXT, 4096, 512
    params.n_seq_max, params.n_threads, params.n_threads_batch = _SEQUENCES, _THREADS, _THREADS
    params.kv_unified = True
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(4096, 0, 1)

    def run(tokens: list[tuple[int, int, int, bool]]) -> None:
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = sequence
        assert llama_cpp.llama_decode(context, batch) == 0

    def generate(prompts: list[list[int]], new: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        tokens = [(t, p, s, p == len(ids) - 1) for s, ids in enumerate(prompts) for p, t in enumerate(ids)]
        rows = [i for i, token in enumerate(tokens) if token[3]]
        run(tokens)
        for step in range(new):
            drawn = []
            for row in rows:
                logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, row), shape=(vocab_size,))
                weights = np.cumsum(np.exp(logits - logits.max()))
                drawn.append(int(np.searchsorted(weights, rng.random() * weights[-1])))
            if step + 1 < new:
                run([(t, len(ids) + step, s, True) for s, (t, ids) in enumerate(zip(drawn, prompts, strict=True))])
                rows = list(range(len(prompts)))

    return generate


if __name__ == "__main__":
    serve(load)
