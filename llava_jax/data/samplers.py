"""The original's orders, in which neighbours are alike in length and, if wished, in modality."""

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from llava_jax.data import shuffling
from llava_jax.errors import DataError

VARIANTS = ("llava", "tinyllava")
DEFAULT_SEED = 42  # of the permutations when no generator is given

# permutations: n -> a permutation of range(n)
Permutations = Callable[[int], Sequence[int]]


def split_to_even_chunks(
    indices: Sequence[int], lengths: Sequence[int], num_chunks: int
) -> list[Sequence[int]]:
    """Splits indices into chunks of equal size and nearly equal length.

    Each index goes, in the order given, to the chunk with the least length so far, the first of several,
    that is not full. Indices that do not divide evenly are dealt out in turn instead.
    """
    if len(indices) % num_chunks:
        return [indices[i::num_chunks] for i in range(num_chunks)]
    size = len(indices) // num_chunks
    chunks = [[] for _ in range(num_chunks)]
    not_full = [(0, number) for number in range(num_chunks)]  # a heap of (length, chunk)
    for index in indices:
        length, number = not_full[0]
        chunks[number].append(index)
        if len(chunks[number]) < size:
            heapq.heapreplace(not_full, (length + lengths[index], number))
        else:
            heapq.heappop(not_full)
    return chunks


def get_length_grouped_indices(
    lengths: Sequence[int],
    batch_size: int,
    world_size: int,
    generator: Permutations | np.random.Generator | None = None,
    merge: bool = True,
) -> list[int]:
    """An order of the samples in which each megabatch of world_size batches is sorted and evenly split.

    A permutation is cut into megabatches; each is sorted by descending length and dealt to world_size
    batches of nearly equal length, which follow each other. `generator` draws the permutation: any callable
    n -> permutation of range(n), or a numpy Generator; None draws from DEFAULT_SEED. `merge` is accepted
    for callers of the original, where it has no effect either.
    """
    del merge
    lengths = np.asarray(lengths).tolist()
    order = [int(index) for index in _permutations(generator)(len(lengths))]
    grouped = []
    for megabatch in _cut(order, world_size * batch_size):
        longest_first = sorted(megabatch, key=lengths.__getitem__, reverse=True)
        for batch in split_to_even_chunks(longest_first, lengths, world_size):
            grouped += batch
    return grouped


def get_modality_length_grouped_indices(
    lengths: Sequence[int],
    batch_size: int,
    world_size: int,
    generator: Permutations | np.random.Generator | None = None,
    variant: str = "llava",
) -> list[int]:
    """An order whose megabatches hold samples with images only or without images only.

    lengths: positive for samples with images, negative for those without. Both kinds are ordered by
    `get_length_grouped_indices`, their megabatches shuffled together. `generator` as there; it draws for the
    samples with images, for those without, and for the megabatches. The last megabatch of either kind is
    left out of that: in "llava" both come last as one, sorted by index; in "tinyllava" they are joined
    unsorted, what fills a megabatch comes first and the rest last.

    With one kind only the order is that of `get_length_grouped_indices` with the signed lengths, as in
    LLaVA; TinyLLaVA's own code fails there. Raises DataError for a length of 0.
    """
    if variant not in VARIANTS:
        raise DataError(f"the sampler variant {variant!r} is not known; choose one of {', '.join(VARIANTS)}.")
    lengths = np.asarray(lengths)
    if not lengths.all():
        raise DataError(
            f"sample {int(np.argmin(np.abs(lengths)))} has length 0, which says neither with nor without image; "
            "remove it."
        )
    draw = _permutations(generator)
    if (lengths > 0).all() or (lengths < 0).all():
        return get_length_grouped_indices(lengths, batch_size, world_size, draw)
    megabatch_size = world_size * batch_size
    shuffled, rest = [], []
    for ids in (np.flatnonzero(lengths > 0), np.flatnonzero(lengths < 0)):
        order = ids[get_length_grouped_indices(np.abs(lengths[ids]), batch_size, world_size, draw)]
        *full, last = _cut(order.tolist(), megabatch_size)
        shuffled += full
        rest += last
    shuffled = [shuffled[index] for index in draw(len(shuffled))]
    if variant == "llava":
        shuffled.append(sorted(rest))
    elif len(rest) >= megabatch_size:
        shuffled = [rest[:megabatch_size], *shuffled, rest[megabatch_size:]]
    else:
        shuffled.append(rest)
    return list(itertools.chain.from_iterable(shuffled))


class LengthGroupedSampler:
    """Sample ids in the original's grouped order, another in every iteration.

    batch_size: of one device's microbatch. world_size: such batches per optimizer step, so devices times
    accumulation steps (TinyLLaVA counts devices only). lengths, generator and variant: see
    `get_modality_length_grouped_indices`; without `group_by_modality` see `get_length_grouped_indices`.
    """

    def __init__(
        self,
        batch_size: int,
        world_size: int,
        lengths: Sequence[int] | None = None,
        generator: Permutations | np.random.Generator | None = None,
        group_by_modality: bool = False,
        variant: str = "llava",
    ):
        if lengths is None:
            raise DataError("LengthGroupedSampler needs the lengths of the samples; pass lengths=.")
        self._arguments = (lengths, batch_size, world_size, _permutations(generator))
        self._group_by_modality = group_by_modality
        self._variant = variant

    def __len__(self) -> int:
        return len(self._arguments[0])

    def __iter__(self) -> Iterator[int]:
        if self._group_by_modality:
            return iter(get_modality_length_grouped_indices(*self._arguments, variant=self._variant))
        return iter(get_length_grouped_indices(*self._arguments))


def seeded_permutations(*key: int) -> Permutations:
    """Draws a new permutation at every call; the sequence of them is a function of the key alone."""
    numbers = itertools.count()
    return lambda size: shuffling.permutation(size, *key, next(numbers))


def _permutations(generator) -> Permutations:
    if generator is None:
        return seeded_permutations(DEFAULT_SEED, shuffling.GROUPS)
    return getattr(generator, "permutation", generator)


def _cut(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]
