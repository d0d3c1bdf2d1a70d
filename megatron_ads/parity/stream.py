"""Run prompts through both sides layer by layer: weights of one layer at a time, activations of all prompts kept.

Each layer gets the same input on both sides, which shows its own error, and our own output of the layer before, which
shows what has gathered. Shape suffixes: S = tokens of a prompt, C = hidden width, T = tokens, E = experts.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding, kl_div, linear, log_softmax

from conversion.hf_folder import HfFolder, stored_values
from conversion.names import EMBEDDING, Parameter, Split, layer_parameters, output_layer_name
from conversion.regions import part_values
from conversion.sources import WeightSource
from megatron_ads.layout import ParallelLayout
from megatron_ads.models.settings import ModelSettings
from megatron_ads.models.single_layer import SingleLayer, build_norm
from megatron_ads.parity.reference import Reference, ReferenceLayer, RouterScores
from megatron_ads.parity.verdict import LayerKind, LayerResult, Limits, LogitResult, RouterResult, StreamResult
from megatron_ads.runtime.device import device

Rows = list[Tensor]
"""One tensor a prompt."""


class Stream:
    """The two sides of one checkpoint and their current state."""

    def __init__(
        self, source: WeightSource, folder: HfFolder, settings: ModelSettings, *, dtype: torch.dtype, limits: Limits
    ) -> None:
        """Megatron's process groups must exist, for one rank; ``dtype`` is that of ``settings.precision``."""
        self._source, self._folder, self._settings, self._limits = source, folder, settings, limits
        self._dtype, self._device = dtype, device()
        self._reference = Reference(folder, dtype, self._device)
        self._elsewhere_T = torch.zeros((), dtype=torch.bool, device=self._device)
        """Tokens that some router so far has sent to other experts, each side on its own."""

    def compare(
        self, prompts: Sequence[Tensor], layout: ParallelLayout, advance: Callable[[LayerResult], None]
    ) -> StreamResult:
        """Take token rows (S,), of any lengths, through all layers; ``advance`` receives each one's result.

        The slices of ``layout`` are cut and joined again.
        """
        shape = self._source.shape
        tokens = [prompt.to(self._device) for prompt in prompts]
        theirs, ours = [self._reference.embed(row) for row in tokens], [self._embed(row) for row in tokens]
        results: list[LayerResult] = []

        def add(layer: int, their_input: Rows, our_input: Rows) -> tuple[Rows, Rows]:
            result, their_output, our_output = self._layer(layer, tokens, their_input, our_input, layout)
            results.append(result)
            advance(result)
            return their_output, our_output

        for layer in range(shape.num_layers):
            theirs, ours = add(layer, theirs, ours)
        norm = build_norm(self._source, "decoder.final_layernorm", self._settings).to(self._device)
        theirs, ours = [self._reference.final_norm(x) for x in theirs], [norm(x).detach() for x in ours]
        logits = self._compare_logits(theirs, ours)
        for layer in range(shape.num_layers, shape.num_layers + shape.mtp_layers):
            theirs, ours = add(layer, theirs, ours)
        return StreamResult(tuple(results), logits)

    def _embed(self, tokens_S: Tensor) -> Tensor:
        return embedding(tokens_S.cpu(), self._source.read(EMBEDDING)).to(self._device, self._dtype)

    def _layer(
        self, layer: int, tokens: Rows, theirs: Rows, ours: Rows, layout: ParallelLayout
    ) -> tuple[LayerResult, Rows, Rows]:
        """Return the result and both sides' outputs for their own inputs."""
        started = time.monotonic()
        their_output, scores = self._run_theirs(layer, tokens, theirs)
        same_input, routed, our_output, routed_own = self._run_ours(layer, tokens, theirs, ours)
        router, same_T = None, torch.ones(sum(map(len, tokens)), dtype=torch.bool, device=self._device)
        if scores:
            self._elsewhere_T = self._elsewhere_T | _moved(torch.cat(routed_own), _weights(scores))
            router, same_T = self._compare_routing(layer, routed, scores)
        shape = self._source.shape
        kind = LayerKind.EXPERTS if shape.is_moe_layer(layer) else LayerKind.DENSE
        difference, largest = _difference(same_input, their_output, same_T)
        result = LayerResult(
            layer=layer,
            kind=kind if layer < shape.num_layers else LayerKind.MTP,
            difference=difference,
            carried=_difference(our_output, their_output, torch.ones_like(same_T))[0],
            largest=largest,
            changed_tensors=tuple(
                changed_parameters(layer_parameters(shape, layer), self._source, self._folder, layout)
            ),
            router=router,
            seconds=time.monotonic() - started,
        )
        return result, their_output, our_output

    def _run_theirs(self, layer: int, tokens: Rows, inputs: Rows) -> tuple[Rows, list[RouterScores]]:
        module = self._reference.layer(layer)  # freed on return: one layer is held at a time
        scores: list[RouterScores] = []
        module.watch_router(scores.append)
        return self._run(module, layer, tokens, inputs, self._reference.embed), scores

    def _run_ours(self, layer: int, tokens: Rows, theirs: Rows, ours: Rows) -> tuple[Rows, Rows, Rows, Rows]:
        """Return the outputs and routing weights for their inputs, then those for our inputs."""
        module, weights = SingleLayer(self._source, layer, self._settings), list[Tensor]()
        module.watch_router(lambda weights_TE, chosen_TE: weights.append((weights_TE * chosen_TE).float()))
        same_input = self._run(module, layer, tokens, theirs, self._embed)
        routed = list(weights)
        our_output = self._run(module, layer, tokens, ours, self._embed)
        return same_input, routed, our_output, weights[len(routed) :]

    def _run(
        self,
        module: ReferenceLayer | SingleLayer,
        layer: int,
        tokens: Rows,
        inputs: Rows,
        embed: Callable[[Tensor], Tensor],
    ) -> Rows:
        if layer < self._source.shape.num_layers:
            return [module.decode(row) for row in inputs]
        return [module.predict(ids, row, embed) for ids, row in zip(tokens, inputs, strict=True)]

    def _compare_routing(self, layer: int, weights: Rows, scores: list[RouterScores]) -> tuple[RouterResult, Tensor]:
        """Return how the routers compare, and which tokens (T,) go to the same experts on both sides."""
        ours_TE, theirs_TE = torch.cat(weights), _weights(scores)
        ranked_TE = self._ranked(layer, torch.cat([one.logits_TE for one in scores]))
        exchanged_TE, moved_T = (ours_TE != 0) ^ (theirs_TE != 0), _moved(ours_TE, theirs_TE)
        # how far apart the scores of what was exchanged lie, over the spread of all scores
        most = ranked_TE.masked_fill(~exchanged_TE, -torch.inf).amax(dim=1)
        least = ranked_TE.masked_fill(~exchanged_TE, torch.inf).amin(dim=1)
        near_T = moved_T & (most - least < self._limits.near_tie)
        kept = (ours_TE - theirs_TE).abs().amax(dim=1).masked_fill(moved_T, 0.0)
        result = RouterResult(
            tokens=len(moved_T),
            rerouted=int((moved_T & ~near_T).sum()),
            near_ties=int(near_T.sum()),
            weight_difference=float(kept.max()),
        )
        return result, ~moved_T

    def _ranked(self, layer: int, logits_TE: Tensor) -> Tensor:
        """Return the scores by which experts are selected."""
        shape = self._source.shape
        if shape.score_function == "softmax":
            return logits_TE.softmax(-1)
        mtp = layer - shape.num_layers
        prefix = f"decoder.layers.{layer}" if mtp < 0 else f"mtp.layers.{mtp}.transformer_layer"
        return logits_TE.sigmoid() + self._source.read(f"{prefix}.mlp.router.expert_bias").to(logits_TE.device)

    def _compare_logits(self, theirs: Rows, ours: Rows) -> LogitResult:
        head = self._source.read(output_layer_name(self._source.shape)).to(self._device, self._dtype)
        by_position = torch.zeros(max(len(row) for row in theirs))
        divergences, agreeing = [], 0
        for their_SC, our_SC in zip(theirs, ours, strict=True):
            right_SV, other_SV = self._reference.logits(their_SC), linear(our_SC, head).float()
            difference_S = (right_SV - other_SV).abs().amax(dim=-1).cpu()
            by_position[: len(difference_S)] = torch.maximum(by_position[: len(difference_S)], difference_S)
            p, q = log_softmax(right_SV.double(), -1), log_softmax(other_SV.double(), -1)
            divergences.append(kl_div(q, p, reduction="none", log_target=True).sum(-1))
            agreeing += int((right_SV.argmax(-1) == other_SV.argmax(-1)).sum())
        divergence_T = torch.cat(divergences)
        elsewhere_T = self._elsewhere_T.expand_as(divergence_T)
        counted_T = ~elsewhere_T | elsewhere_T.all()  # where all are, they are all there is to judge by
        return LogitResult(
            tokens=len(divergence_T),
            rerouted=int(elsewhere_T.sum()),
            max_abs_difference=float(by_position.max()),
            divergence=max(float(divergence_T[counted_T].mean()), 0.0),
            agreement=agreeing / len(divergence_T),
            by_position=tuple(by_position.tolist()),
        )


def _weights(scores: list[RouterScores]) -> Tensor:
    return torch.cat([one.weights_TE for one in scores])


def _moved(ours_TE: Tensor, theirs_TE: Tensor) -> Tensor:
    """Return which tokens (T,) are not sent to the same experts."""
    return ((ours_TE != 0) ^ (theirs_TE != 0)).any(dim=1)


def _difference(ours: Rows, theirs: Rows, counted_T: Tensor) -> tuple[float, float]:
    """Return root mean square and maximum of the difference of some tokens, over the root mean square of ``theirs``.

    Both are NaN where no token counts.
    """
    a, b = torch.cat(ours)[counted_T].float(), torch.cat(theirs)[counted_T].float()
    if not len(a):
        return math.nan, math.nan
    size = b.pow(2).mean().sqrt()
    return float((a - b).pow(2).mean().sqrt() / size), float((a - b).abs().max() / size)


def changed_parameters(
    parameters: Iterable[Parameter], source: WeightSource, folder: HfFolder, layout: ParallelLayout
) -> Iterator[str]:
    """Yield those ``parameters`` whose tensor-parallel slices, joined again, are not the bits in ``folder``."""
    for parameter in parameters:
        size = layout.tp if parameter.expert is None else layout.etp
        slices = [source.read(parameter.name, rank=rank, size=size) for rank in range(size)]
        if parameter.split is Split.REPLICATED:
            ours = slices[0]
        elif parameter.split is Split.GATE_UP:
            ours = torch.cat([one.chunk(2)[side] for side in (0, 1) for one in slices])
        else:
            ours = torch.cat(slices, dim=1 if parameter.split is Split.COLUMNS else 0)
        parts = part_values(parameter, ours)
        if not all(_same_bits(values, stored_values(folder, name)) for name, values in parts):
            yield parameter.name


def _same_bits(ours: Tensor, stored: Tensor) -> bool:
    if ours.dtype != stored.dtype:  # a router bias that is stored narrower than FP32 is compared by value
        return torch.equal(ours.float(), stored.float())
    return torch.equal(ours.contiguous().view(torch.uint8), stored.contiguous().view(torch.uint8))
