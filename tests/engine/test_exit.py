"""A process ends as it should whatever its engines are doing."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import torch
from helpers import tiny_model
from sparsekv import LLM

llm = LLM(tiny_model(), max_num_seqs=2, kv_memory="8MiB")
x = torch.randn(300, 300)
llm._streams._jobs.put(lambda: [torch.linalg.inv(x) for _ in range(200)])
{end}
"""


def test_a_script_may_end_while_its_engine_works() -> None:
    for end in ("", "del llm"):
        script = SCRIPT.format(tests=str(Path(__file__).parents[1]), end=end)
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (done.returncode, done.stderr)
