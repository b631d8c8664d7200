"""vLLM's CPU build, compiled, on all cores; with zentorch where that is installed. usage: ... CHECKPOINT."""

import os
import sys

from protocol import Generate, serve  # type: ignore[import-not-found]


def load() -> Generate:
    """Load the checkpoint."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    llm = LLM(
        sys.argv[1],
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_seqs=64,
        enable_prefix_caching=False,
    )

    def generate(prompts: list[list[int]], new: int, _seed: int) -> None:
        params = SamplingParams(temperature=1.0, max_tokens=new, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == new for output in outputs)

    return generate


if __name__ == "__main__":
    serve(load)
