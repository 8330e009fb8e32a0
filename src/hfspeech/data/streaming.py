"""Rows that come as they are read: the same schema, filters and checks, one row at a time."""

import datasets

from hfspeech.audio import BadAudio, duration_s
from hfspeech.data.leaks import Recordings, span
from hfspeech.data.rows import decode_row, default_id, group_columns, is_audio, row_name, to_seconds
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


def stream_rows(raw, folder, columns, filters, data_args, dataset_name, split, seed):
    """Brings a stream into the schema, undecoded, without the rows that the filters reject.

    Nothing is raised while rows are read, because that may be in other processes: see `left_out`, `bad_audio`, `fatal`.

    Args:
        raw: `datasets.IterableDataset`, or a `datasets.Dataset` of paths.
        folder, columns, filters, data_args, dataset_name, split: as for `rows.read_rows`.
        seed: of the shuffling within a buffer.

    Returns:
        `datasets.IterableDataset` with the columns of `SCHEMA`, the group columns, `recording_id`, `bad_audio` and
        `fatal` (sentences, or None), and `left_out`: [reason, row, detail] of the rows that were rejected since the
        row before; those after the last row are lost. Shuffled within a buffer; `row` counts the rows as they are
        read.
    """
    groups = group_columns(data_args)
    texts = ("id", "text", "speaker", "dataset", "split", "recording_id", "bad_audio", "fatal", *groups)
    features = datasets.Features(
        {name: datasets.Value("string") for name in texts}
        | {name: datasets.Value("float64") for name in ("duration_s", "offset_s")}
        | {"row": datasets.Value("int64"), "left_out": datasets.List(datasets.List(datasets.Value("string")))}
        | {"audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}}
    )
    left_out = []

    def convert(batch):
        value = {name: batch[name][0] for name in batch}
        number = value["__row__"]
        audio = value[columns.audio] or {"bytes": None, "path": None}
        if isinstance(audio, str):
            audio = {"bytes": None, "path": audio}
        if audio["bytes"] is None:
            audio["path"] = folder.find(audio["path"])
        text = value[columns.text]
        given_id = _string(value[columns.id]) if columns.id else None
        row = dict.fromkeys(features) | {
            "audio": audio,
            "text": "" if text is None else str(text),
            "speaker": _string(value[columns.speaker]) if columns.speaker else None,
            "dataset": dataset_name,
            "split": split,
            "duration_s": 0.0,
            "row": number,
            "recording_id": given_id if columns.id_is_given else None,
            **{name: _string(value.get(name)) for name in groups},
        }
        name = row_name(number, audio["path"] or given_id or split)
        try:
            if audio["bytes"] is None and not folder.holds(audio["path"]):
                raise UserError(folder.refusal(f"{dataset_name}, {split}: Row {number}", [audio["path"]]))
            if columns.offset:
                row["offset_s"] = to_seconds(value[columns.offset], columns.offset, number - 1, dataset_name)
            given = value[columns.duration] if columns.duration and row["offset_s"] is not None else None
            row["duration_s"] = to_seconds(given, columns.duration, number - 1, dataset_name)
            if row["duration_s"] is None:
                row["duration_s"] = _whole_duration_s(audio) - (row["offset_s"] or 0.0)
            reason = filters.reasons([row["text"]], [row["duration_s"]])[0]
            if reason is not None:
                left_out.append([reason[0], name, reason[1]])
                return {key: [] for key in row}
        except BadAudio as reason:
            row["bad_audio"] = f"{name}: {reason}"
        except UserError as error:
            row["fatal"] = str(error)
        row["id"] = given_id or default_id(audio["path"], row["offset_s"], folder, split, number)
        row["left_out"] = left_out[:]
        left_out.clear()
        return {key: [entry] for key, entry in row.items()}

    stream = undecoded_stream(raw, columns.audio)
    stream = stream.map(lambda row, i: {**row, "__row__": i + 1}, with_indices=True)
    stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_ROWS)
    unmapped = [*raw.column_names, "__row__"]
    return stream.map(convert, batched=True, batch_size=1, remove_columns=unmapped, features=features)


def decode_stream(rows, held_out):
    """Decodes the rows of a stream as they come, and finds those that must not be trained on.

    Args:
        rows: what `stream_rows` or `mix_streams` returned.
        held_out: split name → rows in memory, none of which may come along in the stream.

    Returns:
        `datasets.IterableDataset` whose rows are those of a `SpeechDataset`, with `left_out`, `bad_audio` and `fatal`.
    """
    recordings = {name: Recordings(held) for name, held in held_out.items()}
    ids = {
        (dataset, recording): name
        for name, held in held_out.items()
        for dataset, recording in zip(held["dataset"][:], held["recording_id"][:])
        if recording is not None
    }

    def decode(row):
        row = {**row, "waveform": None}
        audio, recording = row["audio"], row.pop("recording_id")
        if row["bad_audio"] or row["fatal"]:
            del row["audio"]
            return row
        decode_row(row)
        if row["waveform"] is not None and (found := _found_in(row, audio, recording)):
            row["waveform"] = None
            row["fatal"] = (
                f"{row['dataset']}, {row['split']}: {row_name(row['row'], audio['path'] or row['id'])} also stands in "
                f"{found}; take it out of one of them."
            )
        return row

    def _found_in(row, audio, recording):
        found = ids.get((row["dataset"], recording))
        source = audio["bytes"] if audio["bytes"] is not None else audio["path"]
        for name, known in recordings.items():
            if found is None and known.find(source, *span(row["offset_s"], row["duration_s"])) is not None:
                found = name
        return found

    return rows.map(decode, remove_columns=["audio", "recording_id"])


def mix_streams(streams, weights, seed):
    """Draws from several streams by weight (equally without weights) until each has been read once."""
    if len(streams) == 1:
        return streams[0]
    total = sum(weights) if weights else None
    shares = [weight / total for weight in weights] if weights else [1 / len(streams)] * len(streams)
    return datasets.interleave_datasets(streams, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")


def _string(value):
    return None if value is None or value == "" else str(value)


def _whole_duration_s(audio):
    return duration_s(audio["bytes"] if audio["bytes"] is not None else audio["path"])
