"""Layers of DeepSeek-R1's widths with the 32 experts of one rank, built as training builds them, with random weights.

32 experts of which a token visits 8 give a rank as many expert tokens as 256 experts over 8 ranks do. Where
``Stack.updates`` is False, steps end before the optimizer, whose state would not fit beside so many layers on one card:
what is measured is the forward and backward pass, which the planner's ``efficiency`` is about.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.gpu.timing import on_gpu
from conversion.published_models import published_config
from megatron_ads.architecture import ModelShape, shape_from_config
from megatron_ads.config.model import LoraConfig, ModelConfig, Precision, Recompute
from megatron_ads.demo_model import CONFIGS, Preset
from megatron_ads.layout import ParallelLayout, PipelinePlacement, place_layers
from megatron_ads.models.parts import Lora
from megatron_ads.models.settings import ModelSettings
from megatron_ads.planning.job import PlannedJob
from megatron_ads.runtime import process_groups
from megatron_ads.runtime.device import seed_everything

LAYOUT = ParallelLayout(world=1)
LEARNING_RATE = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """Some layers, and how they are trained."""

    layers: int = 4
    dense: int = 1
    experts: int = 32
    mtp: bool = False
    vocabulary: int = 129_280
    row_tokens: int = 4096
    samples: int = 8
    """Samples packed into a row, of equal length."""
    microbatches: int = 8
    recompute: Recompute = Recompute.none
    updates: bool = False
    """Whether steps end with an update of the weights."""
    lora_rank: int | None = None
    deterministic: bool = False
    tiny: bool = False
    """Take the widths of the demo model."""

    def sized(self, *, tiny: bool) -> "Stack":
        """Return the stack, or one that a CPU runs in a moment."""
        if not tiny:
            return self
        return replace(self, tiny=True, experts=8, vocabulary=1536, row_tokens=64, samples=4, microbatches=2)

    @property
    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        widths = CONFIGS[Preset.tiny] if self.tiny else published_config("deepseek_r1")
        unused = ("quantization_config", "auto_map")
        return {name: value for name, value in widths.items() if name not in unused} | {
            "num_hidden_layers": self.layers,
            "first_k_dense_replace": self.dense,
            "n_routed_experts": self.experts,
            "num_nextn_predict_layers": int(self.mtp),
            "vocab_size": self.vocabulary,
        }

    @property
    def shape(self) -> ModelShape:
        return shape_from_config(self.config)

    @property
    def placement(self) -> PipelinePlacement:
        return place_layers(self.shape, LAYOUT)

    @property
    def model(self) -> ModelConfig:
        """The section of a recipe."""
        return ModelConfig(
            precision=Precision.bf16,
            recompute=self.recompute,
            mtp_loss_weight=0.1 if self.mtp else 0.0,
            lora=LoraConfig(rank=self.lora_rank),
        )

    @property
    def settings(self) -> ModelSettings:
        return ModelSettings.of(self.model, deterministic=self.deterministic)

    @property
    def job(self) -> PlannedJob:
        """The stack as the planner sees it."""
        return PlannedJob(
            shape=self.shape,
            layout=LAYOUT,
            placement=self.placement,
            model=self.model,
            seq_length=self.row_tokens,
            micro_batch_size=1,
            microbatches=self.microbatches,
            lora=Lora.of(self.model),
        )

    def megatron_config(self) -> Any:
        """Return the configuration that its modules are built with; a rank must have been started."""
        from megatron_ads.models.transformer_config import megatron_config

        return megatron_config(self.shape, LAYOUT, self.placement, self.settings)

    def __str__(self) -> str:
        parts = [f"{self.dense} dense"] * bool(self.dense) + [f"{self.layers - self.dense} MoE"]
        return " + ".join([*parts, *["MTP"] * self.mtp]) + f" layers, recompute {self.recompute}"


_STAGE = Stack(layers=2, dense=0, vocabulary=16_384, recompute=Recompute.full, updates=True)
STACKS = {
    "plain": Stack(),
    "full": Stack(mtp=True, recompute=Recompute.full),
    "selective": Stack(recompute=Recompute.selective),
    "stage": _STAGE,  # what a middle stage of the 671B job holds, and a small vocabulary
    "long": Stack(vocabulary=16_384, row_tokens=32_768, samples=1, microbatches=2, recompute=Recompute.full),
    "lora": replace(_STAGE, recompute=Recompute.selective, lora_rank=16),
    "switches": Stack(layers=3, mtp=True, microbatches=4),
    "checkpoint": replace(_STAGE, layers=1, experts=16, vocabulary=4096, microbatches=1),  # 14 GB of it
    "deterministic": replace(_STAGE, dense=1, experts=16, vocabulary=4096, microbatches=2, deterministic=True),
}


def one_rank(*, deterministic: bool = False) -> None:
    """Start the process groups of a job of one rank, as every module needs them."""
    process_groups.start(LAYOUT, create_gloo_process_groups=False)
    seed_everything(0, deterministic)


@dataclass(frozen=True, slots=True)
class Built:
    """A stack that can be trained."""

    stack: Stack
    models: Sequence[Any]
    chunks: Sequence[Any]
    optimizer: Any
    batches: Sequence[Any]

    def step(self) -> Any:
        """Run one step and return its report."""
        from megatron_ads.training.step import run_step

        return run_step(self.batches, self.chunks, self.optimizer, learning_rate=LEARNING_RATE)


class NoUpdate:
    """In the place of an optimizer: leaves the weights alone."""

    def step(self, learning_rate: float) -> Any:
        """Say that nothing was updated."""
        from megatron_ads.optim.chain import UpdateReport

        return UpdateReport(updated=False, grad_norm=0.0, norm_by_kind={}, zero_gradients=0)


def build(stack: Stack) -> Built:
    """Build the stack with random weights, as ``training.build`` builds a model that it loads."""
    from megatron_ads.config.training import OptimConfig
    from megatron_ads.models.build import build_chunks
    from megatron_ads.models.lora import add_adapters, initialise_adapters
    from megatron_ads.optim.build import build_optimizer, trains_experts_anywhere
    from megatron_ads.training.build import wrap_chunks

    models, lora = build_chunks(stack.shape, LAYOUT, stack.placement, stack.settings), Lora.of(stack.model)
    for parameter in (parameter for model in models for parameter in model.parameters()):
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=stack.shape.initializer_range)
        else:
            torch.nn.init.ones_(parameter)
    if lora is not None:
        add_adapters(models, lora, stack.shape, stack.settings.spec)
        initialise_adapters(models, 0)
    chunks = wrap_chunks(models, overlap=on_gpu())
    optimizer: Any = NoUpdate()
    if stack.updates:
        optim, has_experts = OptimConfig(learning_rate=LEARNING_RATE), trains_experts_anywhere(chunks)
        optimizer = build_optimizer(chunks, optim, Precision.bf16, has_expert_member=has_experts)
    return Built(stack, models, chunks, optimizer, [_batch(stack) for _ in range(stack.microbatches)])


def _batch(stack: Stack) -> Any:
    """Return a row of random samples; the last token of each has no label."""
    from megatron_ads.data.packed_batch import PackedBatch

    samples_NS = torch.randint(stack.vocabulary, (stack.samples, stack.row_tokens // stack.samples))
    mask_NS = torch.ones(samples_NS.shape)
    mask_NS[:, -1] = 0
    return PackedBatch.unpadded(
        tokens_BS=samples_NS.view(1, -1),
        labels_BS=samples_NS.roll(-1, dims=1).view(1, -1),
        mask_BS=mask_NS.view(1, -1),
        cu_seqlens=torch.arange(0, stack.row_tokens + 1, samples_NS.size(1), dtype=torch.int32),
    )
