"""Rollouts against ``transformers.generate`` on the same prompts, and new weights against a copy of the same bytes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_ads.config.rl import RlConfig

REPETITIONS = 5
"""In turn, so that a change of the machine's load meets both."""


def compared(model: Path, recipe: str, settings: Sequence[str]) -> dict[str, Any]:
    """Return the median seconds of each, in this process; the rollouts are one batch of the recipe's."""
    from megatron_ads.config.recipes import load_job
    from megatron_ads.config.rl import RlConfig
    from megatron_ads.inference.model_folder import hugging_face_folder

    config = load_job(recipe, [f"model.load={model}", *settings])
    assert isinstance(config, RlConfig)
    with hugging_face_folder(model) as folder:
        return {**_generation(folder, config), **_new_weights(folder)}


def _generation(model: Path, config: "RlConfig") -> dict[str, Any]:
    """Generate the same prompts twice, the most probable tokens, so that both generate the same ones.

    No token ends an answer, so that the batch stays whole: what is compared is the speed of a token.
    """
    import torch

    from megatron_ads.config.generation import GenerationConfig, Method
    from megatron_ads.data.chat import load_tokenizer
    from megatron_ads.inference.language_model import load_model
    from megatron_ads.inference.transformers_engine import TransformersEngine
    from megatron_ads.training.rollout.prompts import open_prompts

    tokenizer, loaded = load_tokenizer(model), load_model(model, torch.float32)
    limit, samples, pad = config.rollout.max_new_tokens, config.rollout.samples, tokenizer.end_token_id
    stream = open_prompts(config.data, tokenizer, max_new_tokens=limit, probe_rows=1).stream
    drawn = stream.draw(max(1, config.rollout.batch_size // samples))
    asked = [one.tokens for one in drawn for _ in range(samples)]
    engine = TransformersEngine(loaded, end_token=loaded.config.vocab_size, pad_token=pad, tokenizer=tokenizer)
    how = GenerationConfig(method=Method.greedy, max_new_tokens=limit, log_probabilities=True)
    ids, mask = _padded(asked, pad)
    ours, theirs = _in_turn(
        lambda: [one[0].token_ids for one in engine.generate(asked, how)],
        lambda: loaded.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=limit, min_new_tokens=limit, eos_token_id=None,
            pad_token_id=pad,
        )[:, ids.shape[1] :].tolist(),
    )  # fmt: skip
    pairs = [
        pair for mine, other in zip(ours.value, theirs.value, strict=True) for pair in zip(mine, other, strict=True)
    ]
    return {
        "answers": len(asked),
        "tokens_per_answer": limit,
        "rollout_seconds": ours.seconds,
        "generate_seconds": theirs.seconds,
        "same_tokens": sum(mine == other for mine, other in pairs) / len(pairs),
    }


def _new_weights(model: Path) -> dict[str, Any]:
    """Give an engine all weights, and copy as many bytes, in as many tensors as the engine has."""
    import torch
    from safetensors.torch import load_file

    from megatron_ads.inference.language_model import load_model
    from megatron_ads.inference.transformers_engine import TransformersEngine

    loaded = load_model(model, torch.float32)
    engine = TransformersEngine(loaded, end_token=0)
    published = [pair for file in sorted(model.glob("*.safetensors")) for pair in load_file(file).items()]
    held = [tensor.clone() for tensor in loaded.state_dict().values()]
    new = [tensor.clone() for tensor in held]
    given, copied = _in_turn(
        lambda: engine.update_weights(iter(published)),
        lambda: [old.copy_(tensor) for old, tensor in zip(held, new, strict=True)] and None,
    )
    nbytes = sum(tensor.nbytes for tensor in held)
    return {"update_weights_seconds": given.seconds, "copy_seconds": copied.seconds, "bytes": nbytes}


def _padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Any, Any]:
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


@dataclass(slots=True)
class _Timed:
    work: Callable[[], Any]
    value: Any = None
    seconds: float = 0.0


def _in_turn(*works: Callable[[], Any]) -> list[_Timed]:
    """Return what each returns and its median seconds, after one repetition that does not count."""
    timed, seconds = [_Timed(work) for work in works], [list[float]() for _ in works]
    for _ in range(REPETITIONS + 1):
        for one, kept in zip(timed, seconds, strict=True):
            began = time.monotonic()
            one.value = one.work()
            kept.append(time.monotonic() - began)
    for one, kept in zip(timed, seconds, strict=True):
        one.seconds = median(kept[1:])
    return timed
