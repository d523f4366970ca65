"""lm-evaluation-harness (pip install 'sparsekv[eval]') over any policy: the model type `sparsekv`, and rows of results.

generate_until runs in the engine. loglikelihood reads the context as the prompt, but for its last token, and scores the
continuation by decode steps where the policy needs them (methods.steps); loglikelihood_rolling scores windows of the
model's context, all of it by steps there. A ratio `cr` makes one budget for all requests of a kind in a task, out of
the longest of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekv.engine import LLM, SamplingParams
from sparsekv.evals.methods.intervals import Estimate, bootstrap, share
from sparsekv.evals.methods.rows import Row, Usage, make_row
from sparsekv.evals.methods.setting import Setting, budget_of
from sparsekv.evals.methods.steps import needs_steps, walk
from sparsekv.modeling import contexts
from sparsekv.modeling.attach import attachment_of
from sparsekv.modeling.load import load_model
from sparsekv.modeling.split import SplitModel
from sparsekv.policies import Policy

NEW_TOKENS = 256
"""Of a generation whose task names no number."""
DENSE = Setting()
_WEIGHTED: dict[str, Callable[[Any], Any]] = {
    "word_perplexity": lambda mean: np.exp(-mean),
    "byte_perplexity": lambda mean: np.exp(-mean),
    "bits_per_byte": lambda mean: -mean / np.log(2),
}
"""Metrics of (log-likelihood, weight) pairs."""


@register_model("sparsekv")
class SparseLM(TemplateLM):
    """pretrained: an embedded model's name, a folder, a hub id, or a model attached by `setting.attach`, with its
    tokenizer; the other arguments are Setting's. batch_size: sequences that the engine runs at once.

    Raises ValueError as Setting and sparsekv.attach do.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        policy: str | None = None,
        adapter: str | None = None,
        cr: float | None = None,
        budget: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.setting = Setting(
            policy=policy or ("dense" if adapter is None else "dms"), adapter=adapter, cr=cr, budget=budget
        )
        if isinstance(pretrained, str):
            self.model, tokenizer = load_model(pretrained, device=device, dtype=dtype)
            self.setting.attach(self.model)
        else:
            self.model = pretrained
        self.tokenizer: Any = tokenizer
        self.batch, self.seed = int(batch_size), seed
        self.context = attachment_of(self.model).max_tokens
        with contexts.dense(self.model):
            self.split = SplitModel(self.model)
        self.usage = Usage()
        self.budget: int | None = None
        """The last one used."""

    # What TemplateLM asks for

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokenizer.bos_token_id or self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:
            begin = self.tokenizer.bos_token
            add_special_tokens = not (begin and string.startswith(begin))
        return self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        rows = [(context + continuation, len(continuation)) for _, context, continuation in requests]
        rows = [(ids[-self.context :], count) for ids, count in rows]
        with self._governed(max(len(ids) for ids, _ in rows)) as policy:
            return [self._score(ids, count, by_steps=needs_steps(policy)) for ids, count in rows]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        found = []
        for request in requests:
            ids = self.tok_encode(request.arguments[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.context - 1, 1)
            parts: list[Any] = [(("", ""), *make_disjoint_window(window)) for window in windows]
            found.append(sum(score for score, _ in self._loglikelihood_tokens(parts)))
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        params = [self._params(request.arguments[1]) for request in requests]
        prompts = [
            self.tok_encode(request.arguments[0])[-(self.context - (each.max_tokens or 0)) :]
            for request, each in zip(requests, params, strict=True)
        ]
        longest = max(len(ids) + (each.max_tokens or 0) for ids, each in zip(prompts, params, strict=True))
        texts: list[str] = []
        with self._governed(longest):
            llm = LLM(self.model, tokenizer=self.tokenizer, max_num_seqs=self.batch)
            for i in range(0, len(prompts), self.batch):  # the samples are kept for their bytes, so not all at once
                part = slice(i, i + self.batch)
                with self.usage.timed():
                    outputs = llm.generate(prompts[part], params[part], keep=True)
                for sample in [output.outputs[0] for output in outputs]:
                    assert sample.kv is not None and sample.session is not None
                    size = sample.session.state.bytes
                    self.usage.add(sample.kv, sequences=1, output=len(sample.token_ids), size=size)
                    texts.append(sample.text)
        return texts

    # How

    def _score(self, ids: list[int], count: int, *, by_steps: bool) -> tuple[float, bool]:
        """(log-likelihood of the last `count` tokens, whether each is the most likely one)."""
        row = torch.tensor([ids], device=self.model.device)
        with self.usage.timed():
            walked = walk(self.split, row, start=len(ids) - count - 1, by_steps=by_steps)
            following = walked.tokens[0]
            logits = self.split.logits(walked.hidden[0]).float()
            right = bool((logits.argmax(-1) == following).all())
            value = float(-torch.nn.functional.cross_entropy(logits, following, reduction="sum"))
        self.usage.counts_reads &= by_steps
        self.usage.add(walked.stats, sequences=1, output=count, size=walked.stats.bytes)
        return value, right

    def _params(self, given: dict[str, Any]) -> SamplingParams:
        until = given.get("until") or []
        until = [until] if isinstance(until, str) else [text for text in until if text]
        most = next((given[k] for k in ("max_gen_toks", "max_new_tokens", "max_tokens") if k in given), NEW_TOKENS)
        sampled = given.get("do_sample", False)
        return SamplingParams(
            max_tokens=min(int(most), self.context - 1),
            temperature=float(given.get("temperature", 1.0)) if sampled else 0.0,
            top_p=float(given.get("top_p", 1.0)) if sampled else 1.0,
            stop=until,
            seed=self.seed,
        )

    @contextmanager
    def _governed(self, tokens: int) -> Iterator[Policy]:
        with torch.no_grad(), self.setting.governing(self.model, tokens=tokens) as policy:
            self.budget = budget_of(policy)
            yield policy


def load_tasks(names: Sequence[str]) -> dict[str, Any]:
    """By name the harness's tasks: those that a name stands for, or the one that a YAML file describes.

    Raises ValueError for an unknown name or a file that cannot be read.
    """
    files = [name for name in names if name.endswith((".yaml", ".yml"))]
    specs: list[Any] = [name for name in names if name not in files]
    try:
        specs += [load_yaml(name, resolve_func=True) for name in files]
        return TaskManager(include_defaults=len(files) < len(names)).load(specs)["tasks"]
    except (KeyError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot load the tasks {', '.join(names)} of lm-evaluation-harness: {reason}") from None


def measure_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Sequence[Setting],
    *,
    tasks: Sequence[str],
    limit: int | None,
    batch: int,
    seed: int,
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """One row for each of the harness's tasks, dense first and then under each setting. model: as for
    methods.measure; limit: documents of each task."""
    rows: list[Row] = []
    make, run = cast(Any, SparseLM), cast(Any, simple_evaluate)
    for setting in (DENSE, *settings):
        for name, task in load_tasks(tasks).items():
            lm = make(model, tokenizer=tokenizer, batch_size=batch, seed=seed)
            lm.setting = setting
            found = run(lm, tasks=[task], limit=limit, bootstrap_iters=0, random_seed=seed)
            scores = _scores(found["results"][name], found["samples"][name])
            about = {"task": name, "length": None, "scores": scores}
            rows.append(make_row(setting, lm.usage, budget=lm.budget, seed=seed, **about))
            on_row(rows[-1])
    return rows


def _scores(results: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Estimate]:
    """results: of a task, "metric,filter" -> value; samples: of its documents, metric -> value under each filter."""
    scores = {}
    for key, value in results.items():
        metric, _, filter_ = key.partition(",")
        if not filter_ or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        values = [sample[metric] for sample in samples if sample.get("filter", filter_) == filter_ and metric in sample]
        scores[metric if filter_ == "none" else key] = _estimate(metric, float(value), values)
    return scores


def _estimate(metric: str, value: float, samples: list[Any]) -> Estimate:
    """With an interval where the metric is one of the mean of its documents."""
    found = None
    if metric in _WEIGHTED:
        sums, weights = np.asarray(samples, dtype=np.float64).T
        found = bootstrap(sums, weights, unit="documents", statistic=_WEIGHTED[metric])
    elif samples and all(isinstance(sample, int | float) for sample in samples):
        found = share(samples, unit="documents")
    if found is None or abs(found.value - value) > 1e-6 * max(1.0, abs(value)):
        return Estimate(value=value, low=None, high=None, interval="none: not a mean over documents")
    return found
