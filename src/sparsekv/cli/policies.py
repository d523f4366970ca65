"""`sparsekv policies`: the methods, what they take, need and give."""

import json
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

if TYPE_CHECKING:
    from sparsekv.policies.registry import Method


def command(
    as_json: Annotated[bool, Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """What every policy does, the options it takes, what it needs and what it frees."""
    from sparsekv.policies.registry import describe, policy_names

    methods = [describe(name) for name in policy_names()]
    if as_json:
        typer.echo(json.dumps([method.to_dict() for method in methods]))
        return
    _print(methods)


def _print(methods: list["Method"]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("policy", no_wrap=True)
    table.add_column("what it does", ratio=1)
    table.add_column("options")
    for name in ("needs\nweights", "needs\ntraining", "frees\nmemory", "CUDA\ngraphs"):
        table.add_column(name, justify="center", no_wrap=True)
    table.add_column("exact under")
    for method in methods:
        flags = (method.needs_weights, method.needs_training, method.frees_memory, method.recordable)
        options = ", ".join([*method.options, *(["cr"] if method.budget or method.needs_training else [])])
        exact = ", ".join(method.exact_under)
        table.add_row(method.name, method.about, options, *("yes" if flag else "-" for flag in flags), exact)
    console = Console()
    console.print(table)
    console.print(
        "budget: tokens that a KV head holds (quest: reads). cr: without an adapter budget = (input + output tokens) / "
        "cr, with one the ratio to serve it at.\nPolicies that need training take an adapter.",
        highlight=False,
    )
