"""Our reader and writer against the safetensors library's."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conversion.errors import DamagedCheckpointError
from conversion.safetensors_file import HeaderEntry, build_header, header_order, map_bytes, read_header

TENSORS = {
    "b.weight": torch.arange(6, dtype=torch.float32).view(2, 3).bfloat16(),
    "a.weight": torch.arange(15, dtype=torch.uint8).view(torch.float8_e4m3fn).view(3, 5),
    "c.bias": torch.tensor([1.5, 2.5]),
    "scalar": torch.tensor(7.0),
}


def test_the_header_we_write_is_the_one_safetensors_writes(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    entries = header_order([HeaderEntry(name, t.dtype, tuple(t.shape)) for name, t in TENSORS.items()])
    written = (tmp_path / "x.safetensors").read_bytes()
    header = build_header(entries, {"format": "pt"})
    assert written.startswith(header)
    assert len(written) == len(header) + sum(t.nbytes for t in TENSORS.values())


def test_reading_gives_what_was_saved(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file(TENSORS, file, metadata={"format": "pt"})
    header = read_header(file)
    assert header.metadata == {"format": "pt"}
    for name, tensor in TENSORS.items():
        stored = header.tensors[name].read()
        assert (stored.dtype, stored.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(stored.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name
    assert torch.equal(header.tensors["b.weight"].read_rows(1, 2), TENSORS["b.weight"][1:2])
    with safe_open(file, "pt") as reference:
        assert set(reference.keys()) == set(header.tensors)
    assert load_file(file).keys() == header.tensors.keys()


def test_mapping_does_not_change_the_file(tmp_path):
    file = tmp_path / "bytes"
    file.write_bytes(bytes(range(16)))
    mapped = map_bytes(file, 4, 4)
    mapped += 1  # private to the process
    assert file.read_bytes() == bytes(range(16))
    assert mapped.tolist() == [5, 6, 7, 8]


def _write(path, header: object, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _entry(begin: int, end: int, shape=(2,), dtype="BF16") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": _entry(0, 4)}, b"123", "truncated"),
        ({"a": _entry(0, 4)}, b"12345", "left over"),
        ({"a": _entry(0, 4), "b": _entry(2, 6)}, b"123456", "starts at data byte 2"),
        ({"a": _entry(0, 4), "b": _entry(6, 10)}, b"1234567890", "starts at data byte 6"),
        ({"a": _entry(0, 4, shape=(3,))}, b"1234", "takes 4 bytes, but BF16 of shape"),
        ({"a": _entry(0, 4, dtype="C64")}, b"1234", "C64"),
    ],
    ids=["truncated", "left over", "overlap", "gap", "shape", "dtype"],
)
def test_a_header_that_contradicts_the_file_is_refused(tmp_path, header, data, message):
    _write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(DamagedCheckpointError, match=message):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        *([1], {"a": [1]}, {"a": {}}, {"a": _entry(0, 4) | {"data_offsets": [0]}}, {"a": _entry(0, 4, ["2"])}),
        *({"a": _entry(0, 4, [-1, -2])}, {"a": _entry(0, 4, [True, 2])}, {"a": _entry(0, 4, [10**4000] * 2)}),
        *({"a": _entry(0, 4, [2, *[1] * 1000])}, {"a": _entry(0, 10**30)}),
    ],
    ids=["list", "entry", "empty", "offsets", "shape", "negative", "flag", "digits", "dimensions", "huge offset"],
)
def test_a_header_of_another_form_is_refused(tmp_path, header):
    _write(tmp_path / "x.safetensors", header, b"1234")
    with pytest.raises(DamagedCheckpointError, match=r"header of .*x\.safetensors (is not a JSON|describes a without)"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("data", [b"", b"\x00" * 4, b"\xff" * 16, b"\x04\x00\x00\x00\x00\x00\x00\x00oops"])
def test_what_is_not_safetensors_is_refused(tmp_path, data):
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(DamagedCheckpointError):
        read_header(tmp_path / "x.safetensors")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DamagedCheckpointError, match=r"absent\.safetensors is missing"):
        read_header(tmp_path / "absent.safetensors")
