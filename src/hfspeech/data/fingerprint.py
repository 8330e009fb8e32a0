"""A fingerprint of a split: whether two runs had the same rows, without storing or decoding them."""

import hashlib

from hfspeech.data.leaks import sample
from hfspeech.data.rows import in_threads, undecoded

SAMPLED_ROWS = 1000  # of which a part of the audio is read: a few hundredths of a second


def fingerprint(rows):
    """Returns a SHA-256 of the rows of a split, in their order, as `sha256:…`.

    It covers, of each row, the text, the speaker, the seconds (to the millisecond), where in its file a segment starts, and
    the size of the recording in bytes; of up to `SAMPLED_ROWS` rows spread evenly over the split also 4 KB from the
    middle of the recording. It does not cover where the files lie or what they are called, the ids, group columns and
    stored speaker embeddings; nor would it see a change inside a recording that keeps its size and stands in a row, or
    a part, that is not read.

    Args:
        rows: `datasets.Dataset` with undecoded audio and the hidden columns.
    """
    columns = rows.select_columns(["text", "speaker", "duration_s", "offset_s", "num_bytes"])[:]
    step = max(1, -(-len(rows) // SAMPLED_ROWS))
    contents, paths = undecoded(rows.select(range(0, len(rows), step)))
    sampled = in_threads(sample, [path if content is None else content for content, path in zip(contents, paths)])
    total = hashlib.sha256()
    for text, speaker, seconds, offset_s, size in zip(*columns.values()):
        total.update(f"{text}\0{speaker}\0{seconds:.3f}\0{offset_s}\0{size}\n".encode())
    total.update(repr([checksum for _, checksum in sampled]).encode())
    return f"sha256:{total.hexdigest()}"


def other_rows(account, another):
    """Returns the splits of two `SpeechSplits.account` of which both know the fingerprint, where it differs."""
    splits, others = account["splits"], another["splits"]
    return [
        name
        for name, entry in splits.items()
        if entry.get("fingerprint")
        and others.get(name, {}).get("fingerprint", entry["fingerprint"]) != entry["fingerprint"]
    ]
