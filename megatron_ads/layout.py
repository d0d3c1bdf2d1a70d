"""How the ranks of one job, and the layers of one model, are divided among the kinds of parallelism.

Attention and experts are laid over the same ranks twice:

    attention:  world = pp * dp  * cp * tp      tp fastest, then cp, dp, pp
    experts:    world = pp * edp * ep * etp     etp fastest, then ep, edp, pp

which is the rank order of ``megatron.core.parallel_state`` ("tp-cp-ep-dp-pp").
"""

import re
from dataclasses import dataclass

from megatron_ads.architecture import ModelShape
from megatron_ads.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Coordinates:
    """Where one rank sits: its index along every axis of both grids."""

    pp: int
    dp: int
    cp: int
    tp: int
    edp: int
    ep: int
    etp: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelLayout:
    """Group sizes, in ranks. ``dp`` and ``edp`` are what is left over: derived, never configured."""

    world: int
    tp: int = 1
    """Tensor parallel, attention and dense layers."""
    cp: int = 1
    """Context parallel: ranks sharing one sequence."""
    pp: int = 1
    """Pipeline stages."""
    vpp: int = 1
    """Virtual chunks per stage (interleaved pipeline); not an axis of the rank grid."""
    ep: int = 1
    """Expert parallel: ranks the routed experts are spread over."""
    etp: int = 1
    """Tensor parallel inside one expert."""

    def __post_init__(self) -> None:
        for name in ("world", "tp", "cp", "pp", "vpp", "ep", "etp"):
            if getattr(self, name) < 1:
                raise ConfigError(f"layout.{name} is {getattr(self, name)}; it must be at least 1.")
        self._require_divides("pp * cp * tp", f"{self.pp} * {self.cp} * {self.tp}", self.pp * self.cp * self.tp)
        self._require_divides("pp * ep * etp", f"{self.pp} * {self.ep} * {self.etp}", self.pp * self.ep * self.etp)
        if self.vpp > 1 and self.pp == 1:
            raise ConfigError(
                f"layout.vpp is {self.vpp} with layout.pp = 1: virtual chunks interleave pipeline stages. "
                "Raise layout.pp, or set layout.vpp to 1."
            )

    def _require_divides(self, product: str, numbers: str, size: int) -> None:
        if self.world % size:
            raise ConfigError(
                f"layout.{product} = {numbers} = {size}, which does not divide the {self.world} ranks of this job. "
                f"Launch a multiple of {size} ranks, or lower one of these sizes."
            )

    @property
    def dp(self) -> int:
        """Data-parallel replicas of the attention and dense weights."""
        return self.world // (self.pp * self.cp * self.tp)

    @property
    def edp(self) -> int:
        """Data-parallel replicas of each routed expert."""
        return self.world // (self.pp * self.ep * self.etp)

    @property
    def model_ranks(self) -> int:
        """Smallest world that holds one copy of every weight on this layout's axes."""
        return self.world // self.dp

    def coordinates(self, rank: int) -> Coordinates:
        """Return the position of ``rank`` in both grids."""
        if not 0 <= rank < self.world:
            raise ConfigError(f"rank {rank} is outside this layout of {self.world} ranks (0 to {self.world - 1}).")
        tp, rest = rank % self.tp, rank // self.tp
        cp, rest = rest % self.cp, rest // self.cp
        dp, pp = rest % self.dp, rest // self.dp
        etp, rest = rank % self.etp, rank // self.etp
        ep, rest = rest % self.ep, rest // self.ep
        return Coordinates(pp=pp, dp=dp, cp=cp, tp=tp, edp=rest % self.edp, ep=ep, etp=etp)

    def check_model(self, shape: ModelShape) -> None:
        """Refuse a model whose heads, widths, vocabulary or experts cannot be cut evenly by these sizes.

        Raises:
            ConfigError: With the model's number and the size that does not divide it.
        """
        for what, number, name in (
            ("attention heads", shape.num_heads, "tp"),
            ("vocabulary entries", shape.vocab_size, "tp"),
            ("dense feed-forward columns", shape.dense_ffn_size, "tp"),
            ("shared-expert columns", shape.shared_ffn_size, "tp"),
            ("routed-expert columns", shape.expert_ffn_size if shape.num_experts else 0, "etp"),
        ):
            if number % getattr(self, name):
                raise ConfigError(
                    f"The model's {number} {what} cannot be cut into layout.{name} = {getattr(self, name)} equal "
                    f"parts. Choose a divisor of {number}."
                )
        if shape.num_experts:
            self.local_experts(shape.num_experts, 0)
        elif self.ep > 1 or self.etp > 1:
            raise ConfigError(
                f"layout.ep = {self.ep} and layout.etp = {self.etp} have no effect: the model has no routed experts. "
                "Set both to 1."
            )

    def local_experts(self, num_experts: int, ep: int) -> range:
        """Return the global numbers of the routed experts that expert-parallel rank ``ep`` holds."""
        if num_experts % self.ep:
            raise ConfigError(
                f"{num_experts} routed experts cannot be spread evenly over layout.ep = {self.ep} ranks "
                f"({num_experts} / {self.ep} = {num_experts / self.ep:g}). Choose a divisor of {num_experts}."
            )
        count = num_experts // self.ep
        return range(ep * count, (ep + 1) * count)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """The consecutive piece of the model that one rank runs as a unit: one virtual stage."""

    stage: int
    """Pipeline stage, 0-based."""
    virtual: int
    """Virtual chunk within the stage, 0-based."""
    layers: tuple[int, ...]
    """Decoder layers, by global number from 0."""
    has_embedding: bool
    has_loss: bool
    """Final norm, output layer and loss are here."""
    mtp_layers: tuple[int, ...] = ()
    """MTP layers, numbered from 0 among themselves."""

    @property
    def needs_embedding(self) -> bool:
        """Whether the word embedding is stored here: the first chunk, and any with MTP layers."""
        return self.has_embedding or bool(self.mtp_layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelinePlacement:
    """Which chunk runs which layers. ``chunks`` are in the order a microbatch visits them."""

    pp: int
    chunks: tuple[Chunk, ...]

    @property
    def vpp(self) -> int:
        """Virtual chunks per stage."""
        return len(self.chunks) // self.pp

    @property
    def string(self) -> str:
        """The placement in Megatron-Core's ``pipeline_model_parallel_layout`` notation."""
        return "|".join(
            "E" * chunk.has_embedding + "t" * len(chunk.layers) + "m" * len(chunk.mtp_layers) + "L" * chunk.has_loss
            for chunk in self.chunks
        )

    def stage_chunks(self, stage: int) -> tuple[Chunk, ...]:
        """Return the chunks of one pipeline stage, by virtual number."""
        return tuple(chunk for chunk in self.chunks if chunk.stage == stage)

    def expert_less_stages(self, shape: ModelShape) -> tuple[int, ...]:
        """Return the stages whose ranks own no routed expert: dense layers, embedding or loss only."""
        return tuple(
            stage
            for stage in range(self.pp)
            if not any(
                chunk.mtp_layers
                and shape.is_moe_layer(shape.num_layers)
                or any(shape.is_moe_layer(layer) for layer in chunk.layers)
                for chunk in self.stage_chunks(stage)
            )
        )


_REPEAT_GROUP = re.compile(r"\(([^()]*)\)\*(\d+)")
_REPEAT_ONE = re.compile(r"([Etm|L])\*(\d+)")


def expand_pipeline(pipeline: str) -> list[str]:
    """Unroll a pipeline string into one string per chunk: ``"Et|(tt|)*2tL"`` -> ``Et, tt, tt, tL``.

    Letters: ``E`` embedding, ``t`` decoder layer, ``m`` MTP layer, ``L`` final norm, head and loss;
    ``|`` ends a chunk, ``(...)*n`` and ``x*n`` repeat, commas and spaces are ignored.
    """
    text = re.sub(r"[,\s]", "", pipeline)
    for pattern in (_REPEAT_GROUP, _REPEAT_ONE):
        text = pattern.sub(lambda match: match[1] * int(match[2]), text)
    if bad := sorted(set(text) - set("Etm|L")):
        raise ConfigError(
            f"layout.pipeline {pipeline!r} holds {''.join(bad)!r}; the letters are E (embedding), t (decoder layer), "
            "m (MTP layer), L (loss), with | between chunks and (...)*n to repeat."
        )
    return text.split("|")


def place_layers(
    shape: ModelShape,
    layout: ParallelLayout,
    *,
    pipeline: str | None = None,
    first_stage_layers: int | None = None,
    last_stage_layers: int | None = None,
) -> PipelinePlacement:
    """Assign every layer to a pipeline chunk.

    With ``pipeline``, as the string says; MTP layers it does not mention go beside the loss. Otherwise the
    decoder layers are spread evenly, after ``first_stage_layers`` and ``last_stage_layers`` took theirs.

    Raises:
        ConfigError: If the layers do not fit the stages; the message carries the equation.
    """
    if pipeline is not None:
        if first_stage_layers is not None or last_stage_layers is not None:
            raise ConfigError(
                "layout.pipeline already says which layers are on the first and last stage; "
                "remove layout.first_stage_layers and layout.last_stage_layers."
            )
        pieces = expand_pipeline(pipeline)
    else:
        pieces = _even_pieces(shape, layout, first_stage_layers, last_stage_layers)
    if shape.mtp_layers and not any("m" in piece for piece in pieces):
        pieces = [piece.replace("L", "m" * shape.mtp_layers + "L") for piece in pieces]
    _check_pieces(shape, layout, pieces)
    return PipelinePlacement(pp=layout.pp, chunks=_number_layers(layout.pp, pieces))


def _even_pieces(shape: ModelShape, layout: ParallelLayout, first: int | None, last: int | None) -> list[str]:
    """Spread the decoder layers; with vpp > 1 the first/last counts are those of the first/last chunk."""
    chunks = layout.pp * layout.vpp
    if chunks == 1:
        first = last = None
    fixed = [count for count in (first, last) if count is not None]
    rest, left = shape.num_layers - sum(fixed), chunks - len(fixed)
    if left and (rest < 0 or rest % left):
        raise ConfigError(
            f"{shape.num_layers} decoder layers - {sum(fixed)} on the first/last chunk = {rest}, which "
            f"{left} chunks (layout.pp * layout.vpp = {layout.pp} * {layout.vpp} = {chunks}, less {len(fixed)} given) "
            "cannot share evenly. "
            "Set layout.first_stage_layers / layout.last_stage_layers, or write layout.pipeline."
        )
    if not left and rest:
        raise ConfigError(
            f"layout.first_stage_layers + layout.last_stage_layers = {sum(fixed)}, but the model has "
            f"{shape.num_layers} decoder layers and no other stage takes the rest."
        )
    counts = [rest // left] * left if left else []
    counts = ([first] if first is not None else []) + counts + ([last] if last is not None else [])
    pieces = ["t" * count for count in counts]
    pieces[0] = "E" + pieces[0]
    pieces[-1] = pieces[-1] + "L"
    return pieces


def _check_pieces(shape: ModelShape, layout: ParallelLayout, pieces: list[str]) -> None:
    chunks = layout.pp * layout.vpp
    text = "|".join(pieces)
    if len(pieces) != chunks:
        raise ConfigError(
            f"layout.pipeline has {len(pieces)} chunks, but layout.pp * layout.vpp = "
            f"{layout.pp} * {layout.vpp} = {chunks}. Write one chunk per stage and virtual stage."
        )
    if text.count("t") != shape.num_layers:
        raise ConfigError(
            f"layout.pipeline places {text.count('t')} decoder layers, but the model has {shape.num_layers}: "
            f"{abs(shape.num_layers - text.count('t'))} {'missing' if text.count('t') < shape.num_layers else 'too many'}."
        )
    if text.count("m") != shape.mtp_layers:
        raise ConfigError(
            f"layout.pipeline places {text.count('m')} MTP layers (m), but the model has {shape.mtp_layers}."
        )
    if not re.fullmatch(r"Et*(\|t*)*(\|?t*m*)(\|)?L", text) and not re.fullmatch(r"E[t|]*[m|]*L", text):
        raise ConfigError(
            f"layout.pipeline {text!r} is out of order: E first, then every t, then every m, then L, each of E and L once."
        )
    with_mtp = [index for index, piece in enumerate(pieces) if "m" in piece]
    if len(with_mtp) > 1:
        raise ConfigError("layout.pipeline spreads the MTP layers over several chunks; they must share one.")
    if with_mtp and layout.pp > 1 and with_mtp[0] < chunks - layout.pp:
        raise ConfigError("layout.pipeline puts MTP layers (m) before the last virtual chunk; move them to the end.")
    if with_mtp and layout.pp > 1 and with_mtp[0] % layout.pp == 0:
        raise ConfigError("layout.pipeline puts MTP layers (m) on the first pipeline stage; move them to a later one.")


def _number_layers(pp: int, pieces: list[str]) -> tuple[Chunk, ...]:
    chunks, layer = [], 0
    for index, piece in enumerate(pieces):
        count = piece.count("t")
        chunks.append(
            Chunk(
                stage=index % pp,
                virtual=index // pp,
                layers=tuple(range(layer, layer + count)),
                has_embedding="E" in piece,
                has_loss="L" in piece,
                mtp_layers=tuple(range(piece.count("m"))),
            )
        )
        layer += count
    return tuple(chunks)
