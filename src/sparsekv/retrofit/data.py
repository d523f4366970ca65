"""The rows a retrofit trains on: stretches of text and long-range retrieval, each decided by (seed, row number) alone.

So a resumed run sees exactly the rows that an undisturbed one would have seen, whatever was drawn before.
"""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from sparsekv.evals.corpus import Corpus
from sparsekv.evals.items import ItemBuilder
from sparsekv.retrofit.retrieval import training_item


class Blend(Dataset[dict[str, Tensor]]):
    """`count` rows, in batches of `batch` of which the first share is retrieval.

    A row is {"input_ids": int64 [length]}. Raises ValueError where the corpus has no document of `length` tokens.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerBase,
        *,
        count: int,
        batch: int,
        length: int,
        retrieval_share: float,
        seed: int,
    ) -> None:
        self.corpus = corpus
        self.builder = ItemBuilder(corpus, tokenizer)
        self.count, self.batch, self.length, self.seed = count, batch, length, seed
        self.retrieval_rows = round(retrieval_share * batch)
        corpus.window(np.random.default_rng(0), length)  # refuses a corpus that is too short before any step is made

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((self.seed, index))
        if index % self.batch < self.retrieval_rows:
            ids = training_item(self.builder, rng, self.length).ids
        else:
            ids = self.corpus.window(rng, self.length).ids
        return {"input_ids": torch.from_numpy(ids.astype(np.int64))}
