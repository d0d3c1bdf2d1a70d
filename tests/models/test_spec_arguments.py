"""What each version of Megatron-Core is given as part of a layer; other tests show that the installed one takes it."""

import pytest
from packaging.version import Version

from megatron_ads.runtime import megatron_version
from parity_tests.harness.ranks import run_ranks


def _kinds(installed: str) -> tuple[str, str, str]:
    """Return of what kind the experts, a mixture and a dense feed-forward are with one version."""
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from megatron_ads.models.spec_arguments import experts_of, feed_forward_of

    megatron_version.megatron_core = lambda: Version(installed)  # in a process of its own
    MLP.as_mlp_submodule = getattr(MLP, "as_mlp_submodule", MLP)  # there since 0.18
    linears = MLPSubmodules(linear_fc1=None, linear_fc2=None)
    made = (experts_of(SequentialMLP, linears), feed_forward_of(MoELayer, linears), feed_forward_of(MLP, linears))
    return tuple(type(each).__name__ for each in made)


@pytest.mark.parametrize(
    ("installed", "kinds"),
    [
        ("0.16.1", ("ModuleSpec", "ModuleSpec", "ModuleSpec")),
        ("0.17.1", ("partial", "ModuleSpec", "ModuleSpec")),
        ("0.19.2", ("partial", "partial", "partial")),
    ],
)
def test_parts_are_specs_or_callables_by_version(installed: str, kinds: tuple[str, str, str]) -> None:
    assert run_ranks(1, _kinds, installed) == [kinds]
