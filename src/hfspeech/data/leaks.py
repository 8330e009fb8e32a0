"""Finds recordings that stand in two splits, by id, by path and by what is in the file."""

import functools
import hashlib
import os
import zlib
from collections import Counter

from hfspeech.data.rows import in_threads, undecoded
from hfspeech.errors import UserError

# Bytes of a recording that are compared before all of it is.
_SAMPLE = 4096


def check_leaks(splits, is_carved=False):
    """Stops the run if a recording stands in two of the splits.

    The same audio means the same bytes in the same or overlapping segments. Files are looked into only where
    another split has one of the same size. The same speech encoded twice is not found.

    Args:
        splits: name → `datasets.Dataset` with the hidden columns `recording_id` and `num_bytes`.
        is_carved: validation was taken from train, so what has to be changed is train.

    Raises:
        UserError: names the two splits, how many rows they share, and the first of them.
    """
    names = list(splits)
    recordings = dict(zip(names, recordings_of(*splits.values())))
    for i, name in enumerate(names):
        for other in names[:i]:
            if {name, other} == {"test", "retention"}:
                continue  # both are measured on, neither is trained on
            shared = shared_rows(recordings[other], recordings[name])
            if shared:
                first, second, why = shared[0]
                count = len({row for _, row, _ in shared})
                source = "train" if other == "validation" and is_carved else other
                raise UserError(
                    f"{count} of the {len(splits[name])} rows of {name} also stand in {other} (same {why}): "
                    f"{_name(splits[name], second)} is {_name(splits[other], first)} of {other}. "
                    f"Take them out of {source}, or choose other splits."
                )


def recordings_of(*datasets):
    """Returns the `Recordings` of each dataset, to be compared with each other."""
    sizes = Counter(size for rows in datasets for size in set(rows["num_bytes"][:]))
    sizes = {size for size, count in sizes.items() if count > 1}
    return [Recordings(rows, sizes) for rows in datasets]


def shared_rows(one, two):
    """Returns (row of `one`, row of `two`, `id` or `audio`) for the recordings that stand in both `Recordings`."""
    seen = {key: row for row, key in enumerate(one.ids) if key[1] is not None}
    shared = [(seen[key], row, "id") for row, key in enumerate(two.ids) if key in seen]
    alike = sorted(row for key in one.by_sample.keys() & two.by_sample.keys() for row in two.by_sample[key])
    for row, audio in zip(alike, two.audio(alike)):
        other = one.find(audio, *two.spans[row])
        if other is not None:
            shared.append((other, row, "audio"))
    return shared


class Recordings:
    """Finds among the rows of a dataset the one that has the same audio as a given recording.

    Args:
        rows: `datasets.Dataset` with undecoded audio and the hidden columns.
        sizes: the sizes in bytes that a given recording may have; None for any.
    """

    def __init__(self, rows, sizes=None):
        columns = rows.select_columns(["dataset", "recording_id", "offset_s", "duration_s", "num_bytes"])[:]
        self.ids = list(zip(columns["dataset"], columns["recording_id"]))
        self.spans = [span(*row) for row in zip(columns["offset_s"], columns["duration_s"])]
        self._audio = rows.select_columns("audio")
        self.by_sample = {}
        numbers = [row for row, size in enumerate(columns["num_bytes"]) if sizes is None or size in sizes]
        for row, key in zip(numbers, in_threads(sample, self.audio(numbers))):
            self.by_sample.setdefault(key, []).append(row)
        self._by_content = {}

    def audio(self, numbers):
        """Returns what is undecoded in these rows: the bytes, or the path where there are none."""
        return [path if content is None else content for content, path in zip(*undecoded(self._audio.select(numbers)))]

    def find(self, audio, start_s, end_s):
        """Returns the number of a row with the same bytes whose segment overlaps this one, or None."""
        key = sample(audio)
        if key not in self.by_sample:
            return None
        if key not in self._by_content:
            by_content = self._by_content[key] = {}
            for row, other in zip(self.by_sample[key], self.audio(self.by_sample[key])):
                by_content.setdefault(content_hash(other), []).append(row)
        for row in self._by_content[key].get(content_hash(audio), ()):
            start, end = self.spans[row]
            if start_s < end and start < end_s:
                return row
        return None


def sample(audio):
    """Returns the size of a recording and a checksum of its middle, which tell most of them apart at once."""
    if not isinstance(audio, str):
        return len(audio), zlib.crc32(audio[len(audio) // 2 :][:_SAMPLE])
    with open(audio, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(size // 2)
        return size, zlib.crc32(file.read(_SAMPLE))


def content_hash(audio):
    """Returns a hash of the bytes of an undecoded recording."""
    if not isinstance(audio, str):
        return hashlib.blake2b(audio).digest()
    return _file_hash(audio, os.stat(audio).st_mtime_ns)


# A long recording may be the file of thousands of segments.
@functools.lru_cache(maxsize=1 << 20)
def _file_hash(path, modified):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()


def span(offset_s, duration_s):
    """Returns the segment that a row takes of its file, as (from, to) in seconds."""
    return (0.0, float("inf")) if offset_s is None else (offset_s, offset_s + duration_s)


def _name(rows, row):
    return f"row {rows[row]['row']} ({rows[row]['id']})"
