"""What more devices take off each one: state, arithmetic and traffic of compiled steps on 8 to 64 virtual devices.

    python -m benchmarks.scaling [--json]

Nothing is run: the CPU compiler partitions the step of a model of a quarter billion parameters (decoder and projector
train in bfloat16, the vision tower is frozen), one row of 512 tokens per device, and its program is counted. The
layers' loops are unrolled, for a loop's body is counted once. The CPU moves bfloat16 as float32, at twice the bytes,
and reduces gradients whole where accelerators scatter them.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys

LENGTH = 512
BYTES = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
COLLECTIVE = re.compile(r"= (\(.*?\)|\S+) (all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\(")
ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
MESHES = [  # zero, mesh.fsdp, mesh.tensor
    *((3, size, 1) for size in (8, 16, 32, 64)),
    (2, 8, 1),
    (1, 8, 1),
    (3, 32, 2),
]


def collective_bytes(hlo: str) -> dict[str, int]:
    """The bytes of the results of a program's collectives on one device, by kind."""
    found = dict.fromkeys(("all-gather", "all-reduce", "reduce-scatter", "all-to-all"), 0)
    for types, kind in COLLECTIVE.findall(hlo):
        for dtype, sizes in ARRAY.findall(types):
            found[kind] += BYTES[dtype] * math.prod(int(size) for size in sizes.split(",") if size)
    return found


def measure(zero: int, fsdp: int, tensor: int) -> dict:
    """Figures of one device, for a process that has `fsdp * tensor` of them."""
    import jax

    from llava_jax.config import (
        Config,
        DataConfig,
        MeshConfig,
        ModelConfig,
        ShardingConfig,
        TextConfig,
        TrainConfig,
        VisionConfig,
    )
    from llava_jax.program import Program
    from llava_jax.sharding import make_mesh

    layers = 2
    model = ModelConfig(
        vision=VisionConfig(num_hidden_layers=layers, image_size=112),
        text=TextConfig(
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=layers,
            num_attention_heads=16,
            num_key_value_heads=16,
            head_dim=128,
        ),
    )
    config = Config(
        model=model,
        data=DataConfig(batch_size=fsdp * tensor, max_length=LENGTH),
        mesh=MeshConfig(1, fsdp, tensor),
        sharding=ShardingConfig(zero),
        train=TrainConfig(scan_unroll=layers),
    )
    program = Program(config, make_mesh(config.mesh), num_steps=1)
    state, frozen = program.abstract_state(), program.abstract_frozen()
    compiled = program.train_step().lower(state, frozen, program.abstract_batch(LENGTH, 1)).compile()

    def held(tree) -> int:
        leaves = jax.tree.leaves(tree)
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)

    return {
        "zero": zero,
        "fsdp": fsdp,
        "tensor": tensor,
        "parameters": held((state.trainable, frozen)),
        "moments": held(state.opt_state),
        "flops": compiled.cost_analysis()["flops"],
        **collective_bytes(compiled.as_text()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--measure", nargs=3, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    rows = []
    for zero, fsdp, tensor in MESHES:
        flags = {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={fsdp * tensor}",
            "JAX_PLATFORMS": "cpu",
        }
        command = [sys.executable, "-m", "benchmarks.scaling", "--measure", *map(str, (zero, fsdp, tensor))]
        run = subprocess.run(command, env=os.environ | flags, check=True, capture_output=True, text=True)
        rows.append(json.loads(run.stdout.splitlines()[-1]))
        if len(rows) == 1:
            print(
                "zero  fsdp  tensor  MB per device: parameters  moments  gathered  reduced  exchanged   GFLOP"
            )
        print(_line(rows[-1]), flush=True)
    if arguments.json:
        print(json.dumps({"rows": rows}))


def _line(row: dict) -> str:
    reduced = row["all-reduce"] + row["reduce-scatter"]
    megabytes = [row["parameters"], row["moments"], row["all-gather"], reduced, row["all-to-all"]]
    held = "".join(
        f"{size / 1e6:>{width}.1f}" for size, width in zip(megabytes, (27, 9, 10, 9, 11), strict=True)
    )
    return f"{row['zero']:>4}{row['fsdp']:>6}{row['tensor']:>8}{held}{row['flops'] / 1e9:>8.0f}"


if __name__ == "__main__":
    main()
