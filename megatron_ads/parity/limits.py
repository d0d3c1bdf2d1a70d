"""How large a difference may be before a checkpoint fails its parity check, with the reasons."""

from dataclasses import dataclass

from megatron_ads.config.model import Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The limits of one number format. Differences must stay below."""

    layer: float
    """Root mean square of a layer's difference, given the same input, over that of its output."""
    divergence: float
    """Mean over positions of KL(Hugging Face || ours), in nats, of the whole model's next-token distribution."""
    near_tie: float
    """How far apart the last chosen and the first left-out score may be for either choice to count as right."""
    rerouted: float
    """Share of tokens that a router, its layer given the same input, may send to other experts; near ties apart."""


LIMITS = {
    Precision.fp32: Limits(layer=1e-5, divergence=1e-6, near_tie=1e-5, rerouted=1e-9),
    Precision.bf16: Limits(layer=2e-2, divergence=2e-2, near_tie=1e-2, rerouted=0.02),
}
"""FP32: sums of up to 20,000 terms in another order, 2^-24 * sqrt(20,000) = 8e-6 of their size at worst, usually 1e-6;
a router's scores inherit it, and a token at a tie closer than that may go either way.

BF16: each operation rounds to 2^-9 = 2e-3 of its size and a layer chains some ten of them, so 6e-3 to 1e-2; the scores
inherit 1e-2 of their spread, so that about one token in a hundred changes one expert.
"""
