"""A tiny model with a tokenizer and text, as a folder that `from_pretrained` reads."""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from helpers import tiny_model

_WORDS = ("the", "a", "river", "mountain", "old", "ship", "sails", "under", "green", "light", "and", "slowly", "turns")
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def text(words: int, *, seed: int = 0) -> str:
    """Sentences of random words."""
    rng = random.Random(seed)
    sentences = []
    while words > 0:
        count = rng.randint(4, 9)
        sentences.append(" ".join(rng.choices(_WORDS, k=count)).capitalize() + ".")
        words -= count
    return " ".join(sentences)


def tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE with 400 entries, trained on the words above."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([text(2000)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", model_max_length=2048)
    if chat:
        fast.chat_template = CHAT
    return fast


def save(folder: Path, *, seed: int = 0) -> Path:
    """The model's folder, with texts/*.txt (four documents) beside its files."""
    model = tiny_model(seed=seed, vocab_size=512, max_position_embeddings=2048)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "texts").mkdir()
    for i in range(4):
        (folder / "texts" / f"{i}.txt").write_text(text(1200, seed=i + 1))
    return folder


def random_heads(heads: list, *, seed: int = 0, scale: float = 2.0) -> None:
    """Heads whose logits spread widely, so that every ratio can be dialled."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for head in heads:
            head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * scale)
            head.bias.zero_()
