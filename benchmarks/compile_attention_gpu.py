"""python -m benchmarks.compile_attention_gpu [--json]: compiles the Hopper attention kernels without a GPU and checks them.

Needs `pip install jax-cuda13-plugin` of jax's version, which brings the compiler; no driver, no card.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import sys
import tempfile
from pathlib import Path

# Public figures of the cards: memory in bytes, bytes per second.
CARDS = {
    "H200": ("NVIDIA H200", 151397597184, 4.8e12),
    "H100": ("NVIDIA H100 80GB HBM3", 84942979072, 3.352e12),
}
SHAPES = {
    "H64 577": dict(B=8, T=577, N=16, H=64, causal=False),
    "H128 2048 causal packed": dict(B=4, T=2048, N=32, H=128, causal=True),
    "H64 2048 causal packed": dict(B=4, T=2048, N=32, H=64, causal=True),
}
KERNELS = ("forward", "dq", "dkv")


def target(card: str) -> str:
    """A GpuTargetConfigProto: what XLA's compiler asks of a card."""
    name, memory, bandwidth = CARDS[card]
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": 233472,
        "shared_memory_per_block_optin": 232448,
        "threads_per_core_limit": 2048,
        "core_count": 132,
        "fpus_per_core": 128,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": int(bandwidth),
        "l2_cache_size": 52428800,
        "clock_rate_ghz": 1.98,
        "device_memory_size": memory,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    fields = " ".join(f"{key}: {value}" for key, value in device.items())
    capability = "cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }"
    versions = "dnn_version_info { major: 9 minor: 10 patch: 0 }"
    return (
        f'gpu_device_info {{ {fields} {capability} }} platform_name: "CUDA" {versions} '
        f'device_description_str: "{name}"'
    )


@dataclasses.dataclass
class _Group:
    """Matmuls in flight: the registers that they write and those that they read."""

    written: set[str] = dataclasses.field(default_factory=set)
    read: set[str] = dataclasses.field(default_factory=set)


def misused_registers(ptx: str) -> list[str]:
    """Lines that touch a register while a matmul in flight still writes it, or write one that it still reads.

    wgmma is asynchronous, and the compiler in front of ptxas does not know. Where this happens ptxas
    runs all matmuls one by one, or the program is wrong.
    """
    found, committed, open_group = [], [], _Group()
    for number, line in enumerate(ptx.splitlines(), 1):
        line = line.strip()
        complain = lambda what, number=number, line=line: found.append(f"{number}: {what}: {line[:80]}")
        flying = [*committed, open_group]
        written, read = (
            set().union(*(getattr(group, key) for group in flying)) for key in ("written", "read")
        )
        if "wgmma.mma_async" in line:
            lists = [
                set(re.findall(r"%\w+", part))
                for part in re.findall(r"\{([^{}]*)\}", line.split("mma_async")[1])
            ]
            if len(lists) > 1 and lists[1] & written:
                complain("operand in flight")
            open_group.written |= lists[0]
            open_group.read |= lists[1] if len(lists) > 1 else set()
        elif "wgmma.commit_group" in line:
            committed.append(open_group)
            open_group = _Group()
        elif wait := re.search(r"wgmma\.wait_group\S* (\d+)", line):
            committed = committed[len(committed) - int(wait[1]) :] if int(wait[1]) else []
        elif re.match(r"\$L__BB\w+:", line) and (written or read):
            complain("in flight at a branch")
        elif not line.startswith((".", "//", "$")):
            if written.intersection(re.findall(r"%\w+", line)):
                complain("result in flight")
            destination = re.match(r"(?:@!?%\w+\s+)?(?!st|mbarrier)[\w.:]+\s+\{?(%\w+)", line)
            if destination and destination[1] in read:
                complain("operand overwritten")
    return found


def compile_case(card: str, B: int, T: int, N: int, H: int, causal: bool) -> list[dict]:
    """Compiles forward and backward for a card; one row per kernel."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from llava_jax.kernels.flash_gpu import flash_attention

    devices = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=target(card), topology="1x1x1"
    ).devices
    sharding = jax.sharding.SingleDeviceSharding(devices[0])
    tensor = jax.ShapeDtypeStruct((B, T, N, H), jnp.bfloat16, sharding=sharding)
    segments = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=sharding) if causal else None

    def both(q, k, v, do, segment_ids):
        attend = lambda q, k, v: flash_attention(q, k, v, segment_ids, causal=causal, sm_scale=H**-0.5)
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(do)

    arguments = tensor, tensor, tensor, tensor, segments
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        with standard_error_in(Path(folder) / "stderr"):
            jax.jit(both).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
        return [describe(path) for path in sorted(Path(folder).glob("*.ptx"))]


@contextlib.contextmanager
def standard_error_in(path: Path):
    """What libraries write there, too: the dump complains of a disassembler that is not installed."""
    kept = os.dup(2)
    with path.open("w") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def describe(ptx_file: Path) -> dict:
    """What the compiler said of one kernel, and which of the three it is."""
    ptx, said = ptx_file.read_text(), ptx_file.with_suffix(".ptxas").read_text()
    resources = ptx_file.with_suffix(".resources.txt").read_text()
    waits = re.findall(r"wgmma\.wait_group\S* (\d+)", ptx)
    # dq is the only one that waits with two matmuls in flight, the forward kernel has logarithms.
    kernel = "dq" if "2" in waits else "forward" if "lg2.approx" in ptx else "dkv"
    number = lambda pattern, text: int(re.search(pattern, text)[1])
    return {
        "kernel": kernel,
        "registers": number(r"Used (\d+) registers", said),
        "claimed": [int(n) for n in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32 (\d+)", ptx)],
        "spill_bytes": sum(int(n) for n in re.findall(r"(\d+) bytes spill", said)),
        "serialized": "C7510" in said or "C7513" in said or "serialized" in said,
        "shared_bytes": number(r"smem_scratch_bytes=(\d+)", resources),
        "wgmma": ptx.count("wgmma.mma_async"),
        "waits": {n: waits.count(n) for n in sorted(set(waits))},
        "misused": misused_registers(ptx),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_attention_gpu", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--card", choices=CARDS, action="append", help="H200 and H100 when not given")
    options = parser.parse_args()
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        sys.exit("The compiler for GPUs is missing: pip install jax-cuda13-plugin==<the version of jax>.")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    print(f"{'card':6}{'shape':26}{'kernel':9}{'registers (loader, compute)':>29}{'spills':>8}{'shared KB':>11}"
          f"{'wgmma':>7}  {'waits':24}{'verdict'}")  # fmt: skip
    rows = []
    for card in options.card or CARDS:
        for name, shape in SHAPES.items():
            for row in sorted(compile_case(card, **shape), key=lambda row: KERNELS.index(row["kernel"])):
                bad = row["spill_bytes"] or row["serialized"] or row["misused"]
                claimed = f"{row['registers']} ({min(row['claimed'])}, {max(row['claimed'])})"
                waits = ", ".join(f"{count} x {n}" for n, count in row["waits"].items())
                print(f"{card:6}{name:26}{row['kernel']:9}{claimed:>29}{row['spill_bytes']:8}"
                      f"{row['shared_bytes'] / 1024:11.0f}{row['wgmma']:7}  {waits:24}{'BAD' if bad else 'good'}",
                      flush=True)  # fmt: skip
                rows.append({"card": card, "shape": name, **row})
    bad = [row for row in rows if row["spill_bytes"] or row["serialized"] or row["misused"]]
    if options.json:
        print(json.dumps({"kernels": rows, "bad": len(bad)}))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
