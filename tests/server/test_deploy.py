"""The files in deploy/: the dashboard asks for metrics that exist, the image and the unit for options that exist."""

import json
import re
import shlex
import subprocess
import sysconfig
from pathlib import Path

import pytest

from http_serving import Running
from sparsekv.cli import main

DEPLOY = Path(__file__).parents[2] / "deploy"
VLLM = {
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total"),
    *("prompt_tokens_total", "generation_tokens_total", "request_success_total"),
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
}
"""Names that vLLM 0.26 has behind its prefix."""


def test_the_dashboard_asks_for_what_there_is(running: Running) -> None:
    board = json.loads((DEPLOY / "grafana.json").read_text())
    text = running.service.metrics.text().decode()
    known = {name.removeprefix("sparsekv:") for name in re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)}
    asked = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    assert len(asked) > 20
    for expression in asked:
        for prefix, name in re.findall(r"(\$\{engine\}|sparsekv):(\w+)", expression):
            stem = name.removesuffix("_bucket")
            assert stem in known | {"dial_cr", "dial_changes_total"}  # of a server with a dial
            if prefix != "sparsekv":
                assert stem in VLLM
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_image_is_linted_and_its_command_is_one() -> None:
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    found = subprocess.run([hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    text = (DEPLOY / "Dockerfile").read_text()
    (command,) = re.findall(r"^CMD (\[.*\])$", text, re.MULTILINE)
    assert re.search(r'^ENTRYPOINT \["sparsekv", "serve"\]$', text, re.MULTILINE)
    parse(json.loads(command))


def test_the_unit_s_command_is_one() -> None:
    (line,) = re.findall(
        r"^ExecStart=\S+/sparsekv serve (.*)$", (DEPLOY / "sparsekv.service").read_text(), re.MULTILINE
    )
    parse(shlex.split(line))


def parse(arguments: list[str]) -> None:
    """As the command line does; an unknown option raises."""
    command = main._load("serve")
    command.make_context("serve", list(arguments))
    with pytest.raises(Exception, match="No such option"):
        command.make_context("serve", [*arguments, "--no-such"])
