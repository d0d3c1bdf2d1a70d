"""What a rank runs on our side: the passes of ``reference`` on Megatron-Core, exports, and whole command lines.

Shape suffixes: B = rows, S = tokens of a row, C = hidden width, T = B * S tokens, E = experts.
"""

import gc
import json
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from conversion.layer_specs import LayerSpec
from conversion.rank_files import ShardsLayout
from conversion.sources import open_source
from megatron_ads import cli
from megatron_ads.architecture import read_model_shape
from megatron_ads.layout import ParallelLayout, place_layers
from megatron_ads.runtime import process_groups
from megatron_ads.runtime.device import device, seed_everything
from parity_tests.deliberate_errors import CODE_ERRORS
from parity_tests.harness.model_jobs import ROW_TOKENS, Job, PassResult, build, on_device, packed, rows, train_pass
from parity_tests.passes import Pass, Routing

__all__ = ["ROW_TOKENS", "Job", "PassResult", "rows"]

PATIENCE = 240.0
"""Seconds that a call on several ranks may take where the machine has other work; alone it takes ten."""


def with_error(error: str, function: Callable[..., Any], *args: Any) -> Any:
    """Run ``function`` on this rank while a deliberate error of ``CODE_ERRORS`` is in the code."""
    with CODE_ERRORS[error]():
        return function(*args)


def forward(job: Job, tokens_BS: Tensor, prepare: Callable[[Any], None] | None = None) -> Pass:
    """Run one evaluation pass on one rank and keep what every layer and every router gave."""
    model, wrapped = _build_one(job)
    if prepare is not None:
        prepare(model)
    wrapped.eval()
    layers: list[Tensor] = []
    routing: list[Routing] = []
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda _m, _i, output: layers.append(_rows_first(output[0])))
        if hasattr(layer.mlp, "router"):
            layer.mlp.router.register_forward_hook(lambda _m, _i, output: routing.append(_routing(output, tokens_BS)))
    with torch.no_grad():
        logits = wrapped(*_inputs(tokens_BS), None)
    return Pass(logits.float().cpu(), layers, routing)


def _rows_first(output_SBC: Tensor) -> Tensor:
    """Return a layer's output (B, S, C); Megatron has some say that they have a gradient, whatever ``no_grad`` says."""
    return output_SBC.detach().transpose(0, 1).float().cpu()


def _build_one(job: Job) -> tuple[Any, Any]:
    """Return the whole model on this rank's device, bare, and in the wrapper of its precision."""
    from megatron_ads.models.build import wrap_precision

    chunks, _, _ = build(job)
    (wrapped,) = wrap_precision(chunks)
    return chunks[0], wrapped


def _inputs(tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens and positions on this rank's device."""
    positions_BS = torch.arange(tokens_BS.size(1)).expand(tokens_BS.shape)
    return tokens_BS.to(device()), positions_BS.to(device())


def _routing(output: tuple[Tensor, Tensor], tokens_BS: Tensor) -> Routing:
    """Return the routing with tokens in the order of ``tokens_BS``; Megatron has them sequence first."""
    rows_, length = tokens_BS.shape
    weights_TE, map_TE = (x.unflatten(0, (length, rows_)).transpose(0, 1).flatten(0, 1) for x in output)
    chosen = map_TE.nonzero()[:, 1].view(map_TE.size(0), -1)
    return Routing(chosen.cpu(), weights_TE.float().cpu())


def greedy_tokens(job: Job, prompt_BS: Tensor, count: int) -> list[int]:
    """Return the ``count`` most probable tokens behind the one prompt, each from a pass over everything before it."""
    _, model = _build_one(job)
    model.eval()
    tokens_BS = prompt_BS
    with torch.no_grad():
        for _ in range(count):
            best = model(*_inputs(tokens_BS), None)[:, -1].argmax(-1, keepdim=True)
            tokens_BS = torch.cat([tokens_BS, best.cpu()], dim=1)
    return tokens_BS[0, prompt_BS.size(1) :].tolist()


def mtp_logits(job: Job, tokens_BS: Tensor) -> Tensor:
    """Return the logits of the first MTP layer, (B, S, vocabulary)."""
    model, wrapped = _build_one(job)
    kept: list[Tensor] = []
    model.mtp.layers[0].register_forward_hook(lambda _m, _i, output: kept.append(output[0]))
    tokens_BS, positions_BS = _inputs(tokens_BS)
    with torch.no_grad():
        mask_BS = torch.ones(tokens_BS.shape, device=tokens_BS.device)
        wrapped.train()(tokens_BS, positions_BS, None, labels=tokens_BS, loss_mask=mask_BS)
        logits_SBV, _ = model.output_layer(kept[0])
    return logits_SBV.transpose(0, 1).float().cpu()


def pipeline_logits(job: Job) -> list[Tensor]:
    """Return this rank's part of the logits of each of its packed rows, (1, S, vocabulary / tp); last stage only."""
    chunks, shape, _ = build(job)
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_ads.models.build import wrap_precision

    chunks = wrap_precision(chunks)
    for chunk in chunks:
        chunk.eval()
    mine = rows(shape.vocab_size)[parallel_state.get_data_parallel_rank() :: job.layout.dp]

    def step(data: Any, model: Any) -> tuple[Tensor, Any]:
        row = on_device(next(data))
        return model(row["tokens"], row["positions"], None, packed_seq_params=packed(row)), partial(_keep)

    with torch.no_grad():
        kept = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(mine) for _ in chunks] if len(chunks) > 1 else iter(mine),
            model=chunks,
            num_microbatches=len(mine),
            seq_length=ROW_TOKENS,
            micro_batch_size=1,
            forward_only=True,
        )
    return [one["logits"].float().cpu() for one in kept]


def _keep(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return output.new_zeros(()), output.new_ones((), dtype=torch.int), {"logits": output}


def gradients(job: Job) -> PassResult:
    """Run forward and backward over the four packed rows of a step, with Megatron's reduction."""
    return train_pass(job)


def names_by_rank(folder: Path, layout: ParallelLayout, pipeline: str | None, spec: LayerSpec) -> list[list[str]]:
    """Take the place of each rank in turn, build its chunks and return their canonical names, rank by rank."""
    return [_names(folder, layout, pipeline, spec, rank) for rank in range(layout.world)]


def _names(folder: Path, layout: ParallelLayout, pipeline: str | None, spec: LayerSpec, rank: int) -> list[str]:
    process_groups.start_fake(layout, rank)
    from megatron_ads.models.build import build_chunks
    from megatron_ads.models.settings import ModelSettings
    from megatron_ads.models.weights import named_weights

    try:
        seed_everything(1)
        shape = read_model_shape(folder)
        chunks = build_chunks(shape, layout, place_layers(shape, layout, pipeline=pipeline), ModelSettings(spec=spec))
        return [name for weight in named_weights(chunks, spec) for name in weight.canonical]
    finally:
        process_groups.stop()


def load_and_export(job: Job, folder: Path) -> None:
    """Build the model of ``job``, fill it from the checkpoint and write its weights as shards."""
    chunks, shape, spec = build(job)
    from megatron_ads.training.export import export_shards

    layout = ShardsLayout(
        shape=shape, layout=job.layout, placement=place_layers(shape, job.layout, pipeline=job.pipeline)
    )
    export_shards(folder, chunks, spec, open_source(job.folder), layout)


def parity(arguments: Sequence[str], out: Path, error: str | None = None) -> tuple[int, dict[str, Any]]:
    """Run ``megatron-ads parity``, with a deliberate error of ``CODE_ERRORS`` or none; return status and report."""
    words = ["parity", *arguments, "--out", str(out)]
    if error is None:
        status = cli.main(words)
    else:
        with CODE_ERRORS[error]():
            status = cli.main(words)
    return status, json.loads((out / "parity.json").read_text())


def most_layers_alive(arguments: Sequence[str], out: Path) -> int:
    """Run ``megatron-ads parity`` and return how many layers, of either side, were in memory at any one time."""
    from megatron_ads.models.single_layer import SingleLayer
    from megatron_ads.parity.reference import ReferenceLayer

    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    def counted(right: Any) -> Any:
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            nonlocal most
            right(self, *args, **kwargs)
            module = self._module if isinstance(self, SingleLayer) else self._model
            alive.add(module)
            most = max(most, len(alive))

        return init

    gc.disable()  # what only the collector would free is still in memory
    try:
        with (
            patch.object(SingleLayer, "__init__", counted(SingleLayer.__init__)),
            patch.object(ReferenceLayer, "__init__", counted(ReferenceLayer.__init__)),
        ):
            cli.main(["parity", *arguments, "--out", str(out)])
    finally:
        gc.enable()
    return most
