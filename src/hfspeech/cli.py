"""The `hfspeech` command: check a run before paying for it, evaluate any Whisper, transcribe recordings, and speak
texts with any SpeechT5.

Each command imports what it needs when it is called, so that `hfspeech --help` answers at once.
"""

import argparse
import contextlib
import csv
import json
import sys
import time
from pathlib import Path

from .errors import UserError, explain_errors, nearest

AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aif", ".aiff", ".m4a", ".mp4", ".aac", ".webm", ".wma")
SUBTITLE_S = 8.0  # longest subtitle, so that it can be read at a glance
SPOKEN_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus")  # what speech can be written as
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
# What heard the voices that microsoft/speecht5_tts was trained with; a model that says nothing of its own is its child.
STOCK_SPEAKER_ENCODER = "speechbrain/spkrec-xvect-voxceleb"


@explain_errors
def main(argv=None):
    """Runs one command line and returns its exit code; user errors end in one sentence and exit code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser, commands = _build_parser()
    if not argv:
        parser.print_help()
        return 0
    if not argv[0].startswith("-") and argv[0] not in commands:
        raise UserError(
            f"There is no command {argv[0]!r}.{nearest(argv[0], commands)} Choose from {', '.join(commands)}."
        )
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [flag for action in commands[args.command]._actions for flag in action.option_strings]
        raise UserError(
            f"hfspeech {args.command}: there is no setting {unknown[0].partition('=')[0]}."
            f"{nearest(unknown[0].partition('=')[0], known)} See hfspeech {args.command} --help."
        )
    return args.run(args)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{self.prog}: {message.removeprefix('argument ')}. See {self.prog} --help.")


def _build_parser():
    parser = _Parser(
        prog="hfspeech",
        description="Fine-tune Whisper and SpeechT5: check, evaluate, transcribe, synthesize.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    check = commands.add_parser(
        "check",
        help="look over a run before paying for it",
        description="Goes through a run's settings, model and data, and measures one step; trains and writes nothing.",
        allow_abbrev=False,
    )
    check.add_argument("arguments_file", metavar="ARGS.yaml", help="the recipe's arguments file")
    check.add_argument("--overfit", action="store_true", help="also train on one batch until it is learnt")
    check.add_argument(
        "flags", nargs=argparse.REMAINDER, metavar="--name value", help="settings that win over the file"
    )
    check.set_defaults(run=_check)

    evaluate = commands.add_parser(
        "evaluate",
        help="measure the error rate of any Whisper",
        description="Transcribes a split and prints its error rates, each with its 95 %% interval.",
        allow_abbrev=False,
    )
    evaluate.add_argument("model", metavar="MODEL", help="Whisper or adapter of one: folder or Hub id")
    evaluate.add_argument("--dataset_name", required=True, help="Hub dataset, folder, manifest or parquet file")
    evaluate.add_argument("--dataset_config_name", help="configuration of the Hub dataset")
    evaluate.add_argument("--dataset_revision", help="branch, tag or commit of the Hub dataset")
    evaluate.add_argument("--split", default="test", help="split to evaluate on (default: test)")
    evaluate.add_argument("--audio_column_name", help="column of the audio (default: found by itself)")
    evaluate.add_argument("--text_column_name", help="column of the text (default: found by itself)")
    evaluate.add_argument("--speaker_column_name", help="column of the speaker, for the intervals")
    evaluate.add_argument("--group_columns", nargs="+", help="columns whose values get an error rate each")
    evaluate.add_argument(
        "--normalizer",
        default="auto",
        choices=["auto", "none", "basic", "english", "marks"],
        help="text normaliser (default: english for English, marks elsewhere)",
    )
    evaluate.add_argument("--max_samples", type=_positive, help="use only the first rows")
    evaluate.add_argument(
        "--on_bad_audio",
        default="error",
        choices=["error", "skip"],
        help="what a broken recording does (default: error)",
    )
    evaluate.add_argument("--output", type=Path, help="JSON file for the result; the predictions go beside it")
    evaluate.set_defaults(run=_evaluate)

    transcribe = commands.add_parser(
        "transcribe",
        help="write down what recordings say",
        description="Transcribes recordings of any length. A broken file is reported and passed over (exit code 1).",
        allow_abbrev=False,
    )
    transcribe.add_argument("model", metavar="MODEL", help="Whisper or adapter of one: folder or Hub id")
    transcribe.add_argument("files", metavar="FILE", nargs="+", type=Path, help="recordings, or folders of them")
    transcribe.add_argument("--format", default="text", choices=list(_FORMATS), help="what to write (default: text)")
    transcribe.add_argument("--output_dir", type=Path, help="folder for one file for each recording (default: print)")
    transcribe.add_argument(
        "--timestamps",
        default="pauses",
        choices=["pauses", "model"],
        help="times from the sound, or from the model's timestamp tokens (default: pauses)",
    )
    transcribe.set_defaults(run=_transcribe)

    synthesize = commands.add_parser(
        "synthesize",
        help="speak texts of any length",
        description="Speaks texts of any length with a SpeechT5. A table of texts becomes a folder of recordings; a "
        "broken row is reported and passed over (exit code 1).",
        allow_abbrev=False,
    )
    synthesize.add_argument("model", metavar="MODEL", help="SpeechT5 or adapter of one: folder or Hub id")
    what = synthesize.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", help="what to say")
    what.add_argument(
        "--file",
        type=Path,
        help="what to say: a .txt; or a .csv, .tsv or .jsonl with a column text and, if you like, file_name or id, "
        "speaker, voice (a recording)",
    )
    whose = synthesize.add_mutually_exclusive_group()
    whose.add_argument("--voice", type=Path, metavar="REF.wav", help="a recording of the voice, 3 s or more")
    whose.add_argument("--speaker", metavar="NAME", help="one of the model's own voices (default: its only one)")
    whose.add_argument("--speaker_embedding", type=Path, metavar="FILE.npy", help="the voice as 512 numbers")
    synthesize.add_argument("--output", type=Path, required=True, help="recording to write, or folder of a table's")
    synthesize.add_argument("--speed", type=float, default=1.0, help="2 is twice as fast, 0.5 half (default: 1.0)")
    synthesize.add_argument(
        "--seed", type=_not_negative, default=0, help="another one says it another way (default: 0)"
    )
    synthesize.add_argument(
        "--vocoder",
        help="from spectrogram to sound: hifigan, griffin_lim, or a SpeechT5HifiGan (default: the model's own, or hifigan)",
    )
    synthesize.add_argument("--language", help="language of the text (default: the model's own, or en)")
    synthesize.add_argument("--speaker_encoder", help="what listens to --voice (default: the model's own)")
    synthesize.add_argument("--batch_size", type=_positive, default=8, help="sentences spoken at once (default: 8)")
    synthesize.add_argument("--model_revision", default="main", help="branch, tag or commit of the model on the Hub")
    synthesize.set_defaults(run=_synthesize)

    own_window = {evaluate: "full, as any other tool does it", transcribe: "as the model was trained"}
    own_language = {evaluate: "the model's own", transcribe: "the model's own, or guessed for each piece"}
    for command in (evaluate, transcribe):
        command.add_argument("--model_revision", default="main", help="branch, tag or commit of the model on the Hub")
        command.add_argument("--language", help=f"language of the speech (default: {own_language[command]})")
        command.add_argument("--task", choices=["transcribe", "translate"], help="default: the model's own")
        command.add_argument(
            "--encoder_window",
            choices=["auto", "full"],
            default="full" if command is evaluate else None,
            help="pad a batch to its longest piece, right for models trained so, or to the full window "
            f"(default: {own_window[command]})",
        )
        command.add_argument("--batch_size", type=_positive, default=16, help="pieces decoded at once (default: 16)")
    return parser, commands.choices


def _positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def _not_negative(text):
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


_positive.__name__ = _not_negative.__name__ = "whole number"  # argparse names the type in its message


# transcribe


def _transcribe(args):
    from tqdm import tqdm

    from .audio import BadAudio, decode, duration_s
    from .inference import transcribe
    from .models.loading import enough_memory
    from .runs import claim_folder

    files = _audio_files(args.files)
    if args.format in ("srt", "vtt") and len(files) > 1 and not args.output_dir:
        raise UserError(f"{len(files)} recordings need a {args.format} file each: say where with --output_dir FOLDER.")
    if args.output_dir:
        claim_folder(args.output_dir)

    model, processor = _load_model(args)
    broken, good, durations_s = [], [], {}
    for path in files:
        with contextlib.suppress(BadAudio, UserError):  # decoding says it again, and louder
            durations_s[path] = duration_s(path)
    bar = tqdm(total=round(sum(durations_s.values())), unit=" s", unit_scale=True, desc="transcribing", disable=None)

    def waveforms():
        for path in files:
            try:
                waveform = decode(path, processor.feature_extractor.sampling_rate)
            except (BadAudio, UserError) as reason:
                broken.append(path)
                bar.write(f"{path}: {reason}", file=sys.stderr)
                continue
            good.append(path)
            yield waveform

    found = transcribe(
        model,
        processor,
        waveforms(),
        args.batch_size,
        max_piece_s=SUBTITLE_S if args.format in ("srt", "vtt") else None,
        timestamps=args.timestamps,
        encoder_window=args.encoder_window,
        on_progress=bar.update,
    )
    with enough_memory(), bar:
        for number, segments in enumerate(found):
            path = good[number]
            if args.output_dir:
                target = args.output_dir / f"{files[path]}.{_FORMATS[args.format][0]}"
                _write(target, _FORMATS[args.format][1](path, segments))
            else:
                text = _FORMATS[args.format][1](path, segments)
                bar.clear()
                print(f"{path}: {text}" if args.format == "text" and len(files) > 1 else text, end="", flush=True)
    if broken:
        print(f"{len(broken)} of {len(files)} recordings could not be read.", file=sys.stderr)
    return 1 if broken else 0


def _audio_files(paths):
    """Returns recording → name of its output without suffix, for files and, recursively, for folders of them."""
    files = {}
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES and p.is_file())
            if not inside:
                raise UserError(f"{path} holds no recording ({', '.join(AUDIO_SUFFIXES)}): give another folder.")
            files.update({p: p.relative_to(path).with_suffix("") for p in inside})
        elif path.exists():
            files[path] = Path(path.stem)
        else:
            raise UserError(f"There is no file or folder {path}: check its path (from here, {Path.cwd()}).")
    owners = {}
    for path, name in files.items():
        if name in owners:
            raise UserError(f"{owners[name]} and {path} would both be called {name}: transcribe them one by one.")
        owners[name] = path
    return files


def _as_text(path, segments):
    return " ".join(segment["text"] for segment in segments) + "\n"


def _as_json(path, segments):
    result = {"file": str(path), "text": _as_text(path, segments).strip(), "segments": segments}
    return json.dumps(result, ensure_ascii=False) + "\n"


def _as_srt(path, segments):
    return "".join(
        f"{number}\n{_clock(segment['start_s'], ',')} --> {_clock(segment['end_s'], ',')}\n{segment['text']}\n\n"
        for number, segment in enumerate(segments, 1)
    )


def _as_vtt(path, segments):
    cues = (f"{_clock(s['start_s'], '.')} --> {_clock(s['end_s'], '.')}\n{s['text']}\n\n" for s in segments)
    return "WEBVTT\n\n" + "".join(cues)


_FORMATS = {"text": ("txt", _as_text), "json": ("json", _as_json), "srt": ("srt", _as_srt), "vtt": ("vtt", _as_vtt)}


def _clock(seconds, point):
    milliseconds = round(seconds * 1000)
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02}:{minutes:02}:{rest // 1000:02}{point}{rest % 1000:03}"


# evaluate


def _evaluate(args):
    from tqdm import tqdm

    from .arguments import DataArguments, default_num_workers
    from .data import load_split
    from .inference import evaluate_rows
    from .metrics import TranscriptScore
    from .models.loading import enough_memory
    from .models.whisper import set_language
    from .runs import claim_folder, environment, write_json, write_jsonl

    if args.output:
        claim_folder(args.output.parent, "--output")

    data_args = DataArguments(
        dataset_name=[args.dataset_name],
        dataset_config_name=args.dataset_config_name and [args.dataset_config_name],
        dataset_revision=args.dataset_revision and [args.dataset_revision],
        audio_column_name=args.audio_column_name,
        text_column_name=args.text_column_name,
        speaker_column_name=args.speaker_column_name,
        group_columns=args.group_columns,
        max_test_samples=args.max_samples,
        on_bad_audio=args.on_bad_audio,
    )
    dataset = load_split(data_args, args.split)
    model, processor = _load_model(args)
    if not args.language:
        # A Whisper that guesses the language of every row may be measured in the wrong one without anyone noticing.
        own = model.generation_config
        language = (getattr(own, "language", None) or "").strip("<|>")
        task = args.task or getattr(own, "task", None) or "transcribe"
        set_language(model, processor, language, task, bool(getattr(own, "return_timestamps", False)))
    compute_metrics = TranscriptScore(processor, args.group_columns, args.normalizer)
    with enough_memory(), tqdm(total=len(dataset), unit=" rows", desc="evaluating", disable=None) as bar:
        score, rows, bad_audio = evaluate_rows(
            model, processor, dataset, compute_metrics, args.batch_size, args.on_bad_audio,
            default_num_workers(), args.encoder_window, bar.update,
        )  # fmt: skip
    print(_score_table(score))
    if score["unfinished"]:
        print(f"{score['unfinished']} rows were cut off at the number of tokens that their length allows.")
    for sentence in bad_audio:
        print(f"left out: {sentence}")
    if args.output:
        arguments = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "run"}
        result = {
            "model": args.model,
            "model_commit": model.hub_commit,
            "dataset": args.dataset_name,
            "split": args.split,
            **score,
            "account": dataset.account,
            "bad_audio": bad_audio,
            "environment": environment(),
            "arguments": arguments,
        }
        predictions = args.output.with_name(f"{args.output.stem}_predictions.jsonl")
        write_json(args.output, result)
        write_jsonl(predictions, rows)
        print(f"The result is in {args.output}, every row in {predictions}.")
    return 0


def _score_table(score):
    from .publish import percent, rate_text

    lines = [("", "word error rate", "character error rate", "words", "rows")]
    entries = [("all", score)]
    for column, values in score["groups"].items():
        entries += [(f"{column}: {value}", rates) for value, rates in values.items()]
    for name, rates in entries:
        lines.append((name, rate_text(rates), rate_text(rates, "cer"), str(rates["words"]), str(rates["rows"])))
    width = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    table = ["  ".join(cell.ljust(w) for cell, w in zip(line, width)).rstrip() for line in lines]
    return "\n".join(
        [
            *table,
            f"{score['substitutions']} words substituted, {score['insertions']} inserted, "
            f"{score['deletions']} deleted; {percent(score['raw_wer'])} as written, with case and punctuation",
            f"95 % intervals: {score['interval']}; text normalised by {score['normalizer']}",
        ]
    )


# check


def _check(args):
    from .preflight import check

    flags = [flag for flag in args.flags if flag != "--overfit"]
    check(args.arguments_file, flags, overfit=args.overfit or len(flags) < len(args.flags))
    return 0


# synthesize


def _synthesize(args):
    from .models.loading import quiet_transformers
    from .models.speecht5 import load_speecht5_for_inference
    from .models.vocoders import load_vocoder
    from .spelling import TextFrontEnd, unknown_characters, unknown_report
    from .synthesis import check_speed, max_piece_tokens

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
    from tqdm import tqdm

    from .audio import SAMPLING_RATE, write
    from .models.loading import enough_memory
    from .synthesis import synthesize

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
    from .data.sources import _read_files

    _require_file(path)
    table = _read_files([path])
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
    from .runs import claim_folder

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
    from .synthesis import split_text

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
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    start = (language or "").lower().replace("_", "-").split("-")[0]
    if len(start) > 3 and start not in TO_LANGUAGE_CODE or language == "":
        raise UserError(
            f"There is no language {language!r}.{nearest(start, TO_LANGUAGE_CODE)} Give a code such as de."
        )
    return language


class _Voices:
    """Whose voice speaks a row: the one that was asked for, else the row's own, else the model's only one.

    Args:
        args: `voice`, `speaker`, `speaker_embedding`, of which one at most is given; `speaker_encoder`.
        rows: list of dicts that may have `voice` (a recording, its path from the table's folder) and `speaker`.
        dim: numbers of an embedding.
        settings, speakers: as `load_speecht5_for_inference` returns them.
    """

    def __init__(self, args, rows, dim, settings, speakers):
        self.args, self.dim, self.speakers, self.heard, self.encoder = args, dim, speakers, {}, None
        self.given = None
        is_given = args.speaker or args.speaker_embedding
        if args.voice or not is_given and any(row.get("voice") for row in rows):
            from .voices import load_speaker_encoder

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
            return row["voice"], self._of_recording(self.args.file.parent / row["voice"])
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
        from .audio import BadAudio, decode
        from .voices import voice_of

        if path not in self.heard:
            try:
                waveform = decode(path)
            except BadAudio as reason:
                raise UserError(f"{path}: {reason}; give another recording of the voice.") from None
            self.heard[path] = voice_of(waveform, self.encoder, str(path))
        return self.heard[path]

    def _of_file(self, path):
        import numpy as np
        import torch

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


# shared


def _load_model(args):
    from .models.loading import quiet_transformers
    from .models.whisper import load_for_inference

    quiet_transformers()
    return load_for_inference(args.model, args.model_revision, args.language, args.task)


def _write(path, text):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"Cannot write {path} ({error.strerror}): free some space, or choose another place with --output_dir."
        ) from None


if __name__ == "__main__":
    sys.exit(main())
