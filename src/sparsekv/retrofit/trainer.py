"""The retrofit on transformers.Trainer: eviction heads learn, the base is frozen and is its own teacher.

L(step) = D(model with eviction off, model with soft gates) + max(0, target(step) - fraction),
fraction = mean over layers, heads and tokens of alpha = sigmoid(l), target = 1 - 1 / CR(step)  (arXiv 2506.05345, 3.2).

Data and gate noise depend on (seed, step) alone, and a checkpoint holds the heads, the optimiser and the step: a run
that was killed and resumed gives the losses of an undisturbed one.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from sparsekv import dms
from sparsekv.dms import EvictionHead
from sparsekv.modeling import modes
from sparsekv.modeling.adapter import AdapterConfig, base_shape, load_adapter, save_adapter
from sparsekv.modeling.attach import attachment_of, heads
from sparsekv.modeling.compiled import compiled_layers
from sparsekv.modeling.states import Divergence, SplitModel
from sparsekv.policies.dms import DMSPolicy
from sparsekv.retrofit.config import RetrofitConfig
from sparsekv.retrofit.data import Blend
from sparsekv.retrofit.metrics import METRICS_FILE, MetricsCallback

CHECKPOINTS, STATE_FILE = "checkpoints", "trainer_state.json"

_DIVERGENCES: dict[str, Divergence] = {
    "kl_teacher_student": dms.kl_teacher_student,
    "kl_student_teacher": dms.kl_student_teacher,
}


def train(model: PreTrainedModel, rows: Blend, config: RetrofitConfig, *, progress: bool = True) -> None:
    """Train the heads of a model attached with DMS, in place; resumes from the newest whole checkpoint in
    config.output.

    Raises ValueError for a loss that is not finite, heads that get no gradient, or several visible GPUs.
    """
    trainer = RetrofitTrainer(model, rows, config, progress=progress)
    checkpoint = newest_checkpoint(Path(config.output))
    use_cache = model.config.use_cache
    with compiled_layers(model):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    model.config.use_cache = use_cache
    model.eval()


def adapter_config(model: PreTrainedModel, config: RetrofitConfig, **training: Any) -> AdapterConfig:
    """What adapter_config.json says of these heads before calibration."""
    return AdapterConfig(
        base_model_name_or_path=config.model,
        base_shape=base_shape(model),
        window=config.window,
        lag=config.lag,
        training=config.training_keys() | training,
    )


def newest_checkpoint(output: Path) -> Path | None:
    """The last checkpoint that was written to its end: Trainer writes the state file last."""
    whole = []
    for folder in (output / CHECKPOINTS).glob("checkpoint-*"):
        try:
            whole.append((json.loads((folder / STATE_FILE).read_text())["global_step"], folder))
        except (OSError, ValueError, KeyError):
            continue  # killed while it was being written
    return max(whole)[1] if whole else None


class RetrofitTrainer(Trainer):
    """See the module. model: attached with DMS, its heads untrained or to be trained further."""

    def __init__(self, model: PreTrainedModel, rows: Blend, config: RetrofitConfig, *, progress: bool) -> None:
        self.retrofit = config
        _freeze_base(model)
        arguments = TrainingArguments(
            output_dir=str(Path(config.output) / CHECKPOINTS),
            max_steps=config.steps,
            per_device_train_batch_size=config.batch,
            learning_rate=config.lr,
            lr_scheduler_type="constant",
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            weight_decay=0.0,
            max_grad_norm=config.clip,
            seed=config.seed,
            use_cpu=next(model.parameters()).device.type == "cpu",
            save_strategy="steps",
            save_steps=config.save_every,
            save_total_limit=2,
            logging_strategy="no",
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        if arguments.n_gpu > 1 or arguments.world_size > 1:
            raise ValueError("retrofit uses one device: start one process, with CUDA_VISIBLE_DEVICES naming one GPU")
        metrics = MetricsCallback(Path(config.output) / METRICS_FILE, progress=progress)
        super().__init__(model=model, args=arguments, train_dataset=rows, callbacks=[metrics])
        self.pop_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False
        with modes.dense(model), torch.no_grad():
            self.split = SplitModel(model)
        self.metrics = metrics
        self._parts = torch.zeros(3)
        self._gradient_seen = False

    # The loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """inputs: input_ids int64 [B, S] -> the scalar loss of the module's docstring."""
        config, step, ids = self.retrofit, self.state.global_step + 1, inputs["input_ids"]
        base = self.split.model
        with modes.dense(base), torch.no_grad():
            teacher = self.split.hidden(ids)
        with modes.soft(base, tau=config.tau, generator=self._noise(step)) as gates:
            student = self.split.hidden(ids)
        divergence = self.split.divergence(teacher, student, _DIVERGENCES[config.divergence])
        fraction = marked_fraction(gates.gates, hard=config.fraction == "hard")
        pull = dms.hinge(fraction, self.target(step))
        self._parts = torch.stack([divergence.detach(), pull.detach(), fraction.detach()])
        return divergence + pull

    def target(self, step: int) -> float:
        """The fraction of marks that the hinge asks for at a step, counted from 1."""
        config = self.retrofit
        ratio = dms.compression_ratio(step, steps_per_cr=config.steps_per_cr, max_cr=config.max_cr)
        return dms.target_fraction(ratio)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward; stops before the optimiser takes in what is not finite."""
        loss = super().training_step(*args, **kwargs)
        step = self.state.global_step + 1
        divergence, pull, fraction = self._parts.tolist()
        if not math.isfinite(divergence + pull):
            raise ValueError(
                f"the loss is not finite at step {step} (divergence {divergence}, hinge {pull}): lower lr "
                f"({self.retrofit.lr:g}) and name a new output folder"
            )
        if not self._gradient_seen:
            self._check_gradients()
        self.metrics.record(
            {
                "step": step,
                "loss": divergence + pull,
                "divergence": divergence,
                "hinge": pull,
                "fraction": fraction,
                "target": self.target(step),
                "ratio_target": 1 / (1 - self.target(step)),
            }
        )
        return loss

    def _noise(self, step: int) -> torch.Generator:
        generator = torch.Generator(device=self.args.device)
        return generator.manual_seed(self.retrofit.seed * 1_000_003 + step)

    def _check_gradients(self) -> None:
        for index, head in enumerate(heads(self.split.model)):
            gradients = [parameter.grad for parameter in head.parameters()]
            if any(g is None or not g.any() for g in gradients):
                raise ValueError(
                    f"eviction head {index} gets no gradient: rows of {self.retrofit.length} tokens and a window of "
                    f"{self.retrofit.window} must leave something to forget, and the attention backend must pass it on"
                )
        self._gradient_seen = True

    # What Trainer asks for

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        assert isinstance(self.train_dataset, Blend)
        return SequentialSampler(self.train_dataset)  # rows are random already, each by its number

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: it would walk over all parameters at every step."""
        return 0

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        assert output_dir is not None
        save_adapter(self.split.model, output_dir, adapter_config(self.split.model, self.retrofit))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_heads(resume_from_checkpoint, self.split.model)


def marked_fraction(gates: list[Tensor], *, hard: bool) -> Tensor:
    """The mean of alpha = sigmoid(l) over layers, tokens and heads; hard: of l > 0, with alpha's gradient
    (straight-through). gates: l by layer, float32 [tokens, heads]."""
    alpha = torch.stack(gates).sigmoid()
    if hard:
        alpha = alpha + ((alpha > 0.5).float() - alpha).detach()
    return alpha.mean()


def load_heads(folder: str | Path, model: PreTrainedModel) -> AdapterConfig:
    """Copy an adapter's weights into the heads of a model attached with DMS."""
    policy = attachment_of(model).policy
    assert isinstance(policy, DMSPolicy)
    loaded = load_adapter(str(folder), model)
    loaded.copy_into({i: head for i, head in enumerate(policy.sources) if isinstance(head, EvictionHead)})
    return loaded.config


def _freeze_base(model: PreTrainedModel) -> None:
    model.requires_grad_(False)
    for head in heads(model):
        head.requires_grad_(True)
