"""Plan an export in the image of a published checkpoint: its files and order, its bytes where values are unchanged."""

from dataclasses import dataclass
from pathlib import Path

import torch

from conversion.atomic_file import FileRecord, write_small
from conversion.carried import DerivedBuffer, copy_side_files, find_side_files
from conversion.errors import DamagedCheckpointError, naming_refusals
from conversion.hf_folder import INDEX, SCALE_SUFFIX, HfFolder, open_hf_folder
from conversion.plan import ConversionPlan, OutputFile, Quantized, Values, Verbatim, folder_state
from conversion.safetensors_file import SafetensorsHeader, StoredTensor, read_header
from conversion.sources import WeightSource
from conversion.to_hf import ExportDtype, HfTensor, hf_tensors, untrue_fields, write_config
from megatron_ads.architecture import fp8_blocks
from megatron_ads.errors import ConversionError


def reference_target(source: WeightSource, target: Path, reference: Path, dtype: ExportDtype) -> "ReferenceTarget":
    """Open the reference of an export.

    Raises:
        ConversionError: If ``dtype`` is not what the reference stores.
        DamagedCheckpointError: If its scales are not of the format that its config says.
    """
    with naming_refusals(reference):
        opened = open_hf_folder(reference)
        if wrong := [reason for field, reason in untrue_fields(opened) if field.endswith("scale_fmt")]:
            raise DamagedCheckpointError(f"{wrong[0]}. Give a reference that is what its config.json says.")
    if dtype not in (ExportDtype.STORED, ExportDtype.FP8 if opened.is_fp8 else ExportDtype.BF16):
        raise ConversionError(
            f"--dtype {dtype} contradicts --reference {reference}, whose weights are "
            f"{'FP8' if opened.is_fp8 else 'BF16'}: the reference decides. Omit one of the two."
        )
    return ReferenceTarget(source, target, opened)


@dataclass(frozen=True, slots=True)
class ReferenceTarget:
    """A Hugging Face folder to be written like ``reference``, which decides files, order and dtypes.

    Weights equal to the reference's in BF16 keep its codes and scales; an unchanged model is reproduced byte for byte.
    """

    source: WeightSource
    target: Path
    reference: HfFolder

    def plan(self) -> ConversionPlan:
        """Give every tensor of the reference its values from the source.

        Raises:
            ConversionError: If the two are not the same model.
        """
        if self.reference.shape != self.source.shape:
            raise ConversionError(
                f"{self.reference.path} is another model than {self.source.path}: their config.json differ. "
                "Give as --reference the checkpoint that the training started from."
            )
        wanted = hf_tensors(self.source, ExportDtype.BF16, self.reference.aliases)
        tensors = {tensor.name: tensor for tensor in wanted}
        weights = self.reference.weight_files()
        stored = (*self.source.files(), *weights)
        carried = (find_side_files(self.reference.path, weights=weights), self.source.side_files())
        finishing = {INDEX, "config.json"} | {name for side_files in carried for name in side_files.names}
        return ConversionPlan(
            source=self.source.path,
            target=self.target,
            files=tuple(self._plan_file(file, tensors) for file in self.reference.files),
            source_files=stored,
            source_state=folder_state(stored),
            tensor_count=len(self.source.names()),
            finishing=tuple(finishing),
            side_files=carried,
            reference=self.reference.path,
        )

    def _plan_file(self, file: str, tensors: dict[str, HfTensor]) -> OutputFile:
        path = self.reference.path / file
        header = read_header(path)
        items = [item for name in header.tensors if (item := self._item(name, header, tensors)) is not None]
        items.sort(key=lambda item: item.offset)
        with path.open("rb") as handle:
            return OutputFile(file, handle.read(header.data_start), path.stat().st_size, tuple(items))

    def _item(
        self, name: str, header: SafetensorsHeader, tensors: dict[str, HfTensor]
    ) -> Values | Quantized | Verbatim | None:
        """Return what writes one stored tensor; None if the item of another one of this file does."""
        stored = header.tensors[name]
        if name in self.reference.derived:
            return Verbatim(name, stored.offset, DerivedBuffer.of(stored).data)
        if name not in tensors:  # block scales
            weight = name.removesuffix(SCALE_SUFFIX)
            return None if weight in header.tensors else self._quantized(tensors[weight], None, stored)
        if stored.dtype is torch.float8_e4m3fn:
            return self._quantized(tensors[name], stored, header.tensors.get(name + SCALE_SUFFIX))
        return Values(name, stored.offset, stored.dtype, (tensors[name].view,))

    def _quantized(self, tensor: HfTensor, codes: StoredTensor | None, scales: StoredTensor | None) -> Quantized:
        blocks = fp8_blocks(self.reference.config)
        return Quantized(
            tensor.name,
            codes.offset if codes else None,
            scales.offset if scales else None,
            tensor.view,
            self.reference.block,
            blocks is not None and blocks.power_of_two_scales,
            self.reference.matrix(tensor.name),
        )

    def prepare(self, plan: ConversionPlan) -> None:
        """Carry the side files, the source's over the reference's; the config is the reference's."""
        copy_side_files(self.reference.path, plan.target, skip=("config.json",))
        copy_side_files(self.source.side_folder, plan.target, skip=("config.json",))
        write_config(self.reference.config, plan, self.reference.path)

    def finish(self, plan: ConversionPlan, records: tuple[FileRecord, ...]) -> None:
        """Write the reference's index, if it has one."""
        if (self.reference.path / INDEX).exists():
            write_small(plan.target / INDEX, (self.reference.path / INDEX).read_bytes())
