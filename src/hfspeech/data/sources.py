"""Where rows come from: a Hub dataset, a local folder, a manifest file or parquet, split by split.

How a local path maps to splits:

- A **manifest file** (`.csv`, `.tsv`, `.jsonl`, `.parquet`): its `split` column says which rows are which; without
  one, a file called `train`, `validation`, `dev` or `test` is that split, and any other file is train. When one
  split is asked for (`load_split`), a file without a `split` column is that split.
- A **folder with manifests**: `train.tsv`, `dev.tsv`, `test.tsv` (Common Voice; audio beside them or in `clips/`), or
  the same in `.csv`, `.jsonl` or `.parquet`, also as the shards `test-00000-of-00001.parquet`, here or in `data/`.
- An **audiofolder**: `train/metadata.csv`, `test/metadata.csv` and so on (or `metadata.jsonl`), with a `file_name`
  column; or one `metadata.csv` for all, in which a `split` column, or else the first folder of `file_name`, names
  the split; failing both, all of it is train.

`validation` may also be called `valid`, `val` or `dev` there.
"""

import json
import os
import re
from pathlib import Path

from hfspeech.errors import UserError, nearest
from hfspeech.hub import gated, license_in, look_up, stated_license

MANIFEST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
ALIASES = {"valid": "validation", "val": "validation", "dev": "validation"}
_OFFICIAL = ("train", "validation", "test")


def open_source(name, config=None, revision=None, streaming=False, flags="--dataset"):
    """Opens one dataset, without reading its rows yet.

    Args:
        name: Hub id (`owner/name`), or path of a folder, a manifest or a parquet file.
        config: configuration of the Hub dataset.
        revision: branch, tag or commit of the Hub dataset.
        streaming: do not download the Hub dataset first.
        flags: how the flags of this dataset begin, for messages.

    Returns:
        object with `name`, `record` (a dict of what was used), `split_names` and `read(split)`, which gives the rows
        (a `datasets.Dataset` or `IterableDataset`, or None) and the folder that their paths start from (or None).

    Raises:
        UserError: there is no such dataset, or no access, or nothing readable in the folder.
    """
    path = Path(name).expanduser()
    if path.exists():
        return LocalSource(name, path)
    if path.suffix in MANIFEST_SUFFIXES or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"No such file or folder: {name}; give an existing path, or a Hub id such as owner/name.")
    if name.count("/") != 1:
        raise UserError(
            f"There is no file or folder {name} here, and a Hub dataset is written owner/name, such as google/fleurs."
        )
    return HubSource(name, config, revision, streaming, flags)


class LocalSource:
    """A manifest, a folder of manifests, or an audiofolder; paths only, audio is read when a row is."""

    def __init__(self, name, path):
        self.name = name
        card = (path if path.is_dir() else path.parent) / "README.md"
        self.record = {"name": str(name), "license": license_in(card)}
        self._tables = {}
        if path.is_dir():
            files = _split_files(path)
            if not files:
                raise UserError(
                    f"{name} holds no rows that can be read: write {path / 'train' / 'metadata.csv'} with the columns "
                    "file_name and text (and the same for test), or put train.csv and test.csv there."
                )
        else:
            if path.suffix not in MANIFEST_SUFFIXES:
                raise UserError(f"{name} is none of {', '.join(MANIFEST_SUFFIXES)}; give a manifest or a folder.")
            files = {None: [path]}
        for split, paths in files.items():
            self._tables[split] = read_table(paths), str(paths[0].resolve().parent)
        if None in self._tables:
            self._part(path)

    def _part(self, path):
        """Distributes the rows of a single manifest over the splits that it names."""
        rows, folder = self._tables[None]
        if "split" in rows.column_names:
            names = [str(value) for value in rows["split"][:]]
        elif "file_name" in rows.column_names:
            names = [str(value).replace("\\", "/").split("/")[0] for value in rows["file_name"][:]]
            if not {ALIASES.get(name, name) for name in names} <= set(_OFFICIAL):
                names = []
        else:
            names = []
        if names:
            del self._tables[None]
            for name in dict.fromkeys(names):
                self._tables[name] = rows.select([i for i, other in enumerate(names) if other == name]), folder
        else:
            stem = ALIASES.get(path.stem, path.stem)
            self.default_split = stem if stem in _OFFICIAL else "train"

    @property
    def split_names(self):
        return [self.default_split if split is None else split for split in self._tables]

    def read(self, split, only=False):
        """Returns the rows of a split and their folder; `only`: a file that names no splits is the one asked for."""
        if None in self._tables:
            return self._tables[None] if only or split == self.default_split else (None, None)
        if split in self._tables:
            return self._tables[split]
        return next((table for name, table in self._tables.items() if ALIASES.get(name) == split), (None, None))


class HubSource:
    """A dataset of the Hub (or of any `HF_ENDPOINT`), with the token of the environment or of `hf auth login`."""

    def __init__(self, name, config, revision, streaming, flags):
        import datasets
        from datasets.exceptions import DatasetNotFoundError

        self.name = name
        info, unreachable = look_up(name, revision, "dataset", f"{flags}_revision")
        commit = info and info.sha
        self.record = {"name": name, "config": config, "revision": revision, "commit": commit}
        self.record["license"] = stated_license(info and info.card_data)
        where = f"{name}@{revision}" if revision else name
        try:
            self._splits = datasets.load_dataset(name, config, revision=commit or revision, streaming=streaming)
        except (ValueError, RuntimeError, ImportError, OSError) as error:
            text = str(error)
            if unreachable:
                raise UserError(f"{where} is not in the cache, and {unreachable}.") from None
            if "onfig" in text and "vailable" in text:
                available = re.search(r"\[(.*)\]", text, re.S)
                configs = re.findall(r"'([^']+)'", available[1]) if available else []
                said = f"has no configuration {config!r}" if config else "needs a configuration"
                raise UserError(
                    f"{where} {said}; give {flags}_config_name one of: {', '.join(configs)}."
                    f"{nearest(config, configs) if config else ''}"
                ) from None
            if "scripts are no longer supported" in text or "torchcodec" in text:
                raise UserError(
                    f"{where} is not stored as parquet, which is what can be read here; "
                    f"give {flags}_revision refs/convert/parquet, where the Hub keeps a converted copy."
                ) from None
            if isinstance(error, DatasetNotFoundError) and "gated" in text:
                raise UserError(gated(name, "dataset")) from None
            if isinstance(error, DatasetNotFoundError) or "No (supported) data files" in text:
                raise UserError(f"{where} holds no data files that can be read; see its page on the Hub.") from None
            raise
        if commit is None:
            files = getattr(next(iter(self._splits.values())), "cache_files", None) or [{"filename": ""}]
            found = re.search(r"[/\\]([0-9a-f]{40})[/\\]", files[0]["filename"])
            self.record["commit"] = found[1] if found else None

    @property
    def split_names(self):
        return list(self._splits)

    def read(self, split, only=False):
        return (self._splits[split] if split in self._splits else None), None


def _split_files(folder):
    """Maps split names to the manifests of a folder; the key None stands for one manifest that holds them all."""
    files = {}
    for where in (folder, folder / "data"):
        if not where.is_dir():
            continue
        for path in sorted(where.iterdir()):
            split = re.sub(r"-\d{5}-of-\d{5}.*$", "", path.stem) if path.suffix == ".parquet" else path.stem
            if path.suffix in MANIFEST_SUFFIXES and ALIASES.get(split, split) in _OFFICIAL:
                files.setdefault(split, []).append(path)
    if files:
        for split, paths in files.items():
            if len({path.suffix for path in paths}) > 1 or (len(paths) > 1 and paths[0].suffix != ".parquet"):
                raise UserError(
                    f"{folder} holds several manifests of the split {split} ({', '.join(p.name for p in paths)}); "
                    "leave one, or name the file itself instead of the folder."
                )
        return files
    files = {path.name: [metadata] for path in sorted(folder.iterdir()) if (metadata := _metadata(path))}
    if not files and (metadata := _metadata(folder)):
        files = {None: [metadata]}
    return files


def _metadata(folder):
    names = ("metadata.csv", "metadata.jsonl", "metadata.tsv", "metadata.parquet")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_table(paths):
    """Reads the manifests of one split as a `datasets.Dataset`; text of any manifest but parquet stays text.

    Args:
        paths: list of Path, one manifest, or several shards of parquet.

    Raises:
        UserError: a manifest cannot be read, or holds no rows.
    """
    import datasets

    suffix = paths[0].suffix
    if suffix == ".parquet":
        files = [str(path) for path in paths]
        try:
            rows = datasets.load_dataset("parquet", data_files={"rows": files}, split="rows")
        except datasets.exceptions.DatasetGenerationError as error:
            raise UserError(f"{paths[0]} cannot be read as parquet: {error.__cause__}.") from None
    else:
        rows = datasets.Dataset.from_dict(_read_jsonl(paths[0]) if suffix == ".jsonl" else _read_csv(paths[0]))
    if len(rows) == 0:
        raise UserError(f"{paths[0]} holds no rows.")
    return rows


def _read_csv(path):
    import csv

    import pandas

    # The TSV files of Common Voice hold bare quotation marks; a CSV file needs quoting for its commas.
    style = {"sep": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {"sep": ","}
    try:
        table = pandas.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False, **style)
    except pandas.errors.EmptyDataError:
        raise UserError(f"{path} is empty; its first line has to name the columns.") from None
    except (pandas.errors.ParserError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return {name: table[name].tolist() for name in table.columns}


def _read_jsonl(path):
    rows = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    rows.append(dict(json.loads(line)))
                except (ValueError, TypeError) as error:
                    raise UserError(f"{path}, line {number}: not a JSON object ({error}).") from None
    columns = dict.fromkeys(name for row in rows for name in row)
    return {name: [value if (value := row.get(name)) is None else _as_text(value) for row in rows] for name in columns}


def _as_text(value):
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def find_file(path, folder):
    """Resolves a path of a manifest: from the manifest's folder, or from `clips/` in it as in Common Voice."""
    whole = os.path.join(folder, os.path.expanduser(path))
    if not os.path.exists(whole):
        in_clips = os.path.join(folder, "clips", path)
        if os.path.exists(in_clips):
            return in_clips
    return whole
