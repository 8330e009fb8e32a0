"""`hfspeech synthesize`: a text, or a table of texts, spoken by any SpeechT5."""

import contextlib
import csv
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from hfspeech.audio import SAMPLING_RATE, BadAudio, decode, write
from hfspeech.cli import AUDIO_SUFFIXES
from hfspeech.data.sources import AudioFolder, read_table
from hfspeech.errors import UserError, nearest
from hfspeech.models.loading import enough_memory, quiet_transformers
from hfspeech.models.speecht5 import load_speecht5_for_inference
from hfspeech.models.vocoders import load_vocoder
from hfspeech.runs import claim_folder
from hfspeech.spelling import TextFrontEnd, unknown_characters, unknown_report
from hfspeech.synthesis import check_speed, max_piece_tokens, split_text, synthesize
from hfspeech.voices import load_speaker_encoder, voice_of

SPOKEN_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus")  # what speech can be written as
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
# What heard the voices that microsoft/speecht5_tts was trained with; a model that says nothing of its own is its child.
STOCK_SPEAKER_ENCODER = "speechbrain/spkrec-xvect-voxceleb"


def run(args):
    """Speaks the text, or the rows of the table; returns the exit code, 1 if a row could not be spoken."""
    check_speed(args.speed)
    language = _known_language(args.language)
    is_table = args.file is not None and args.file.suffix.lower() in TABLE_SUFFIXES
    rows = _rows_to_say(args.file) if is_table else [{"text": _text_to_say(args)}]
    _claim_output(args, is_table)

    quiet_transformers()
    model, processor, settings, speakers = load_speecht5_for_inference(args.model, args.model_revision)
    language = language or settings.get("language") or "en"
    front_end = TextFrontEnd(processor.tokenizer, language, settings.get("spell_out", True))
    voices = _Voices(args, rows, model.config.speaker_embedding_dim, settings, speakers)
    jobs = _jobs(args, is_table, rows, voices, front_end, max_piece_tokens(model.config))
    unknown = unknown_characters(front_end, [row["text"] for row in jobs.values()])
    if unknown:
        print(f"The model's tokenizer lacks characters of the text: {unknown_report(unknown)}.", file=sys.stderr)
    vocoder = load_vocoder(args.vocoder or settings.get("vocoder") or "hifigan")

    start = time.perf_counter()
    seconds = _speak(args, is_table, jobs, model, processor, front_end, vocoder)
    spent = time.perf_counter() - start
    print(f"{args.output}: {seconds:.1f} s of speech, made in {spent:.1f} s (real-time factor {spent / seconds:.2f}).")
    if len(jobs) < len(rows):
        print(f"{len(rows) - len(jobs)} of {len(rows)} rows could not be spoken.", file=sys.stderr)
        return 1
    return 0


def _speak(args, is_table, jobs, model, processor, front_end, vocoder):
    """Writes the speech of every job, and the table of it; returns the seconds of speech."""
    texts = [row["text"] for row in jobs.values()]
    bar = tqdm(total=sum(map(len, texts)), unit=" characters", unit_scale=True, desc="speaking", disable=None)
    found = synthesize(
        model,
        processor,
        front_end,
        vocoder,
        texts,
        [row["embedding"] for row in jobs.values()],
        args.seed,
        args.speed,
        args.batch_size,
        on_progress=bar.update,
    )
    seconds = 0.0
    with enough_memory(), bar, contextlib.ExitStack() as stack:
        if is_table:
            with _explain_writing(args.output):
                file = (args.output / "metadata.csv").open("w", buffering=1, newline="", encoding="utf-8")
            table = csv.writer(stack.enter_context(file))
            table.writerow(["file_name", "text", "speaker", "seconds"])
        for (target, row), spoken in zip(jobs.items(), found):
            duration_s = len(spoken.waveform) / SAMPLING_RATE
            seconds += duration_s
            with _explain_writing(target):
                write(target, spoken.waveform)
                if is_table:
                    name = target.relative_to(args.output).as_posix()
                    table.writerow([name, row["text"], row["who"], round(duration_s, 3)])
    return seconds


@contextlib.contextmanager
def _explain_writing(path):
    try:
        yield
    except (OSError, RuntimeError) as error:  # libsndfile's are RuntimeErrors
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise UserError(
            f"Cannot write {path} ({reason}): free some space, or choose another place with --output."
        ) from None


def _text_to_say(args):
    if args.file is None:
        text, source = args.text, "--text"
    else:
        if args.file.suffix.lower() != ".txt":
            raise UserError(
                f"{args.file} is none of .txt, {', '.join(TABLE_SUFFIXES)}: give a text, or a table with a column text."
            )
        _require_file(args.file)
        try:
            text, source = args.file.read_text(encoding="utf-8-sig"), args.file
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise UserError(f"Cannot read {args.file} ({reason}): save it as UTF-8 text.") from None
    if not text.strip():
        raise UserError(f"{source} is empty: write what is to be said.")
    return text


def _rows_to_say(path):
    """Reads a table as a list of dicts: its columns, `number` from 1, and `name` for messages."""
    _require_file(path)
    table = read_table([path])
    if "text" not in table.column_names:
        raise UserError(
            f"{path} has no column text, only {', '.join(table.column_names)}.{nearest('text', table.column_names)} "
            "Call the column of what is to be said text."
        )
    rows = []
    for number, row in enumerate(table, 1):
        name = row.get("file_name") or row.get("id")
        name = f"{path}, row {number} ({name})" if name else f"{path}, row {number}"
        rows.append({**row, "text": row["text"] or "", "number": number, "name": name})
    return rows


def _require_file(path):
    if not path.is_file():
        raise UserError(f"There is no file {path}: check its path (from here, {Path.cwd()}).")


def _claim_output(args, is_table):
    """Sees that the output can be written, before any work is done for it."""
    suffixes = ", ".join(SPOKEN_SUFFIXES)
    is_recording = args.output.suffix.lower() in SPOKEN_SUFFIXES
    if not is_table:
        if not is_recording or args.output.is_dir():
            raise UserError(f"--output {args.output} has to be a file that ends in one of {suffixes}.")
        return claim_folder(args.output.parent, "--output")
    if is_recording:
        raise UserError(f"{args.file} becomes many recordings: give a folder for them with --output FOLDER.")
    claim_folder(args.output, "--output")
    if args.output.resolve() == args.file.resolve().parent:
        raise UserError(
            f"--output {args.output} is the folder of {args.file}, whose own files could be overwritten: choose another."
        )


def _jobs(args, is_table, rows, voices, front_end, max_tokens):
    """Returns file to write → row, with its voice as `who` and `embedding`; says of each broken row what is wrong."""
    jobs = {}
    for row in rows:
        try:
            split_text(row["text"], front_end, max_tokens)  # says so if nothing in it can be spoken
            target = _target(args.output, row) if is_table else args.output
            if target in jobs:
                raise UserError(
                    f"It would be called {target}, as row {jobs[target]['number']} is: rename one of them."
                )
            who, embedding = voices.of(row)
            jobs[target] = {**row, "who": who, "embedding": embedding}
        except UserError as reason:
            if not is_table:
                raise
            print(f"{row['name']}: {reason}", file=sys.stderr)
    if not jobs:
        raise UserError(f"No row of {args.file} can be spoken: mend them as said above.")
    return jobs


def _target(folder, row):
    """Returns where the speech of a row goes: a WAV inside the folder, named by file_name, id or number."""
    name = row.get("file_name") or row.get("id")
    if not name:
        name = f"{row['number']:05}"
    elif row.get("file_name") and Path(name).suffix.lower() in AUDIO_SUFFIXES:
        name = name[: -len(Path(name).suffix)]
    target = folder / f"{name}.wav"
    if "\0" in name or not target.resolve().is_relative_to(folder.resolve()) or ".." in Path(name).parts:
        raise UserError(f"{name!r} leads out of {folder}: give a name inside it.")
    return target


def _known_language(language):
    """Returns a language as it was given, if it is a code or an English name that there is."""
    start = (language or "").lower().replace("_", "-").split("-")[0]
    if len(start) > 3 and start not in TO_LANGUAGE_CODE or language == "":
        raise UserError(
            f"There is no language {language!r}.{nearest(start, TO_LANGUAGE_CODE)} Give a code such as de."
        )
    return language


class _Voices:
    """Whose voice speaks a row: the one that was asked for, else the row's own, else the model's only one.

    Args:
        args: `voice`, `speaker`, `speaker_embedding`, of which one at most is given; `speaker_encoder`; `audio_root`.
        rows: list of dicts that may have `voice` (a recording, its path from the table's folder) and `speaker`.
        dim: numbers of an embedding.
        settings, speakers: as `load_speecht5_for_inference` returns them.
    """

    def __init__(self, args, rows, dim, settings, speakers):
        self.args, self.dim, self.speakers, self.heard, self.encoder = args, dim, speakers, {}, None
        self.folder = AudioFolder(args.file.parent, args.audio_root or []) if args.file else None
        self.given = None
        is_given = args.speaker or args.speaker_embedding
        if args.voice or not is_given and any(row.get("voice") for row in rows):
            if args.voice:
                _require_file(args.voice)
            name = args.speaker_encoder or settings.get("speaker_encoder") or STOCK_SPEAKER_ENCODER
            self.encoder = load_speaker_encoder(name)
        if args.voice:
            self.given = str(args.voice), self._of_recording(args.voice)
        elif args.speaker:
            self.given = args.speaker, self._of_speaker(args.speaker)
        elif args.speaker_embedding:
            self.given = str(args.speaker_embedding), self._of_file(args.speaker_embedding)

    def of(self, row):
        """Returns (name, float tensor of shape (dim,)) of the voice of a row."""
        if self.given:
            return self.given
        if row.get("voice"):
            path = self.folder.find(row["voice"])
            if not self.folder.holds(path):
                raise UserError(self.folder.refusal("The voice", [path]))
            return row["voice"], self._of_recording(Path(path))
        if row.get("speaker"):
            return row["speaker"], self._of_speaker(row["speaker"])
        if len(self.speakers) == 1:
            return next(iter(self.speakers.items()))
        if self.speakers:
            raise UserError(f"{self.args.model} has several voices: choose one with --speaker: {self._names()}.")
        raise UserError(
            f"Say whose voice {self.args.model} is to speak with: --voice REF.wav, a recording of 3 s or more, or "
            "--speaker_embedding FILE.npy."
        )

    def _of_speaker(self, name):
        if not self.speakers:
            raise UserError(
                f"{self.args.model} has no voices of its own, so no {name!r}: give a recording with --voice REF.wav."
            )
        if name not in self.speakers:
            raise UserError(
                f"{self.args.model} has no voice {name!r}.{nearest(name, self.speakers)} It has {self._names()}."
            )
        return self.speakers[name]

    def _of_recording(self, path):
        if path not in self.heard:
            try:
                waveform = decode(path)
            except BadAudio as reason:
                raise UserError(f"{path}: {reason}; give another recording of the voice.") from None
            self.heard[path] = voice_of(waveform, self.encoder, str(path))
        return self.heard[path]

    def _of_file(self, path):
        _require_file(path)
        try:
            vector = np.load(path, allow_pickle=False)
            vector = np.asarray(vector, dtype=np.float32).reshape(-1)
        except (OSError, ValueError, EOFError, TypeError, AttributeError):  # an archive of arrays, too
            raise UserError(f"{path} is not an array that can be read: write it with numpy.save.") from None
        if len(vector) != self.dim or not np.isfinite(vector).all() or not vector.any():
            raise UserError(
                f"{path} holds {len(vector)} numbers; a voice is {self.dim} that are finite and not all zero: make it anew."
            )
        return torch.from_numpy(vector)

    def _names(self):
        names = sorted(self.speakers)
        return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
