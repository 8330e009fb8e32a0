"""From recordings on a disk to a dataset on the Hub: parquet with the audio inside, and a card that says what it is."""

import dataclasses
import io
import logging
import os
import re
import tempfile
from pathlib import Path

from tqdm import tqdm

from hfspeech.arguments import DataArguments
from hfspeech.audio import SAMPLING_RATE, BadAudio, decode, sampling_rate_of
from hfspeech.data.rows import as_undecoded, find_columns, is_audio, row_name, to_seconds
from hfspeech.data.sources import ALIASES, LocalSource
from hfspeech.errors import UserError
from hfspeech.hub import fetch_file, require_write_access, upload_folder
from hfspeech.runs import writing

SHARD_BYTES = 500 * 10**6
GROUP_BYTES = 32 * 10**6  # of audio in memory, and in one row group
MOST_FAULTS = 5  # named in a message

_ABSOLUTE = re.compile(r"/[^/\s]+/|~/|[A-Za-z]:[\\/]|file://")

logger = logging.getLogger("hfspeech")


@dataclasses.dataclass
class Split:
    """What is in a split, for the card."""

    name: str
    features: dict
    rows: int
    seconds: float = 0.0
    num_bytes: int = 0
    speakers: set = dataclasses.field(default_factory=set)
    rates: set = dataclasses.field(default_factory=set)


def push_dataset(
    path, repo_id, config="default", language=None, license=None, private=None, revision=None, tag=None, columns=None,
    audio_root=(),
):  # fmt: skip
    """Uploads local recordings as a dataset that `load_dataset` and the recipes read, and prints where it is.

    Args:
        path: audiofolder, manifest or parquet, as `hfspeech.data` reads it; all its splits.
        repo_id: `owner/name`, or a bare name for the user's own namespace.
        config: the configuration that it becomes; what is there of it is replaced, other ones stay.
        language, license: for the card; what it says already stays.
        private, revision, tag: as for `hfspeech.hub.upload_folder`.
        columns: dict of `audio_column_name`, `text_column_name`, `speaker_column_name`; those found by themselves if absent.
        audio_root: folders that the paths of a manifest may lead into, besides its own.

    Returns:
        `hfspeech.hub.Pushed`.

    Raises:
        UserError: there is nothing readable, or a recording is broken, or it may not be uploaded there.
        PushFailed: the upload did not succeed.
    """
    if not re.fullmatch(r"\w[\w.-]*", config):
        raise UserError(f"{config!r} cannot name a configuration: use letters, digits, - _ and . only.")
    if config == "data":  # where the configuration that is called default lies
        raise UserError("data cannot name a configuration: choose another name with --config.")
    if language and not re.fullmatch(r"[a-z]{2,3}(-\w+)*", language):
        raise UserError(f"{language!r} is no code of a language: give one such as de.")
    if license and not re.fullmatch(r"[a-z0-9.+-]+", license):
        raise UserError(f"{license!r} is no licence as the Hub names them: give one such as cc-by-4.0.")
    if not Path(path).expanduser().exists():
        raise UserError(f"There is no file or folder {path}: check its path (from here, {Path.cwd()}).")
    source = LocalSource(str(path), Path(path).expanduser(), audio_root=audio_root)
    where = {"private": private, "revision": revision, "tag": tag}
    repo_id = require_write_access(repo_id, "dataset", **where)
    with tempfile.TemporaryDirectory(prefix="hfspeech-") as folder, writing(folder, "set TMPDIR to a larger disk"):
        folder, data_dir = Path(folder), "data" if config == "default" else config
        splits = write_parquet(source, folder / data_dir, DataArguments(dataset_name=[str(path)], **(columns or {})))
        there = [fetch_file(repo_id, "README.md", "dataset", branch, missing_ok=True) for branch in (revision, None)]
        text = next((file.read_text(encoding="utf-8") for file in there if file), "")
        sizes = sum(file.stat().st_size for file in (folder / data_dir).iterdir())
        card = dataset_card(text, repo_id, config, data_dir, splits, sizes, language, license)
        (folder / "README.md").write_text(card, encoding="utf-8")
        pushed = upload_folder(folder, repo_id, "dataset", replaces=[f"{data_dir}/*.parquet"], **where)
    print(f"Pushed to {pushed.url}\nTrain on it with:\n    --dataset_name {repo_id}{_flags(config, pushed.revision)}")
    return pushed


def write_parquet(source, folder, data_args, shard_bytes=SHARD_BYTES):
    """Writes all splits of a source as parquet files with the audio inside, and decodes every recording once.

    Args:
        source: `LocalSource`.
        folder: where `train-00000-of-00002.parquet` and so on go; made here.
        data_args: for the names of columns.
        shard_bytes: about how large a file may get.

    Returns:
        list of `Split`.

    Raises:
        UserError: a recording is broken (the sentence names those), or two splits are the same one.
    """
    folder.mkdir(parents=True)
    order, parts = ("train", "validation", "test"), {}
    for name in source.split_names:
        split = ALIASES.get(name, name)
        if not re.fullmatch(r"\w+", split) or split in parts:
            raise UserError(f"{source.name} has a split {name}: give it a name of its own, of letters, digits and _.")
        rows, paths_from = source.read(name)
        parts[split] = _Part(split, rows, paths_from, find_columns(rows, data_args, source.name), source.name)
    parts = sorted(parts.values(), key=lambda part: order.index(part.name) if part.name in order else len(order))
    features, faults = _common_features(parts), []
    splits = [part.write(features, folder, shard_bytes, faults) for part in parts]
    if faults:
        more = [f"and {len(faults) - MOST_FAULTS} more"] if len(faults) > MOST_FAULTS else []
        last = "Nothing was pushed: mend these recordings, or take their rows out."
        raise UserError("\n".join([*faults[:MOST_FAULTS], *more, last]))
    return splits


def _common_features(parts):
    """Returns the `datasets.Features` of all splits together: a column that one of them lacks is empty there."""
    import datasets

    features = datasets.Features()
    for part in parts:
        for name, feature in part.features.items():
            if features.setdefault(name, feature) != feature:
                raise UserError(
                    f"The column {name} of {part.where} is {features[name]} in one split and {feature} in another: store "
                    "it the same way in both."
                )
    return features


class _Part:
    """A split on its way into parquet.

    Args:
        name: of the split.
        rows, paths_from: as a source reads them.
        columns: its `Columns`.
        where: name of the source, for messages.
    """

    def __init__(self, name, rows, paths_from, columns, where):
        import datasets

        self.name, self.where, self.columns, self.audio = name, where, columns, columns.audio
        self.offsets, self.lengths = (self._seconds(rows, name) for name in (columns.offset, columns.duration))
        is_path = not is_audio(rows.features, self.audio)
        rows = as_undecoded(rows, self.audio, paths_from, f"{where}, {name}", range(1, len(rows) + 1))
        if is_path and self.audio != "audio":
            rows, self.audio = rows.rename_column(self.audio, "audio"), "audio"
        left_out = {"split", columns.offset} | self._local_paths(rows)
        self.rows = rows.select_columns([column for column in rows.column_names if column not in left_out])
        text = datasets.Value("string")
        self.features = {c: text if f == datasets.Value("null") else f for c, f in self.rows.features.items()}
        self.features[self.audio] = datasets.Audio()
        if columns.duration:
            self.features[columns.duration] = datasets.Value("float64")

    def write(self, features, folder, shard_bytes, faults):
        """Writes the split, and adds a sentence to `faults` for each broken recording; returns its `Split`."""
        import pyarrow

        split, schema = Split(self.name, features, len(self.rows)), features.arrow_schema
        shards, tables = _Shards(folder, self.name, schema, shard_bytes), self.rows.with_format("arrow")
        contents, seconds, first = [], [], 0
        for i in tqdm(range(len(self.rows)), unit=" rows", desc=f"reading {self.name}", disable=None):
            audio = self.rows[i][self.audio]
            try:
                content, rate, num_s = _recording(audio, self.offsets[i], self.lengths[i])
            except BadAudio as reason:
                row = row_name(i + 1, audio["path"] or "").removesuffix(", ")
                faults.append(f"{self.where}, {self.name}, {row}: {reason}")
                continue
            contents.append(content)
            seconds.append(num_s)
            split.seconds += num_s
            split.rates.add(rate)
            if (
                sum(len(content["bytes"]) for content in contents) < min(GROUP_BYTES, shard_bytes)
                and i + 1 < split.rows
            ):
                continue
            if not faults:
                table = tables[first : i + 1]
                values = {c: table[c] if c in table.column_names else [None] * len(table) for c in features}
                values[self.audio] = contents
                if self.columns.duration:
                    values[self.columns.duration] = seconds
                table = pyarrow.Table.from_pydict(values, schema=schema)
                split.num_bytes += table.nbytes
                shards.write(table)
            contents, seconds, first = [], [], i + 1
        shards.close()
        if self.columns.speaker:
            split.speakers = set(self.rows[self.columns.speaker][:]) - {None, ""}
        return split

    def _seconds(self, rows, column):
        if not column:
            return [None] * len(rows)
        return [to_seconds(value, column, i, self.where) for i, value in enumerate(rows[column][:], 1)]

    def _local_paths(self, rows):
        """Returns the columns that hold paths of this machine, which are nobody else's business."""
        found = set()
        for name, feature in rows.features.items():
            is_text = getattr(feature, "dtype", None) in ("string", "large_string")
            if is_text and name != self.columns.text and any(_ABSOLUTE.match(value or "") for value in rows[name][:]):
                found.add(name)
                logger.warning("%s: the column %s holds paths of this machine and is left out.", self.where, name)
        return found


def _recording(audio, offset_s, num_s):
    """Returns a recording as {bytes, path}, its sampling rate and its seconds; of a segment, only that.

    Raises:
        BadAudio: it cannot be used.
    """
    content, name = audio["bytes"], os.path.basename(audio["path"] or "") or None
    if content is None:
        try:
            content = Path(audio["path"]).read_bytes()
        except (IsADirectoryError, TypeError):
            raise BadAudio("no file is named") from None
        except OSError as error:
            raise BadAudio(error.strerror.lower()) from None
    if not content:
        raise BadAudio("0 bytes")
    rate = sampling_rate_of(content) or SAMPLING_RATE
    waveform = decode(content, rate, offset_s, num_s if offset_s is not None else None)
    if offset_s is not None:
        import soundfile

        buffer = io.BytesIO()
        soundfile.write(buffer, waveform, rate, format="FLAC")
        content, name = buffer.getvalue(), f"{Path(name or 'segment').stem}_{offset_s:g}.flac"
    return {"bytes": content, "path": name}, rate, len(waveform) / rate


class _Shards:
    """Writes tables into parquet files of about `max_bytes`, which are numbered when their number is known."""

    def __init__(self, folder, split, schema, max_bytes):
        self.folder, self.split, self.schema, self.max_bytes = folder, split, schema, max_bytes
        self.files, self.writer = [], None

    def write(self, table):
        import pyarrow.parquet

        if self.writer is None:
            self.files.append(self.folder / f"{self.split}-{len(self.files):05}.part")
            self.writer = pyarrow.parquet.ParquetWriter(self.files[-1], self.schema)
        self.writer.write_table(table)
        if self.files[-1].stat().st_size + GROUP_BYTES > self.max_bytes:
            self._end_file()

    def close(self):
        self._end_file()
        for number, file in enumerate(self.files):
            file.rename(self.folder / f"{self.split}-{number:05}-of-{len(self.files):05}.parquet")

    def _end_file(self):
        if self.writer is not None:
            self.writer.close()
        self.writer = None


def dataset_card(text, repo_id, config, data_dir, splits, download_bytes, language=None, license=None):
    """Returns the card of a dataset, with what is said of one configuration written anew.

    Args:
        text: the card that is there, or an empty string.
        repo_id, config: where it goes.
        data_dir: folder of its parquet files.
        splits: list of `Split`.
        download_bytes: size of these files.
        language, license: told of it, or None.
    """
    import datasets
    from datasets.info import DatasetInfosDict
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard, DatasetCardData

    card = DatasetCard(text or f"---\n{{}}\n---\n\n# {repo_id.split('/')[1]}\n")
    data = card.data = card.data or DatasetCardData()
    data.license = license or data.license
    known = [data.language] if isinstance(data.language, str) else data.language or []
    data.language = sorted({*known, *([language] if language else [])}) or None
    data.task_categories = data.task_categories or ["automatic-speech-recognition", "text-to-speech"]
    info = datasets.DatasetInfo(
        features=splits[0].features,
        splits=[{"name": s.name, "num_bytes": s.num_bytes, "num_examples": s.rows} for s in splits],
        download_size=download_bytes,
        dataset_size=sum(s.num_bytes for s in splits),
    )
    DatasetInfosDict({config: info}).to_dataset_card_data(data)
    files = [{"split": s.name, "path": f"{data_dir}/{s.name}-*"} for s in splits]
    MetadataConfigs({config: {"data_files": files}}).to_dataset_card_data(data)
    infos = DatasetInfosDict.from_dataset_card_data(data).values()
    num_rows = sum(split.num_examples for of_config in infos for split in of_config.splits.values())
    data.size_categories = [_size_category(num_rows)]
    begin, end = f"<!-- hfspeech push-dataset: {config} -->", f"<!-- end of {config} -->"
    section = f"{begin}\n{_section(repo_id, config, splits)}\n{end}"
    if begin in card.text and end in card.text:
        before, _, rest = card.text.partition(begin)
        card.text = before + section + rest.partition(end)[2]
    else:
        card.text = f"{card.text.rstrip()}\n\n{section}\n"
    return str(card)


def _section(repo_id, config, splits):
    """Returns what the card says of one configuration: a table of its splits, and how to load it."""
    lines = [f"## {'Recordings' if config == 'default' else config}", ""]
    lines += ["| split | rows | length | speakers | sampling rate |", "|---|---|---|---|---|"]
    for s in splits:
        rates = ", ".join(f"{rate} Hz" for rate in sorted(s.rates))
        length = f"{s.seconds / 3600:.1f} hours" if s.seconds >= 3600 else f"{s.seconds / 60:.1f} minutes"
        lines.append(f"| {s.name} | {s.rows} | {length} | {len(s.speakers) or ''} | {rates} |")
    name = f'"{repo_id}"' + ("" if config == "default" else f', "{config}"')
    flags = _flags(config)
    lines += ["", "```python", "from datasets import load_dataset", "", f"dataset = load_dataset({name})", "```", ""]
    lines += [f"To train on it with hfspeech: `--dataset_name {repo_id}{flags}`"]
    return "\n".join(lines)


def _flags(config, revision=None):
    flags = "" if config == "default" else f" --dataset_config_name {config}"
    return flags + (f" --dataset_revision {revision}" if revision else "")


def _size_category(num_rows):
    names = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M"]
    return next((name for i, name in enumerate(names) if num_rows < 1000 * 10**i), "n>100M")
