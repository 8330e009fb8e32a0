"""Rows that come as they are read: the same schema, filters and checks as of a table, a block of rows at a time."""

import logging
import math
import zlib
from dataclasses import dataclass, replace

import datasets
import numpy as np
import pyarrow
import torch

from hfspeech.data.leaks import Recordings, span
from hfspeech.data.rows import HIDDEN, Columns, Filters, decode_row, is_audio, read_rows, row_name
from hfspeech.errors import UserError

# Rows of a streamed validation or test split that are kept in memory where no number is given.
EVAL_ROWS = 1000
# Rows of a stream that become validation where there is no such split.
CARVED_ROWS = 200
# A stream is shuffled within blocks of so many undecoded rows (about 100 kB each).
SHUFFLE_ROWS = 500
TABLE_ROWS = 100  # are read at a time

logger = logging.getLogger("hfspeech")


@dataclass
class Shard:
    """Rows that are read one after the other: a file of a stream, or a stretch of a table.

    Args:
        rows: `datasets.IterableDataset` of undecoded audio, or `datasets.Dataset`.
        where: its name in messages.
        number: of the file, where a row has to be told from those of other files; None for a table.
        start, stop: its first row and the one after its last; None for the end.
    """

    rows: object
    where: str
    number: int | None = None
    start: int = 0
    stop: int | None = None

    def tables(self, start=0):
        """Yields (number of its first row, from 0, `pyarrow.Table`) for the rows from `start` on.

        Raises:
            UserError: reading fails.
        """
        start = max(start, self.start)
        try:
            rows = self.rows.skip(start)
            if self.stop is not None:
                rows = rows.take(self.stop - start)
            for table in rows.with_format("arrow").iter(TABLE_ROWS):
                yield start, table
                start += len(table)
        except Exception as error:  # whatever an HTTP client, a decompressor or a reader of parquet raises
            what = (str(error).splitlines() or [""])[0]
            raise UserError(
                f"{self.where}: nothing can be read after row {start} ({type(error).__name__}: {what})."
            ) from None

    def names(self, start, count):
        """Returns what `count` rows are called from `start` on: their number, from 1, and the shard's."""
        numbers = range(start + 1, start + count + 1)
        return list(numbers) if self.number is None else [f"{number} of shard {self.number}" for number in numbers]


def shards_of(rows, audio_column, where):
    """Returns the `Shard`s that a stream is stored in, with undecoded audio; a table is a single one."""
    if isinstance(rows, datasets.Dataset):
        return [Shard(rows, where)]
    if is_audio(rows.features, audio_column):
        rows = rows.cast_column(audio_column, datasets.Audio(decode=False))
    rows, count = rows.decode(False), rows.num_shards
    if count == 1:
        return [Shard(rows, where)]
    return [Shard(rows.shard(count, i), f"{where}, shard {i}", i) for i in range(count)]


def first_rows(shards, num_rows):
    """Reads the first rows of some shards into memory.

    Returns:
        `datasets.Dataset`, and a list of how many of its rows come from each shard.
    """
    tables, counts = [], []
    for shard in shards:
        counts.append(0)
        for _, table in shard.tables():
            table = table[: num_rows - sum(counts)]
            tables.append(table)
            counts[-1] += len(table)
            if sum(counts) == num_rows:
                return _dataset(tables), counts
    if not tables:
        raise UserError(f"{shards[0].where}: there are no rows.")
    return _dataset(tables), counts


def shards_to_train_on(shards, counts, num_rows=None):
    """Returns shards without the rows that were taken for validation, and no more than `num_rows` rows of them.

    Args:
        shards: of one source, as `shards_of` returns them.
        counts: number of rows that were taken from the first ones, as `first_rows` returns them.
        num_rows: None for all.
    """
    first, start = shards[0], sum(counts)
    if isinstance(first.rows, datasets.Dataset):
        stop = len(first.rows) if num_rows is None else min(len(first.rows), start + num_rows)
        places = range(start, stop, SHUFFLE_ROWS)
        return [replace(first, start=place, stop=min(place + SHUFFLE_ROWS, stop)) for place in places]
    if num_rows is not None:  # whatever files they stand in
        whole = datasets.concatenate_datasets([shard.rows for shard in shards])
        return [Shard(whole, first.where, start=start, stop=start + num_rows)]
    starts = counts + [0] * (len(shards) - len(counts))
    return [replace(shard, start=start) for shard, start in zip(shards, starts)]


@dataclass
class StreamSource:
    """One dataset of a stream.

    Args:
        shards: list of `Shard`.
        share: of the rows of the stream that come from it.
        folder, columns, filters, data_args, name, split: as for `rows.read_rows`.
    """

    shards: list
    share: float
    folder: str | None
    columns: Columns
    filters: Filters
    data_args: object
    name: str
    split: str

    def read(self, reader, num_readers, seed, place):
        """Yields, pass after pass, the good rows that fall to one of several readers, undecoded.

        In each pass the shards are shuffled and dealt to the readers, and the rows of those that do not go round are shared
        out; then the rows are shuffled within blocks. The order depends on the arguments only.

        Args:
            reader, num_readers: which of how many.
            seed: tuple of int.
            place: [pass, card, row, taken]: the pass, the place among what was dealt and the row in it that a block begins
                with, and how many rows of the block were yielded already.

        Yields:
            (place, row): the place to go on from after this row, and a dict with the columns of `SCHEMA` and `HIDDEN`, the
            group columns, `epoch` (the pass), `index` (an int that stands for the row) and `left_out`: [reason, row, detail] of
            the rows that were rejected since the row before.

        Raises:
            UserError: a shard cannot be read, a row has to stop the run, or no row is good.
        """
        number, card, start, taken = place
        how = self.folder, self.columns, self.filters, self.data_args, self.name, self.split
        left_out, num_barren = _LeftOut(), 0
        while num_barren <= num_readers:  # by then it has had a part of every shard
            num_barren += 1
            for begin, block, names in self._blocks(self._deal(reader, num_readers, seed, number), card, start):
                rows = read_rows(block, *how, left_out, names)
                order = np.random.default_rng((*seed, number, reader, *begin)).permutation(len(rows))
                for i in range(taken, len(rows)):
                    row = rows[int(order[i])]
                    index = zlib.crc32(str(row["row"]).encode())
                    row |= {"epoch": number, "index": index, "left_out": left_out[:], "bad_audio": None, "fatal": None}
                    if not self.columns.id_is_given:  # whether a column is an id, no single block can tell
                        row["recording_id"] = None
                    left_out.clear()
                    num_barren = 0
                    yield [number, *begin, i + 1], row
                taken = 0
            number, card, start = number + 1, 0, 0
        raise UserError(f"{self.name}, {self.split}: no row of it can be trained on.")

    def _deal(self, reader, num_readers, seed, number):
        """Returns what falls to a reader in a pass: (shard, n, m) for every m-th row of a shard from its n-th on."""
        order = np.random.default_rng((*seed, number)).permutation(len(self.shards))
        rest, parts = self.uneven(num_readers)
        cards = [(i, 0, 1) for i in order[: len(order) - rest]]
        cards += [(i, (part + number) % parts, parts) for part in range(parts) for i in order[len(order) - rest :]]
        return [(self.shards[i], *every) for i, *every in cards[reader::num_readers]]

    def uneven(self, num_readers):
        """Returns how many shards are left when all readers have the same number, and in how many parts these are dealt."""
        rest = len(self.shards) % num_readers
        return rest, num_readers // math.gcd(rest, num_readers)

    def _blocks(self, cards, card, start):
        """Yields ([card, row] that it begins with, `datasets.Dataset`, names of its rows) of one block after the other."""
        begin, tables, names = [card, start], [], []
        for place, (shard, part, parts) in list(enumerate(cards))[card:]:
            for at, table in shard.tables(start):
                end, new = at + len(table), shard.names(at, len(table))
                if parts > 1:
                    kept = np.arange((part - at) % parts, len(table), parts)
                    table, new = table.take(kept), [new[i] for i in kept]
                tables.append(table)
                names += new
                if len(names) >= SHUFFLE_ROWS:
                    yield begin, _dataset(tables), names
                    begin, tables, names = [place, end], [], []
            start = 0
        if names:
            yield begin, _dataset(tables), names


class SpeechStream(torch.utils.data.IterableDataset):
    """Rows of several sources as they come, pass after pass without end: those of a `SpeechDataset`, one by one.

    Rows have besides: `left_out`, the rows rejected since the row before ([reason, row, detail] each), and `place`, from
    which a reader goes on after this row. Nothing is raised while rows are read, which may be in other processes:
    `bad_audio` and `fatal` of a row are sentences, or None. A row with `fatal` may have no more than that, and be the last.

    Each dataloader worker of each process is a reader of its own: see `StreamSource.read`. All of them go on for ever, so
    that all processes take the same number of steps. The readers take turns in making the batches of all processes, so
    that it does not matter which process a reader belongs to.

    Args:
        sources: list of `StreamSource`.
        seed: of the order.
        held_out: split name → rows in memory, none of which may come along in the stream.
    """

    def __init__(self, sources, seed, held_out):
        self.sources, self.seed, self.transforms = sources, seed, []
        self._recordings = {name: Recordings(held) for name, held in held_out.items()}
        self._ids = {
            (dataset, recording): name
            for name, held in held_out.items()
            for dataset, recording in zip(held["dataset"][:], held["recording_id"][:])
            if recording is not None
        }
        self.begin()

    def begin(self, process_index=0, processes=1, num_readers=1, num_batches=0, places=()):
        """Says how many read, and where to begin.

        Args:
            process_index, processes: which of how many processes this is.
            num_readers: of all processes, as many in each.
            num_batches: that all processes together have had already.
            places: pairs of a reader's number and the `place` of the last row that was had of it, of all processes.
        """
        self.process_index, self.processes, self.num_readers = process_index, processes, num_readers
        self.num_batches = num_batches // processes
        self.places = {reader: place for reader, place in places if reader % processes == process_index}
        for source in self.sources:
            rest, parts = source.uneven(self.num_readers)
            if rest and process_index == 0 and source.shards[0].stop is None:
                logger.warning(
                    "%s, %s: %d files are shared out to %d readers (processes times dataloader workers): in each pass, "
                    "%d of them %s read %d times over, each time for other rows",
                    source.name, source.split, len(source.shards), self.num_readers, rest,
                    "is" if rest == 1 else "are", parts,
                )  # fmt: skip

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        # A loader has its next batch from worker 0, whichever reader's turn it is.
        turn = (self.num_batches + (worker.id if worker else 0)) * self.processes + self.process_index
        reader = turn % self.num_readers
        num_drawn, *places = self.places.get(reader, [0] + [[0, 0, 0, 0]] * len(self.sources))
        readings = [
            source.read(reader, self.num_readers, (self.seed, number), place)
            for number, (source, place) in enumerate(zip(self.sources, places))
        ]
        shares = [source.share for source in self.sources]
        try:
            while True:
                number = np.random.default_rng((self.seed, reader, num_drawn)).choice(len(shares), p=shares)
                places[number], row = next(readings[number])
                num_drawn += 1
                yield {**self._decoded(row), "place": [reader, num_drawn, *places]}
        except UserError as error:
            yield {"waveform": None, "fatal": str(error)}

    def _decoded(self, row):
        """Decodes a row and applies the transforms, unless it must not be trained on."""
        audio = row["audio"]
        hidden = {name: row.pop(name) for name in HIDDEN}
        decode_row(row)
        if row["waveform"] is None:
            return row
        if found := self._held_out_in(row, audio, hidden["recording_id"]):
            row["waveform"] = None
            row["fatal"] = (
                f"{row['dataset']}, {row['split']}: {row_name(row['row'], audio['path'] or row['id'])} also stands in "
                f"{found}; take it out of one of them."
            )
            return row
        for transform in self.transforms:
            row = transform(row)
        return row

    def _held_out_in(self, row, audio, recording):
        source = audio["bytes"] if audio["bytes"] is not None else audio["path"]
        for name, known in self._recordings.items():
            if known.find(source, *span(row["offset_s"], row["duration_s"])) is not None:
                return name
        return self._ids.get((row["dataset"], recording))


class _LeftOut(list):
    """The rows of a stream that its filters reject, each as [reason, row, detail]; see `rows.Dropped`."""

    def add(self, reason, row, detail=""):
        self.append([reason, row, detail])


def _dataset(tables):
    """Makes a `datasets.Dataset` of tables, without the checksum of all their audio that would else be its name."""
    return datasets.Dataset(pyarrow.concat_tables(tables).replace_schema_metadata(None), fingerprint="block")
