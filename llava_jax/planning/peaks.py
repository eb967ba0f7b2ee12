"""What devices can compute at most, for model FLOPs utilisation."""

from llava_jax.planning.targets import GPUS, TPUS

# Beside those that can be planned for: NVIDIA's data sheets and architecture papers, bfloat16 without sparsity.
_OTHERS = {
    "TPU v3": 61.5,  # cloud.google.com/tpu/docs/v3: 123 a chip, which is two devices
    "NVIDIA B200": 2250,
    "NVIDIA GB200": 2500,
    "NVIDIA GH200": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
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
    """bfloat16 FLOPs per second of a device that JAX calls so; None if it is in neither table."""
    chips = (TPUS | GPUS).values()
    tflops = {kind: chip.peak_tflops for chip in chips for kind in chip.kinds} | _OTHERS
    kinds = [kind for kind in tflops if device_kind.startswith(kind)]
    return 1e12 * tflops[max(kinds, key=len)] if kinds else None  # "NVIDIA A100" is no "NVIDIA A10"
