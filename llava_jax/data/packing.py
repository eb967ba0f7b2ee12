"""Which samples share a row of fixed length, and in which order an epoch takes the rows."""

import bisect
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from llava_jax.data import shuffling
from llava_jax.data.array_cache import cache_path, load_arrays, save_arrays
from llava_jax.data.batching import PADDING
from llava_jax.errors import DataError

_FORMAT = 1  # raise it when the same samples give another plan
# On a mix shaped like LLaVA's, 8192 tokens per row: 12 candidates for 4 mean lengths of room waste 0.1 % of the
# tokens, these 0.05 % with more even images; still more is slower and gains nothing that could be noticed.
_NUM_CANDIDATES = 20  # samples among which a row's last ones are chosen
_ROOM = 5  # mean lengths of room that are left for those
_EVENNESS = 1 / 256  # of a row's tokens may be given up for an even number of images
_PROBE_SIZE = 8192  # samples that `default_max_images` packs to see what a limit costs
_WASTE_FOR_SLOTS = 0.005  # of the tokens; an image slot costs about a hundredth of its row, filled or empty
_STEPS_PER_CHUNK = 16  # among which rows are exchanged so that their images are even


@dataclasses.dataclass(frozen=True, eq=False)
class Packing:
    """Rows of samples: row r holds the samples ids[row_starts[r] : row_starts[r + 1]].

    row_starts int64[R + 1], ids int64[N].
    """

    row_starts: np.ndarray
    ids: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.row_starts) - 1

    def row(self, number: int) -> np.ndarray:
        """The samples of a row, int64[n]; none for PADDING."""
        if number == PADDING:
            return self.ids[:0]
        return self.ids[self.row_starts[number] : self.row_starts[number + 1]]

    def totals(self, values: np.ndarray) -> np.ndarray:
        """Sums a quantity of the samples over each row: int[N] -> int64[R]."""
        return np.add.reduceat(values[self.ids].astype(np.int64), self.row_starts[:-1])


def pack(
    lengths: np.ndarray, num_images: np.ndarray, *, row_length: int, max_images: int, seed: int
) -> Packing:
    """Puts samples together into rows of at most row_length tokens and max_images images.

    lengths and num_images int[N]. The samples are shuffled by `seed`. A row takes them as they come while
    there is room for several more, then those of the next few that fill it best; so a row is a random
    sample of the data and nearly no token is wasted, where sorting by length first would put like with like
    and leave every row of short samples a gap. Time is linear in N.

    Raises DataError naming a sample that does not fit.
    """
    _require_fit(lengths, num_images, row_length, max_images)
    order = shuffling.permutation(len(lengths), seed, shuffling.PACKING).tolist()
    rows = list(_fill_rows(order, lengths.tolist(), num_images.tolist(), row_length, max_images))
    row_starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return Packing(row_starts, np.fromiter(itertools.chain.from_iterable(rows), np.int64, len(order)))


def cached_pack(
    lengths: np.ndarray,
    num_images: np.ndarray,
    *,
    cache_dir: str,
    overwrite_cache: bool = False,
    **limits: int,
) -> Packing:
    """As `pack` with the same arguments, but read from cache_dir where an earlier call has left its plan.

    A large dataset takes seconds to plan, which every restart would pay again. cache_dir "" is nowhere.
    """
    if not cache_dir:
        return pack(lengths, num_images, **limits)
    path = cache_path(cache_dir, "packing", _FORMAT, limits, lengths, num_images)
    arrays = None if overwrite_cache else load_arrays(path)
    if arrays is None:
        packing = pack(lengths, num_images, **limits)
        save_arrays(path, row_starts=packing.row_starts, ids=packing.ids)
        return packing
    return Packing(**arrays)


def default_max_images(lengths: np.ndarray, num_images: np.ndarray, *, row_length: int) -> int:
    """How many image slots a row needs: int[N], int[N] -> the count.

    Every slot of every row costs vision compute, even an empty one; too few leave tokens empty. It is the
    least number with which packing a fixed random part of the data wastes at most half a percent more of
    the tokens than packing without that limit, and no less than the images of any one sample.
    """
    if not num_images.any():
        return 0
    least = int(num_images.max())
    _require_fit(lengths, num_images, row_length, least)
    probe = shuffling.permutation(len(lengths), 0, shuffling.PACKING)[:_PROBE_SIZE]
    lengths, num_images = lengths[probe], num_images[probe]

    def num_rows(max_images: int) -> int:
        return pack(lengths, num_images, row_length=row_length, max_images=max_images, seed=0).num_rows

    per_row = num_images.sum() * row_length / lengths.sum()
    no_limit = max(least, int(row_length * (num_images / lengths).max()))
    enough = num_rows(no_limit) / (1 - _WASTE_FOR_SLOTS)
    choices = range(max(least, int(per_row)), no_limit)
    return choices.start + bisect.bisect_left(choices, True, key=lambda count: num_rows(count) <= enough)


def epoch_rows(row_images: np.ndarray, epoch: int, *, seed: int, rows_per_step: int) -> np.ndarray:
    """The order in which an epoch takes rows with row_images int[R] -> int64[steps * rows_per_step].

    The rows are shuffled by seed and epoch. Then, among a few neighbouring steps, they are exchanged so that
    the steps have nearly equal numbers of images, and ordered within a step so that its halves, their halves
    and so on (microbatches, then processes) have too. PADDING fills the last step.
    """
    order = shuffling.permutation(len(row_images), seed, shuffling.PACKED_ROWS, epoch)
    images = np.append(row_images, 0).astype(np.int64)  # PADDING reads the last entry
    num_full = len(order) // rows_per_step * rows_per_step
    chunk_size = _STEPS_PER_CHUNK * rows_per_step
    steps = [
        _deal(order[start : min(start + chunk_size, num_full)], images, rows_per_step)
        for start in range(0, num_full, chunk_size)
    ]
    if num_full < len(order):
        rest = np.pad(order[num_full:], (0, -len(order) % rows_per_step), constant_values=PADDING)
        steps.append(rest[None])
    order = _even_halves(np.concatenate(steps), images)
    order[1::2] = order[1::2, ::-1]  # the half with one image more is not always the same
    return order.reshape(-1)


def _require_fit(lengths: np.ndarray, num_images: np.ndarray, row_length: int, max_images: int) -> None:
    misfits = np.flatnonzero((lengths > row_length) | (num_images > max_images))
    if len(misfits):
        first = misfits[0]
        raise DataError(
            f"sample {first} with {lengths[first]} tokens and {num_images[first]} images does not fit into a "
            f"packed row of {row_length} tokens and {max_images} images ({len(misfits)} such samples); raise "
            "data.row_length or data.max_images_per_row, or lower data.max_length."
        )


def _fill_rows(
    order: list[int], lengths: list[int], num_images: list[int], row_length: int, max_images: int
) -> Iterator[list[int]]:
    """Yields rows of sample ids until all in `order` are placed; the oldest waiting sample is always taken."""
    stream = iter(order)
    waiting = list(itertools.islice(stream, _NUM_CANDIDATES))
    room = _ROOM * sum(lengths) // max(1, len(lengths))
    even = sum(num_images) * row_length / max(1, sum(lengths))  # images of a full row
    while waiting:
        row, free, slots = [], row_length, max_images
        while waiting and (
            not row or (free - lengths[waiting[0]] >= room and num_images[waiting[0]] <= slots)
        ):
            sample = waiting.pop(0)
            row.append(sample)
            free -= lengths[sample]
            slots -= num_images[sample]
            waiting.extend(itertools.islice(stream, 1))
        sizes = [(lengths[sample], num_images[sample]) for sample in waiting]
        images_missing = even - (max_images - slots)
        chosen = _best_filling(sizes, free, slots, images_missing, int(row_length * _EVENNESS))
        row += [waiting[place] for place in chosen]
        for place in reversed(chosen):
            del waiting[place]
        waiting.extend(itertools.islice(stream, len(chosen)))
        yield row


def _best_filling(
    sizes: Sequence[tuple[int, int]], free: int, slots: int, images: float, tolerance: int
) -> list[int]:
    """The places in `sizes`, (tokens, images) each, whose sum fills `free` tokens best within `slots` images.

    Of the fillings within `tolerance` tokens of the best it is one whose images are nearest to `images`. Bit t
    of reachable[k] says whether some of the sizes sum up to t tokens and k images.
    """
    within = (1 << (free + 1)) - 1
    reachable = [1]
    before = []
    for length, count in sizes:
        before.append(reachable)
        if length <= free:
            longer = [0] * count + [sums << length & within for sums in reachable]
            pairs = itertools.zip_longest(reachable, longer[: slots + 1], fillvalue=0)
            reachable = [without | with_it for without, with_it in pairs]
    fullest = [sums.bit_length() - 1 for sums in reachable]
    good = [k for k, tokens in enumerate(fullest) if tokens >= max(fullest) - tolerance and tokens >= 0]
    k = min(good, key=lambda k: abs(k - images))
    tokens = fullest[k]
    chosen = []
    for place in reversed(range(len(sizes))):
        sums = before[place]
        if k >= len(sums) or not sums[k] >> tokens & 1:  # not without this one
            chosen.append(place)
            tokens -= sizes[place][0]
            k -= sizes[place][1]
    return chosen[::-1]


def _deal(rows: np.ndarray, images: np.ndarray, rows_per_step: int) -> np.ndarray:
    """Deals rows int64[n] to steps int64[n / rows_per_step, rows_per_step], from most images to least and to and fro."""
    rounds = rows[np.argsort(-images[rows], kind="stable")].reshape(rows_per_step, -1)
    rounds[1::2] = rounds[1::2, ::-1]
    return rounds.T


def _even_halves(steps: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Reorders each of the steps int64[S, n] so that halves, and halves of halves while n is even, weigh nearly alike."""
    num_pairs, odd = divmod(steps.shape[1], 2)
    if odd:
        return steps
    steps = np.take_along_axis(steps, np.argsort(-images[steps], axis=1, kind="stable"), axis=1)
    # Neighbours are alike; the pairs that differ most are split first, the heavier one to the lighter half.
    pairs = steps.reshape(len(steps), num_pairs, 2)
    gaps = images[pairs[..., 0]] - images[pairs[..., 1]]
    by_gap = np.argsort(-gaps, axis=1, kind="stable")
    pairs = np.take_along_axis(pairs, by_gap[..., None], axis=1)
    gaps = np.take_along_axis(gaps, by_gap, axis=1)
    ahead = np.zeros(len(steps), np.int64)  # images of the first half minus those of the second
    for pair in range(num_pairs):
        swapped = ahead > 0
        pairs[swapped, pair] = pairs[swapped, pair, ::-1]
        ahead += np.where(swapped, -gaps[:, pair], gaps[:, pair])
    return np.concatenate([_even_halves(pairs[..., half], images) for half in range(2)], axis=1)
