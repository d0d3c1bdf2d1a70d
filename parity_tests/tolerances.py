"""Every tolerance of the ladder, with its reason and the deliberate error that must exceed it; and what was measured.

Exact comparisons (names, bits, chosen experts, generated tokens) have none; their twins are in the same files.
``PARITY_FIGURES=FILE`` names a file that ``record`` appends every figure to, as JSON lines.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from megatron_ads.config.model import Precision
from megatron_ads.parity.verdict import LIMITS
from parity_tests.machines import CPU_FP32, Machine


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """A limit that a difference must stay below."""

    value: float
    what: str
    """The difference it limits, with its unit."""
    reason: str
    twins: tuple[str, ...]
    """Tests in which a deliberate small error must exceed it, ``file::test``."""


LOGITS = Tolerance(
    value=1e-5,
    what="largest |difference| of any FP32 logit, logits of order 1",
    reason="Both sides round FP32 sums of up to a few hundred terms in another order: 2^-24 * sqrt(terms) * size, "
    "a few 1e-7 per layer, 1e-6 at the logits. Ten times that is the limit.",
    twins=("test_rung_03_logits.py::test_a_small_error_is_seen_in_the_logits",),
)
LAYER = Tolerance(
    value=1e-5,
    what="largest |difference| of a layer's FP32 output over that output's root mean square",
    reason="As for the logits; relative, because hidden states grow from layer to layer.",
    twins=("test_rung_03_logits.py::test_the_bisect_names_the_layer_that_departs",),
)
BF16_NOISE = Tolerance(
    value=1.5,
    what="root-mean-square error of our BF16 logits over that of transformers' BF16 logits, both against FP32",
    reason="Two correct BF16 passes differ from FP32 by rounding noise of the same size; where a rounding moves a "
    "token to another expert one side may be unlucky, which over all tokens averages to well below a half.",
    twins=("test_rung_03_logits.py::test_a_small_error_is_seen_in_bf16",),
)
BF16_KL = Tolerance(
    value=5e-3,
    what="mean KL(FP32 || BF16) over positions, nats",
    reason="A logit error of relative size 2^-8 on logits of order 1 moves probabilities by about 1e-2, whose KL is "
    "half its square, 1e-4; tokens that change an expert add the rest.",
    twins=("test_rung_03_logits.py::test_a_small_error_is_seen_in_bf16",),
)
BF16_ROUTER = Tolerance(
    value=1.5,
    what="error of our routing over that of transformers', both in BF16 against FP32: root mean square of the weights "
    "of tokens that keep their experts; number of tokens that do not",
    reason="As for the logits: noise of the same size moves as many tokens across a tie. Counts of 80 such tokens "
    "scatter by 80^0.5, a ratio of two by a sixth; the limit is three times that.",
    twins=(
        "test_rung_04_router.py::test_a_bias_in_the_weights_is_seen_in_bf16",
        "test_rung_04_router.py::test_group_limits_off_are_seen_in_bf16",
    ),
)
ROUTER_WEIGHTS = Tolerance(
    value=1e-5,
    what="largest |difference| of a routing weight, weights of order 0.3",
    reason="The scores differ as much as the hidden states they are computed from, 1e-6.",
    twins=("test_rung_04_router.py::test_a_router_error_is_seen",),
)
GRADIENTS = Tolerance(
    value=1e-4,
    what="|difference| of a parameter's FP32 gradient in the 2-norm, over the 2-norm of the gradient",
    reason="Backward passes sum over tokens too: 1e-6 to 1e-5. The limit leaves a factor of ten.",
    twins=("test_rung_05_gradients.py::test_an_error_of_the_backward_pass_is_seen",),
)
BF16_GRADIENTS = Tolerance(
    value=2.0,
    what="root-mean-square error of the gradients of a kind of parameter over that of the compared BF16 pass",
    reason="As for the logits, but a kind such as one norm's weight has few values to average over, and those noises "
    "scatter more.",
    twins=(
        "test_rung_05_gradients.py::test_an_error_of_the_backward_pass_is_seen_in_bf16",
        "test_rung_08_layouts.py::test_a_missing_reduction_is_seen_in_bf16",
    ),
)
MTP_OUTPUT = Tolerance(
    value=1e-5,
    what="largest |difference| of the MTP layer's FP32 logits, of order 1",
    reason="As for the logits: one more layer of the same kind.",
    twins=("test_rung_06_mtp.py::test_an_error_in_the_mtp_layer_is_seen",),
)
BF16_TOKEN_MARGIN = Tolerance(
    value=0.05,
    what="how far the FP32 logit of a token generated in BF16 is below the best one behind the same tokens, mean of 64",
    reason="The KL of 2e-3 is a logit noise of its double's root, 0.06. Where the two best are closer than that, for "
    "one token in ten, the other may be taken and costs 0.1: 0.01 in the mean, of which the limit is five times.",
    twins=("test_rung_07_generation.py::test_the_least_of_the_errors_is_seen_in_bf16_tokens",),
)
LAYOUT_LOSS = Tolerance(
    value=1e-6,
    what="relative difference of the summed loss",
    reason="A sum of 100 FP32 losses in another order.",
    twins=("test_rung_08_layouts.py::test_a_missing_reduction_is_seen",),
)
LAYOUT_LOGITS = Tolerance(
    value=1e-5,
    what="largest |difference| of any FP32 logit",
    reason="As for the logits: tensor parallelism orders the sums anew.",
    twins=("test_rung_08_layouts.py::test_an_error_in_the_logits_under_a_layout_is_seen",),
)
LAYOUT_GRADIENTS = Tolerance(
    value=2e-5,
    what="largest |difference| of a gradient over the largest value of that gradient",
    reason="FP32 sums over tokens, in another order per layout.",
    twins=("test_rung_08_layouts.py::test_a_missing_reduction_is_seen",),
)
TRAINING_LOSS = Tolerance(
    value=1e-4,
    what="relative difference of the loss of any of 50 steps",
    reason="Adam divides by the root of the second moment, so a gradient near 0 can change sign of its update by "
    "rounding; over 50 steps that reaches 1e-5 of the loss.",
    twins=("test_rung_09_training.py::test_an_error_of_the_optimizer_is_seen",),
)
BF16_TRAINING_LOSS = Tolerance(
    value=5e-3,
    what="relative difference of the loss, ours in BF16, theirs in FP32, mean of 50 steps",
    reason="A logit noise of 0.06 in each of 100 target tokens is 0.1 % of their mean loss; updates from noisy "
    "gradients add to that step by step. The mean over steps stays within a few times that.",
    twins=("test_rung_09_training.py::test_an_error_of_training_is_seen_in_bf16",),
)
AUC = Tolerance(
    value=0.001,
    what="|difference| of the area under the ROC curve, of 1",
    reason="0.1 points: the size of difference that the compared trainings may have by rounding alone.",
    twins=("test_rung_09_training.py::test_a_model_trained_on_shuffled_labels_misses_the_area",),
)
PIPELINE_LOSS = Tolerance(
    value=1e-5,
    what="relative difference of the loss of either step; ten times that for the gradient norm",
    reason="61 layers are rounded in the same order on both sides; only sums over tokens and stages differ, by 1e-7, "
    "and the second step starts from weights that Adam has moved by rounding.",
    twins=("rung_10_pipeline.py::measure",),
)
PIPELINE_WEIGHTS = Tolerance(
    value=1e-3,
    what="root mean square of the difference of exported weights, over that of what two steps changed",
    reason="Adam's first steps are sign(gradient) * rate: where a gradient is rounding noise, its sign is chance. One "
    "element in a million of that kind makes 1e-3 to 2e-3; measured is 1e-6.",
    twins=("rung_10_pipeline.py::measure",),
)
STREAMED_LAYER = Tolerance(
    value=LIMITS[Precision.fp32].layer,
    what="root mean square of a layer's FP32 difference over that of its output, given the same input",
    reason="For real widths: FP32 sums of up to 20,000 terms in another order, 2^-24 * sqrt(20,000) at worst.",
    twins=("test_rung_11_checkpoint.py::test_wrong_arithmetic_fails_rung_3_with_rung_2_green",),
)
STREAMED_LAYER_BF16 = Tolerance(
    value=LIMITS[Precision.bf16].layer,
    what="the same in BF16",
    reason="Each operation rounds to 2^-9 = 2e-3 of its size, and a layer chains some ten of them.",
    twins=("test_rung_11_checkpoint.py::test_wrong_arithmetic_fails_rung_3_with_rung_2_green",),
)
STREAMED_DIVERGENCE = Tolerance(
    value=LIMITS[Precision.fp32].divergence,
    what="mean KL(Hugging Face || ours) of the next-token distribution in FP32, nats",
    reason="Logits off by 1e-5 to 1e-3 after 61 layers move a distribution by the square of that.",
    twins=("test_rung_11_checkpoint.py::test_values_in_the_wrong_place_fail_rungs_2_and_3_and_name_the_layer",),
)
ALL = {name: value for name, value in globals().items() if isinstance(value, Tolerance)}


def record(
    rung: int, what: str, value: float | int | str, tolerance: Tolerance | None = None, machine: Machine = CPU_FP32
) -> None:
    """Note one value measured on ``machine`` next to the limit it must stay below; None: it must be exact."""
    limit = None if tolerance is None else tolerance.value
    shown = f"{value:.2e}" if isinstance(value, float) else str(value)
    print(f"rung {rung}, {machine}: {what}: {shown}" + (f" (limit {limit:g})" if limit is not None else ""))
    if file := os.environ.get("PARITY_FIGURES"):
        with Path(file).open("a", encoding="utf-8") as lines:
            figure = {"rung": rung, "machine": str(machine), "what": what, "value": value, "limit": limit}
            lines.write(json.dumps(figure) + "\n")
