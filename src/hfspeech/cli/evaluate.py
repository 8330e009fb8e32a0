"""`hfspeech evaluate`: the error rates of any Whisper on a split, each with its interval."""

from pathlib import Path

from tqdm import tqdm

from hfspeech.arguments import DataArguments, default_num_workers
from hfspeech.data import load_split
from hfspeech.inference import evaluate_rows
from hfspeech.metrics import TranscriptScore
from hfspeech.models.loading import enough_memory, quiet_transformers
from hfspeech.models.whisper import load_for_inference, set_language
from hfspeech.publish import percent, rate_text
from hfspeech.runs import claim_folder, environment, write_json, write_jsonl


def run(args):
    """Transcribes a split, and prints and writes its error rates; returns the exit code."""
    if args.output:
        claim_folder(args.output.parent, "--output")

    data_args = DataArguments(
        dataset_name=[args.dataset_name],
        dataset_config_name=args.dataset_config_name and [args.dataset_config_name],
        dataset_revision=args.dataset_revision and [args.dataset_revision],
        audio_root=args.audio_root,
        audio_column_name=args.audio_column_name,
        text_column_name=args.text_column_name,
        speaker_column_name=args.speaker_column_name,
        group_columns=args.group_columns,
        max_test_samples=args.max_samples,
        on_bad_audio=args.on_bad_audio,
    )
    dataset = load_split(data_args, args.split)
    quiet_transformers()
    model, processor = load_for_inference(args.model, args.model_revision, args.language, args.task)
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
        arguments = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
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
