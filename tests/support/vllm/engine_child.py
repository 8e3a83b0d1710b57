"""A run of vLLM in a process of its own, in the environment where it is installed.

One JSON object comes as the argument: ``engine``, arguments of ``vllm.LLM``; ``prompts``, token
ids; ``max_tokens``. The last line printed is one, too: ``tokens`` of each prompt, and with the
engine in this process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``) ``lengths``, what each step drafts.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main(task: dict[str, Any]) -> dict[str, Any]:
    import vllm

    engine = vllm.LLM(
        **task["engine"],
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=512,
        max_num_seqs=8,
        kv_cache_memory_bytes=64 << 20,
    )
    lengths: list[int] = []
    core = getattr(engine.llm_engine.engine_core, "engine_core", None)
    if core is not None:
        update = core.scheduler.update_from_output

        def watched(scheduled: Any, output: Any) -> Any:
            lengths.append(scheduled.num_spec_tokens_to_schedule)
            return update(scheduled, output)

        core.scheduler.update_from_output = watched
    params = vllm.SamplingParams(
        temperature=0.0, max_tokens=task["max_tokens"], ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for ids in task["prompts"]]
    outputs = engine.generate(prompts, params, use_tqdm=False)
    return {"tokens": [list(o.outputs[0].token_ids) for o in outputs], "lengths": lengths}


if __name__ == "__main__":
    result = main(json.loads(sys.argv[1]))
    print(json.dumps(result), flush=True)
