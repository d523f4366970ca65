"""What the tests of the command line share: a tiny random model with a tokenizer on disk, and adapters for it."""

from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

import sparsekv
from helpers import random_heads, tiny_model
from sparsekv.modeling.adapter import AdapterConfig, base_shape, save_adapter

TEXT = "The access code of the old lighthouse is 12345. The keeper <b>wrote</b> & forgot it. "
VOCABULARY = 320
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


class Outcome(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str


def make_tokenizer(*, chat: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text, losslessly."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([TEXT] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", chat_template=CHAT if chat else None)


def save_model(folder: Path, *, chat: bool = False, **config: object) -> Path:
    """A tiny random Llama and its tokenizer in `folder`."""
    model = tiny_model("Llama", vocab_size=VOCABULARY, **config)
    model.save_pretrained(folder)
    make_tokenizer(chat=chat).save_pretrained(folder)
    return folder


def write_adapter(folder: Path, **config: object) -> Path:
    """Random heads for save_model's model, window 4, with a made-up table of ratios from 1.2 to 8."""
    model = tiny_model("Llama", vocab_size=VOCABULARY, **config)
    sparsekv.attach(model, policy="dms", window=4)
    random_heads(model)
    save_adapter(
        model,
        folder,
        AdapterConfig(
            base_model_name_or_path="tiny", base_shape=base_shape(model), window=4, offsets=[(-2.0, 1.2), (3.0, 8.0)]
        ),
    )
    return folder


def refused(outcome, *words):
    """Exit code 2 and one sentence with these words: no traceback, nothing on stdout."""
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("Error: ")
    assert len(outcome.err.strip().splitlines()) == 1
    for word in words:
        assert word in outcome.err
