"""``model`` and ``layout``: the weights to start from, how they are run, which are trained, how ranks divide them."""

import math
from dataclasses import dataclass, field
from enum import StrEnum

from omegaconf import MISSING

from megatron_ads.architecture import ModelShape
from megatron_ads.errors import require, require_above, require_at_least, require_distinct, require_each
from megatron_ads.layout import ParallelLayout, PipelinePlacement, place_layers


class LayerSpecChoice(StrEnum):
    """Which layer implementation Megatron builds."""

    auto = "auto"
    local = "local"
    grouped = "grouped"
    te = "te"


class Precision(StrEnum):
    """Number format of weights and activations in the forward and backward pass."""

    fp32 = "fp32"
    bf16 = "bf16"


class Recompute(StrEnum):
    """Which activations are computed again in the backward pass instead of being kept."""

    none = "none"
    selective = "selective"
    full = "full"


class FrozenPart(StrEnum):
    """A part of the model that can be kept as loaded; layers of MTP count as ``mtp`` only."""

    embedding = "embedding"
    attention = "attention"
    """Attention projections, with their norms and the norm before them."""
    dense = "dense"
    """Feed-forward of the dense layers, with the norm before it."""
    router = "router"
    experts = "experts"
    """Routed experts."""
    shared_experts = "shared_experts"
    mtp = "mtp"
    """The whole multi-token-prediction block; its loss then trains the layers below it only."""
    output = "output"
    """Final norm and output layer."""


class TrainOnly(StrEnum):
    """The only weights that are trained."""

    new_tokens = "new_tokens"
    """Rows of embedding and output layer of the tokens that ``convert grow-vocabulary`` added last."""


class LoraTarget(StrEnum):
    """Linears that low-rank adapters can stand beside; layers of MTP have the same ones, where they are trained."""

    attention = "attention"
    """All projections: of latent attention five, or four where queries have no low rank; of grouped queries two."""
    dense = "dense"
    """Feed-forward of the dense layers."""
    shared_experts = "shared_experts"
    experts = "experts"
    """Every routed expert, each with adapters of its own."""


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adaptation (arXiv:2106.09685): ``W + alpha / rank * B A``, where B and A are trained and W is not.

    Embedding, norms, routers and output layer are kept as loaded, too. What is exported are the merged weights.
    """

    rank: int | None = None
    """Rows of A and columns of B; gate and up projection share one A. None trains the weights themselves."""
    alpha: float = 32.0
    """Times 1 / rank, the weight of what the adapters add."""
    targets: list[LoraTarget] = field(default_factory=lambda: list(LoraTarget))
    """What has adapters; by default every linear of attention and feed-forwards that the model has."""

    def check(self) -> None:
        """Refuse values that are impossible whatever the other sections say."""
        require(
            self.rank is not None or self == LoraConfig(),
            "model.lora has no effect while model.lora.rank is null. Set it, 16 for example, or remove model.lora.",
        )
        require_at_least("model.lora", self, 1, "rank")
        require_above("model.lora", self, 0, "alpha")
        require(bool(self.targets), f"model.lora.targets is empty. Choose from {', '.join(LoraTarget)}.")
        require_distinct("model.lora.targets", self.targets)


def recompute_on(stage: int, recompute: Recompute, recompute_stages: int | None) -> Recompute:
    """Return what of ``model.recompute`` and ``model.recompute_stages`` holds on a pipeline stage."""
    return recompute if recompute_stages is None or stage < recompute_stages else Recompute.none


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The weights to start from, how they are run, and which of them are trained."""

    load: str = MISSING
    """Folder of weights: a Hugging Face checkpoint, converted shards or a torch_dist checkpoint."""
    layer_spec: LayerSpecChoice = LayerSpecChoice.auto
    """``te``: Transformer Engine; ``grouped``: torch with grouped experts; ``local``: torch, experts one by one.
    ``auto`` takes ``te`` where it is installed and there is a GPU, else ``grouped``."""
    precision: Precision = Precision.bf16
    """``bf16`` computes in BF16 and keeps gradients and optimizer state in FP32."""
    recompute: Recompute = Recompute.none
    """``selective``: the inside of every feed-forward, experts included, and what is between a latent attention's
    latents and its output projection; ``full``: whole layers."""
    recompute_stages: int | None = None
    """Pipeline stages, counted from the first, that recompute; those behind them hold fewer microbatches and keep
    everything. None: all stages recompute."""
    expert_bias_update_rate: float | None = None
    """How far the router's selection bias of each expert moves against its load after every step (arXiv:2408.15664);
    DeepSeek-V3 was pre-trained with 0.001. None keeps the bias as loaded."""
    aux_loss_coefficient: float = 0.0
    """Weight of the load-balancing loss; 0 is off."""
    mtp_loss_weight: float = 0.0
    """Weight of the multi-token-prediction loss; 0 keeps the MTP layers as loaded and does not run them."""
    frozen: list[FrozenPart] = field(default_factory=list)
    """Parts that are not trained; empty trains everything."""
    train_only: TrainOnly | None = None
    """``new_tokens``: rows of the tokens that ``convert grow-vocabulary`` added, everything else kept to the bit; None
    trains everything but ``frozen``."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters that are trained instead of the weights: ``{rank: 16, alpha: 32, targets: [attention]}``."""
    published: str | None = None
    """Name of the published model this is for, by which a job is planned before ``load`` exists; None: unknown."""

    def recompute_on(self, stage: int) -> Recompute:
        """Return what the ranks of a pipeline stage compute again."""
        return recompute_on(stage, self.recompute, self.recompute_stages)

    def check(self) -> None:
        """Refuse values that are impossible whatever the other sections say."""
        require_at_least("model", self, 0, "aux_loss_coefficient", "mtp_loss_weight")
        require_at_least("model", self, 1, "recompute_stages")
        require(
            self.recompute_stages is None or self.recompute is not Recompute.none,
            f"model.recompute_stages is {self.recompute_stages}, which has no effect while model.recompute is none. "
            "Remove it, or set model.recompute.",
        )
        wanted = "above 0, or null to keep the bias as loaded"
        require_each("model", self, ["expert_bias_update_rate"], lambda rate: 0 < rate < math.inf, wanted)
        require_distinct("model.frozen", self.frozen)
        require(
            FrozenPart.mtp not in self.frozen or self.mtp_loss_weight > 0,
            "model.frozen lists mtp, which has no effect: with model.mtp_loss_weight = 0 the MTP layers are kept as "
            "loaded. Remove mtp.",
        )
        self.lora.check()
        self._check_train_only()
        require(
            self.lora.rank is None or not self.frozen,
            f"model.frozen lists {', '.join(self.frozen)}, but with model.lora every weight is frozen. Remove it; "
            "what is to have no adapters is left out of model.lora.targets.",
        )
        require(
            self.lora.rank is None or self.expert_bias_update_rate is None,
            f"model.expert_bias_update_rate is {self.expert_bias_update_rate}, but model.lora keeps the routers as "
            "loaded. Set it to null.",
        )

    def _check_train_only(self) -> None:
        """Refuse settings that contradict ``train_only``."""
        for name, absent in (("frozen", []), ("expert_bias_update_rate", None)):
            require(
                self.train_only is None or getattr(self, name) == absent,
                f"model.{name} is {getattr(self, name)}, but model.train_only = {self.train_only} keeps "
                "everything else as loaded already. Remove one of the two.",
            )
        require(
            self.train_only is None or self.lora.rank is None,
            f"model.train_only is {self.train_only} and model.lora.rank is {self.lora.rank}: adapters keep embedding "
            "and output layer as loaded. Remove one of the two.",
        )


@dataclass(kw_only=True, slots=True)
class LayoutConfig:
    """Parallel sizes a user chooses, in ranks; replicas (dp, edp) follow from the number of ranks launched."""

    tp: int = 1
    """Tensor parallel, attention and dense layers."""
    cp: int = 1
    """Context parallel: ranks sharing one sequence."""
    pp: int = 1
    """Pipeline stages."""
    vpp: int = 1
    """Virtual chunks per stage; 1 is no interleaving."""
    ep: int = 1
    """Expert parallel: ranks the routed experts are spread over."""
    etp: int = 1
    """Tensor parallel inside one expert."""
    pipeline: str | None = None
    """Layers of every chunk, as ``Et|(tt|)*29tmL``; None spreads them evenly. The MTP layers (m) are in the chunk
    of the loss (L) or in the one before it."""
    first_stage_layers: int | None = None
    """Decoder layers of stage 0, where the others share the rest evenly; None is an even share."""
    last_stage_layers: int | None = None
    """Decoder layers of the last stage; None is an even share."""

    def runtime(self, world: int) -> ParallelLayout:
        """Return the layout for a job of ``world`` ranks.

        Raises:
            ConfigError: If the sizes do not divide the ranks.
        """
        return ParallelLayout(world=world, **self._sizes)

    def fewest_ranks(self) -> int:
        """Return the smallest number of ranks that holds every weight once."""
        return ParallelLayout.smallest(**self._sizes).world

    @property
    def _sizes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("tp", "cp", "pp", "vpp", "ep", "etp")}

    def placement(self, shape: ModelShape, layout: ParallelLayout) -> PipelinePlacement:
        """Return which chunk runs which layers.

        Raises:
            ConfigError: If the layers do not fit the stages.
        """
        return place_layers(
            shape,
            layout,
            pipeline=self.pipeline,
            first_stage_layers=self.first_stage_layers,
            last_stage_layers=self.last_stage_layers,
        )

    def check(self) -> None:
        """Refuse values that are impossible whatever the other sections say."""
        for name in ("first_stage_layers", "last_stage_layers"):
            require_at_least("layout", self, 0, name)
            require(
                getattr(self, name) is None or (self.pp > 1 and self.vpp == 1 and self.pipeline is None),
                f"layout.{name} is {getattr(self, name)}, which has no effect unless layout.pp > 1, layout.vpp = 1 and "
                f"layout.pipeline is null (they are {self.pp}, {self.vpp}, {self.pipeline!r}). Remove it.",
            )
