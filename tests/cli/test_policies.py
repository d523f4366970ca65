"""policies: every one of them, as a table and as JSON."""

import json

from sparsekv.policies.registry import policy_names


def test_json_lists_every_policy_with_what_it_needs_and_gives(run) -> None:
    listed = {method["name"]: method for method in json.loads(run("policies", "--json").out)}
    assert sorted(listed) == policy_names()
    assert {name for name, method in listed.items() if method["needs_weights"]} == {"tova", "h2o", "snapkv"}
    assert {"dense", "quest"} == {name for name, method in listed.items() if not method["frees_memory"]}
    assert listed["dms"]["needs_training"] and not listed["random"]["needs_training"]
    assert listed["streaming"]["options"] == ["budget", "sinks"]
    assert all(method["exact_under"] and method["about"].endswith(".") for method in listed.values())


def test_the_table_names_every_policy(run, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    out = run("policies").out
    assert all(f" {name} " in out for name in policy_names())
