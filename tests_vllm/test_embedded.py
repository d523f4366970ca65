"""The embedded model with its own adapter, dialled to 4."""

from pathlib import Path
from types import SimpleNamespace

import sparsekv
from engines import engine, greedy, nothing_is_left, rows, texts
from sparsekv.integrations.vllm import engine_args

MODEL, ADAPTER = "smollm2-135m", str(Path(__file__).parents[1] / "adapters" / "smollm2-135m")
TEXT = (
    "The lighthouse stood on the northern cape for two hundred years before anyone wrote down who had built it. Ships "
    "from the islands passed it each autumn with salt and wool, and their captains paid the keeper in oil. When the "
    "harbour silted up the trade moved south, the village emptied, and only the keeper's family stayed. "
)


def test_answers_equal_ours_at_ratio_4():
    reference = sparsekv.LLM(MODEL, adapter=ADAPTER, cr=4, kv_memory="256MiB")
    prompts = [reference.tokenizer(TEXT * n)["input_ids"] for n in (1, 4, 8)]
    params = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True}
    answers = reference.generate(prompts, sparsekv.SamplingParams(**params))
    want = [list(output.outputs[0].token_ids) for output in answers]
    assert answers[-1].kv.compression_ratio > 2.5
    reference.close()
    made = SimpleNamespace(model=MODEL, adapter=ADAPTER)
    arguments = engine_args(MODEL, adapter=ADAPTER, cr=4)
    with engine(made, **arguments | {"max_model_len": 1024, "num_gpu_blocks_override": 36}) as llm:
        assert [x for (x,) in texts(llm, prompts, greedy(**params))] == want
        assert rows(llm).executor.policies[0].offset != 0
        assert nothing_is_left(llm)
