"""Finds recordings that stand in two splits, by id, by path and by what is in the file."""

import functools
import hashlib
import os

from hfspeech.errors import UserError


def check_leaks(splits):
    """Stops the run if a recording stands in two of the splits.

    The same audio means the same bytes in the same or overlapping segments. Files are hashed only where another
    split has one of the same size. The same speech encoded twice is not found.

    Args:
        splits: name → `datasets.Dataset` with the hidden columns `recording_id` and `num_bytes`.

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
                raise UserError(
                    f"{count} of the {len(splits[name])} rows of {name} also stand in {other} (same {why}): "
                    f"{_name(splits[name], second)} is {_name(splits[other], first)} of {other}. "
                    f"Take them out of {other}, or choose other splits."
                )


def shared_rows(one, two):
    """Returns (row of `one`, row of `two`, `id` or `audio`) for the recordings that stand in both datasets."""
    shared = []
    seen = {key: row for row, key in enumerate(_recordings(one)) if key[1] is not None}
    for row, key in enumerate(_recordings(two)):
        if key in seen:
            shared.append((seen[key], row, "id"))

    in_one, in_two = _by_size(one), _by_size(two)
    spans_one, spans_two = _spans(one), _spans(two)
    one, two = one.select_columns("audio"), two.select_columns("audio")
    for size in in_one.keys() & in_two.keys():
        by_content = {}
        for row in in_one[size]:
            by_content.setdefault(content_hash(one[row]["audio"]), []).append((row, *spans_one[row]))
        for row in in_two[size]:
            start, end = spans_two[row]
            for other, other_start, other_end in by_content.get(content_hash(two[row]["audio"]), ()):
                if start < other_end and other_start < end:
                    shared.append((other, row, "audio"))
                    break
    return shared


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


def _by_size(rows):
    by_size = {}
    for row, size in enumerate(rows["num_bytes"][:]):
        by_size.setdefault(size, []).append(row)
    return by_size


def _spans(rows):
    """The segment that each row takes of its file, as (from, to) in seconds."""
    return [
        (0.0, float("inf")) if offset is None else (offset, offset + duration)
        for offset, duration in zip(rows["offset_s"][:], rows["duration_s"][:])
    ]


def _name(rows, row):
    return f"row {rows[row]['row']} ({rows[row]['id']})"
