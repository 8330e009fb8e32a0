"""The one schema of rows, the filters on the way into it, and the dataset that decodes a row when it is asked for."""

import logging
import os
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.pool import ThreadPool

import numpy as np
import pyarrow
import pyarrow.compute
import torch
from tokenizers.pre_tokenizers import ByteLevel

from hfspeech.audio import BadAudio, decode, duration_s
from hfspeech.errors import UserError, nearest
from hfspeech.text import TIMESTAMP, labels_of

logger = logging.getLogger("hfspeech")

# Names that a column of this meaning bears in the datasets of the Hub, Common Voice, NeMo and Kaldi exports.
COLUMN_NAMES = {
    "audio": ("audio", "file_name", "audio_filepath", "audio_path", "audio_file", "path", "wav"),
    "text": ("text", "sentence", "transcription", "transcript", "normalized_text", "raw_text"),
    "id": ("id", "audio_id", "utterance_id", "utt_id", "segment_id"),
    "speaker": ("speaker", "speaker_id", "client_id", "spk_id"),
    "duration": ("duration", "duration_s", "seconds"),
    "offset": ("offset", "offset_s"),
}
SCHEMA = ("id", "audio", "text", "speaker", "duration_s", "dataset", "split", "offset_s", "row")
SPEAKER_EMBEDDING_DIM = 512  # of SpeechT5
# Columns that only the leak check reads.
HIDDEN = ("recording_id", "num_bytes")


class SpeechDataset(torch.utils.data.Dataset):
    """Rows of one schema over a `datasets.Dataset`; a row's audio is decoded when the row is asked for.

    `dataset[i]` gives a dict with `index` (i), `epoch`, `id`, `text`, `speaker` (or None), `duration_s`, `dataset`,
    `split`, `offset_s` (or None for a whole recording), `row` (its number in the source, from 1), the group columns,
    and `waveform` (float32, 16 kHz, mono). `dataset[i, seconds]` gives the same row with `padded_s`, the seconds that its
    waveform is to be padded to. Where the audio cannot be used, `waveform` is None and `bad_audio` says why
    and in which row; where nothing could be (FFmpeg is missing), `fatal` has the sentence that ends the run.

    Args:
        rows: `datasets.Dataset` with the columns of `SCHEMA` and the group columns; audio undecoded.
        transforms: callables row → row, applied after decoding, such as augmentation of training rows.
        account: JSON-able dict that says where the rows come from and which were left out.
    """

    def __init__(self, rows, transforms=(), account=None):
        self.rows = rows
        self.transforms = list(transforms)
        self.account = account or {}
        self.epoch = 0
        self.encoded = frozenset()

    def set_epoch(self, epoch):
        """Tells the transforms, through each row's `epoch`, which pass over the rows this is."""
        self.epoch = epoch

    def skip_audio_of(self, keys):
        """Leaves out the waveforms of rows whose encoder output is known: they get `is_encoded` instead.

        Args:
            keys: set of (row number, seconds to pad the waveform to), as they are asked for.
        """
        self.encoded = keys

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        index, padded_s = key if isinstance(key, tuple) else (key, None)
        row = {"index": int(index), "epoch": self.epoch, "padded_s": padded_s, **self.rows[int(index)]}
        if key in self.encoded:
            del row["audio"]
            return {**row, "waveform": None, "is_encoded": True}
        decode_row(row)
        if row["waveform"] is not None:
            for transform in self.transforms:
                row = transform(row)
        return row

    def record(self, index):
        """Returns what is known of a row besides its audio, for results; nothing is decoded."""
        row = self.rows[int(index)]
        left_out = ("audio", "speaker_embedding")
        return {"index": int(index), **{name: value for name, value in row.items() if name not in left_out}}

    @property
    def column_names(self):
        return self.rows.column_names

    def column(self, name):
        """Returns a column as a list, without decoding any audio."""
        return self.rows[name][:]

    def select(self, indices):
        """Returns the rows at these positions, as a dataset of the same kind."""
        return SpeechDataset(self.rows.select(indices), self.transforms, self.account)


def decode_row(row):
    """Replaces `audio` of a row by `waveform`, or by None and the reason in `bad_audio` or `fatal`.

    Nothing is raised: rows are read in other processes, whose errors would come out as their tracebacks.
    """
    audio = row.pop("audio")
    num_s = row["duration_s"] if row["offset_s"] is not None else None
    try:
        source = audio["bytes"] if audio["bytes"] is not None else audio["path"]
        row["waveform"] = decode(source, offset_s=row["offset_s"], num_s=num_s)
    except BadAudio as reason:
        row["waveform"] = None
        row["bad_audio"] = f"{row_name(row['row'], audio['path'] or row['id'])}: {reason}"
    except UserError as error:
        row["waveform"] = None
        row["fatal"] = str(error)


def row_name(number, path):
    """Names a row in messages: `row 812, clip_07.wav`."""
    return f"row {number}, {os.path.basename(str(path))}"


@dataclass
class Columns:
    """The columns of one dataset by their meaning; None where there is none."""

    audio: str
    text: str
    id: str | None
    speaker: str | None
    duration: str | None
    offset: str | None
    id_is_given: bool


def find_columns(rows, data_args, where, lenient=False):
    """Finds the columns by the arguments, and where these are silent by their type and usual names.

    Args:
        rows: a `datasets.Dataset` or `IterableDataset`.
        data_args: the `DataArguments`.
        where: the dataset's name, for messages.
        lenient: a column that an argument names may be missing (one of several datasets); then it is found by itself.

    Raises:
        UserError: a column is missing, or several could be meant; it lists the columns there and the flag to use.
    """
    names = list(rows.column_names or rows.features or [])
    there = ", ".join(names)
    found = {}
    for meaning, usual in COLUMN_NAMES.items():
        given = getattr(data_args, f"{meaning}_column_name", None)
        flag = f"--{meaning}_column_name"
        if given in names:
            found[meaning] = given
            continue
        if given is not None and not lenient:
            raise UserError(f"{where} has no column {given} for {flag}; it has: {there}.{nearest(given, names)}")
        candidates = [name for name in usual if name in names]
        if meaning == "audio":
            candidates = [name for name in names if is_audio(rows.features, name)] or candidates
        elif meaning == "text":
            candidates = [name for name in candidates if not is_audio(rows.features, name)]
        if len(candidates) > 1 and meaning in ("audio", "text", "speaker"):
            raise UserError(
                f"{where} has several columns for the {meaning}: {', '.join(candidates)}; choose with {flag}."
            )
        if len(candidates) > 1:
            logger.info("%s: several columns could hold the %s (%s); none is used.", where, meaning, candidates)
        if not candidates and meaning in ("audio", "text"):
            raise UserError(f"{where} has no column that looks like the {meaning}; name one of {there} with {flag}.")
        found[meaning] = candidates[0] if len(candidates) == 1 else None
    return Columns(**found, id_is_given=found["id"] is not None and found["id"] == data_args.id_column_name)


def is_audio(features, name):
    """Tells whether a column of these features holds audio rather than the path of it."""
    import datasets

    feature = (features or {}).get(name)
    return isinstance(feature, datasets.Audio) or (isinstance(feature, dict) and {"bytes", "path"} <= set(feature))


@dataclass
class Filters:
    """What a row has to satisfy, apart from its audio being readable.

    Args:
        min_duration_s, max_duration_s: of the recording or segment; `max_duration_s` None for no limit.
        tokenizer: with its prefix tokens set; None skips the two filters on tokens.
        max_label_length: number of label tokens that the model takes, without the start token.
    """

    min_duration_s: float
    max_duration_s: float | None
    tokenizer: object = None
    max_label_length: int | None = None

    def reasons(self, texts, durations):
        """Returns for each row None, or (why it is left out, the example's detail)."""
        reasons = [self._reason(text, duration) for text, duration in zip(texts, durations)]
        left = [i for i, reason in enumerate(reasons) if reason is None and self._may_fail(texts[i])]
        if left:
            rest = [texts[i] for i in left], [durations[i] or 0.0 for i in left]
            for i, reason in zip(left, self._token_reasons(*rest)):
                reasons[i] = reason
        return reasons

    def _reason(self, text, duration):
        if not text.strip():
            return "empty text", ""
        if duration is not None and duration < self.min_duration_s:
            return f"shorter than {self.min_duration_s:g} s", f"{duration:.2f} s"
        if duration is not None and self.max_duration_s is not None and duration > self.max_duration_s:
            return f"longer than {self.max_duration_s:g} s", f"{duration:.2f} s"

    def _may_fail(self, text):
        """Tells whether a text has to be tokenised to know that it passes; most are too short to fail."""
        if self.tokenizer is None:
            return False
        if self._token_bounds is None:
            return True
        num_around, special = self._token_bounds
        is_long = self.max_label_length is not None and num_around + len(text.encode()) > self.max_label_length
        return is_long or not special.isdisjoint(text)

    @cached_property
    def _token_bounds(self):
        """The number of tokens around a text, and the characters that special tokens begin with.

        Other text makes no more tokens than it has bytes, and comes back whole, where there is a token for each byte.
        None where there is not.
        """
        if not set(ByteLevel.alphabet()) <= self.tokenizer.get_vocab().keys():
            return None
        return len(labels_of(self.tokenizer, [""], [0.0])[0]), {token[0] for token in self.tokenizer.get_added_vocab()}

    def _token_reasons(self, texts, durations):
        labels = labels_of(self.tokenizer, texts, durations)
        heard = self.tokenizer.batch_decode(labels, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for text, ids, back in zip(texts, labels, heard):
            length = len(ids)
            text, back = TIMESTAMP.sub("", text), TIMESTAMP.sub("", back)
            if "".join(text.split()) != "".join(back.split()):
                lost = "".join(dict.fromkeys(c for c in text if c not in back and not c.isspace()))
                yield "characters that the tokenizer cannot spell", f"{lost or text[:40]!r} in {text[:60]!r}"
            elif self.max_label_length is not None and length > self.max_label_length:
                yield f"labels longer than {self.max_label_length} tokens", f"{length} tokens"
            else:
                yield None


class SpokenTextFilters(Filters):
    """The filters on text that is to be spoken; what the model cannot read is counted, not left out.

    Args:
        front_end: `TextFrontEnd`.
        max_tokens: number of tokens that the model takes.

    Attributes:
        unknown: `collections.Counter` of the characters that the tokenizer lacks, over all texts looked at.
    """

    def __init__(self, min_duration_s, max_duration_s, front_end, max_tokens):
        super().__init__(min_duration_s, max_duration_s, max_label_length=max_tokens)
        self.front_end, self.unknown = front_end, Counter()

    def _may_fail(self, text):
        return True

    def _token_reasons(self, texts, durations):
        for text in texts:
            spoken = self.front_end(text)
            self.unknown.update(self.front_end.unknown(text))
            length = len(self.front_end.ids(text))
            if not spoken.strip():
                yield "no text left to speak", repr(text[:40])
            elif length > self.max_label_length:
                yield f"text longer than {self.max_label_length} tokens", f"{length} tokens"
            else:
                yield None


class Dropped(dict):
    """Rows left out, reason → {"count", "example"}."""

    def add(self, reason, row, detail=""):
        entry = self.setdefault(reason, {"count": 0, "example": f"{row}: {detail}" if detail else row})
        entry["count"] += 1


def read_rows(raw, folder, columns, filters, data_args, dataset_name, split, dropped, numbers=None):
    """Brings the rows of one dataset and split into the schema, without those that the filters reject.

    Args:
        raw: the `datasets.Dataset` as it is stored.
        folder: the `AudioFolder` of its paths.
        columns: its `Columns`.
        filters: the `Filters`.
        data_args: for `group_columns` and `on_bad_audio`.
        dataset_name, split: remembered in each row.
        dropped: the `Dropped` that takes the account.
        numbers: of the rows in their source, from 1 or as they are to be named; None where these are all of it.

    Returns:
        `datasets.Dataset` with the columns of `SCHEMA` and `HIDDEN` and the group columns.

    Raises:
        UserError: a header shows bad audio and `on_bad_audio` is `error`; a path leads out of the folder.
    """
    import datasets

    numbers = range(1, len(raw) + 1) if numbers is None else numbers
    raw = as_undecoded(raw, columns.audio, folder, f"{dataset_name}, {split}", numbers)
    texts = ["" if text is None else str(text) for text in raw[columns.text][:]]
    given = durations_given(raw, columns, dataset_name, numbers)
    offsets = [None] * len(raw)
    if columns.offset:
        offsets = [
            to_seconds(value, columns.offset, number, dataset_name)
            for value, number in zip(raw[columns.offset][:], numbers)
        ]
    paths, sizes, measured = _measure(raw, columns.audio, given)

    def name_of(i):
        return row_name(numbers[i], paths[i] or split)

    durations = []
    for i, (seconds, offset) in enumerate(zip(measured, offsets)):
        if isinstance(seconds, BadAudio):
            if data_args.on_bad_audio == "error":
                name = name_of(i)
                raise UserError(
                    f"{dataset_name}, {split}: {name[0].upper()}{name[1:]}: {seconds}. "
                    "Leave such rows out with --on_bad_audio skip."
                )
            dropped.add("bad audio", name_of(i), str(seconds))
            seconds = None
        elif offset is not None and given[i] is None:
            seconds = max(0.0, seconds - offset)
        durations.append(seconds)
    speakers = _strings(raw[columns.speaker][:]) if columns.speaker else [None] * len(raw)
    reasons = filters.reasons(texts, durations)
    if data_args.speakers:
        _check_speakers(data_args.speakers, speakers, columns.speaker, f"{dataset_name}, {split}")
        reasons = [
            reason if speaker in data_args.speakers else ("another speaker", f"{speaker}")
            for reason, speaker in zip(reasons, speakers)
        ]
    kept = []
    for i, reason in enumerate(reasons):
        if isinstance(measured[i], BadAudio):
            continue
        if reason is None:
            kept.append(i)
        else:
            dropped.add(reason[0], name_of(i), reason[1])

    ids, are_recordings = _ids(raw, columns, paths, offsets, folder, split, numbers)
    own = {
        "id": ids,
        "text": texts,
        "speaker": speakers,
        "duration_s": durations,
        "dataset": [dataset_name] * len(raw),
        "split": [split] * len(raw),
        "offset_s": offsets,
        "row": list(numbers),
        "recording_id": ids if are_recordings else [None] * len(raw),
        "num_bytes": sizes,
    }
    if data_args.speaker_embedding_column_name:
        own["speaker_embedding"] = _embeddings(raw, data_args.speaker_embedding_column_name, dataset_name)
    for name in group_columns(data_args):
        own[name] = _strings(raw[name][:]) if name in raw.column_names else [None] * len(raw)
    kinds = {"duration_s": "float64", "offset_s": "float64", "num_bytes": "int64"}
    kinds |= {"row": pyarrow.infer_type(numbers), "speaker_embedding": pyarrow.list_(pyarrow.float32())}
    own = {name: pyarrow.array(values, kinds.get(name, "string")) for name, values in own.items()}
    audio = raw.select_columns([columns.audio]).rename_columns({columns.audio: "audio"})
    rows = datasets.concatenate_datasets([audio, datasets.Dataset(pyarrow.table(own))], axis=1)
    return rows.select(kept)


def rows_with(count, speakers, raw, columns):
    """Returns how many rows from the first on hold `count` rows of these speakers (None: of any), or all there are."""
    if not (speakers and columns.speaker):
        return min(count, len(raw))
    numbers = [n for n, speaker in enumerate(_strings(raw[columns.speaker][:]), 1) if speaker in speakers]
    return [0, *numbers][count] if count <= len(numbers) else len(raw)


def _check_speakers(wanted, speakers, column, where):
    """Refuses --speakers where none of them speaks."""
    there = sorted({speaker for speaker in speakers if speaker})
    if not column:
        raise UserError(f"{where} has no speaker column for --speakers: name it with --speaker_column_name.")
    if not set(wanted) & set(there):
        raise UserError(
            f"{where} has no row of --speakers {' '.join(wanted)}; it has: {', '.join(there[:12])}."
            f"{nearest(wanted[0], there)}"
        )


def _embeddings(raw, column, dataset_name):
    """Returns the speaker embeddings of a column, each a list of floats."""
    if column not in raw.column_names:
        raise UserError(
            f"{dataset_name} has no column {column} for --speaker_embedding_column_name; it has: "
            f"{', '.join(raw.column_names)}.{nearest(column, raw.column_names)}"
        )
    values = raw[column][:]
    for i, value in enumerate(values):
        if not isinstance(value, list) or len(value) != SPEAKER_EMBEDDING_DIM:
            raise UserError(
                f"{dataset_name}, row {i + 1}: {column} does not hold {SPEAKER_EMBEDDING_DIM} numbers: name another "
                "column with --speaker_embedding_column_name, or leave it out."
            )
    return values


def group_columns(data_args):
    """The group columns that are not in the schema anyway."""
    return [name for name in data_args.group_columns or [] if name not in SCHEMA]


def as_undecoded(raw, column, folder, where, numbers):
    """Makes the audio column one of undecoded audio, with absolute paths for what lies in files.

    `where` and `numbers` are what the table and its rows are called in messages.

    Raises:
        UserError: a path leads out of the folder.
    """
    import datasets

    if is_audio(raw.features, column):
        raw = raw.cast_column(column, datasets.Audio(decode=False))
        contents, named = undecoded(raw, column)
    elif folder.path is None:
        raise UserError(f"The column {column} holds text and not audio; name the audio's with --audio_column_name.")
    else:
        contents, named = [None] * len(raw), [None if path is None else str(path) for path in raw[column][:]]
    if all(content is not None for content in contents):
        return raw

    def find(job):
        content, path = job
        whole = folder.find(path) if content is None else path
        return whole, content is not None or folder.holds(whole)

    found = in_threads(find, list(zip(contents, named)))
    paths = pyarrow.array([path for path, _ in found], "string")
    outside = [i for i, (_, is_inside) in enumerate(found) if not is_inside]
    if outside:
        row = f"{where}: Row {numbers[outside[0]]}"
        raise UserError(folder.refusal(row, [found[i][0] for i in outside]))
    contents = pyarrow.array([None if content is None else bytes(content) for content in contents], "binary")
    audio = pyarrow.StructArray.from_arrays([contents, paths], ["bytes", "path"])
    table = raw.with_format("arrow")[:].combine_chunks()
    table = table.set_column(table.column_names.index(column), column, audio)
    return datasets.Dataset(table.replace_schema_metadata(None)).cast_column(column, datasets.Audio(decode=False))


def to_seconds(value, column, number, dataset_name):
    """Reads a number of seconds from a manifest, or None from an empty cell."""
    if value is None or value == "":
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise UserError(f"{dataset_name}, row {number}: the {column} {value!r} is not a number of seconds.")
    return seconds


def durations_given(raw, columns, dataset_name, numbers):
    """Reads the duration column, unless its first recordings show that it is not in seconds."""
    if not columns.duration:
        return [None] * len(raw)
    given = [
        to_seconds(value, columns.duration, number, dataset_name)
        for value, number in zip(raw[columns.duration][:], numbers)
    ]
    if not columns.offset:
        for i in range(min(3, len(raw))):
            audio = raw[columns.audio][i]
            try:
                seconds = duration_s(audio["bytes"] if audio["bytes"] is not None else audio["path"])
            except BadAudio:
                continue
            if given[i] is not None and abs(given[i] - seconds) > 0.5 + 0.1 * seconds:
                logger.warning(
                    "%s: the column %s says %g where the recording has %.2f s; durations are read from the files.",
                    dataset_name,
                    columns.duration,
                    given[i],
                    seconds,
                )
                return [None] * len(raw)
    return given


def undecoded(rows, column="audio"):
    """Returns the contents (memoryview or None) and the paths of a column of undecoded audio; no audio is copied."""
    contents, paths = [], []
    for batch in rows.select_columns([column]).with_format("arrow").iter(1000):
        for chunk in pyarrow.compute.struct_field(batch[column], "bytes").chunks:
            if chunk.null_count == len(chunk):
                contents += [None] * len(chunk)
                continue
            _, starts, content = chunk.buffers()  # pyarrow's own scalars would be copies
            starts = np.frombuffer(starts, "int32")[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
            content = memoryview(content or b"")
            spans = zip(starts, starts[1:], chunk.is_valid().to_pylist())
            contents += [content[start:end] if is_valid else None for start, end, is_valid in spans]
        paths += pyarrow.compute.struct_field(batch[column], "path").to_pylist()
    return contents, paths


def in_threads(function, values):
    """Returns the results in order. Threads, because on a network file system the time goes by waiting."""
    with ThreadPool(8) as threads:
        return threads.map(function, values)


def _measure(raw, column, given):
    """Returns paths, sizes in bytes, and durations or the `BadAudio` that each header shows."""
    contents, paths = undecoded(raw, column)
    measured = in_threads(_measure_one, list(zip(contents, paths, given)))
    return paths, [size for size, _ in measured], [seconds for _, seconds in measured]


def _measure_one(job):
    content, path, given = job
    if content is not None:
        size = len(content)
    elif path:
        try:
            size = os.stat(path).st_size
        except (OSError, ValueError):  # no file can have such a name
            return None, BadAudio("no such file")
    else:
        return None, BadAudio("neither bytes nor a path")
    if size == 0:
        return 0, BadAudio("0 bytes")
    if given is not None:
        return size, given
    try:
        return size, duration_s(path if content is None else content)
    except BadAudio as reason:
        return size, reason


def _ids(raw, columns, paths, offsets, folder, split, numbers):
    """Returns an id for each row, and whether it names the recording.

    A column that was found by itself may number the rows of a split, in whatever order: then it names none.
    """
    if columns.id:
        ids = [None if value is None else str(value) for value in raw[columns.id][:]]
        are_numbers = all(id is None or id.isdecimal() for id in ids)
        if columns.id_is_given or (len(set(ids)) == len(ids) and not are_numbers and None not in ids):
            return [id or f"{split}-{number}" for id, number in zip(ids, numbers)], True
        logger.info("The column %s holds numbers or repeats itself, so it is not taken for an id.", columns.id)
    return [_default_id(*row, folder, split) for row in zip(paths, offsets, numbers)], False


def _default_id(path, offset_s, number, folder, split):
    """The id of a row without one: its path from the manifest, and where the segment starts."""
    if not path:
        return f"{split}-{number}"
    name = os.path.relpath(path, folder.path) if folder.path and os.path.isabs(path) else path
    return name if offset_s is None else f"{name}@{offset_s:g}"


def _strings(values):
    return [None if value is None or value == "" else str(value) for value in values]
