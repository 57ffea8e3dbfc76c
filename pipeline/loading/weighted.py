"""Which samples a weighted mix takes in each epoch.

Each part of the dataset, with n samples and weight w, has an endless tape: its shards in an order shuffled by the seed, again
and again. Epoch e takes the samples at ⌊e · n · w⌋ to ⌊(e + 1) · n · w⌋ − 1 of the tape. So:

- with w = 0.5, epochs 0 and 1 take one half each, and together all; epochs 2 and 3 the same halves again,
- with w = 3, each epoch takes each sample three times,
- with w = a / b in lowest terms, any b epochs in a row take each sample exactly a times, and any number m of epochs in a row
  take it m · w times, rounded down or up.

A piece of the tape is a contiguous part of a shard, so reads stay large.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from pipeline.arrays import Ints
from pipeline.hashing import hash64

TAPE_STREAM, PIECE_STREAM = 4, 5  # see `pipeline.loading.order`


@dataclass(frozen=True)
class Weight:
    """The weight of consecutive shards: how often each of their samples is taken per epoch."""

    shards: int
    times: Fraction


@dataclass(frozen=True)
class Row:
    """The samples of an epoch, end to end, in pieces: int64[pieces] each."""

    shard: Ints
    first: Ints  # the position in the shard of the piece's first sample
    begin: Ints  # the place in the row of the piece's first sample
    visit: Ints  # counts how often the tape has begun again since the epoch began, so it differs between equal samples
    length: int  # samples


def epoch_length(shard_samples: Ints, weights: Sequence[Weight], epoch: int | None = None) -> int:
    """Samples that an epoch takes. None: the fewest that any epoch takes; others take at most one more of each part."""
    total, first = 0, 0
    for weight in weights:
        amount = int(shard_samples[first : first + weight.shards].sum()) * weight.times
        first += weight.shards
        total += int(amount) if epoch is None else _cut(amount, epoch + 1) - _cut(amount, epoch)
    return total


def weighted_row(shard_samples: Ints, weights: Sequence[Weight], seed: int, epoch: int) -> Row:
    """The pieces that an epoch takes, shuffled."""
    found: list[tuple[Ints, Ints, Ints, Ints]] = []  # shard, first, size, visit
    begin = 0
    for weight in weights:
        shards = np.arange(begin, begin + weight.shards)
        begin += weight.shards
        shards = shards[np.argsort(hash64(seed, TAPE_STREAM, shards), kind="stable")]
        ends = np.cumsum(shard_samples[shards])
        samples = int(ends[-1]) if len(ends) else 0
        amount = samples * weight.times
        start, stop = _cut(amount, epoch), _cut(amount, epoch + 1)
        first_pass = start // samples if samples else 0
        for nth in range(first_pass, -(-stop // samples) if samples else 0):
            low = np.maximum(ends - shard_samples[shards], start - nth * samples)
            high = np.minimum(ends, stop - nth * samples)
            taken = np.flatnonzero(high > low)
            first = low[taken] - (ends - shard_samples[shards])[taken]
            found.append((shards[taken], first, (high - low)[taken], np.full(len(taken), nth - first_pass)))
    shard, first, size, visit = (np.concatenate(columns) for columns in zip(*found, strict=True))
    order = np.argsort(hash64(seed, PIECE_STREAM, epoch, shard, first, visit), kind="stable")
    size = size[order]
    return Row(shard[order], first[order], np.cumsum(size) - size, visit[order], int(size.sum()))


def _cut(amount: Fraction, epoch: int) -> int:
    """Where an epoch begins on a tape of which each takes `amount` samples."""
    return int(amount * epoch)  # rounds down
