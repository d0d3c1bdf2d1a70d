"""Rollouts against ``transformers.generate`` on the same prompts, and new weights against a copy of the same bytes."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

REPETITIONS = 5
"""In turn, so that a change of the machine's load meets both."""


def compared(model: Path, recipe: str, settings: Sequence[str]) -> dict[str, Any]:
    """Return the seconds of each, the median of some, in this process; one rollout is a batch of a step.

    Tokens are the most probable ones, so that both generate the same ones, and no token ends an answer, so that the
    batch stays whole: what is compared is the speed of a token.
    """
    import torch

    from megatron_ads.config.generation import GenerationConfig, Method
    from megatron_ads.config.recipes import load_job
    from megatron_ads.config.rl import RlConfig
    from megatron_ads.data.chat import load_tokenizer
    from megatron_ads.inference.language_model import load_model
    from megatron_ads.inference.transformers_engine import TransformersEngine
    from megatron_ads.training.prompts import open_prompts

    config = load_job(recipe, [f"model.load={model}", *settings])
    assert isinstance(config, RlConfig)
    tokenizer, loaded = load_tokenizer(model), load_model(model, torch.float32)
    limit = config.rollout.max_new_tokens
    prompts = open_prompts(config.data, tokenizer, max_new_tokens=limit, probe_rows=1)
    groups = max(1, config.rollout.batch_size // config.rollout.samples)
    asked = [one.tokens for one in prompts.stream.draw(groups) for _ in range(config.rollout.samples)]
    never = loaded.config.vocab_size  # no token has this number
    engine = TransformersEngine(loaded, end_token=never, pad_token=tokenizer.end_token_id, tokenizer=tokenizer)
    how = GenerationConfig(method=Method.greedy, max_new_tokens=limit, log_probabilities=True)
    ids, mask = _padded(asked, tokenizer.end_token_id)
    generated: dict[str, Any] = {}

    def ours() -> None:
        generated["ours"] = [one[0].token_ids for one in engine.generate(asked, how)]

    def theirs() -> None:
        with torch.inference_mode():
            found = loaded.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=limit, min_new_tokens=limit,
                eos_token_id=None, pad_token_id=tokenizer.end_token_id,
            )  # fmt: skip
        generated["theirs"] = [tuple(row[ids.shape[1] :]) for row in found.tolist()]

    rollout, reference = _in_turn(ours, theirs)
    same = sum(
        a == b for mine, other in zip(*generated.values(), strict=True) for a, b in zip(mine, other, strict=True)
    )
    new = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    old = [tensor.clone() for tensor in new.values()]
    sync, copy = _in_turn(
        lambda: engine.update_weights(iter(_as_published(model))),
        lambda: [kept.copy_(tensor) for kept, tensor in zip(old, new.values(), strict=True)],
    )
    return {
        "answers": len(asked),
        "tokens_per_answer": limit,
        "rollout_seconds": rollout,
        "generate_seconds": reference,
        "same_tokens": same / (len(asked) * limit),
        "update_weights_seconds": sync,
        "copy_seconds": copy,
        "bytes": sum(tensor.nbytes for tensor in old),
    }


def _as_published(model: Path) -> list[tuple[str, Any]]:
    from safetensors.torch import load_file

    return [pair for file in sorted(model.glob("*.safetensors")) for pair in load_file(file).items()]


def _padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Any, Any]:
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def _in_turn(first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float]:
    """Return the median seconds of each, after one repetition that does not count."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPETITIONS + 1):
        for kept, work in zip(seconds, (first, second), strict=True):
            began = time.monotonic()
            work()
            kept.append(time.monotonic() - began)
    return median(seconds[0][1:]), median(seconds[1][1:])
