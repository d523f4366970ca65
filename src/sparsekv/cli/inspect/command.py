"""`sparsekv inspect`: read a text by one method or several and show which head forgot which token."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from sparsekv.cli.models import check_length, open_model, setting_of
from sparsekv.cli.output import check_target, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsekv.cli.inspect.page import Inspected
    from sparsekv.evals.methods.setting import Setting


def command(
    model: Annotated[str, Argument(help="smollm2-135m, a folder, or a hub id.")],
    file: Annotated[Path, Option(help="The text to read, UTF-8.", exists=True, dir_okay=False)],
    adapter: Annotated[
        list[str] | None, Option(help="Trained eviction heads: a folder or a hub id. Repeat it to compare.")
    ] = None,
    policy: Annotated[
        list[str] | None,
        Option(help="A method without training, see `sparsekv policies`; or of the adapter, as dms-quest. Repeatable."),
    ] = None,
    cr: Annotated[
        float | None, Option(help="Compression ratio at the text's length: of adapters, or budget = length / cr.")
    ] = None,
    budget: Annotated[int | None, Option(help="Tokens that a policy may hold per head, or Quest read.")] = None,
    prompt: Annotated[
        int | None,
        Option(help="Tokens read as the prompt, by methods that prune it at its end; the rest comes one by one."),
    ] = None,
    html: Annotated[Path | None, Option(help="Write the page here.")] = None,
    png: Annotated[Path | None, Option(help="Write ratio against length and share by head here, as PNG.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print every token's count and every head's ratio.")] = False,
) -> None:
    """Which head forgot which token of a text, for one method or several side by side."""
    if html is None and png is None and not as_json:
        raise ValueError("inspect writes nothing yet; pass --html page.html, --png figures.png, --json, or several")
    for target in (html, png):
        if target is not None:
            check_target(target)
    from sparsekv.modeling.attach import attach, detach

    settings = settings_of(adapters=adapter or [], policies=policy or [], cr=cr, budget=budget)
    text = _read(file)
    loaded, tokenizer = open_model(model)
    found = []
    for setting in settings:
        attach(loaded, **setting.arguments(tokens=len(cut(tokenizer, text)[0])))
        about: dict[str, Any] = {"title": file.name, "model_name": model, "method": _name(setting), "prompt": prompt}
        found.append(inspect_text(loaded, tokenizer, text, cr=setting.cr, **about))
        detach(loaded)
    if html is not None:
        from sparsekv.cli.inspect.page import build_page

        write_text(html, build_page(*found))
        typer.echo(f"wrote {html}", err=True)
    if png is not None:
        from sparsekv.cli.inspect.figures import draw_figures

        draw_figures(found, png)
        typer.echo(f"wrote {png}", err=True)
    if as_json:
        records = [to_record(inspected) for inspected in found]
        typer.echo(json.dumps(records[0] if len(records) == 1 else records, ensure_ascii=False))


def settings_of(*, adapters: list[str], policies: list[str], cr: float | None, budget: int | None) -> "list[Setting]":
    """One for each adapter, and for each policy that needs none. Raises ValueError where there is nothing to see."""
    from sparsekv.policies.registry import describe

    trained = [name for name in policies if describe(name).needs_training]
    if len(trained) > 1:
        raise ValueError(f"--policy {' and '.join(trained)} both say what to do with adapters; name one of them")
    plain = [describe(name) for name in policies if name not in trained]
    shared = None if any(method.budget for method in plain) and not trained else budget
    found = [
        setting_of(adapter=name, policy=trained[0] if trained else None, cr=cr, budget=shared)
        for name in adapters or [None] * len(trained)
    ]
    for method in plain:
        own = {"cr": cr, "budget": budget} if method.budget else {"cr": None, "budget": None}
        found.append(setting_of(adapter=None, policy=method.name, **own))
    if not found:
        raise ValueError("there is nothing to see yet: pass --adapter with trained heads, or --policy")
    return found


def inspect_text(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    text: str,
    *,
    title: str,
    model_name: str,
    method: str,
    cr: float | None,
    prompt: int | None = None,
) -> "Inspected":
    """Read `text` with an attached model. method: what it is called; prompt: as sparsekv.inspect takes it.

    Raises ValueError for an empty text or one beyond the context.
    """
    import torch

    from sparsekv.cli.inspect.page import Inspected
    from sparsekv.modeling.attach import attachment_of
    from sparsekv.modeling.tracing.trace import inspect

    ids, pieces = cut(tokenizer, text)
    check_length(len(ids), attachment_of(model).max_tokens)
    return Inspected(
        title=title,
        model=model_name,
        method=method,
        cr=cr,
        pieces=pieces,
        trace=inspect(model, torch.tensor([ids], device=model.device), prompt=prompt),
    )


def cut(tokenizer: "PreTrainedTokenizerBase", text: str) -> tuple[list[int], list[str]]:
    """Token ids and the piece of the text that each stands for; joined, the pieces are the text.

    The later tokens of a character that takes several have empty pieces, and so have added special tokens.

    Raises ValueError for a text without tokens or a tokenizer that does not know where its tokens lie.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} does not know where its tokens lie in a text; use a fast one")
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids: list[int] = encoded["input_ids"]
    if not ids:
        raise ValueError("the text is empty: it has no tokens")
    pieces, end = [], 0
    for _, stop in encoded["offset_mapping"]:
        pieces.append(text[end : max(stop, end)])
        end = max(stop, end)
    pieces[-1] += text[end:]
    return ids, pieces


def to_record(inspected: "Inspected") -> dict[str, Any]:
    """JSON-ready."""
    from sparsekv.cli.inspect.kinds import by_age, by_kind

    trace, kept = inspected.trace, inspected.kept
    counts = kept.flatten(0, 1).sum(0).tolist()
    return {
        "model": inspected.model,
        "method": inspected.method,
        "cr": inspected.cr,
        "window": trace.window,
        "layers": trace.layers,
        "heads": kept.shape[0] * kept.shape[1],
        "kept": "held" if trace.read is None else "read by the last query",
        "kv": trace.stats.to_dict(),
        "ratio_per_head": trace.stats.ratio_per_head,
        "lengths": trace.lengths,
        "ratios": trace.ratios,
        "kinds": [asdict(share) for share in by_kind(kept, inspected.pieces, window=trace.window)],
        "ages": [asdict(share) for share in by_age(kept)],
        "tokens": [{"text": piece, "held_by": count} for piece, count in zip(inspected.pieces, counts, strict=True)],
    }


def _name(setting: "Setting") -> str:
    if setting.adapter is None:
        return setting.policy
    return setting.adapter if setting.policy in ("dms", "dmc") else f"{setting.adapter}, {setting.policy}"


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not a UTF-8 text") from None
