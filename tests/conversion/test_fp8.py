"""FP8 arithmetic against a definition written out with numpy (one FP32 multiply, one rounding to BF16) and torch's."""

import numpy as np
import pytest
import torch

from conversion.fp8 import dequantize, quantize, scale_shape
from megatron_ads.errors import ConversionError
from parity_tests.harness import fp8_reference


def e4m3_value(code: int) -> np.float32:
    """Decode one code by definition: 1 sign bit, 4 exponent bits of bias 7, 3 mantissa bits; none of the NaNs."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 0x7
    if exponent == 0:
        return np.float32(sign * mantissa / 8 * 2.0**-6)
    return np.float32(sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def round_to_bf16_bits(value: np.float32) -> int:
    """Round to the nearest BF16, ties to even, and return its 16 bits."""
    bits = int(np.float32(value).view(np.uint32))
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


def bf16_bits(tensor: torch.Tensor) -> list[int]:
    return (tensor.view(torch.int16).to(torch.int32) & 0xFFFF).flatten().tolist()


FINITE = [code for code in range(256) if code & 0x7F != 0x7F]


def codes_of(numbers: list[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.uint8).view(torch.float8_e4m3fn)


def random_codes(seed: int) -> torch.Tensor:
    """Return 576 x 200 codes without NaN: rows in 4.5 blocks as kv_a_proj_with_mqa has them, columns in 1.6 blocks."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (576, 200), generator=generator, dtype=torch.int32).to(torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x80
    return codes.view(torch.float8_e4m3fn)


@pytest.mark.parametrize("convert", [dequantize, fp8_reference.dequantize], ids=["compiled", "torch"])
def test_every_code_times_random_scales_is_an_fp32_multiply_rounded_once(convert):
    generator = np.random.default_rng(0)
    scales = (generator.uniform(1e-6, 3e-2, size=16)).astype(np.float32)  # not powers of two
    for scale in scales:
        got = convert(codes_of(FINITE)[None], torch.tensor([[scale, scale]]))
        assert bf16_bits(got) == [round_to_bf16_bits(e4m3_value(code) * scale) for code in FINITE]


def test_rounding_before_the_multiply_would_be_seen():
    # The negative twin: scales rounded to BF16 first, as some converters do, give other numbers.
    scale = torch.tensor([[0.0123456789, 0.0123456789]])
    exact = dequantize(codes_of(FINITE)[None], scale)
    inexact = dequantize(codes_of(FINITE)[None], scale.bfloat16().float())
    assert (exact != inexact).sum() > 50


def test_each_block_has_its_own_scale_up_to_the_edges():
    codes, scales = random_codes(1), torch.rand(5, 2, generator=torch.Generator().manual_seed(1)) + 0.5
    got = dequantize(codes, scales)
    for row, column in [(0, 0), (127, 127), (128, 127), (127, 128), (511, 0), (512, 199), (575, 199), (575, 127)]:
        value = e4m3_value(int(codes.view(torch.uint8)[row, column])) * np.float32(scales[row // 128, column // 128])
        assert bf16_bits(got[row, column][None]) == [round_to_bf16_bits(value)]


@pytest.mark.parametrize(
    ("first_row", "columns"), [(0, range(200)), (100, range(5, 130)), (128, range(128, 200)), (575, range(127, 129))]
)
def test_a_rectangle_is_cut_out_of_the_whole_and_bit_equal_to_the_reference(first_row, columns):
    codes, scales = random_codes(4), torch.rand(5, 2, generator=torch.Generator().manual_seed(4)) * 1e-2
    part = dequantize(codes[first_row:], scales, first_row=first_row, columns=columns)
    expected = fp8_reference.dequantize(codes, scales)[first_row:][:, columns]
    assert torch.equal(part.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_nan_code_is_refused_in_the_wanted_columns_only(code):
    codes = torch.zeros(3, 10, dtype=torch.uint8)
    codes[2, 9] = code
    codes, scales = codes.view(torch.float8_e4m3fn), torch.ones(1, 1)
    dequantize(codes, scales, columns=range(9))
    with pytest.raises(ConversionError, match="NaN codes"):
        dequantize(codes, scales, columns=range(9, 10))
    dequantize(codes_of([0x7E, 0xFE, 0x80])[None], scales)


def test_scales_have_one_entry_per_begun_block():
    assert scale_shape((576, 7168)) == (5, 56)
    assert scale_shape((128, 1)) == (1, 1)


@pytest.mark.parametrize("convert", [quantize, fp8_reference.quantize], ids=["compiled", "torch"])
def test_quantising_scales_the_largest_value_of_a_block_to_448(convert):
    values = torch.zeros(130, 130)
    values[0, 0], values[5, 5], values[129, 129] = 89.6, -44.8, 7.0
    codes, scales = convert(values)
    # block (0, 0): 89.6 / 448 = 0.2; block (1, 1): 7 / 448 = 1/64; the others hold zeros only
    torch.testing.assert_close(scales, torch.tensor([[0.2, 1.0], [1.0, 1 / 64]]), rtol=1e-7, atol=0)
    assert codes[0, 0].float() == 448 and codes[5, 5].float() == -224 and codes[129, 129].float() == 448
    assert codes.float().count_nonzero() == 3


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 1.0, 3e38], ids=str)
def test_quantising_never_gives_nan_or_infinity(magnitude):
    codes, scales = quantize(torch.full((3, 130), magnitude))
    assert codes.float().isfinite().all()
    assert scales.isfinite().all() and (scales > 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_without_an_fp8_code_are_refused(bad):
    values = torch.ones(4, 4)
    values[1, 2] = bad
    with pytest.raises(ConversionError, match="NaN or infinite"):
        quantize(values)


def test_the_error_of_quantising_is_that_of_three_mantissa_bits():
    values = torch.randn(256, 256, generator=torch.Generator().manual_seed(3))
    error = (dequantize(*quantize(values)).float() - values).abs()
    # half a step of 2**-3 in the largest binade [256, 448] is 16 / 448 of the block's largest value
    assert error.max() <= values.abs().max() * 16.5 / 448
    assert error.max() > values.abs().max() * 8 / 448  # the bound is not slack by a factor of two


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", [0, 12], ids=["one magnitude", "twelve decades"])
def test_quantising_is_bit_equal_to_the_reference(dtype, spread):
    values = torch.randn(300, 200, generator=torch.Generator().manual_seed(6)) * torch.logspace(-spread, 0, 200)
    values[:128, :128] = 0  # a block of zeros
    values[0, 130:140] = torch.tensor([1.0625, 1.1875, -1.0625, 448, 432, 440, 2**-10, 2**-9, 3 * 2**-10, -0.0])  # ties
    values = values.to(dtype)
    codes, scales = quantize(values)
    expected_codes, expected_scales = fp8_reference.quantize(values.float())
    assert torch.equal(scales, expected_scales)
    assert torch.equal(codes.view(torch.uint8), expected_codes.view(torch.uint8))


def test_power_of_two_scales_are_rounded_up_and_lose_nothing_but_range():
    values = torch.randn(300, 200, generator=torch.Generator().manual_seed(6)) * torch.logspace(-12, 0, 200)
    values[:128, :128], values[0, 130] = 0, 448.0  # its scale is 1 already
    codes, scales = quantize(values, power_of_two_scales=True)
    _, exact = quantize(values)
    expected = torch.where(exact == 1.0, exact, 2.0 ** torch.log2(exact.double()).ceil().float())
    assert torch.equal(scales, expected)
    spread = scales.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :200]
    assert torch.equal(codes.view(torch.uint8), (values / spread).to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("powers", [False, True])
def test_what_is_written_in_fp8_is_finite_when_it_is_read_back(powers):
    """Around the largest BF16: accepted values come back finite, larger ones are refused."""
    accepted = []
    for bits in range(0x7F000000, 0x7F800000, 0x8000):
        values = torch.tensor([[bits]], dtype=torch.int32).view(torch.float32)
        try:
            codes, scales = quantize(values, power_of_two_scales=powers)
        except ConversionError:
            continue
        accepted.append(bits)
        assert dequantize(codes, scales).isfinite().all(), hex(bits)
    assert max(accepted) == (0x7F778000 if powers else 0x7F7F0000)
