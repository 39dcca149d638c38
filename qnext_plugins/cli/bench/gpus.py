"""What the makers' data sheets say of GPUs: memory bandwidth, and dense matrix products accumulated in float32."""

from __future__ import annotations

from typing import NamedTuple


class DataSheet(NamedTuple):
    """Of one GPU."""

    bandwidth: float
    """TB/s of its memory."""
    bf16: float
    """TFLOP/s without sparsity."""
    fp8: float | None
    """TFLOP/s without sparsity; None where there are no such instructions."""


# By what the driver's name contains; the first that fits counts, so the longer name comes first.
DATA_SHEETS = {
    "H200 NVL": DataSheet(4.8, 836, 1671),
    "GH200": DataSheet(4.0, 989, 1979),
    "H200": DataSheet(4.8, 989, 1979),
    "H100 NVL": DataSheet(3.9, 836, 1671),
    "H100 PCIe": DataSheet(2.0, 756, 1513),
    "H100": DataSheet(3.35, 989, 1979),
    "H800": DataSheet(3.35, 989, 1979),
    "H20": DataSheet(4.0, 148, 296),
    "GB200": DataSheet(8.0, 2500, 5000),
    "B200": DataSheet(8.0, 2250, 4500),
    "A100 80GB PCIe": DataSheet(1.935, 312, None),
    "A100-SXM4-80GB": DataSheet(2.039, 312, None),
    "A100": DataSheet(1.555, 312, None),
    "L40S": DataSheet(0.864, 362, 733),
    "RTX PRO 6000": DataSheet(1.792, 504, 1008),
    "RTX 6000 Ada": DataSheet(0.96, 364, 729),
    "RTX 5090": DataSheet(1.792, 210, 419),
    "RTX 4090": DataSheet(1.008, 165, 330),
    "RTX 3090": DataSheet(0.936, 71, None),
    "MI300X": DataSheet(5.3, 1307, 2615),
    "MI325X": DataSheet(6.0, 1307, 2615),
    "MI355X": DataSheet(8.0, 2517, 5033),
}


def data_sheet(name: str) -> DataSheet | None:
    """That of the GPU which the driver calls ``name``, or None if it is not known here."""
    return next((sheet for part, sheet in DATA_SHEETS.items() if part in name), None)
