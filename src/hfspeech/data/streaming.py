"""Rows that come as they are read: the same schema, filters and checks, one row at a time."""

import datasets

from hfspeech.audio import BadAudio, duration_s
from hfspeech.data.leaks import content_hash
from hfspeech.data.rows import decode_row, default_id, group_columns, is_audio, row_name, to_seconds
from hfspeech.data.sources import find_file
from hfspeech.errors import UserError

# Rows of a streamed validation or test split that are kept in memory where no number is given.
EVAL_ROWS = 1000
# Rows of a stream that become validation where there is no such split.
CARVED_ROWS = 200
# A stream is shuffled within so many undecoded rows (about 100 kB each).
SHUFFLE_ROWS = 500


def undecoded_stream(rows, column):
    """Makes a stream give audio as bytes or paths; rows of a local table become a stream first."""
    if isinstance(rows, datasets.Dataset):
        if is_audio(rows.features, column):
            rows = rows.cast_column(column, datasets.Audio(decode=False))
        return rows.to_iterable_dataset()
    if isinstance(rows.features.get(column), datasets.Audio):
        rows = rows.cast_column(column, datasets.Audio(decode=False))
    return rows.decode(False)


def take_rows(rows, columns, folder, num_rows):
    """Reads the first rows of a stream into memory, as a `datasets.Dataset` with undecoded audio."""
    if isinstance(rows, datasets.Dataset):
        return rows.select(range(min(num_rows, len(rows))))
    features = rows.features.copy()
    kept = list(undecoded_stream(rows, columns.audio).take(num_rows))
    features[columns.audio] = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    return datasets.Dataset.from_dict({name: [row[name] for row in kept] for name in features}, features=features)


def stream_rows(raw, folder, columns, filters, data_args, dataset_name, split, dropped, held_out, seed):
    """Brings a stream into the schema, decoded, without the rows that the filters reject.

    Args:
        raw: `datasets.IterableDataset`, or a `datasets.Dataset` of paths.
        folder, columns, filters, data_args, dataset_name, split, dropped: as for `rows.read_rows`.
        held_out: split name → rows in memory, none of which may come along in the stream.
        seed: of the shuffling within a buffer.

    Returns:
        `datasets.IterableDataset` whose rows are those of a `SpeechDataset`, shuffled within a buffer; `row` counts
        them as they are read.
    """
    held_ids, held_sizes = {}, {}
    for name, rows in held_out.items():
        for i, (size, recording) in enumerate(zip(rows["num_bytes"][:], rows["recording_id"][:])):
            held_sizes.setdefault(size, []).append((name, rows, i))
            if columns.id_is_given and recording is not None and rows[i]["dataset"] == dataset_name:
                held_ids[recording] = name

    def convert(batch):
        value = {name: batch[name][0] for name in batch}
        number = value["__row__"]
        audio = value[columns.audio]
        if isinstance(audio, str):
            audio = {"bytes": None, "path": find_file(audio, folder) if folder else audio}
        text = value[columns.text]
        row = {
            "text": "" if text is None else str(text),
            "speaker": _string(value[columns.speaker]) if columns.speaker else None,
            "dataset": dataset_name,
            "split": split,
            "offset_s": to_seconds(value[columns.offset], columns.offset, number - 1, dataset_name)
            if columns.offset
            else None,
            "row": number,
            "audio": audio,
            **{name: _string(value.get(name)) for name in group_columns(data_args)},
        }
        given_id = _string(value.get(columns.id)) if columns.id else None
        row["id"] = given_id or default_id(audio["path"], row["offset_s"], folder, split, number)
        name = row_name(number, audio["path"] or row["id"])
        _stop_if_held_out(row, audio, name)
        try:
            row["duration_s"] = _duration_s(audio, row["offset_s"], value, number)
            bad = None
        except BadAudio as reason:
            row["duration_s"], bad = 0.0, str(reason)
        if bad is None:
            reason = filters.reasons([row["text"]], [row["duration_s"]])[0]
            if reason is not None:
                dropped.add(reason[0], name, reason[1])
                return {key: [] for key in [*row, "waveform"] if key != "audio"}
            decode_row(row)
            bad = row.pop("bad_audio", None)
            bad = bad and bad.removeprefix(f"{name}: ")
        if bad is not None:
            if data_args.on_bad_audio == "error":
                raise UserError(
                    f"{dataset_name}, {split}: {name[0].upper()}{name[1:]}: {bad}. "
                    "Leave such rows out with --on_bad_audio skip."
                )
            dropped.add("bad audio", name, bad)
            row.pop("audio", None)
            return {key: [] for key in [*row, "waveform"]}
        return {key: [entry] for key, entry in row.items()}

    def _duration_s(audio, offset_s, value, number):
        given = value.get(columns.duration) if columns.duration else None
        if offset_s is not None and given is not None:
            return to_seconds(given, columns.duration, number - 1, dataset_name)
        return duration_s(audio["bytes"] if audio["bytes"] is not None else audio["path"]) - (offset_s or 0.0)

    def _stop_if_held_out(row, audio, name):
        found = held_ids.get(row["id"])
        if found is None and audio["bytes"] is not None:
            for other, rows, i in held_sizes.get(len(audio["bytes"]), ()):
                if content_hash(rows[i]["audio"]) == content_hash(audio):
                    found = other
        if found:
            raise UserError(f"{dataset_name}, {split}: {name} also stands in {found}; take it out of one of them.")

    stream = undecoded_stream(raw, columns.audio)
    stream = stream.map(lambda row, i: {**row, "__row__": i + 1}, with_indices=True)
    stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_ROWS)
    return stream.map(convert, batched=True, batch_size=1, remove_columns=[*raw.column_names, "__row__"])


def mix_streams(streams, weights, seed):
    """Draws from several streams by weight (equally without weights) until each has been read once."""
    if len(streams) == 1:
        return streams[0]
    total = sum(weights) if weights else None
    shares = [weight / total for weight in weights] if weights else [1 / len(streams)] * len(streams)
    return datasets.interleave_datasets(streams, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")


def _string(value):
    return None if value is None or value == "" else str(value)
