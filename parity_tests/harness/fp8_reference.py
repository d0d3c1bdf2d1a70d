"""DeepSeek's FP8 storage written with torch alone, as the compiled loops must give it bit for bit."""

import torch


def dequantize(codes_RC: torch.Tensor, scale_rc: torch.Tensor) -> torch.Tensor:
    """Return the BF16 values of all codes of a weight."""
    row_blocks, column_blocks = (torch.arange(extent) // 128 for extent in codes_RC.shape)
    return (codes_RC.float() * scale_rc[row_blocks[:, None], column_blocks[None, :]]).bfloat16()


def quantize(values_RC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes, scales) of finite FP32 values."""
    rows, columns = values_RC.shape
    block_rows, block_columns = -(-rows // 128), -(-columns // 128)
    padded = torch.zeros(block_rows * 128, block_columns * 128)
    padded[:rows, :columns] = values_RC
    blocks = padded.view(block_rows, 128, block_columns, 128)
    amax_rc = blocks.abs().amax(dim=(1, 3))
    smallest = torch.finfo(torch.float32).tiny
    scale_rc = torch.where(amax_rc == 0, 1.0, (amax_rc / 448).clamp(min=smallest))
    codes = (blocks / scale_rc[:, None, :, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.view(padded.shape)[:rows, :columns].contiguous(), scale_rc
