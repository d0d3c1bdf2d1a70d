"""Inner products of the gradients of several rewards' objectives, as POPO needs them, from norms of sums alone.

With g_k = grad L_k and g = sum_j g_j:

    I_k = <g_k, g> = (|g_k|^2 + |g|^2 - |g - g_k|^2) / 2

so no gradient has to be kept, and each norm is reduced over all parallel groups as that of any update is. Objectives
that are linear in the rewards' advantages give g - g_k as the gradient of the others' sum.

Source: Taiji, equations 5-6, for I_k; how it is computed is ours.
"""

from collections.abc import Callable, Collection
from functools import cache


def inner_products(rewards: Collection[str], norm_of: Callable[[frozenset[str]], float]) -> dict[str, float]:
    """Return I_k by reward; ``norm_of`` gives the L2 norm of the gradient of the sum of some rewards' objectives.

    It is called once for each set of rewards: 3 times for two of them, 2 K + 1 times for K.
    """
    norm, together = cache(norm_of), frozenset(rewards)
    whole = norm(together) ** 2
    return {name: (norm(frozenset({name})) ** 2 + whole - norm(together - {name}) ** 2) / 2 for name in rewards}
