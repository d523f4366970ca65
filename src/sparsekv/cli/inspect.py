"""`sparsekv inspect`: read a text with trained eviction heads and show which head forgot which token."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from sparsekv.cli.models import check_length, open_model
from sparsekv.cli.output import check_target, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsekv.cli.inspect_page import Inspected


def command(
    model: Annotated[str, Argument(help="smollm2-135m, a folder, or a hub id.")],
    adapter: Annotated[str, Option(help="Trained eviction heads: a folder or a hub id.")],
    file: Annotated[Path, Option(help="The text to read, UTF-8.", exists=True, dir_okay=False)],
    cr: Annotated[float | None, Option(help="Compression ratio; default: as trained.")] = None,
    html: Annotated[Path | None, Option(help="Write the page here.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print every token's count and every head's ratio.")] = False,
) -> None:
    """Which head forgot which token of a text: JSON, or one self-contained HTML page."""
    if html is None and not as_json:
        raise ValueError("inspect writes nothing yet; pass --html page.html, --json, or both")
    if html is not None:
        check_target(html)
    text = _read(file)
    from sparsekv.modeling.attach import attach

    loaded, tokenizer = open_model(model)
    attach(loaded, adapter=adapter, cr=cr)
    inspected = inspect_text(loaded, tokenizer, text, title=file.name, model_name=model, adapter=adapter, cr=cr)
    if html is not None:
        from sparsekv.cli.inspect_page import build_page

        write_text(html, build_page(inspected))
        typer.echo(f"wrote {html}", err=True)
    if as_json:
        typer.echo(json.dumps(to_record(inspected), ensure_ascii=False))


def inspect_text(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    text: str,
    *,
    title: str,
    model_name: str,
    adapter: str,
    cr: float | None,
) -> "Inspected":
    """Read `text` with a model attached with DMS. Raises ValueError for an empty text or one beyond the context."""
    import torch

    from sparsekv.cli.inspect_page import Inspected
    from sparsekv.modeling.attach import attachment_of
    from sparsekv.modeling.trace import inspect

    ids, pieces = cut(tokenizer, text)
    attachment = attachment_of(model)
    check_length(len(ids), attachment.max_tokens)
    return Inspected(
        title=title,
        model=model_name,
        adapter=adapter,
        cr=cr,
        pieces=pieces,
        layers=[attached.layer for attached in attachment.layers if attached.policy is attachment.policy],
        trace=inspect(model, torch.tensor([ids], device=model.device)),
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
    trace, counts = inspected.trace, inspected.held.sum(0).tolist()
    return {
        "model": inspected.model,
        "adapter": inspected.adapter,
        "cr": inspected.cr,
        "window": trace.window,
        "heads": len(inspected.held),
        "kv": trace.stats.to_dict(),
        "ratio_per_head": trace.stats.ratio_per_head,
        "tokens": [{"text": piece, "held_by": count} for piece, count in zip(inspected.pieces, counts, strict=True)],
    }


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not a UTF-8 text") from None
