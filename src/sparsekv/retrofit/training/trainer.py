"""The retrofit on transformers.Trainer: eviction heads learn, alone, with LoRA or with all weights.

The loss is distill.py's; the target ratio rises by one every `steps_per_cr` steps. Data and gate noise depend on
(seed, step, row) alone, and a checkpoint holds what is trained, the optimiser and the step: a run that was killed and
resumed, or that is spread over several processes, gives the losses of an undisturbed one.
"""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, SequentialSampler
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import SCHEDULER_NAME

from sparsekv.dms import NeuronSource
from sparsekv.modeling import contexts
from sparsekv.modeling.adapter import HEAD, AdapterConfig, base_shape
from sparsekv.modeling.attach import attachment_of, heads
from sparsekv.modeling.compiled import compiled_layers
from sparsekv.modeling.queries.dmc import clear_channel
from sparsekv.policies.dms import DMSPolicy
from sparsekv.retrofit.config import RetrofitConfig
from sparsekv.retrofit.data.rows import Blend
from sparsekv.retrofit.export import export
from sparsekv.retrofit.training import checkpoint as checkpoints
from sparsekv.retrofit.training.distill import Distillation, Draw
from sparsekv.retrofit.training.metrics import MetricsCallback
from sparsekv.retrofit.training.peft import add_lora
from sparsekv.retrofit.training.recorded import Recorded
from sparsekv.retrofit.training.target import Progress, channel_kept, step_target


def train(
    model: PreTrainedModel,
    rows: Blend,
    config: RetrofitConfig,
    *,
    teacher: PreTrainedModel | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Train a model attached with DMS or DMC, in place; resumes from the newest whole checkpoint in config.output.

    teacher: another model to learn from; needed where all weights are trained. Returns what was trained by the names of
    a Distillation's parameters, on the CPU. Raises ValueError for a loss that is not finite or heads that get no
    gradient.
    """
    with contexts.soft(model, tau=config.tau, shared=config.granularity == "layer"):
        trainer = RetrofitTrainer(model, rows, config, teacher=teacher, progress=progress)
        newest = checkpoints.newest(Path(config.output))
        with compiled_layers(model), nullcontext() if teacher is None else compiled_layers(teacher):
            trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
        trainer.recorded = None  # its memory is free again
        model.eval()
        attachment_of(model).keep = 0.0
        policy = attachment_of(model).policy
        assert isinstance(policy, DMSPolicy)
        policy.offset = 0.0
        return checkpoints.trained_weights(trainer.distillation)


def adapter_config(model: PreTrainedModel, config: RetrofitConfig, **training: Any) -> AdapterConfig:
    """What adapter_config.json says of these heads before calibration."""
    lora = config.lora if config.trainable == "lora" else None
    return AdapterConfig(
        base_model_name_or_path=config.model,
        base_shape=base_shape(model),
        window=config.window,
        lag=config.lag,
        policy=config.policy,
        source=config.source,
        neuron=neuron_source(config),
        r=0 if lora is None else lora.rank,
        lora_alpha=0 if lora is None else lora.alpha,
        target_modules=[] if lora is None else lora.targets,
        training=config.training_keys() | training,
    )


def neuron_source(config: RetrofitConfig) -> NeuronSource | None:
    """What attach takes, where the queries are to carry the logits."""
    if config.source != "neuron":
        return None
    return NeuronSource(channel=config.neuron.channel, scale=config.neuron.scale, offset=config.neuron.offset)


def make_trainable(model: PreTrainedModel, config: RetrofitConfig) -> None:
    """Freeze what is not trained; LoRA is added."""
    model.requires_grad_(config.trainable == "all")
    if config.trainable == "lora":
        add_lora(model, config.lora, seed=config.seed)
    for head in heads(model) if config.source == "linear" else []:
        head.requires_grad_(True)
        head.shared = config.granularity == "layer"
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})


class ClearChannel(TrainerCallback):
    """DMC: once the channel is faded out nothing merges, and all weigh alike, until that is learned."""

    def __init__(self, model: PreTrainedModel, fade_steps: int) -> None:
        self.model, self.fade_steps = model, fade_steps

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Every process calls it."""
        if state.global_step == self.fade_steps:
            clear_channel(self.model)


class Family(TrainerCallback):
    """Saves the adapter of each ratio of `family` when the run passes it."""

    def __init__(self, trainer: "RetrofitTrainer") -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Every process calls it, since each may hold a piece of the weights."""
        config, trained = self.trainer.retrofit, self.trainer.distillation
        for ratio in config.family:
            if config.steps_to(ratio) != state.global_step:
                continue
            weights = checkpoints.trained_weights(trained)
            if state.is_world_process_zero:
                made = adapter_config(trained.student, config, steps=state.global_step, final_cr=ratio)
                export(weights, config.model, folder=Path(config.output) / f"cr{ratio:g}", adapter=made)


def whole(gradient: Tensor | None) -> Tensor | None:
    """A gradient, gathered where it is in pieces."""
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


class RetrofitTrainer(Trainer):
    """See the module. model: attached with DMS and within contexts.soft."""

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
        on_cpu = next(model.parameters()).device.type == "cpu"
        processes = PartialState(cpu=on_cpu).num_processes // config.tensor_parallel
        self.parts = processes * config.accumulate
        if config.batch % self.parts:
            raise ValueError(
                f"batch is {config.batch}; {processes} processes times accumulate {config.accumulate} must divide it, "
                f"so use a multiple of {self.parts}"
            )
        make_trainable(model, config)
        if teacher is not None:
            teacher.requires_grad_(False)
        arguments = TrainingArguments(
            output_dir=str(Path(config.output) / checkpoints.CHECKPOINTS),
            max_steps=config.steps,
            per_device_train_batch_size=config.batch // self.parts,
            gradient_accumulation_steps=config.accumulate,
            learning_rate=config.lr,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": min(config.decay_steps, config.steps), "decay_type": "linear"},
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            weight_decay=0.0,
            max_grad_norm=config.clip,
            seed=config.seed,
            use_cpu=on_cpu,
            save_strategy="steps",
            save_steps=config.save_every,
            save_total_limit=2,
            logging_strategy="no",
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
        )
        if arguments.n_gpu > 1:
            raise ValueError(
                f"one process sees {arguments.n_gpu} GPUs: start one for each with `accelerate launch`, or name one in "
                "CUDA_VISIBLE_DEVICES"
            )
        metrics = MetricsCallback(
            Path(config.output), every=config.log_every, progress=progress, tensorboard=config.tensorboard
        )
        distillation: Any = Distillation(model, config, teacher=teacher)
        distillation._is_accelerate_prepared = config.tensor_parallel > 1  # gradients are whole everywhere: no DDP
        callbacks = [metrics, Family(self)]
        if config.policy == "dmc":
            callbacks.append(ClearChannel(model, config.fade_steps))
        super().__init__(model=distillation, args=arguments, train_dataset=rows, callbacks=callbacks)
        self.pop_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False
        self.metrics = metrics
        self.progress = Progress(config.stall_steps)
        self.recorded: Recorded | None = None
        if self._can_be_recorded(on_cpu):
            self.recorded = Recorded(self._forward_backward, [p for p in model.parameters() if p.requires_grad])
        self._made: list[dict[str, Any]] = []
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
        made = model(inputs["input_ids"], self._draw(), documents=inputs.get("documents"))
        self._made.append({name: value.detach() for name, value in made.items()})
        return made["loss"]

    def training_step(self, model: Any, inputs: dict[str, Tensor | Any], *args: Any, **kwargs: Any) -> Tensor:
        """A forward and backward; stops before the optimiser takes in what is not finite."""
        if self.recorded is None:
            loss = super().training_step(model, inputs, *args, **kwargs)
        else:
            model.train()
            self.distillation.begin(self._draw())
            self._made.append(self.recorded(**self._prepare_inputs(inputs)))
            loss = self._made[-1]["loss"]
        if len(self._made) == self.args.gradient_accumulation_steps:
            self._finish(self.state.global_step + 1)
            self._made = []
        return loss

    def _draw(self) -> Draw:
        """What the next forward is to do."""
        step, alike = self.state.global_step + 1, self.retrofit.tensor_parallel
        target, full = step_target(self.retrofit, step)
        return Draw(
            seed=self.retrofit.seed * 1_000_003 + step,
            target=target,
            part=len(self._made) * (self.args.world_size // alike) + self.args.process_index // alike,
            parts=self.parts,
            keep=channel_kept(self.retrofit, step),
            full=full,
        )

    def _can_be_recorded(self, on_cpu: bool) -> bool:
        """On a GPU of its own, a step asks the host for nothing but what Distillation.begin puts into tensors: unless a
        channel fades, or forwards that are made again look after generators."""
        alone = self.parts == 1 and not dist.is_initialized()
        config = self.retrofit
        return alone and not on_cpu and config.source == "linear" and not config.gradient_checkpointing

    def _forward_backward(self, input_ids: Tensor, documents: Tensor | None = None) -> dict[str, Tensor]:
        """What a recorded step does."""
        made = self.distillation.compare(input_ids, documents)
        made["loss"].backward()
        return {name: value.detach() for name, value in made.items()}

    def _finish(self, step: int) -> None:
        """Check and record a step whose gradients are complete."""
        made = {name: torch.stack([part[name] for part in self._made]).mean(0) for name in self._made[0]}
        told = torch.cat([made["divergence"][None], made["pull"][None], made["fractions"]])
        divergence, pull, *fractions = told.tolist()  # the device is waited for once
        if not math.isfinite(divergence + pull):
            raise ValueError(
                f"the loss is not finite at step {step} (divergence {divergence}, hinge {pull}): lower lr "
                f"({self.retrofit.lr:g}) and name a new output folder"
            )
        if not self._gradient_seen:
            self._check_gradients()
        target, full = step_target(self.retrofit, step)
        fraction = sum(fractions) / len(fractions)
        if full is None:
            self.progress.check(fraction, target)
        self.metrics.record(
            {
                "step": step,
                "loss": divergence + pull,
                "divergence": divergence,
                "hinge": pull,
                "fraction": fraction,
                "target": target,
                "ratio_target": 1 / (1 - target),
                "fractions": [round(x, 4) for x in fractions],
            }
        )

    def _check_gradients(self) -> None:
        student = self.distillation.student
        for index, head in enumerate(heads(student) if self.retrofit.source == "linear" else []):
            gradients = [whole(parameter.grad) for parameter in head.parameters()]
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

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Where processes share a model, all of them read every row."""
        if self.retrofit.tensor_parallel == 1:
            return super().get_train_dataloader()
        rows: Any = self.train_dataset
        return DataLoader(rows, batch_size=self._train_batch_size, collate_fn=self.data_collator)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: it would walk over all parameters at every step."""
        return 0

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Nothing: the weights are saved together with the optimiser's state."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        checkpoints.save(self.distillation, self._inner_optimizer(), Path(output_dir))
        if self.args.should_save:
            torch.save(self._scheduler().state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with checkpoints.told(Path(self.retrofit.output)):
            super()._save_checkpoint(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        pass  # with the optimiser's state, once there is one

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.load(self.distillation, self._inner_optimizer(), Path(checkpoint))
            self._scheduler().load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME))

    def _scheduler(self) -> LRScheduler:
        scheduler: Any = self.lr_scheduler  # Trainer's type admits those of other libraries
        return scheduler

    def _inner_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate's wrapper has it as an attribute
