"""Rollouts against ``transformers.generate`` on the same prompts, and new weights against a copy of the same bytes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, cast

from benchmarks.speed.measure import clocked, in_turn

if TYPE_CHECKING:
    from megatron_ads.config.rl import RlConfig
    from megatron_ads.data.chat import ChatTokenizer

REPETITIONS = 5
"""In turn, so that a change of the machine's load meets both."""


def compared(model: Path, recipe: str, settings: Sequence[str]) -> dict[str, Any]:
    """Return the median seconds of each, in this process; the rollouts are one batch of the recipe's."""
    from megatron_ads.inference.model_folder import hugging_face_folder

    with hugging_face_folder(model) as folder:
        generation, weights = generation_of(folder, recipe, settings), weight_update_of(folder)
        of_rollouts = _medians({"rollout": generation.ours, "generate": generation.theirs})
        of_weights = _medians({"update_weights": weights.update, "copy": weights.copy})
        return {**generation.facts, **of_rollouts, "same_tokens": generation.same_tokens(), **of_weights,
                "bytes": weights.nbytes}  # fmt: skip


def _medians(works: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    timed = {f"{name}_seconds": clocked(work) for name, work in works.items()}
    return {name: median(taken) for name, taken in in_turn(timed, seconds=0, least=REPETITIONS).items()}


@dataclass(frozen=True, slots=True)
class Generation:
    """Sampled answers to the prompts of one batch, by our engine and by transformers."""

    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    same_tokens: Callable[[], float]
    """Says how alike the most probable answers of both are."""
    facts: Mapping[str, Any]


def generation_of(model: Path, recipe: str, settings: Sequence[str]) -> Generation:
    """Return what answers the prompts of one batch, each ``rollout.samples`` times.

    No token ends an answer, so that the batch stays whole: what is compared is the speed of a token.
    """
    import torch

    from megatron_ads.config.generation import GenerationConfig, Method
    from megatron_ads.config.recipes import load_job
    from megatron_ads.config.rl import RlConfig
    from megatron_ads.data.chat import load_tokenizer
    from megatron_ads.inference.language_model import left_padded, load_model
    from megatron_ads.inference.transformers_engine import TransformersEngine

    config = load_job(recipe, [f"model.load={model}", *settings])
    assert isinstance(config, RlConfig)
    tokenizer, loaded = load_tokenizer(model), load_model(model, torch.float32)
    limit, samples, pad = config.rollout.max_new_tokens, config.rollout.samples, tokenizer.end_token_id
    asked = _prompts(config, tokenizer)
    engine = TransformersEngine(loaded, end_token=loaded.config.vocab_size, pad_token=pad, tokenizer=tokenizer)
    ids, mask = left_padded(asked, pad)

    def ours(how: GenerationConfig) -> list[list[int]]:
        return [list(one.token_ids or ()) for answers in engine.generate(asked, how) for one in answers]

    def theirs(**how: Any) -> list[list[int]]:
        made = loaded.generate(
            ids, attention_mask=mask, max_new_tokens=limit, min_new_tokens=limit, eos_token_id=None, pad_token_id=pad,
            **how,
        )  # fmt: skip
        return cast(list[list[int]], made[:, ids.shape[1] :].tolist())

    drawn = GenerationConfig(method=Method.sampled, samples=samples, max_new_tokens=limit, log_probabilities=True)
    return Generation(
        ours=lambda: ours(drawn),
        theirs=lambda: theirs(do_sample=True, top_k=0, num_return_sequences=samples),
        same_tokens=lambda: _share_of_same(ours(GenerationConfig(max_new_tokens=limit)), theirs(do_sample=False)),
        facts={
            "answers": len(asked) * samples,
            "tokens_per_answer": limit,
            "prompt_tokens": sum(map(len, asked)) / len(asked),
        },
    )


def _prompts(config: "RlConfig", tokenizer: "ChatTokenizer") -> list[tuple[int, ...]]:
    """Return the prompts of one batch of answers."""
    from megatron_ads.training.rollout.prompts import open_prompts

    limit, batch = config.rollout.max_new_tokens, max(1, config.rollout.batch_size // config.rollout.samples)
    stream = open_prompts(config.data, tokenizer, max_new_tokens=limit, probe_rows=1).stream
    return [one.tokens for one in stream.draw(batch)]


def _share_of_same(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    both = zip(ours, theirs, strict=True)
    pairs = [pair for mine, other in both for pair in zip(mine, other, strict=True)]
    return sum(mine == other for mine, other in pairs) / len(pairs)


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """All weights of a model, given to an engine, and copied."""

    update: Callable[[], Any]
    copy: Callable[[], Any]
    nbytes: int


def weight_update_of(model: Path) -> WeightUpdate:
    """Return what gives an engine all weights, and what copies the same tensors."""
    import torch
    from safetensors.torch import load_file

    from megatron_ads.inference.language_model import load_model
    from megatron_ads.inference.transformers_engine import TransformersEngine

    loaded = load_model(model, torch.float32)
    engine = TransformersEngine(loaded, end_token=0)
    left_out = f"layers.{loaded.config.num_hidden_layers}."  # the MTP layer, which only the trainer has
    files = sorted(model.glob("*.safetensors"))
    published = [pair for file in files for pair in load_file(file).items() if left_out not in pair[0]]
    held = [tensor.clone() for _, tensor in published]
    return WeightUpdate(
        update=lambda: engine.update_weights(iter(published)),
        copy=lambda: [old.copy_(tensor) for old, (_, tensor) in zip(held, published, strict=True)],
        nbytes=sum(tensor.nbytes for tensor in held),
    )
