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

Whoever wrote a manifest is not always who trains on it, so what its rows name has to lie in its folder, links followed,
or in a folder that the user allows (`AudioFolder`). Nothing is fetched that a row names, and no archive is opened.
"""

import json
import os
import re
import shlex
import warnings
from pathlib import Path

from hfspeech.errors import UserError, nearest
from hfspeech.hub import gated, license_in, look_up, stated_license

MANIFEST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
ALIASES = {"valid": "validation", "val": "validation", "dev": "validation"}
_OFFICIAL = ("train", "validation", "test")


def open_source(name, config=None, revision=None, streaming=False, flags="--dataset", audio_root=()):
    """Opens one dataset, without reading its rows yet.

    Args:
        name: Hub id (`owner/name`), or path of a folder, a manifest or a parquet file.
        config: configuration of the Hub dataset.
        revision: branch, tag or commit of the Hub dataset.
        streaming: do not download the Hub dataset first, or copy the parquet files of a folder.
        flags: how the flags of this dataset begin, for messages.
        audio_root: folders that the paths of a manifest may lead into, besides its own.

    Returns:
        object with `name`, `record` (a dict of what was used), `split_names` and `read(split)`, which gives the rows
        (a `datasets.Dataset` or `IterableDataset`, or None) and the `AudioFolder` of their paths.

    Raises:
        UserError: there is no such dataset, or no access, or nothing readable in the folder.
    """
    path = Path(name).expanduser()
    if path.exists():
        return LocalSource(name, path, streaming, audio_root)
    if path.suffix in MANIFEST_SUFFIXES or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"No such file or folder: {name}; give an existing path, or a Hub id such as owner/name.")
    if name.count("/") != 1:
        raise UserError(
            f"There is no file or folder {name} here, and a Hub dataset is written owner/name, such as google/fleurs."
        )
    return HubSource(name, config, revision, streaming, flags)


class LocalSource:
    """A manifest, a folder of manifests, or an audiofolder; paths only, audio is read when a row is."""

    def __init__(self, name, path, streaming=False, audio_root=()):
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
            rows = read_table(paths, streaming and split is not None)
            self._tables[split] = rows, AudioFolder(paths[0].resolve().parent, audio_root)
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
        from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
        from huggingface_hub import constants, file_download

        self.name = name
        info, unreachable = look_up(name, revision, "dataset", f"{flags}_revision")
        commit = info and info.sha
        self.record = {"name": name, "config": config, "revision": revision, "commit": commit}
        self.record["license"] = stated_license(info and info.card_data)
        where = f"{name}@{revision}" if revision else name
        try:
            self._splits = datasets.load_dataset(name, config, revision=commit or revision, streaming=streaming)
        except (ValueError, RuntimeError, ImportError, OSError, DatasetGenerationError) as error:
            text = f"{error} {error.__cause__ or ''}".strip()
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
            if "Data files don't belong" in text:
                raise UserError(
                    f"The card of {where} names data outside of that repository, which is not read: choose another."
                ) from None
            if isinstance(error, DatasetNotFoundError) and "gated" in text:
                raise UserError(gated(name, "dataset")) from None
            if isinstance(error, DatasetNotFoundError) or "No (supported) data files" in text:
                raise UserError(f"{where} holds no data files that can be read; see its page on the Hub.") from None
            if isinstance(error, DatasetGenerationError):
                raise UserError(f"The files of {where} cannot be read ({text}): choose another dataset.") from None
            raise
        # Where `datasets` puts what it downloads of this repository, and what it unpacks.
        cache = Path(constants.HF_HUB_CACHE) / file_download.repo_folder_name(repo_id=name, repo_type="dataset")
        self._folder = AudioFolder(None, [cache, datasets.config.EXTRACTED_DATASETS_PATH])
        if commit is None:
            files = getattr(next(iter(self._splits.values())), "cache_files", None) or [{"filename": ""}]
            found = re.search(r"[/\\]([0-9a-f]{40})[/\\]", files[0]["filename"])
            self.record["commit"] = found[1] if found else None

    @property
    def split_names(self):
        return list(self._splits)

    def read(self, split, only=False):
        return (self._splits[split] if split in self._splits else None), self._folder


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


def read_table(paths, streaming=False):
    """Reads the manifests of one split as a `datasets.Dataset`; text of any manifest but parquet stays text.

    Args:
        paths: list of Path, one manifest, or several shards of parquet.
        streaming: return a `datasets.IterableDataset` of parquet.

    Raises:
        UserError: a manifest cannot be read, or holds no rows.
    """
    import datasets

    path = paths[0]
    try:
        if path.suffix == ".parquet":
            files = [str(path) for path in paths]
            rows = datasets.load_dataset("parquet", data_files={"rows": files}, split="rows", streaming=streaming)
            if streaming:
                return rows
        else:
            rows = datasets.Dataset.from_dict(_read_jsonl(path) if path.suffix == ".jsonl" else _read_csv(path))
    except (*_UNREADABLE, datasets.exceptions.DatasetGenerationError) as error:
        reason = str(error.__cause__ or error).strip().split("\n")[0].rstrip(".")
        raise UserError(f"{path} cannot be read as {path.suffix[1:]}: {reason}.") from None
    if len(rows) == 0:
        raise UserError(f"{path} holds no rows.")
    return rows


# What the readers raise for a file of another kind, another encoding, a thousand brackets.
_UNREADABLE = (OSError, ValueError, TypeError, LookupError, NotImplementedError, RecursionError)


def _read_csv(path):
    import csv

    import pandas

    # The TSV files of Common Voice hold bare quotation marks; a CSV file needs quoting for its commas.
    style = {"sep": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {"sep": ","}
    style |= {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig", "index_col": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pandas.errors.ParserWarning)
            table = pandas.read_csv(path, **style)
    except pandas.errors.ParserWarning:
        raise UserError(
            f"{path} has rows with more cells than its first line names columns: put texts that hold a comma in "
            "quotation marks."
        ) from None
    except pandas.errors.EmptyDataError:
        raise UserError(f"{path} is empty; its first line has to name the columns.") from None
    return {name: table[name].tolist() for name in table.columns}


def _read_jsonl(path):
    rows = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    rows.append(dict(json.loads(line)))
                except (ValueError, TypeError, RecursionError) as error:
                    raise UserError(f"{path}, line {number}: not a JSON object ({error}).") from None
    columns = dict.fromkeys(name for row in rows for name in row)
    return {name: [value if (value := row.get(name)) is None else _as_text(value) for row in rows] for name in columns}


def _as_text(value):
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class AudioFolder:
    """Where the paths of a table start, and the folders that they may lead into.

    Args:
        path: the table's folder; None for rows of the Hub, which name no files of their own.
        roots: the other folders; `~` is the user's home.
    """

    def __init__(self, path, roots=()):
        self.path = path and str(path)
        roots = [os.path.expanduser(root) for root in (roots if path is None else (path, *roots))]
        self._roots = tuple(os.path.join(os.path.realpath(root), "") for root in roots)
        self._real = {}  # folder to where its links lead; most files share theirs

    def find(self, path):
        """Returns the whole path of what a row names: from the folder, or from `clips/` in it as in Common Voice."""
        if not path or self.path is None:
            return path
        whole = os.path.join(self.path, os.path.expanduser(path))
        if not os.path.exists(whole):
            in_clips = os.path.join(self.path, "clips", path)
            if os.path.exists(in_clips):
                return in_clips
        return whole

    def holds(self, whole):
        """Tells whether a file may be read, wherever links lead; what is not there does no harm."""
        if not whole:
            return True
        parent, name = os.path.split(whole)
        is_plain = name not in ("", ".", "..") and not os.path.islink(whole)
        if parent not in self._real:
            self._real[parent] = os.path.realpath(parent)
        real = f"{self._real[parent]}{os.sep}{name}" if is_plain else os.path.realpath(whole)
        return real.startswith(self._roots) or not os.path.exists(whole)

    def refusal(self, row, outside):
        """Returns the sentence for rows that lead out: the name of the first, and the whole paths of all of them."""
        if self.path is None:
            return (
                f"{row} names the file {outside[0]} instead of holding audio, and rows of the Hub must not name files of "
                "this machine: choose another dataset, or the copy of it at the revision refs/convert/parquet."
            )
        folders = [os.path.dirname(os.path.realpath(path)) for path in outside]
        shared = os.path.commonpath(folders)
        allowed = shlex.quote(folders[0] if shared == os.path.abspath(os.sep) else shared)
        return f"{row} leads to {outside[0]}, outside of {self.path}: allow that with --audio_root {allowed}."
