"""Shards are plain safetensors, every block that is read is verified, and only what is asked for is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from megatron_retro.artifacts.block_checksums import BLOCK_BYTES, read_block_checksums
from megatron_retro.checkpoint.shard_files import (
    DTYPE_NAMES,
    Range,
    TensorSlice,
    WrittenShard,
    read_ranges,
    write_shard,
)
from megatron_retro.errors import DamagedArtifact

DTYPES = sorted(DTYPE_NAMES, key=str)


def write(path: Path, tensors: dict[str, Tensor]) -> WrittenShard:
    slices = [
        TensorSlice(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), (0,) * tensor.dim())
        for name, tensor in tensors.items()
    ]
    return write_shard(path, slices, lambda number: list(tensors.values())[number])


def read_back(path: Path, written: WrittenShard, name: str, first: int = 0, count: int | None = None) -> bytes:
    slice_ = next(slice_ for slice_ in written.slices if slice_.spec.name == name)
    target = bytearray(slice_.spec.num_bytes - first if count is None else count)
    done: list[bool] = []
    wanted = Range(slice_.begin + first, len(target), lambda: memoryview(target), lambda: done.append(True))
    read_ranges(path, written.num_bytes, written.checksums, [wanted])
    assert done == [True]
    return bytes(target)


def random_tensor(shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6),
    picks=st.lists(st.integers(0, len(DTYPES) - 1), min_size=6, max_size=6),
)
def test_safetensors_itself_reads_what_is_written(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], picks: list[int]
) -> None:
    path = tmp_path_factory.mktemp("shard") / "a.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"tensor {number}": random_tensor(shape, DTYPES[pick], generator)
        for number, (shape, pick) in enumerate(zip(shapes, picks, strict=False))
    }
    written = write(path, tensors)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        whole = tensor.contiguous().reshape(-1)
        expected = whole.view(torch.uint8).numpy().tobytes() if whole.numel() else b""
        assert read_back(path, written, name) == expected


def test_checksums_are_those_of_the_bytes_on_disk(tmp_path: Path) -> None:
    written = write(tmp_path / "a", {"x": torch.randn(3_000_000)})
    assert len(written.checksums) == -(-written.num_bytes // BLOCK_BYTES) == 3
    assert list(written.checksums) == read_block_checksums(tmp_path / "a")


def test_parts_of_tensors_over_block_borders_come_back(tmp_path: Path) -> None:
    values = torch.randn(3_000_000)
    written = write(tmp_path / "a", {"x": values, "y": values + 1})
    raw = values.numpy().tobytes()
    for first, count in ((0, 10), (BLOCK_BYTES - 7, 20), (BLOCK_BYTES - 200, BLOCK_BYTES + 900), (len(raw) - 4, 4)):
        assert read_back(tmp_path / "a", written, "x", first, count) == raw[first : first + count]


def test_ranges_that_overlap_each_get_their_bytes(tmp_path: Path) -> None:
    values = torch.arange(3_000_000, dtype=torch.int32)
    written = write(tmp_path / "a", {"x": values})
    raw, begin = values.numpy().tobytes(), written.slices[0].begin
    spans = [(5, 9_000_000), (0, 100), (4_000_000, 1_000_000), (5, 9_000_000)]
    targets = [bytearray(count) for _, count in spans]
    ranges = [
        Range(begin + first, count, lambda target=target: memoryview(target), lambda: None)
        for (first, count), target in zip(spans, targets, strict=True)
    ]
    read_ranges(tmp_path / "a", written.num_bytes, written.checksums, ranges)
    assert [bytes(target) for target in targets] == [raw[first : first + count] for first, count in spans]


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(position)
        value = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([value ^ 1]))


def test_a_flipped_bit_is_refused_by_place_and_other_blocks_stay_readable(tmp_path: Path) -> None:
    path = tmp_path / "a"
    written = write(path, {"x": torch.randn(1_500_000), "y": torch.randn(1_500_000)})
    flip(path, written.num_bytes - 3)
    assert len(read_back(path, written, "x")) == 6_000_000
    with pytest.raises(DamagedArtifact, match=rf"bytes {2 * BLOCK_BYTES} to {written.num_bytes} have changed"):
        read_back(path, written, "y")


def test_a_cut_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    written = write(path, {"x": torch.randn(100)})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedArtifact, match="another size"):
        read_back(path, written, "x")
    path.unlink()
    with pytest.raises(DamagedArtifact, match="missing"):
        read_back(path, written, "x")
