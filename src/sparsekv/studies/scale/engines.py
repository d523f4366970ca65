"""The engine that a cell needs, kept for as long as the cells that follow can use it: its start takes minutes on a GPU.

DMS is dialled to each ratio in one engine; a budget needs an engine of its own.
"""

from typing import Any

from sparsekv.engine.llm import LLM
from sparsekv.engine.params import SamplingParams
from sparsekv.evals.problems.base import Problem
from sparsekv.modeling.attach import detach
from sparsekv.modeling.load import load_model
from sparsekv.studies.scale.cells import Cell
from sparsekv.studies.scale.study import Study


class Engines:
    """One engine at a time, for the cells of a study."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self._key: Any = None
        self._llm: LLM | None = None
        self._loaded: tuple[str, Any, Any] | None = None
        self._most: dict[str, int] = {}

    def get(self, cell: Cell) -> LLM:
        """Raises ValueError where the model or the memory allows none."""
        method = cell.method
        most = self._longest(method.model)
        tokens = self.study.ratio_tokens or most
        arguments = method.setting(cell.ratio, tokens=tokens).arguments(tokens=tokens)
        dialled = method.policy == "dms"
        if dialled:
            arguments = {name: value for name, value in arguments.items() if name not in ("cr", "tokens")}
        key = method.model, arguments, most
        if self._llm is None or self._key != key:
            self.close()
            self._llm, self._key = self._start(method.model, arguments, most=most), key
        if dialled:
            self._llm.set_cr(cell.ratio, tokens=tokens)
        return self._llm

    def close(self) -> None:
        """Free the engine; the model stays."""
        if self._llm is not None:
            self._llm.close()
            detach(self._llm.model)
            self._llm = None

    def _longest(self, model: str) -> int:
        """Tokens of the longest prompt of all tasks and its chain: every cell of a method has the same engine."""
        if model not in self._most:
            tokenizer = self._model(model)[1]
            prompts = [len(prompt_ids(tokenizer, p)) for own in self.study.problem_lists.values() for p in own]
            self._most[model] = max(prompts) + self.study.most_tokens
        return self._most[model]

    def _start(self, name: str, arguments: dict[str, Any], *, most: int) -> LLM:
        model, tokenizer = self._model(name)
        rows = self.study.rows
        llm = LLM(
            model,
            tokenizer=tokenizer,
            max_num_seqs=rows,
            max_num_batched_tokens=max(8192, rows),
            max_model_len=most,
            kv_memory=self.study.kv_memory,
            enforce_eager=self.study.enforce_eager,
            **arguments,
        )
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)  # what comes once
        return llm

    def _model(self, name: str) -> tuple[Any, Any]:
        if self._loaded is None or self._loaded[0] != name:
            self.close()
            self._loaded = None
            self._loaded = name, *load_model(name)
        return self._loaded[1:]


def prompt_ids(tokenizer: Any, problem: Problem) -> list[int]:
    """As the model's chat template has it, or the plain text where there is none."""
    if getattr(tokenizer, "chat_template", None) is None:
        return tokenizer.encode(problem.prompt)
    messages = [{"role": "user", "content": problem.prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)
