"""Finds recordings that stand in two splits, by id, by path and by what is in the file."""

import functools
import hashlib
import os

from hfspeech.errors import UserError


def check_leaks(splits, is_carved=False):
    """Stops the run if a recording stands in two of the splits.

    The same audio means the same bytes in the same or overlapping segments. Files are hashed only where another
    split has one of the same size. The same speech encoded twice is not found.

    Args:
        splits: name → `datasets.Dataset` with the hidden columns `recording_id` and `num_bytes`.
        is_carved: validation was taken from train, so what has to be changed is train.

    Raises:
        UserError: names the two splits, how many rows they share, and the first of them.
    """
    names = list(splits)
    for i, name in enumerate(names):
        for other in names[:i]:
            if {name, other} == {"test", "retention"}:
                continue  # both are measured on, neither is trained on
            shared = shared_rows(splits[other], splits[name])
            if shared:
                first, second, why = shared[0]
                count = len({row for _, row, _ in shared})
                source = "train" if other == "validation" and is_carved else other
                raise UserError(
                    f"{count} of the {len(splits[name])} rows of {name} also stand in {other} (same {why}): "
                    f"{_name(splits[name], second)} is {_name(splits[other], first)} of {other}. "
                    f"Take them out of {source}, or choose other splits."
                )


def shared_rows(one, two):
    """Returns (row of `one`, row of `two`, `id` or `audio`) for the recordings that stand in both datasets."""
    shared = []
    seen = {key: row for row, key in enumerate(_recordings(one)) if key[1] is not None}
    for row, key in enumerate(_recordings(two)):
        if key in seen:
            shared.append((seen[key], row, "id"))

    known = Recordings(one)
    spans, sizes, two = _spans(two), two["num_bytes"][:], two.select_columns("audio")
    for row, (size, span) in enumerate(zip(sizes, spans)):
        if size in known.by_size:
            other = known.find(two[row]["audio"], size, *span)
            if other is not None:
                shared.append((other, row, "audio"))
    return shared


class Recordings:
    """Finds among the rows of a dataset the one that has the same audio as a given recording.

    Args:
        rows: `datasets.Dataset` with undecoded audio and the column `num_bytes`.
    """

    def __init__(self, rows):
        self.by_size = {}
        for row, size in enumerate(rows["num_bytes"][:]):
            self.by_size.setdefault(size, []).append(row)
        self._spans = _spans(rows)
        self._audio = rows.select_columns("audio")
        self._by_content = {}

    def find(self, audio, num_bytes, start_s, end_s):
        """Returns the number of a row with the same bytes whose segment overlaps this one, or None."""
        if num_bytes not in self.by_size:
            return None
        if num_bytes not in self._by_content:
            by_content = self._by_content[num_bytes] = {}
            for row in self.by_size[num_bytes]:
                by_content.setdefault(content_hash(self._audio[row]["audio"]), []).append(row)
        for row in self._by_content[num_bytes].get(content_hash(audio), ()):
            start, end = self._spans[row]
            if start_s < end and start < end_s:
                return row
        return None


def content_hash(audio):
    """Returns a hash of the bytes of an undecoded recording."""
    if audio["bytes"] is not None:
        return hashlib.blake2b(audio["bytes"]).digest()
    return _file_hash(audio["path"], os.stat(audio["path"]).st_mtime_ns)


# A long recording may be the file of thousands of segments.
@functools.lru_cache(maxsize=1 << 20)
def _file_hash(path, modified):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()


def _recordings(rows):
    return list(zip(rows["dataset"][:], rows["recording_id"][:]))


def _spans(rows):
    return [span(*row) for row in zip(rows["offset_s"][:], rows["duration_s"][:])]


def span(offset_s, duration_s):
    """Returns the segment that a row takes of its file, as (from, to) in seconds."""
    return (0.0, float("inf")) if offset_s is None else (offset_s, offset_s + duration_s)


def _name(rows, row):
    return f"row {rows[row]['row']} ({rows[row]['id']})"
