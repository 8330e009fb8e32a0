"""The `hfspeech` command: check a run before paying for it, compare runs and make them once more, evaluate any Whisper,
transcribe recordings, speak texts with any SpeechT5, and push runs and datasets to the Hub.

Each command is a module here with `run(args)`, imported when the command is called, so that `hfspeech --help` answers
at once.
"""

import argparse
import importlib
import sys
from pathlib import Path

from hfspeech.errors import UserError, explain_errors, nearest

AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aif", ".aiff", ".m4a", ".mp4", ".aac", ".webm", ".wma")


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
    if args.command is None:
        raise UserError(f"hfspeech: a command comes first, not {argv[0]}. Choose from {', '.join(commands)}.")
    if unknown:
        known = [flag for action in commands[args.command]._actions for flag in action.option_strings]
        raise UserError(
            f"hfspeech {args.command}: there is no setting {unknown[0].partition('=')[0]}."
            f"{nearest(unknown[0].partition('=')[0], known)} See hfspeech {args.command} --help."
        )
    return importlib.import_module(f"hfspeech.cli.{args.command.replace('-', '_')}").run(args)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{self.prog}: {message.removeprefix('argument ')}. See {self.prog} --help.")


def _build_parser():
    parser = _Parser(
        prog="hfspeech",
        description="Fine-tune Whisper and SpeechT5: check, evaluate, transcribe, synthesize, compare, reproduce, push.",
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
    evaluate.add_argument(
        "--audio_root", nargs="+", help="folders that a manifest's paths may lead into, besides its own"
    )
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

    compare = commands.add_parser(
        "compare",
        help="say what differs between runs, and whether it is more than chance",
        description="Shows the settings and figures that differ, and tests the difference on the rows that both have.",
        allow_abbrev=False,
    )
    compare.add_argument(
        "first", metavar="RUN", help="output folder of a run, or its record: what the others are held against"
    )
    compare.add_argument("others", metavar="OTHER", nargs="+", help="the other runs")
    compare.add_argument("--metric", default="wer", choices=["wer", "cer"], help="rate to test (default: wer)")
    compare.add_argument("--output", type=Path, help="JSON file for the comparison")

    reproduce = commands.add_parser(
        "reproduce",
        help="run what a record says once more, and compare",
        description="Launches a recorded run again, with its settings and revisions. Exit code 0 if its figure falls "
        "within the recorded interval, 1 if not.",
        allow_abbrev=False,
    )
    reproduce.add_argument(
        "run", metavar="RUN", help="output folder or Hub id of a run, its record, or recipes/NAME for a recipe's demo"
    )
    reproduce.add_argument("--output_dir", type=Path, help="folder of the new run (default: RUN_reproduced)")
    reproduce.add_argument("--dataset_name", nargs="+", help="where the data lie by now")
    reproduce.add_argument("--retention_dataset_name", help="where the data of the old condition lie by now")
    reproduce.add_argument("--audio_root", nargs="+", help="where the folders lie that a manifest's paths lead into")
    reproduce.add_argument("--model_name_or_path", help="where the model lies by now")
    reproduce.add_argument("--dry_run", action="store_true", help="only show what differs, and what would be run")

    transcribe = commands.add_parser(
        "transcribe",
        help="write down what recordings say",
        description="Transcribes recordings of any length. A broken file is reported and passed over (exit code 1).",
        allow_abbrev=False,
    )
    transcribe.add_argument("model", metavar="MODEL", help="Whisper or adapter of one: folder or Hub id")
    transcribe.add_argument("files", metavar="FILE", nargs="+", type=Path, help="recordings, or folders of them")
    transcribe.add_argument(
        "--format", default="text", choices=["text", "json", "srt", "vtt"], help="what to write (default: text)"
    )
    transcribe.add_argument("--output_dir", type=Path, help="folder for one file for each recording (default: print)")
    transcribe.add_argument(
        "--timestamps",
        default="pauses",
        choices=["pauses", "model"],
        help="times from the sound, or from the model's timestamp tokens (default: pauses)",
    )

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
    synthesize.add_argument(
        "--audio_root", nargs="+", help="folders that a table's voices may lie in, besides its own"
    )
    synthesize.add_argument("--speaker_encoder", help="what listens to --voice (default: the model's own)")
    synthesize.add_argument("--batch_size", type=_positive, default=8, help="sentences spoken at once (default: 8)")
    synthesize.add_argument("--model_revision", default="main", help="branch, tag or commit of the model on the Hub")

    push = commands.add_parser(
        "push",
        help="push a finished run to the Hub",
        description="Packs a finished run, checks that it loads, uploads it, and checks what has arrived. What failed "
        "or was stopped may be repeated: nothing is added twice.",
        allow_abbrev=False,
    )
    push.add_argument("run_dir", metavar="RUN", type=Path, help="output folder of the run")
    push.add_argument(
        "repo_id", metavar="OWNER/NAME", nargs="?", help="repository (default: yours, called as the run)"
    )
    push.add_argument("--merge", action="store_true", help="push the whole model and not its adapter")
    push.add_argument("--with_checkpoint", action="store_true", help="also push what is needed to train on from there")
    push.add_argument("--create_pr", action="store_true", help="open a pull request, also in a repository of others")
    push.add_argument(
        "--dry_run", type=Path, metavar="FOLDER", help="write what would be pushed there, and push nothing"
    )

    push_dataset = commands.add_parser(
        "push-dataset",
        help="push your recordings to the Hub as a dataset",
        description="Makes parquet files and a card of a folder of recordings, a manifest or parquet files, uploads "
        "them, and checks what has arrived. Every recording is decoded before anything is uploaded.",
        allow_abbrev=False,
    )
    push_dataset.add_argument("path", metavar="PATH", help="audiofolder, CSV/TSV/JSONL manifest or parquet")
    push_dataset.add_argument("repo_id", metavar="OWNER/NAME", help="repository")
    push_dataset.add_argument("--config", default="default", help="configuration that it becomes (default: default)")
    push_dataset.add_argument("--language", help="language of the speech, as a code, for the card")
    push_dataset.add_argument("--license", help="licence, as the Hub names it, for the card: cc-by-4.0, cc0-1.0, ...")
    push_dataset.add_argument("--audio_column_name", help="column of the audio (default: found by itself)")
    push_dataset.add_argument("--text_column_name", help="column of the text (default: found by itself)")
    push_dataset.add_argument("--speaker_column_name", help="column of the speaker (default: found by itself)")
    push_dataset.add_argument(
        "--audio_root", nargs="+", help="folders that a manifest's paths may lead into, besides its own"
    )
    for command, noun in ((push, "model"), (push_dataset, "dataset")):
        command.add_argument("--private", action="store_true", default=None, help=f"make the {noun} private")
        command.add_argument("--revision", metavar="BRANCH", help="branch to push to (default: main)")
        command.add_argument("--tag", help="name for the pushed commit, such as v1")

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
