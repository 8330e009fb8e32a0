"""`load_speech`: the train, validation and test rows of a run, mixed, carved, filtered and checked."""

import contextlib
import dataclasses
import itertools
import logging
from collections import Counter

import datasets
import numpy as np

from hfspeech.audio import SAMPLING_RATE, BadAudio, sampling_rate_of
from hfspeech.data.fingerprint import fingerprint
from hfspeech.data.leaks import check_leaks, recordings_of, shared_rows
from hfspeech.data.rows import (
    HIDDEN,
    SCHEMA,
    Dropped,
    Filters,
    SpeechDataset,
    SpokenTextFilters,
    find_columns,
    is_audio,
    read_rows,
    rows_with,
    undecoded,
)
from hfspeech.data.sources import open_source
from hfspeech.data.streaming import (
    CARVED_ROWS,
    EVAL_ROWS,
    SpeechStream,
    StreamSource,
    first_rows,
    shards_of,
    shards_to_train_on,
)
from hfspeech.errors import UserError, nearest
from hfspeech.spelling import unknown_report

# A longer recording holds several sentences, and attention has to find its way through all of them.
LONGEST_SPOKEN_S = 20.0
RATES_LOOKED_AT = 200

logger = logging.getLogger("hfspeech")


class SpeechSplits(dict):
    """Split name → `SpeechDataset`, with the account of where the rows come from and which were left out.

    Attributes:
        account: JSON-able dict: `datasets` (name, commit or path of each) and `splits`, for each split the number of
            `rows`, their `hours`, their `speakers` (None where they are not known), their `fingerprint` (see there; a
            streamed split has none), and `dropped`: reason → `count` and `example`.
    """

    def __init__(self, splits, account):
        super().__init__(splits)
        self.account = account


def load_speech(data_args, processor=None, seed=42, max_label_length=448, front_end=None):
    """Loads the train, validation and test rows of a run, in one schema, checked, not yet decoded.

    Rows come from Hub datasets, audiofolders, manifests and parquet (`hfspeech.data.sources` says which file is which
    split). Several datasets are joined; with `dataset_weights` the training rows are repeated so that each dataset
    has its share and every row is used at least once. Validation is carved from train, whole speakers where there is
    a speaker column, if no dataset has it. `max_*_samples` count in each dataset and split, before the filters.

    When streaming, train is a `SpeechStream` of the same decoded rows, filtered as they come; validation and test are read
    into memory. The account of train starts empty then: what the filters reject is listed in `left_out` of the next row
    that they let through, because rows may be read in other processes.

    Args:
        data_args: the `DataArguments`.
        processor: the model's processor, its tokenizer's prefix tokens set; None skips the filters on tokens.
        seed: of the carving, of the mixture and of the stream's shuffling.
        max_label_length: label tokens, or tokens of the text that is to be spoken, that the model takes; None for no
            limit.
        front_end: `TextFrontEnd` of a model that speaks the text; None for one that writes it.

    Returns:
        `SpeechSplits` with `train`, `validation`, `test`, and `retention` (the test rows of the old condition) if a
        retention dataset is given.

    Raises:
        UserError: a dataset, split or column is missing, audio is bad, a split is empty, a recording stands in two
            splits, or `max_duration_in_seconds` is longer than the model's window.
    """
    loader = _Loader(data_args, processor, max_label_length, ["train", "validation", "test"], front_end)
    sources = loader.open(data_args.dataset_name, data_args.dataset_config_name, data_args.dataset_revision)
    weights = _weights(data_args)
    tests = loader.join(sources, data_args.test_split_name, "test", "--test_split_name", data_args.max_test_samples)
    evals = None
    eval_split = data_args.eval_split_name
    if eval_split != "validation" or any(source.read(eval_split)[0] is not None for source in sources):
        evals = loader.join(sources, [eval_split], "validation", "--eval_split_name", data_args.max_eval_samples)
    splits = {"validation": evals, "test": tests}
    retained = None
    if data_args.retention_dataset_name:
        if not 0 <= data_args.retention_share < 1:
            raise UserError(f"--retention_share has to lie between 0 and 1, not at {data_args.retention_share:g}.")
        retained = loader.open(
            [data_args.retention_dataset_name],
            data_args.retention_dataset_config_name,
            data_args.retention_dataset_revision,
            flags="--retention_dataset",
        )
        splits["retention"] = loader.join(
            retained,
            [data_args.retention_test_split_name],
            "retention",
            "--retention_test_split_name",
            data_args.max_test_samples,
        )

    if data_args.streaming:
        return _with_stream(loader, sources, weights, retained, splits, seed)

    train = loader.parts(
        sources, data_args.train_split_name, "train", "--train_split_name", data_args.max_train_samples
    )
    if splits["validation"] is None:
        train, splits["validation"] = _carve(
            train, data_args.validation_share, data_args.max_eval_samples, seed, loader.account
        )
        loader.is_carved = True
    train = _mix(train, weights, seed)
    if retained and data_args.retention_share > 0:
        old = loader.parts(
            retained, data_args.retention_train_split_name, "train", "--retention_train_split_name", None
        )[0]
        train = _add_share(train, old, data_args.retention_share, seed)
    return loader.finish({"train": train, **splits})


def load_split(data_args, split, processor=None, max_label_length=None):
    """Loads one split alone, to evaluate a model on it: no training rows are needed, and none are looked at.

    Args:
        data_args: the `DataArguments`; `max_test_samples` holds here.
        split: its name in the dataset; a manifest without a `split` column is that split.
        processor, max_label_length: as in `load_speech`.

    Returns:
        `SpeechDataset`, with its `account`.
    """
    loader = _Loader(data_args, processor, max_label_length, [split])
    sources = loader.open(data_args.dataset_name, data_args.dataset_config_name, data_args.dataset_revision)
    rows = loader.join(sources, [split], split, "--test_split_name", data_args.max_test_samples, only=True)
    splits = loader.finish({split: rows})
    splits[split].account = splits.account
    return splits[split]


class _Loader:
    """What the steps of loading share: the arguments, the filters and the account."""

    def __init__(self, data_args, processor, max_label_length, splits, front_end=None):
        if not data_args.dataset_name:
            raise UserError("No dataset is given; name one with --dataset_name.")
        if data_args.on_bad_audio not in ("error", "skip"):
            raise UserError(f"--on_bad_audio is error or skip, not {data_args.on_bad_audio}.")
        self.data_args = data_args
        if data_args.streaming and data_args.speakers:
            raise UserError("--speakers needs rows that are known before they are read: leave --streaming out.")
        if front_end is None:
            self.filters = _filters_of_whisper(data_args, processor, max_label_length)
        elif data_args.streaming:
            raise UserError("Speech synthesis needs the voice of every row before it begins: leave --streaming out.")
        else:
            longest_s = data_args.max_duration_in_seconds or LONGEST_SPOKEN_S
            self.filters = SpokenTextFilters(data_args.min_duration_in_seconds, longest_s, front_end, max_label_length)
        self.account = {"datasets": [], "splits": {}, "notes": []}
        self.is_carved = False
        for split in splits:
            self.dropped(split)

    def open(self, names, configs, revisions, flags="--dataset"):
        names = _as_list(names)
        configs = _one_each(configs, names, f"{flags}_config_name")
        revisions = _one_each(revisions, names, f"{flags}_revision")
        sources = [
            open_source(name, config, revision, self.data_args.streaming, flags, self.data_args.audio_root or [])
            for name, config, revision in zip(names, configs, revisions)
        ]
        self.account["datasets"] += [source.record for source in sources]
        return sources

    def dropped(self, key):
        return self.account["splits"].setdefault(key, {"rows": 0, "hours": 0.0, "dropped": Dropped()})["dropped"]

    def raw(self, sources, split, flag, only=False):
        """Returns (source, rows, folder, columns) for each source that has the split; UserError if none has it."""
        found = []
        for source in sources:
            rows, folder = source.read(split, only)
            if rows is not None:
                if rows.column_names is None:  # a stream of unknown features
                    rows = rows._resolve_features()
                rows = _without_other_media(rows)
                lenient = len(self.account["datasets"]) > 1
                found.append((source, rows, folder, find_columns(rows, self.data_args, source.name, lenient)))
        names = list(dict.fromkeys(name for source in sources for name in source.split_names))
        if not found:
            where = ", ".join(source.name for source in sources)
            raise UserError(
                f"{where} has no split named {split} (it has: {', '.join(names)}); name one with {flag}."
                f"{nearest(split, names)}"
            )
        there = list(dict.fromkeys(name for _, rows, _, _ in found for name in rows.column_names))
        known = set(there) | set(SCHEMA)
        if not any(columns.speaker for *_, columns in found):
            known -= {"speaker"}
        for group in self.data_args.group_columns or []:
            if group not in known and not flag.startswith("--retention"):
                raise UserError(
                    f"{found[0][0].name}, {split}: no column {group} for --group_columns; it has: {', '.join(there)}."
                    f"{nearest(group, there)}"
                )
        return found

    def parts(self, sources, split, key, flag, max_samples, only=False):
        """Returns the filtered rows of a split, one `datasets.Dataset` for each source (None where it has none).

        `key` is where the account goes, `flag` what names another split.
        """
        found = {id(source): rest for source, *rest in self.raw(sources, split, flag, only)}
        parts = []
        for source in sources:
            if id(source) not in found:
                parts.append(None)
                continue
            rows, folder, columns = found[id(source)]
            data_args = self.data_args
            if flag.startswith("--retention"):  # the old condition has speakers of its own
                data_args = dataclasses.replace(data_args, speakers=None)
            if self.data_args.streaming:
                shards = shards_of(rows, columns.audio, f"{source.name}, {split}")
                rows, _ = first_rows(shards, max_samples or EVAL_ROWS)
                if max_samples is None and len(rows) == EVAL_ROWS:
                    self.note(
                        f"{source.name}, {split}: streaming, so only the first {EVAL_ROWS} rows are used; "
                        "set another number with --max_eval_samples and --max_test_samples."
                    )
            elif max_samples is not None:
                rows = rows.select(range(rows_with(max_samples, data_args.speakers, rows, columns)))
            dropped = self.dropped(key)
            parts.append(read_rows(rows, folder, columns, self.filters, data_args, source.name, split, dropped))
        return parts

    def join(self, sources, splits, *how, **only):
        """Returns the filtered rows of these splits of all sources, one after the other; arguments as for `parts`."""
        return _concatenate([part for split in _as_list(splits) for part in self.parts(sources, split, *how, **only)])

    def note(self, line):
        self.account["notes"].append(line)
        logger.warning(line)

    def finish(self, splits):
        """Checks for empty splits and leaks, makes ids unique, writes the account."""
        for name, rows in splits.items():
            dropped = self.dropped(name)
            if len(rows) == 0:
                why = "; ".join(f"{entry['count']} {reason} ({entry['example']})" for reason, entry in dropped.items())
                raise UserError(f"No row of {name} is left: {why or 'the split is empty'}.")
        check_leaks(splits, self.is_carved)
        if isinstance(self.filters, SpokenTextFilters):
            _check_sampling_rates(splits, self.account)
            self.account["unknown_characters"] = dict(self.filters.unknown.most_common())
            if self.filters.unknown:
                lacking = unknown_report(self.filters.unknown)
                self.note(
                    f"The tokenizer lacks {lacking}, and reads each as one unknown sound: teach it them with "
                    "--add_characters, or change the texts."
                )
        datasets.disable_progress_bars()  # what follows is quick; downloads are over
        finished = {}
        for name, rows in splits.items():
            entry = self.account["splits"][name]
            entry["rows"] = len(rows)
            entry["hours"] = round(sum(rows["duration_s"][:]) / 3600, 4)
            entry["fingerprint"] = fingerprint(rows)
            speakers = set(rows["speaker"][:])
            entry["speakers"] = None if None in speakers else len(speakers)
            finished[name] = SpeechDataset(_unique_ids(rows).remove_columns(list(HIDDEN)))
        self.log()
        return SpeechSplits(finished, self.account)

    def log(self):
        for name, entry in self.account["splits"].items():
            if entry["rows"]:
                hours = entry["hours"]
                length = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
                logger.info("%s: %d rows, %s", name, entry["rows"], length)
            for reason, left_out in entry["dropped"].items():
                logger.info("%s: %d left out, %s, such as %s", name, left_out["count"], reason, left_out["example"])


def _without_other_media(rows):
    """Leaves out pictures, films and the like: to look at such a row, `datasets` opens the file or URL that it names."""
    from datasets.features.features import require_decoding

    features = rows.features or {}
    media = [name for name, f in features.items() if require_decoding(f) and not is_audio(features, name)]
    return rows.remove_columns(media) if media else rows  # a stream would pass each row through Python


def _filters_of_whisper(data_args, processor, max_label_length):
    max_duration_s = data_args.max_duration_in_seconds
    if processor is not None:
        window_s = processor.feature_extractor.chunk_length
        if max_duration_s is None:
            max_duration_s = float(window_s)
        elif max_duration_s > window_s:
            raise UserError(
                f"--max_duration_in_seconds {max_duration_s:g} is longer than the model's window of {window_s} s, where "
                f"audio would be cut off and its text kept: give {window_s} at most, or leave the flag out."
            )
    tokenizer = processor.tokenizer if processor is not None else None
    return Filters(data_args.min_duration_in_seconds, max_duration_s, tokenizer, max_label_length)


def _check_sampling_rates(splits, account):
    """Warns of recordings with less treble than the model speaks, and of such that differ in it; looks at some rows."""
    for name, rows in splits.items():
        found = Counter()
        for content, path in zip(
            *undecoded(rows.select(range(min(RATES_LOOKED_AT, len(rows)))).select_columns("audio"))
        ):
            with contextlib.suppress(BadAudio, UserError):  # decoding will say so
                found[sampling_rate_of(path if content is None else content)] += 1
        low = {rate: count for rate, count in found.items() if rate and rate < SAMPLING_RATE}
        if low:
            rate = min(low)
            account["notes"].append(
                f"{name}: {sum(low.values())} of the first {sum(found.values())} recordings have {rate} Hz, so nothing above "
                f"{rate // 2} Hz can be learnt from them: the voice will sound dull"
            )
            logger.warning(account["notes"][-1])
        if len(found) > 1:
            rates = ", ".join(f"{count} of {rate} Hz" for rate, count in sorted(found.items(), key=str))
            account["notes"].append(
                f"{name}: recordings of different sampling rates ({rates}) sound like different rooms"
            )
            logger.warning(account["notes"][-1])


def _with_stream(loader, sources, weights, retained, splits, seed):
    """Finishes a streamed run: validation carved from the first rows if need be, then the stream of the rest."""
    data_args = loader.data_args
    split, flag = data_args.train_split_name, "--train_split_name"
    found = loader.raw(sources, split, flag)
    shards = [shards_of(rows, columns.audio, f"{source.name}, {split}") for source, rows, _, columns in found]
    counts = [[0]] * len(found)
    if splits["validation"] is None:
        num_taken = data_args.max_eval_samples or CARVED_ROWS
        first = [first_rows(part, num_taken + 1)[1] for part in shards]
        for count in map(sum, first):
            if count <= num_taken:  # a small dataset: leave rows to train on
                num_taken = max(1, round(data_args.validation_share * count))
        # Of the rows that were counted in each shard, those that are among the first so many.
        counts = [
            [min(max(num_taken - before, 0), count) for before, count in zip(itertools.accumulate(c, initial=0), c)]
            for c in first
        ]
        loader.note(
            f"No validation split: the first {num_taken} rows of each training stream are taken for it, "
            "whoever speaks."
        )
        loader.is_carved = True
        splits["validation"] = loader.join(sources, [split], "validation", flag, num_taken)
    finished = loader.finish(splits)
    loader.account["splits"]["train"] |= {"rows": None, "hours": None}  # a stream does not know

    def stream(shards, share, source, folder, columns, split):
        return StreamSource(shards, share, folder, columns, loader.filters, data_args, source.name, split)

    weights = dict(zip(map(id, sources), weights or [1] * len(sources)))
    total = sum(weights[id(source)] for source, *_ in found)
    share_of_old = data_args.retention_share if retained else 0.0
    streams = []
    for (source, _, folder, columns), parts, taken in zip(found, shards, counts):
        parts = shards_to_train_on(parts, taken, data_args.max_train_samples)
        share = (1 - share_of_old) * weights[id(source)] / total
        streams.append(stream(parts, share, source, folder, columns, split))
    if share_of_old > 0:
        split = data_args.retention_train_split_name
        for source, rows, folder, columns in loader.raw(retained, split, "--retention_train_split_name"):
            parts = shards_to_train_on(shards_of(rows, columns.audio, f"{source.name}, {split}"), [0])
            streams.append(stream(parts, share_of_old, source, folder, columns, split))
    return SpeechSplits({"train": SpeechStream(streams, seed, splits), **finished}, loader.account)


def _as_list(value):
    return [value] if isinstance(value, str) else list(value)


def _one_each(values, names, flag):
    values = [None] if not values else _as_list(values)
    if len(values) not in (1, len(names)):
        raise UserError(
            f"{flag} has {len(values)} values for {len(names)} datasets; give one for all, or one for each."
        )
    return values * len(names) if len(values) == 1 else values


def _weights(data_args):
    weights, names = data_args.dataset_weights, _as_list(data_args.dataset_name)
    if weights is None:
        return None
    if len(weights) != len(names) or min(weights) <= 0:
        raise UserError(f"--dataset_weights has to be one number above 0 for each of the {len(names)} datasets.")
    return weights


def _concatenate(parts):
    return datasets.concatenate_datasets([part for part in parts if part is not None])


def _draw(num_rows, num_wanted, seed):
    """Draws row numbers in random order, each as often as any other (give or take one)."""
    generator = np.random.default_rng(seed)
    rounds = [generator.permutation(num_rows) for _ in range(-(-num_wanted // num_rows))]
    return np.sort(np.concatenate(rounds)[:num_wanted]) if rounds else np.zeros(0, int)


def _mix(parts, weights, seed):
    """Joins the training rows of several datasets; with weights, each is repeated up to its share."""
    if weights is not None:
        pairs = [(part, weight) for part, weight in zip(parts, weights) if part is not None and len(part)]
        total = max((len(part) / weight for part, weight in pairs), default=0)
        parts = [part.select(_draw(len(part), round(weight * total), seed)) for part, weight in pairs]
        if not parts:
            raise UserError("No row of train is left in any of the datasets.")
    return _concatenate(parts)


def _add_share(train, old, share, seed):
    """Adds rows of the old condition until they are this share of all; all rows of train stay."""
    if len(old) == 0:
        raise UserError("No training row of --retention_dataset_name is left after the filters.")
    num_old = round(len(train) * share / (1 - share))
    return _concatenate([train, old.select(_draw(len(old), num_old, seed))])


def _carve(parts, share, max_samples, seed, account):
    """Parts validation rows from the training rows of each dataset, whole speakers where there are several,
    and at most `max_samples` of each dataset.

    A recording that stands twice in train may fall on both sides: then it leaves validation.
    """
    if not 0 < share < 1:
        raise UserError(
            f"There is no validation split; --validation_share has to lie between 0 and 1, not at {share:g}."
        )
    generator = np.random.default_rng(seed)
    kept, carved = [], []
    for part in parts:
        if part is None or len(part) == 0:
            kept.append(part)
            continue
        wanted = share * len(part)
        if max_samples is not None:
            wanted = min(wanted, max_samples)
        speakers = np.array([speaker or "" for speaker in part["speaker"][:]])
        names, counts = np.unique(speakers[speakers != ""], return_counts=True)
        if len(names) > 1:
            order = generator.permutation(len(names))
            chosen, num_chosen = [], 0
            for i in order:
                if num_chosen + counts[i] <= wanted:
                    chosen.append(names[i])
                    num_chosen += counts[i]
            if not chosen:
                chosen = [names[order[np.argmin(counts[order])]]]
            is_carved = np.isin(speakers, chosen)
            how = f"the speakers {', '.join(sorted(chosen)[:5])}{' …' if len(chosen) > 5 else ''}"
        else:
            is_carved = np.zeros(len(part), bool)
            is_carved[generator.permutation(len(part))[: max(1, round(wanted))]] = True
            how = "rows at random, for want of a speaker column"
        train, validation = part.select(np.flatnonzero(~is_carved)), part.select(np.flatnonzero(is_carved))
        twice = {row for _, row, _ in shared_rows(*recordings_of(train, validation))}
        if twice:
            validation = validation.select([i for i in range(len(validation)) if i not in twice])
        if max_samples is not None:  # the smallest speaker may have more
            validation = validation.select(range(min(max_samples, len(validation))))
        account["notes"].append(f"validation: {len(validation)} rows carved from {part['dataset'][0]}: {how}")
        logger.info(account["notes"][-1])
        kept.append(train)
        carved.append(validation)
    return kept, _concatenate(carved or parts)


def _unique_ids(rows):
    """Makes the ids of rows of several datasets and splits distinct; repeated training rows keep theirs."""
    ids = rows["id"][:]
    if len(set(ids)) == len(ids):
        return rows
    origins = list(zip(rows["dataset"][:], rows["split"][:], rows["row"][:]))
    owners = {}
    for id, origin in zip(ids, origins):
        owners.setdefault(id, set()).add(origin)
    if all(len(owner) == 1 for owner in owners.values()):
        return rows
    unique = [
        id if len(owners[id]) == 1 else f"{dataset}/{split}/{row}/{id}"
        for id, (dataset, split, row) in zip(ids, origins)
    ]
    return rows.remove_columns("id").add_column("id", unique)
