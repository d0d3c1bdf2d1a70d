"""The rotary positions of a ``config.json``: their base and their scaling, in either style."""

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

from megatron_ads.errors import ConfigError, require
from megatron_ads.json_fields import JsonFields
from megatron_ads.model_shape.records import Llama3Shape, YarnShape

_Scaling = TypeVar("_Scaling", YarnShape, Llama3Shape)


def read_rope(
    fields: JsonFields, scalings: Mapping[str, Callable[[JsonFields], _Scaling]]
) -> tuple[float, _Scaling | None]:
    """Return the rotary base and scaling, of ``rope_parameters`` (transformers 5) or ``rope_scaling`` (published).

    Args:
        scalings: What reads the section of each ``rope_type`` that this kind of model may have.
    """
    theta = fields.positive("rope_theta", 10000.0)
    new, old = fields.section("rope_parameters"), fields.section("rope_scaling")
    require(not (new and old), "rope_parameters and rope_scaling are both there; keep the one that holds.")
    rope = new or old
    if rope is None:
        return theta, None
    inner = rope.positive("rope_theta", theta)
    require(
        inner == theta or "rope_theta" not in fields,
        f"rope_theta is {theta:g}, but {inner:g} inside the rope section. Keep one of them.",
    )
    kind = _rope_type(rope, ("default", *scalings))
    scaling = None if kind == "default" else scalings[kind](rope)
    rope.refuse_unread()
    return inner, scaling


def _rope_type(rope: JsonFields, known: tuple[str, ...]) -> str:
    kinds = [rope.choice(name, known) for name in ("rope_type", "type") if name in rope]
    require(bool(kinds), f"The rope section names no rope_type (or type); supported: {', '.join(known)}.")
    require(
        kinds[0] == kinds[-1],
        f"rope_type is {kinds[0]}, but type is {kinds[-1]}; they mean the same. Keep one of them.",
    )
    rope.expect("partial_rotary_factor", 1.0, "positions turn all of the rotary part")
    return kinds[0]


def read_yarn(rope: JsonFields) -> YarnShape:
    rope.expect("truncate", True, "the frequency ramp starts and ends at whole dimensions")
    _check_attention_factor(rope)
    return YarnShape(
        factor=rope.positive("factor"),
        original_max_positions=rope.integer("original_max_position_embeddings"),
        beta_fast=rope.positive("beta_fast", 32.0),
        beta_slow=rope.positive("beta_slow", 1.0),
        mscale=rope.number("mscale", 1.0),
        mscale_all_dim=rope.number("mscale_all_dim", 0.0),
    )


def _check_attention_factor(rope: JsonFields) -> None:
    """Refuse the mscale settings that DeepSeek's code and transformers understand differently.

    Theirs is ``scale(mscale or 1) / scale(mscale_all_dim or 0)``; transformers does so only where both are given and
    not 0, and else takes ``scale(1)``.
    """
    factor, mscale, all_dim = rope.positive("factor"), rope.number("mscale", 1.0), rope.number("mscale_all_dim", 0.0)

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    both = "mscale" in rope and mscale and all_dim
    if not both and scale(mscale) != scale(1.0) * scale(all_dim):
        raise ConfigError(
            f"mscale = {mscale:g} with mscale_all_dim = {all_dim:g}: DeepSeek's code and transformers "
            "compute other attention factors from it. Give both, as in the published config.json."
        )


def read_llama3(rope: JsonFields) -> Llama3Shape:
    return Llama3Shape(
        factor=rope.positive("factor"),
        original_max_positions=rope.integer("original_max_position_embeddings"),
        low_frequency_factor=rope.positive("low_freq_factor"),
        high_frequency_factor=rope.positive("high_freq_factor"),
    )
