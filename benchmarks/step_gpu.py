"""python -m benchmarks.step_gpu [--stage=1] [--json]: a training step of LLaVA-1.5-7B on one GPU, beside transformers'.

Real shapes, random weights. Ours is the step that training compiles (llava_jax/program.py) on packed rows with images;
transformers gets the same samples as rows of their own, all of one length, so that neither side pads: LLaVA in torch,
gradient checkpointing, scaled_dot_product_attention, fused AdamW, with float32 weights under autocast as ours has them,
and with bfloat16 weights alone. Each runs in a process of its own, after a plan of the step's memory for the same card.
"""

import argparse

from benchmarks.step_comparison import add_arguments, cases, compare


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_gpu", description=__doc__)
    parser.add_argument("--stage", choices=("1", "2"), default="2", help="1: the projector alone trains")
    add_arguments(parser)
    options = parser.parse_args()
    compare(cases(options, [f"stage{options.stage}"]), options)


if __name__ == "__main__":
    main()
