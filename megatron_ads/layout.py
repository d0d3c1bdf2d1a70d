"""How the ranks of one job, and the layers of one model, are divided among the kinds of parallelism.

Attention and experts are laid over the same ranks twice:

    attention:  world = pp * dp  * cp * tp      tp fastest, then cp, dp, pp
    experts:    world = pp * edp * ep * etp     etp fastest, then ep, edp, pp

which is the rank order of ``megatron.core.parallel_state`` ("tp-cp-ep-dp-pp").
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Self

from megatron_ads.architecture import GroupedQueryShape, ModelShape
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
        for axes in (("pp", "cp", "tp"), ("pp", "ep", "etp")):
            sizes = [getattr(self, axis) for axis in axes]
            size = math.prod(sizes)
            if self.world % size:
                raise ConfigError(
                    f"layout.{' * '.join(axes)} = {' * '.join(map(str, sizes))} = {size}, which does not divide the "
                    f"{self.world} ranks of this job. Launch a multiple of {size} ranks, or lower one of these sizes."
                )
        if self.vpp > 1 and self.pp == 1:
            raise ConfigError(
                f"layout.vpp is {self.vpp} with layout.pp = 1: virtual chunks interleave pipeline stages. "
                "Raise layout.pp, or set layout.vpp to 1."
            )

    @classmethod
    def smallest(cls, *, tp: int = 1, cp: int = 1, pp: int = 1, vpp: int = 1, ep: int = 1, etp: int = 1) -> Self:
        """Return the layout of these sizes on the fewest ranks: ``pp * lcm(cp * tp, ep * etp)``."""
        # A size below 1 must reach the check that names it: a world of 0 would be refused first.
        world = abs(pp * math.lcm(cp * tp, ep * etp)) or 1
        return cls(world=world, tp=tp, cp=cp, pp=pp, vpp=vpp, ep=ep, etp=etp)

    @property
    def dp(self) -> int:
        """Data-parallel replicas of the attention and dense weights."""
        return self.world // (self.pp * self.cp * self.tp)

    @property
    def edp(self) -> int:
        """Data-parallel replicas of each routed expert."""
        return self.world // (self.pp * self.ep * self.etp)

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

    def stage_ranks(self, stage: int) -> range:
        """Return the ranks of pipeline stage ``stage``: they are consecutive."""
        size = self.world // self.pp
        return range(stage * size, (stage + 1) * size)

    def local_experts(self, num_experts: int, ep: int) -> range:
        """Return the global numbers of the routed experts that expert-parallel rank ``ep`` holds."""
        if num_experts % self.ep:
            raise ConfigError(
                f"{num_experts} routed experts cannot be spread evenly over layout.ep = {self.ep} ranks "
                f"({num_experts} / {self.ep} = {num_experts / self.ep:g}). Choose a divisor of {num_experts}."
            )
        if not 0 <= ep < self.ep:
            raise ConfigError(f"ep {ep} is outside its axis of {self.ep}.")
        count = num_experts // self.ep
        return range(ep * count, (ep + 1) * count)

    def check_model(self, shape: ModelShape) -> None:
        """Refuse a model whose heads, widths, vocabulary or experts cannot be cut evenly by these sizes.

        Raises:
            ConfigError: With the model's number and the size that does not divide it.
        """
        for what, number, name in (
            ("attention heads", shape.num_heads, "tp"),
            ("query groups", shape.attention.num_groups if isinstance(shape.attention, GroupedQueryShape) else 0, "tp"),
            ("vocabulary entries", shape.vocab_size, "tp"),
            ("dense feed-forward columns", shape.dense_ffn_size, "tp"),
            ("shared-expert columns", shape.shared_ffn_size, "tp"),
            ("routed-expert columns", shape.expert_ffn_size, "etp"),
        ):
            if number % getattr(self, name):
                raise ConfigError(
                    f"The model's {number} {what} cannot be cut into layout.{name} = {getattr(self, name)} equal "
                    f"parts. Choose a divisor of {number}."
                )
        for name in ("ep", "etp") if not shape.num_experts else ():
            if getattr(self, name) > 1:
                raise ConfigError(
                    f"layout.{name} is {getattr(self, name)}, but the model has no routed experts. Set it to 1."
                )
        self.local_experts(shape.num_experts, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """The consecutive piece of the model that one rank runs as a unit: one virtual stage."""

    stage: int
    """Pipeline stage, 0-based."""
    virtual: int
    """Virtual chunk within the stage, 0-based."""
    layers: tuple[int, ...]
    """Decoder layers, by global number from 0; may be empty."""
    has_embedding: bool
    has_loss: bool
    """Final norm, output layer and loss are here."""
    mtp_layers: tuple[int, ...] = ()
    """MTP layers, numbered from 0 among themselves."""
    has_tied_output: bool = False
    """The output layer is here, and it is the word embedding."""

    @property
    def needs_embedding(self) -> bool:
        """Whether the word embedding is stored here: the first chunk, any with MTP layers, and a tied output layer."""
        return self.has_embedding or bool(self.mtp_layers) or self.has_tied_output


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelinePlacement:
    """Which chunk runs which layers. ``chunks`` are in the order a microbatch visits them."""

    pp: int
    chunks: tuple[Chunk, ...]

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

    def embedding_ranks(self, pipeline: Sequence[int]) -> list[int]:
        """Return, of the ranks of one pipeline, those that share the word embedding: the first, and that of MTP layers.

        Without MTP layers it is the last one, where the output layer may be the same matrix.
        """
        mtp = next((chunk.stage for chunk in self.chunks if chunk.mtp_layers), self.pp - 1)
        return [pipeline[stage] for stage in dict.fromkeys((0, mtp))]

    def expert_less_stages(self, shape: ModelShape) -> tuple[int, ...]:
        """Return the stages whose ranks own no routed expert: dense layers, embedding or loss only."""
        owning = (chunk for chunk in self.chunks if chunk.mtp_layers or any(map(shape.is_moe_layer, chunk.layers)))
        return tuple(sorted(set(range(self.pp)) - {chunk.stage for chunk in owning}))


# As Megatron-Core unrolls them: groups first, once, then single letters, once; so groups do not nest.
_MOST_EXPERTS = 1_000_000
"""Of all layers; Kimi-K2 has 23,000."""
_REPEATS = (re.compile(r"\(([^()]+)\)\*(\d+)"), re.compile(r"([Etm|L])\*(\d+)"))


def expand_pipeline(pipeline: str) -> list[str]:
    """Unroll a pipeline string into one string per chunk: ``"Et|(tt|)*2tL"`` -> ``Et, tt, tt, tL``.

    Letters: ``E`` embedding, ``t`` decoder layer, ``m`` MTP layer, ``L`` final norm, head and loss;
    ``|`` ends a chunk, ``(...)*n`` and ``x*n`` repeat, commas are ignored, and so are spaces (Megatron-Core
    refuses those).

    Raises:
        ConfigError: If another character is left after unrolling, or something is repeated absurdly often.
    """
    text = re.sub(r"[,\s]", "", pipeline)
    if re.search(r"\*0*[1-9]\d{3}", text):
        raise ConfigError(
            f"layout.pipeline {pipeline!r:.200} repeats something 1,000 times or more; no model is so deep."
        )
    for pattern in _REPEATS:
        text = pattern.sub(lambda match: match[1] * int(match[2]), text)
    if bad := sorted(set(text) - set("Etm|L")):
        raise ConfigError(
            f"layout.pipeline {pipeline!r} holds {''.join(bad)!r}; the letters are E (embedding), t (decoder layer), "
            "m (MTP layer), L (loss), with | between chunks and (...)*n or x*n to repeat, not nested."
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

    With ``pipeline``, as the string says; MTP layers it does not mention go with the loss. Otherwise the
    decoder layers are spread evenly, after ``first_stage_layers`` and ``last_stage_layers`` took theirs.

    Raises:
        ConfigError: If the layers do not fit the stages; the message carries the equation.
    """
    if (shape.num_layers + shape.mtp_layers) * shape.num_experts > _MOST_EXPERTS:  # all are going to be listed
        raise ConfigError(
            f"num_hidden_layers = {shape.num_layers}, num_nextn_predict_layers = {shape.mtp_layers} and "
            f"n_routed_experts = {shape.num_experts} in config.json: no model is so large."
        )
    if pipeline is None:
        counts = _even_counts(shape.num_layers, layout, first_stage_layers, last_stage_layers)
        pieces = ["t" * count for count in counts]
        pieces[0] = "E" + pieces[0]
        pieces[-1] += "L"
    elif first_stage_layers is None and last_stage_layers is None:
        pieces = expand_pipeline(pipeline)
    else:
        raise ConfigError(
            "layout.pipeline already says which layers are on the first and last stage; "
            "remove layout.first_stage_layers and layout.last_stage_layers."
        )
    if not any("m" in piece for piece in pieces):
        pieces = [piece.replace("L", "m" * shape.mtp_layers + "L") for piece in pieces]
    _check_letters(shape, layout, pieces)
    _check_mtp(layout, pieces)
    ends = list(accumulate(piece.count("t") for piece in pieces))
    chunks = tuple(
        Chunk(
            stage=index % layout.pp,
            virtual=index // layout.pp,
            layers=tuple(range(ends[index] - piece.count("t"), ends[index])),
            has_embedding="E" in piece,
            has_loss="L" in piece,
            mtp_layers=tuple(range(piece.count("m"))),
            has_tied_output=shape.tie_word_embeddings and "L" in piece,
        )
        for index, piece in enumerate(pieces)
    )
    return PipelinePlacement(pp=layout.pp, chunks=chunks)


def _even_counts(num_layers: int, layout: ParallelLayout, first: int | None, last: int | None) -> list[int]:
    """Return the decoder layers of every chunk, in the order a microbatch visits them."""
    given = [(name, count) for name, count in (("first", first), ("last", last)) if count is not None]
    chunks = layout.pp * layout.vpp
    for name, count in given:
        if layout.pp == 1 or layout.vpp > 1:
            raise ConfigError(
                f"layout.{name}_stage_layers is {count}, but layout.pp = {layout.pp} and layout.vpp = {layout.vpp}; it "
                "needs several stages of one chunk. Remove it, or write layout.pipeline."
            )
        if count < 0:
            raise ConfigError(f"layout.{name}_stage_layers is {count}; it must be at least 0.")
    rest, takers = num_layers - sum(count for _, count in given), chunks - len(given)
    if rest < 0 or (rest % takers if takers else rest):
        minus = "".join(f" - {count} (layout.{name}_stage_layers)" for name, count in given)
        raise ConfigError(
            f"{num_layers} decoder layers{minus} = {rest}, which {takers} chunks (layout.pp * layout.vpp = "
            f"{layout.pp} * {layout.vpp} = {chunks}, less {len(given)} given) cannot share evenly. "
            "Set layout.first_stage_layers and layout.last_stage_layers, or write layout.pipeline."
        )
    counts = [rest // takers] * takers if takers else []
    return [*([] if first is None else [first]), *counts, *([] if last is None else [last])]


def _check_letters(shape: ModelShape, layout: ParallelLayout, pieces: list[str]) -> None:
    """Refuse a wrong number of chunks or layers, and letters out of order."""
    if len(pieces) != layout.pp * layout.vpp:
        raise ConfigError(
            f"layout.pipeline has {len(pieces)} chunks, but layout.pp * layout.vpp = "
            f"{layout.pp} * {layout.vpp} = {layout.pp * layout.vpp}. Write one chunk per stage and virtual stage."
        )
    flat = "".join(pieces)
    for letter, what, wanted in (
        ("E", "embeddings", 1),
        ("t", "decoder layers", shape.num_layers),
        ("m", "MTP layers", shape.mtp_layers),
        ("L", "losses", 1),
    ):
        if flat.count(letter) != wanted:
            raise ConfigError(
                f"layout.pipeline places {flat.count(letter)} {what} ({letter}), but the model has {wanted}: "
                f"{flat.count(letter) - wanted:+d}."
            )
    if not re.fullmatch("Et*m*L", flat):
        raise ConfigError(
            f"layout.pipeline {'|'.join(pieces)!r} is out of order: first E, then every t, then every m, then L."
        )
    # Megatron-Core 0.16 takes E and L anywhere, but builds the embedding in the first and the head in the last chunk.
    if not (pieces[0].startswith("E") and pieces[-1].endswith("L")):
        raise ConfigError(f"layout.pipeline {'|'.join(pieces)!r} must have E in the first chunk and L in the last one.")


def _check_mtp(layout: ParallelLayout, pieces: list[str]) -> None:
    """Refuse MTP layers where Megatron-Core cannot run them; 0.16 itself overlooks them in stage 0's last chunk."""
    chunks = [index for index, piece in enumerate(pieces) if "m" in piece]
    if not chunks or layout.pp == 1:
        return
    if len(chunks) > 1:
        raise ConfigError(f"layout.pipeline spreads the MTP layers (m) over {len(chunks)} chunks; they must share one.")
    stage, virtual = chunks[0] % layout.pp, chunks[0] // layout.pp
    if virtual != layout.vpp - 1:
        raise ConfigError(
            f"layout.pipeline puts the MTP layers (m) into virtual chunk {virtual} of stage {stage}; "
            f"they must be in the last one, {layout.vpp - 1}."
        )
    if stage == 0:
        raise ConfigError("layout.pipeline puts the MTP layers (m) on pipeline stage 0; move them to a later stage.")


def describe_ranks(ranks: Sequence[int]) -> str:
    """Return ``"rank 3"``, or for several ``"ranks 0-7, 9"``."""
    runs = []
    for _, consecutive in groupby(enumerate(sorted(ranks)), lambda indexed: indexed[1] - indexed[0]):
        run = [rank for _, rank in consecutive]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return f"rank{'s' if len(ranks) != 1 else ''} {', '.join(runs)}"


def rank() -> int:
    """Return the rank of this process as its launcher (torchrun, srun) says; 0 when launched alone."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def world_size() -> int:
    """Return the number of processes of this job as its launcher says; 1 when launched alone."""
    return int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))
