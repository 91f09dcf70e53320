"""Peak rates of accelerators from their manufacturers' data sheets, for `utilization` and `preflight`."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peak rates of one chip, or of the part of one that JAX counts as a device.

    Attributes:
      bfloat16: dense floating-point operations per second.
      tf32: whether float32 convolutions run as TF32, at half the bfloat16 rate, as on NVIDIA GPUs. TPUs compute them in
        one bfloat16 pass by default.
      hbm: memory, bytes; None for chips that `preflight` does not support, as are the fields below.
      hbm_bandwidth: bytes per second.
      link: bytes per second that the chip can send to its neighbours while it receives as many: half of the
        "bidirectional bandwidth" of data sheets.
      network: the same to other nodes, for chips in nodes; None if `link` reaches all chips.
    """

    bfloat16: float
    tf32: bool = False
    hbm: float | None = None
    hbm_bandwidth: float | None = None
    link: float | None = None
    network: float | None = None

    def peak(self, dtype: str) -> float:
        """Return the peak floating-point operations per second of matrix products in `dtype`."""
        return self.bfloat16 / 2 if self.tf32 and dtype != "bfloat16" else self.bfloat16


CHIPS: dict[str, Chip] = {
    # NVIDIA A100 80GB SXM data sheet: 312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s. DGX A100 data sheet: one 200 Gb/s
    # network port for each GPU. Memory as the driver reports it (targets/a100.txtpb).
    "A100": Chip(312e12, True, 85_100_068_864, 2.039e12, 300e9, 25e9),
    "H100 PCIe": Chip(756e12, True),  # NVIDIA H100 data sheet
    # NVIDIA H100 SXM data sheet: 1,979 TFLOP/s with sparsity, half without; 3.35 TB/s, NVLink 900 GB/s. DGX H100
    # data sheet: one 400 Gb/s network port for each GPU.
    "H100": Chip(989e12, True, 84_942_979_072, 3.35e12, 450e9, 50e9),
    # NVIDIA H200 SXM data sheet: 1,979 TFLOP/s with sparsity, 4.8 TB/s, NVLink 900 GB/s. DGX H200: as DGX H100.
    "H200": Chip(989e12, True, 151_397_597_184, 4.8e12, 450e9, 50e9),
    "V100": Chip(125e12, True),  # NVIDIA V100 data sheet
    "L4": Chip(121e12, True),  # NVIDIA L4 data sheet, without sparsity
    "TPU v2": Chip(22.5e12),  # cloud.google.com/tpu/docs/v2, one core
    "TPU v3": Chip(61.5e12),  # cloud.google.com/tpu/docs/v3, one core
    # cloud.google.com/tpu/docs/v4: 275 TFLOP/s, 32 GiB, 1,200 GB/s. Jouppi et al., "TPU v4" (ISCA 2023), table 4: six
    # links of 50 GB/s in each direction.
    "TPU v4": Chip(275e12, False, 32 * GIB, 1.2e12, 300e9),
    # cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 16 GB, 819 GB/s, 400 GB/s both ways.
    "TPU v5 lite": Chip(197e12, False, 16 * GIB, 819e9, 200e9),
    "TPU v5e": Chip(197e12, False, 16 * GIB, 819e9, 200e9),
    # cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 95 GiB, 2,765 GB/s, 1,200 GB/s both ways. The compiler can use
    # 95.74 GiB (see `targets`), so the chip must have 96.
    "TPU v5p": Chip(459e12, False, 96 * GIB, 2.765e12, 600e9),
    "TPU v5": Chip(459e12, False, 96 * GIB, 2.765e12, 600e9),
    # cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 32 GB, 1,638 GB/s, 800 GB/s both ways.
    "TPU v6": Chip(918e12, False, 32 * GIB, 1.638e12, 400e9),
}
"""Chips by JAX's `device_kind`, or a part of it; the first match counts."""


def chip_of(device_kind: str) -> Chip | None:
    """Return the chip of JAX's `device_kind`; None for devices that are not in the table."""
    return next((chip for name, chip in CHIPS.items() if name in device_kind), None)
