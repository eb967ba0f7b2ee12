"""Cuts long documents into samples."""

import copy
import dataclasses

import numpy as np

from llava_jax.data.measuring import Measurements
from llava_jax.data.samples import SampleReader


def cut_documents(reader: SampleReader, measured: Measurements) -> tuple[SampleReader, Measurements]:
    """A reader and measurements in which every piece of a document is a sample; the same if there is none to cut.

    Pieces have data.max_length tokens, the last one what is left, and each begins with the last token of the one
    before: all tokens are learnt once. Samples are in the order of the documents.
    """
    counts = np.maximum(measured.num_pieces, 1)  # what cannot be used stays as it is
    if (counts == 1).all():
        return reader, measured
    owners = np.repeat(np.arange(len(counts)), counts)  # the former id of each sample
    firsts = np.concatenate([[0], np.cumsum(counts)[:-1]])  # the sample that each id begins with
    pieces = np.arange(len(owners)) - firsts[owners]
    limit = reader.config.max_length
    left = measured.full_lengths[owners] - pieces * (limit - 1)
    is_cut = counts[owners] > 1
    lengths = np.where(is_cut, np.minimum(left, limit), measured.lengths[owners]).astype(np.int32)
    measured = Measurements(
        lengths=lengths,
        full_lengths=np.where(is_cut, lengths, measured.full_lengths[owners]),
        num_supervised=np.where(is_cut, lengths - 1, measured.num_supervised[owners]),
        num_images=measured.num_images[owners],
        num_tiles=measured.num_tiles[owners],
        num_pieces=measured.num_pieces[owners],
        problems={int(firsts[id]): problem for id, problem in measured.problems.items()},
        image_owners=firsts[measured.image_owners].astype(np.int32),
        image_paths=measured.image_paths,
    )
    reader = copy.copy(reader)
    reader.dataset = dataclasses.replace(reader.dataset, picks=reader.dataset.picks[owners], pieces=pieces)
    return reader, measured
