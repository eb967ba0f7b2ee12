"""Kinds of devices: their memory, and what they can compute at most."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX calls a device of some kind."""

    kinds: tuple[str, ...]  # its device_kind begins with one of these
    hbm_gib: (
        float  # TPU: what the compiler says is available (libtpu 0.0.42.1); GPU: all that the driver shows
    )
    peak_tflops: float  # bfloat16, dense


# Peaks: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x; a tpu7x chip is two devices.
TPUS = {
    "v4": Chip(("TPU v4",), 30.75, 275),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 15.75, 197),
    "v5p": Chip(("TPU v5p", "TPU v5"), 95.74, 459),
    "v6e": Chip(("TPU v6",), 31.25, 918),
    "tpu7x": Chip(("TPU7x", "TPU v7"), 94.75, 1153.5),
}
# Peaks: NVIDIA's data sheets of the SXM cards.
GPUS = {
    "a100": Chip(("NVIDIA A100",), 79.25, 312),
    "h100": Chip(("NVIDIA H100",), 79.65, 989),
    "h200": Chip(("NVIDIA H200",), 140.4, 989),
}
# Beside those that can be planned for: NVIDIA's data sheets and architecture papers, bfloat16 without sparsity.
_OTHERS = {
    "TPU v3": 61.5,  # cloud.google.com/tpu/docs/v3: 123 a chip, which is two devices
    "NVIDIA B200": 2250,
    "NVIDIA GB200": 2500,
    "NVIDIA GH200": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H200 NVL": 835,
    "NVIDIA H800": 989,
    "NVIDIA H20": 148,
    "NVIDIA A800": 312,
    "NVIDIA A40": 149.7,
    "NVIDIA A30": 165,
    "NVIDIA A10": 125,
    "NVIDIA A10G": 70,
    "NVIDIA L40S": 362,
    "NVIDIA L40": 181,
    "NVIDIA L4": 121,
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 5090": 209.5,
}


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 FLOPs per second of a device that JAX calls so; None if it is in neither table, or a part of a card."""
    if "MIG" in device_kind:
        return None
    chips = (TPUS | GPUS).values()
    tflops = {kind: chip.peak_tflops for chip in chips for kind in chip.kinds} | _OTHERS
    kinds = [kind for kind in tflops if device_kind.startswith(kind)]
    return 1e12 * tflops[max(kinds, key=len)] if kinds else None  # "NVIDIA A100" is no "NVIDIA A10"
