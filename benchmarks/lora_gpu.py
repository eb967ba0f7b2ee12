"""python -m benchmarks.lora_gpu [--rank=128] [--json]: LoRA and QLoRA steps of LLaVA-1.5-7B on one GPU.

As benchmarks/step_gpu.py has full fine-tuning, beside transformers with PEFT. QLoRA keeps the decoder's kernels as
doubly quantised nf4; for it nothing is compared, because bitsandbytes would be needed.
"""

import argparse

from benchmarks.options import positive, several
from benchmarks.step_comparison import add_arguments, cases, compare


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lora_gpu", description=__doc__)
    forms = ("lora", "qlora")
    parser.add_argument("--rank", type=positive, default=128)
    parser.add_argument("--forms", type=several(*forms), default=forms, help=",".join(forms))
    add_arguments(parser)
    options = parser.parse_args()
    compare(cases(options, options.forms, rank=options.rank), options)


if __name__ == "__main__":
    main()
