"""The table of accelerators: who stands in it, and that no rate is above what the data sheets allow."""

from __future__ import annotations

import pytest

from megatron_retro.config.hardware import known_accelerator, read_hardware

# memory (GB), dense bf16 (TFLOP/s), memory bandwidth (TB/s), one direction of the links inside a node (GB/s)
DATA_SHEETS = {
    "A100": (80, 312, 2.039, 300),
    "A100-40GB": (40, 312, 1.555, 300),
    "H100": (80, 989.5, 3.35, 450),
    "H200": (141, 989.5, 4.8, 450),
    "B200": (180, 2250, 8.0, 900),
    "MI300X": (192, 1307.4, 5.3, 448),
}


def test_the_table_holds_the_accelerators_that_people_have() -> None:
    assert set(read_hardware()) == set(DATA_SHEETS)


@pytest.mark.parametrize("name", DATA_SHEETS)
def test_rates_are_below_the_data_sheet(name: str) -> None:
    row, (memory, peak, bandwidth, link) = read_hardware()[name], DATA_SHEETS[name]
    assert row.memory_gb == memory
    assert row.peak_tflops == pytest.approx(peak, rel=1e-3)
    assert 0.4 * peak < row.matmul_tflops < peak
    assert 0.7 * bandwidth < row.memory_tb_per_s < bandwidth
    assert 0.6 * link < row.node_gb_per_s < link


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_device_is_known_by_its_own_name(device: str, name: str | None) -> None:
    """Utilization is counted against the peak of this row: none is better than that of another card."""
    found = known_accelerator(device)
    assert (None if found is None else found.name) == name
