"""Invented names of brands and shops: pronounceable, all different, the same for the same seed."""

import numpy as np

from megatron_ads.data.simulator.vocabulary import NAME_ENDS, NAME_STARTS

POSSIBLE_NAMES = len(NAME_STARTS) * len(NAME_ENDS)


def invent_names(count: int, draw: np.random.Generator) -> list[str]:
    """Return ``count`` different one-word names; a numeral is added once the plain ones are used up."""
    plain = [start + end for start in NAME_STARTS for end in NAME_ENDS]
    order = draw.permutation(len(plain))
    names = [plain[index] for index in order]
    rounds = -(-count // len(names))
    return [name if number == 0 else f"{name} {number + 1}" for number in range(rounds) for name in names][:count]
