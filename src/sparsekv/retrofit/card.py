"""The model card of an adapter, written from what was recorded and measured: nothing in it is typed by hand."""

from typing import Any

from sparsekv.evals.methods.intervals import wilson
from sparsekv.evals.perplexity import rise_of
from sparsekv.evals.retrieval import GRAMMAR
from sparsekv.markdown import table
from sparsekv.modeling.adapter import AdapterConfig
from sparsekv.retrofit.config import RetrofitConfig
from sparsekv.retrofit.data.config import describe_data

NEVER_TRAINED = (*GRAMMAR, "unseen", "look-up", "multi-needle", "variable tracking")
"""Kinds of retrieval in forms that no training shows."""


def model_card(adapter: AdapterConfig, config: RetrofitConfig, results: dict[str, Any] | None) -> str:
    """Markdown. results: what eval.json holds, None where nothing was evaluated."""
    made = adapter.training
    parts = [
        "---\nlibrary_name: sparsekv\n"
        f"base_model: {adapter.base_model_name_or_path}\ntags: [{adapter.policy}, kv-cache]\n---\n\n"
        f"# {_title(adapter)} for {adapter.base_model_name_or_path}\n\n"
        f"{_about(adapter)}, trained towards ratio {made['final_cr']:g}{_marked(made)}, with an offset on the logits "
        f"for every ratio from 1 to {adapter.max_cr:.3g}. {_base(adapter, config)}\n",
        "## Training\n\n"
        f"{made['steps']} steps of {config.batch} x {config.length} tokens{_pieces(config)} in {made['minutes']:g} "
        f"minutes on {made['hardware']} (torch {made['torch']}); of the rows {describe_data(config.data)}, some of "
        f"each text held out. Window {config.window}, "
        f"lag {config.lag}, learning rate {config.lr:g}, seed {config.seed}, commit {made['commit']}. Everything is in "
        f"`config.yaml`, {_logged(config)} in `metrics.jsonl`.\n",
        "## Offsets\n\n" + _offsets(adapter),
    ]
    if results is not None:
        parts.append(_evaluation(results))
    return "\n".join(parts)


def _logged(config: RetrofitConfig) -> str:
    return "every step" if config.log_every == 1 else f"one step in {config.log_every}"


def untrained_texts(results: dict[str, Any]) -> list[str]:
    """The other texts of an evaluation that its adapter's training has not seen. results: what eval.json holds."""
    return [name for name in results["settings"]["other_texts"] if name not in results["trained_texts"]]


def untrained_facts(retrieval: dict[str, dict[str, Any]]) -> tuple[int, int]:
    """(still found, found by dense) of all facts that training could not have shown. retrieval: of a score."""
    cells = [cell for kind, cell in retrieval.items() if kind in NEVER_TRAINED and cell["dense_right"]]
    return round(sum(cell["kept"] * cell["dense_right"] for cell in cells)), sum(cell["dense_right"] for cell in cells)


def _offsets(adapter: AdapterConfig) -> str:
    """The dial, a column for each length."""
    about = adapter.calibration
    columns = {int(length): ratios for length, ratios in adapter.ratios.items()}
    columns[about["length"]] = [ratio for _, ratio in adapter.offsets]
    header = ["offset", *(f"ratio at {length:,} tokens" for length in sorted(columns))]
    rows = [
        [f"{offset:+.3f}", *(f"{columns[length][row]:.3f}" for length in sorted(columns))]
        for row, (offset, _) in enumerate(adapter.offsets)
    ]
    return (
        f"Measured on held-out texts, {about['rows']} of {about['length']} tokens and as much of every other length, "
        f"the window of {adapter.window} tokens counted: of a shorter text it is a larger share.\n\n"
        + table(header, rows)
        + "\n"
    )


def _pieces(config: RetrofitConfig) -> str:
    """Where rows are not of one text each."""
    if set(config.pieces) == {1}:
        return ""
    return f" (rows of {', '.join(map(str, config.pieces))} texts in turn)"


def _marked(made: dict[str, Any]) -> str:
    """How far training came; not every adapter says."""
    return f" (its last step marked {made['marked']:.1%} of tokens)" if "marked" in made else ""


def _title(adapter: AdapterConfig) -> str:
    return "Merging" if adapter.policy == "dmc" else "Eviction heads"


def _about(adapter: AdapterConfig) -> str:
    if adapter.policy == "dmc":
        return (
            "A channel of the keys says which tokens each KV head merges into the slot before theirs, one of the "
            "queries how much each weighs (Dynamic Memory Compression, arXiv 2403.09636)"
        )
    return (
        "One set of heads that says which tokens each KV head can forget (Dynamic Memory Sparsification, arXiv "
        "2506.05345)"
    )


def _base(adapter: AdapterConfig, config: RetrofitConfig) -> str:
    """What became of the base model."""
    if config.trainable == "lora":
        return (
            f"LoRA of rank {adapter.r} was trained with them (learning rate {config.rate:g}): `attach` merges it into "
            "the weights and `detach` takes it out; the base model's files are unchanged."
        )
    if config.trainable == "all":
        return (
            f"All weights were trained with them (learning rate {config.rate:g}): `model/` is a plain Transformers "
            f"model, made from {config.model}, to use them with."
        )
    return "The base model is unchanged."


def _evaluation(results: dict[str, Any]) -> str:
    scores = results["scores"]
    kinds = list(scores[0]["retrieval"])
    others = list(scores[0]["others"])
    unseen = untrained_texts(results)
    header = ["measured ratio", *(f"{name} (never trained on), over dense" for name in unseen)]
    header += [
        "facts in forms never trained on, kept",
        "perplexity",
        "over dense",
        *(f"{name}, over dense" for name in others),
    ]
    header += ["divergence (nats)", "same token"]
    header += [f"{kind} ({'/'.join(scores[0]['retrieval'][kind]['accuracy'])})" for kind in kinds]
    header += [f"{kind}, share of dense" for kind in kinds]
    rows = []
    for score in scores:
        row = [
            f"{score['ratio']:.2f}",
            *(_rise(score["others"][name]) for name in unseen),
            _kept(score["retrieval"]),
            f"{score['perplexity']:.3f}",
            *(_over_dense(text, score) for text in (score, *(score["others"][name] for name in others))),
            f"{score['divergence']:.4f}",
            f"{score['agreement']:.1%}",
        ]
        cells = [score["retrieval"][kind] for kind in kinds]
        row += ["/".join(f"{value:.2f}" for value in cell["accuracy"].values()) for cell in cells]
        row += ["" if cell["share_of_dense"] is None else f"{cell['share_of_dense']:.0%}" for cell in cells]
        rows.append(row)
    used = results["settings"]
    return (
        "## What it costs\n\n"
        f"Teacher-forced on held-out text ({used['rows']} texts of {used['length']} tokens, {used['items']} retrieval "
        f"items a cell; {results['hardware']}, eviction by the {results['eviction']}, seed {results['seed']}, "
        f"{results['date']}; in brackets 95 % intervals, over texts and over the facts that dense finds). Pass-keys "
        "are in a template that training uses, unseen facts in templates and words that "
        "it does not. Nothing that is measured was trained on"
        + ("; each text has an offset of its own to the same ratio" if used["same_ratio"] else "")
        + ("; longer rows have the offset of the shorter, and so another ratio" if used["long_lengths"] else "")
        + ".\n\n"
        + table(header, rows)
        + "\n"
    )


def _rise(text: dict[str, Any]) -> str:
    """The rise of perplexity and its interval."""
    rise = f"{rise_of(text):+.1%}"
    return rise if text["rise"] is None else f"{rise} ({text['rise'][0]:+.1%} to {text['rise'][1]:+.1%})"


def _kept(retrieval: dict[str, dict[str, Any]]) -> str:
    """Of untrained facts, the share that is still found."""
    part, whole = untrained_facts(retrieval)
    if not whole:
        return ""
    found = wilson(part, whole)
    return f"{found.value:.0%} of {whole} ({found.low:.0%} to {found.high:.0%})"


def _over_dense(text: dict[str, Any], score: dict[str, Any]) -> str:
    """The rise of perplexity, with the ratio where it is another than the score's."""
    rise = f"{rise_of(text):+.2%}"
    same = abs(text["ratio"] / score["ratio"] - 1) < 0.02
    return rise if same else f"{rise} at {text['ratio']:.2f}"
