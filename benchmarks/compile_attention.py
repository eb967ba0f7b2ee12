"""python -m benchmarks.compile_attention [--topologies=v5e:2x2,...] [--lengths=2048,...] [--json]: TPU kernels, compiled.

Compiles our kernel and JAX's splash attention, forward and backward, for TPUs that are not here (needs libtpu, the
extra [plan]). It shows that the compiler takes them and what memory they use, not how fast they run.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import sys
import time

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
LENGTHS = (2048, 4096, 8192)
# In which libtpu compiles without a TPU; to be set before it is loaded.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # there is no TPU VM to ask
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # only silences a warning
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing runs on a TPU, so other processes may load it too
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; its batch is as small as a device's share may be."""

    name: str
    length: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    causal: bool  # with segments; otherwise no mask at all
    dtype: str = "bfloat16"


def cases(lengths: tuple[int, ...]) -> list[Case]:
    """The decoder of LLaVA-1.5-7B at these lengths, with fewer key/value heads, in float32, and CLIP."""
    return [
        *(Case("Vicuna", length, 32, 32, 128, True) for length in lengths),
        Case("grouped by 8", 2048, 32, 4, 128, True),
        Case("float32", 1000, 4, 4, 128, True, "float32"),
        Case("head width 80", 2048, 16, 16, 80, True),
        Case("CLIP", 577, 16, 16, 64, False),
    ]


def compile_case(case: Case, implementation: str, topology: str) -> dict:
    """Compiles values and gradients for one device of the topology; what the compiler says of memory, in MiB."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from llava_jax.kernels.attention import attention

    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def array(*shape, dtype=case.dtype):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    def both(q, k, v, segment_ids, grad):
        how = dict(causal=case.causal, implementation=implementation)
        ids = segment_ids if case.causal else None
        out, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, segment_ids=ids, **how), q, k, v)
        return out, *vjp(grad)

    query = array(2, case.length, case.num_heads, case.head_dim)
    key = array(2, case.length, case.num_kv_heads, case.head_dim)
    before = time.monotonic()
    traced = jax.jit(both).trace(query, key, key, array(2, case.length, dtype="int32"), query)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    seconds = time.monotonic() - before
    text = compiled.as_text()
    kernels = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    vmem = [re.search(r'"used_scoped_memory_configs":\[\{[^}]*"size":"(\d+)"', line) for line in kernels]
    return {
        "case": case.name,
        "length": case.length,
        "topology": topology,
        "implementation": implementation,
        "seconds": seconds,
        "kernels": len(kernels),
        "vmem_mib": max((int(found[1]) / 2**20 for found in vmem if found), default=None),
        "temp_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topologies", default=",".join(TOPOLOGIES))
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    if importlib.util.find_spec("libtpu") is None:
        sys.exit("libtpu is not installed: pip install -c constraints.txt -e '.[plan]'")
    os.environ |= ENVIRONMENT
    print(
        f"{'topology':<11}{'case':<15}{'tokens':>7}{'kernel':>11}{'VMEM MiB':>10}{'temp MiB':>10}{'seconds':>9}"
    )
    rows = []
    for topology in args.topologies.split(","):
        for case in cases(tuple(map(int, args.lengths.split(",")))):
            for implementation in ("flash_tpu", "splash"):
                row = compile_case(case, implementation, topology)
                rows.append(row)
                vmem = (
                    "-" if row["vmem_mib"] is None else f"{row['vmem_mib']:.1f}"
                )  # not told of every kernel
                print(
                    f"{topology:<11}{case.name:<15}{case.length:>7}{implementation:>11}{vmem:>10}"
                    f"{row['temp_mib']:>10.1f}{row['seconds']:>9.1f}",
                    flush=True,
                )
    if args.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
