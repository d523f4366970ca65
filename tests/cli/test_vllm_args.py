"""vllm-args prints what engine_args says, for a shell or as JSON, and refuses in one sentence."""

import json
import shlex

from sparsekv.integrations.vllm import engine_args, serve_arguments


def test_it_prints_the_arguments(run, model_folder, adapter_folder) -> None:
    words = ("vllm-args", model_folder, "--adapter", adapter_folder, "--cr", "2")
    want = engine_args(str(model_folder), adapter=str(adapter_folder), cr=2)
    assert shlex.split(run(*words).out) == [word.replace('"cr": 2}', '"cr": 2.0}') for word in serve_arguments(want)]
    assert json.loads(run(*words, "--json").out) == want


def test_streaming_takes_a_budget(run, model_folder) -> None:
    found = json.loads(run("vllm-args", model_folder, "--policy", "streaming", "--budget", "64", "--json").out)
    assert found["additional_config"] == {"sparsekv": {"policy": "streaming", "budget": 64}}


def test_what_vllm_cannot_run_is_refused(run, model_folder, adapter_folder) -> None:
    outcome = run("vllm-args", model_folder)
    assert outcome.code == 2 and "pass adapter=" in outcome.err
    outcome = run("vllm-args", model_folder, "--adapter", adapter_folder, "--cr", "99")
    assert outcome.code == 2 and "holds up to" in outcome.err
