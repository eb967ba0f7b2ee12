"""python -m benchmarks.packing [--json]: how many tokens are padding, in the original's batches and in ours."""

import argparse
import dataclasses
import functools
import json
import time

import numpy as np

from llava_jax.data.packing import default_max_images, epoch_rows, pack
from llava_jax.data.samplers import get_modality_length_grouped_indices
from llava_jax.data.schedules import PaddedSchedule, grouped_order

MAX_LENGTH = 2048
IMAGE_TOKENS = 576
SYSTEM_TOKENS = 36  # of the v1 template, with the beginning of the sequence
ROUND_TOKENS = 9  # role names and separators around one question and its answer
ROW_LENGTHS = (2048, 4096, 8192, 16384)
DEFAULT_ROW_LENGTH = 4 * MAX_LENGTH
RANKS, ROWS_PER_RANK = 8, 16  # LLaVA-1.5's stage 2: eight GPUs, 16 samples each
SAMPLES_PER_STEP = RANKS * ROWS_PER_RANK


@dataclasses.dataclass(frozen=True)
class Part:
    """One source of llava_v1_5_mix665k (data mixture of the LLaVA-1.5 paper, arXiv:2310.03744).

    The number of samples is published. The rest is estimated from how the sources are written: rounds per sample
    from lowest to highest (uniform), and words of a round, question and answer, as mean and deviation.
    """

    name: str
    num_samples: int
    rounds: tuple[int, int]
    words: tuple[float, float]
    tokens_per_word: float = 1.3
    has_image: bool = True


# VQA sources put all questions about an image into one conversation of short rounds; boxes are written as
# "[0.12, 0.34, 0.56, 0.78]", 26 tokens in 4 words; ShareGPT is long and cut at MAX_LENGTH.
MIX = (
    Part("llava conversation", 58_000, (2, 6), (42, 18)),
    Part("llava detail", 23_000, (1, 1), (125, 35)),
    Part("llava complex reasoning", 77_000, (1, 1), (170, 45)),
    Part("ShareGPT", 40_000, (1, 9), (210, 170), has_image=False),
    Part("VQAv2", 83_000, (3, 8), (8.5, 2)),
    Part("GQA", 72_000, (5, 21), (10, 2.5)),
    Part("OKVQA", 9_000, (1, 2), (18, 4)),
    Part("OCR-VQA", 80_000, (2, 6), (15, 6), 1.5),
    Part("A-OKVQA", 66_000, (1, 1), (34, 8)),
    Part("TextCaps", 22_000, (1, 1), (45, 20), 1.8),
    Part("RefCOCO", 48_000, (1, 10), (14, 3), 3.0),
    Part("Visual Genome", 86_000, (10, 10), (13, 2), 3.0),
)


def draw_mix(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens with images, images and words of every sample: int32[N] each."""
    random = np.random.default_rng(seed)
    columns = []
    for part in MIX:
        rounds = random.integers(part.rounds[0], part.rounds[1] + 1, part.num_samples)
        mean, deviation = part.words
        shape = (mean / deviation) ** 2  # of a gamma distribution; those of several rounds add up
        words = np.maximum(2 * rounds, random.gamma(shape * rounds, mean / shape)).astype(np.int32)
        tokens = SYSTEM_TOKENS + ROUND_TOKENS * rounds + (words * part.tokens_per_word).astype(np.int32)
        tokens += IMAGE_TOKENS * part.has_image
        images = np.full(part.num_samples, part.has_image, np.int32)
        columns.append((np.minimum(tokens, MAX_LENGTH).astype(np.int32), images, words))
    return tuple(np.concatenate(column) for column in zip(*columns, strict=True))


def original_waste(lengths: np.ndarray, num_images: np.ndarray, words: np.ndarray) -> float:
    """Share of padding where each device pads its microbatch to the longest, in the original's order by words."""
    signed = np.where(num_images > 0, words, -words)
    draw = np.random.default_rng(0)
    order = np.array(get_modality_length_grouped_indices(signed, ROWS_PER_RANK, RANKS, draw))
    starts = np.arange(0, len(order), ROWS_PER_RANK)
    longest = np.maximum.reduceat(lengths[order], starts)
    return 1 - lengths.sum() / (longest * np.diff(starts, append=len(order))).sum()


def grouped_waste(lengths: np.ndarray, num_images: np.ndarray) -> dict:
    """The same with lengths in tokens and a step's rows padded to one of few lengths, data.packing=False."""
    order = functools.partial(
        grouped_order,
        lengths=lengths,
        num_images=num_images,
        batch_size=SAMPLES_PER_STEP,
        accumulation_steps=1,
        seed=0,
    )
    schedule = PaddedSchedule(lengths, num_images, order, batch_size=SAMPLES_PER_STEP, max_length=MAX_LENGTH)
    shapes = np.array([schedule.step_shape(step) for step in range(schedule.steps_per_epoch)])
    tokens, slots = shapes.sum(axis=0) * SAMPLES_PER_STEP
    return {
        "waste": 1 - lengths.sum() / tokens,
        "unused_slots": 1 - num_images.sum() / slots,
        "programs": len(schedule.shapes(0)),
    }


def packed(lengths: np.ndarray, num_images: np.ndarray, row_length: int) -> dict:
    """Packs the mix and measures it; steps have as many tokens as SAMPLES_PER_STEP samples have, or more."""
    start = time.perf_counter()
    max_images = default_max_images(lengths, num_images, row_length=row_length)
    packing = pack(lengths, num_images, row_length=row_length, max_images=max_images, seed=0)
    row_images = packing.totals(num_images)
    rows_per_rank = max(1, round(SAMPLES_PER_STEP * packing.num_rows / len(lengths) / RANKS))
    order = epoch_rows(row_images, 0, seed=0, rows_per_step=RANKS * rows_per_rank)
    seconds = time.perf_counter() - start
    num_steps = packing.num_rows // (RANKS * rows_per_rank)
    of_ranks = (
        row_images[order[: num_steps * RANKS * rows_per_rank]].reshape(num_steps, RANKS, -1).sum(axis=2)
    )
    in_ten_steps = of_ranks[: num_steps // 10 * 10].reshape(-1, 10, RANKS).sum(axis=1)
    spread = np.ptp(of_ranks, axis=1)
    return {
        "row_length": row_length,
        "max_images": max_images,
        "waste": 1 - lengths.sum() / (packing.num_rows * row_length),
        "unused_slots": 1 - num_images.sum() / (packing.num_rows * max_images),
        "rows": packing.num_rows,
        "samples_per_row": len(lengths) / packing.num_rows,
        "rows_per_rank": rows_per_rank,
        "rank_spread_images": float(spread.mean()),
        "steps_within_5_percent_or_2_images": float(
            (spread <= np.maximum(2, 0.05 * of_ranks.mean(axis=1))).mean()
        ),
        "rank_spread_10_steps": float((np.ptp(in_ten_steps, axis=1) / in_ten_steps.mean(axis=1)).max()),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packing", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    lengths, num_images, words = draw_mix()
    deciles = np.percentile(lengths, [1, 10, 50, 90, 99]).astype(int)
    print(f"A mix shaped like llava_v1_5_mix665k: {len(lengths)} samples, {num_images.sum()} with one image of "
          f"{IMAGE_TOKENS} tokens; {lengths.mean():.0f} tokens on average, percentiles 1, 10, 50, 90, 99: {deciles}.\n"
          "Samples per source are published, lengths are estimates (see MIX).\n")  # fmt: skip
    waste_padded = float(original_waste(lengths, num_images, words))
    grouped = {key: float(value) for key, value in grouped_waste(lengths, num_images).items()}
    print(f"{'batches':34}{'waste %':>8}{'empty slots %':>15}{'rows':>9}{'samples/row':>13}"
          f"{'rank spread 1 / 10 steps':>27}{'seconds':>9}")  # fmt: skip
    print(f"{'original, microbatches of 16':34}{100 * waste_padded:8.2f}")
    print(f"{'grouped, few lengths, 128 rows':34}{100 * grouped['waste']:8.2f}"
          f"{100 * grouped['unused_slots']:15.2f}")  # fmt: skip
    rows = [packed(lengths, num_images, row_length) for row_length in ROW_LENGTHS]
    for row in rows:
        name = f"packed, {row['row_length']} tokens, {row['max_images']} images"
        spread = f"{row['rank_spread_images']:.2f} / {100 * row['rank_spread_10_steps']:.2f} %"
        print(f"{name:34}{100 * row['waste']:8.2f}{100 * row['unused_slots']:15.2f}{row['rows']:9}"
              f"{row['samples_per_row']:13.2f}{spread:>27}{row['seconds']:9.1f}")  # fmt: skip
    print(
        f"\nRank spread: most minus fewest images of the {RANKS} ranks, in images on average over steps, and over ten "
        "steps\nas a share of their mean, at worst. Seconds: choosing the slots, packing and ordering one epoch."
    )
    if options.json:
        default = next(row for row in rows if row["row_length"] == DEFAULT_ROW_LENGTH)
        result = {"waste": default["waste"], "waste_padded": waste_padded, "grouped": grouped, "packed": rows}
        print(json.dumps(result, default=float))


if __name__ == "__main__":
    main()
