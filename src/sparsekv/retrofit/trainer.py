"""The retrofit on transformers.Trainer: eviction heads learn, alone, with LoRA or with all weights.

The loss is distill.py's; the target ratio rises by one every `steps_per_cr` steps. Data and gate noise depend on
(seed, step, row) alone, and a checkpoint holds what is trained, the optimiser and the step: a run that was killed and
resumed, or that is spread over several processes, gives the losses of an undisturbed one.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from sparsekv import dms
from sparsekv.modeling import modes
from sparsekv.modeling.adapter import HEAD, AdapterConfig, base_shape
from sparsekv.modeling.attach import heads
from sparsekv.modeling.compiled import compiled_layers
from sparsekv.retrofit import checkpoint as checkpoints
from sparsekv.retrofit.config import RetrofitConfig
from sparsekv.retrofit.data import Blend
from sparsekv.retrofit.distill import Distillation, Draw
from sparsekv.retrofit.metrics import METRICS_FILE, MetricsCallback
from sparsekv.retrofit.peft import add_lora


def train(
    model: PreTrainedModel,
    rows: Blend,
    config: RetrofitConfig,
    *,
    teacher: PreTrainedModel | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Train a model attached with DMS, in place; resumes from the newest whole checkpoint in config.output.

    teacher: another model to learn from; needed where all weights are trained. Returns what was trained by the names of
    a Distillation's parameters, on the CPU. Raises ValueError for a loss that is not finite or heads that get no
    gradient.
    """
    with modes.soft(model, tau=config.tau):
        trainer = RetrofitTrainer(model, rows, config, teacher=teacher, progress=progress)
        newest = checkpoints.newest(Path(config.output))
        with compiled_layers(model):
            trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
        model.eval()
        return checkpoints.trained_weights(trainer.distillation)


def adapter_config(model: PreTrainedModel, config: RetrofitConfig, **training: Any) -> AdapterConfig:
    """What adapter_config.json says of these heads before calibration."""
    lora = config.lora if config.trainable == "lora" else None
    return AdapterConfig(
        base_model_name_or_path=config.model,
        base_shape=base_shape(model),
        window=config.window,
        lag=config.lag,
        r=0 if lora is None else lora.rank,
        lora_alpha=0 if lora is None else lora.alpha,
        target_modules=[] if lora is None else lora.targets,
        training=config.training_keys() | training,
    )


def make_trainable(model: PreTrainedModel, config: RetrofitConfig) -> None:
    """Freeze what is not trained; LoRA is added."""
    model.requires_grad_(config.trainable == "all")
    if config.trainable == "lora":
        add_lora(model, config.lora, seed=config.seed)
    for head in heads(model):
        head.requires_grad_(True)


class RetrofitTrainer(Trainer):
    """See the module. model: attached with DMS and within modes.soft."""

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Blend,
        config: RetrofitConfig,
        *,
        teacher: PreTrainedModel | None = None,
        progress: bool,
    ) -> None:
        if config.trainable == "all" and teacher is None:
            raise ValueError("trainable: all needs a second, frozen model as teacher: pass teacher=")
        self.retrofit = config
        make_trainable(model, config)
        if teacher is not None:
            teacher.requires_grad_(False)
        arguments = TrainingArguments(
            output_dir=str(Path(config.output) / checkpoints.CHECKPOINTS),
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
        distillation = Distillation(model, config, teacher=teacher)
        super().__init__(model=distillation, args=arguments, train_dataset=rows, callbacks=[metrics])
        self.pop_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False
        self.metrics = metrics
        self._parts: dict[str, Tensor] = {}
        self._gradient_seen = False

    @property
    def distillation(self) -> Distillation:
        """The module that is trained."""
        model: Any = self.model
        return model

    # A step

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """inputs: input_ids and, where rows are packed, documents, int64 [B, S] -> the scalar loss."""
        step = self.state.global_step + 1
        draw = Draw(seed=self.retrofit.seed * 1_000_003 + step, target=self.target(step))
        self._parts = model(inputs["input_ids"], draw, documents=inputs.get("documents"))
        return self._parts["loss"]

    def target(self, step: int) -> float:
        """The fraction of marks to reach at a step, counted from 1."""
        config = self.retrofit
        ratio = dms.compression_ratio(step, steps_per_cr=config.steps_per_cr, max_cr=config.max_cr)
        return dms.target_fraction(ratio)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward; stops before the optimiser takes in what is not finite."""
        loss = super().training_step(*args, **kwargs)
        step = self.state.global_step + 1
        divergence, pull = self._parts["divergence"].item(), self._parts["pull"].item()
        fractions = self._parts["fractions"].tolist()
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
                "fraction": sum(fractions) / len(fractions),
                "target": self.target(step),
                "ratio_target": 1 / (1 - self.target(step)),
                "fractions": [round(x, 4) for x in fractions],
            }
        )
        return loss

    def _check_gradients(self) -> None:
        for index, head in enumerate(heads(self.distillation.student)):
            gradients = [parameter.grad for parameter in head.parameters()]
            if any(g is None or not g.any() for g in gradients):
                raise ValueError(
                    f"eviction head {index} gets no gradient: rows of {self.retrofit.length} tokens and a window of "
                    f"{self.retrofit.window} must leave something to forget, and the attention backend must pass it on"
                )
        self._gradient_seen = True

    # What Trainer asks for

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with two groups: the heads, and what else is trained at its own rate."""
        trained = {n: p for n, p in (model or self.distillation).named_parameters() if p.requires_grad}
        own = [p for name, p in trained.items() if f".{HEAD}." in name]
        base = [p for name, p in trained.items() if f".{HEAD}." not in name]
        groups = [{"params": own, "lr": self.retrofit.lr}, {"params": base, "lr": self.retrofit.rate}]
        kind, settings = self.get_optimizer_cls_and_kwargs(self.args)
        self.optimizer = kind([group for group in groups if group["params"]], **settings)
        return self.optimizer

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        assert isinstance(self.train_dataset, Blend)
        return SequentialSampler(self.train_dataset)  # rows are random already, each by its number

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: it would walk over all parameters at every step."""
        return 0

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Nothing: the weights are saved together with the optimiser's state."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        checkpoints.save(self.distillation, self._inner_optimizer(), Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        pass  # with the optimiser's state, once there is one

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.load(self.distillation, self._inner_optimizer(), Path(checkpoint))

    def _inner_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate's wrapper has it as an attribute
