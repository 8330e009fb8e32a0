"""What a run leaves behind: the model, its record, and a table that says what changed."""

from pathlib import Path

from .models import whisper_of
from .runs import writing

EXAMPLES = 10


def publish(trainer, speech):
    """Saves the model, the processor and the run's record into the output folder, and prints the result.

    Args:
        trainer: `SpeechTrainer` after `train_or_resume` and `measure`.
        speech: what `load_speech` returned.

    Raises:
        UserError: the folder cannot be written any more; `results.json` has then been written already.
    """
    output_dir = Path(trainer.args.output_dir)
    trainer.write_results(speech)
    with writing(output_dir):
        trainer.save_model()
        if trainer.args.should_save:
            whisper_of(trainer.model).generation_config.save_pretrained(output_dir)
    if trainer.is_world_process_zero():
        print(result_table(trainer.results))
        print(example_lines(trainer.predictions.values()))
        print(where_it_lies(trainer))


def result_table(results):
    """Returns the error rates before and after, each with its interval, as lines of text."""
    lines = [("word error rate", "before", "after")]
    before, after = results.get("before") or {}, results.get("after") or {}
    lines.append(("test", rate_text(before), rate_text(after)))
    if after.get("unpadded"):
        lines.append(("  unpadded, as hfspeech transcribes", "", rate_text(after["unpadded"])))
    for column, values in after.get("groups", {}).items():
        before_of = before.get("groups", {}).get(column, {})
        lines += [
            (f"  {column}: {value}", rate_text(before_of.get(value)), rate_text(rate))
            for value, rate in values.items()
        ]
    retention = results.get("retention", {})
    if retention:
        lines.append(
            ("old condition (forgetting)", rate_text(retention.get("before")), rate_text(retention.get("after")))
        )
    width = [max(len(line[i]) for line in lines) for i in range(3)]
    rows = ["  ".join(cell.ljust(w) for cell, w in zip(line, width)).rstrip() for line in lines]
    rule = "─" * (sum(width) + 4)
    note = f"95 % intervals: {after.get('interval', '')}; text normalised by {after.get('normalizer', '')}"
    train = results.get("train")
    if train:
        note += (
            f"\n{train['steps']} steps on {train['audio_seconds'] / 60:.1f} minutes of audio in "
            f"{train['seconds']:.0f} s ({train['audio_seconds_per_second']:.0f} times real time)"
        )
    return "\n".join(["", rule, rows[0], rule, *rows[1:], rule, note])


def example_lines(predictions):
    """Returns ten test rows as reference, before and after; those that changed come first."""
    rows = [row for row in predictions if row["set"] == "test" and "before" in row and "after" in row]
    rows.sort(key=lambda row: row["before"] == row["after"])
    lines = [""]
    for row in rows[:EXAMPLES]:
        lines += [f"reference  {row['text']}", f"before     {row['before']}", f"after      {row['after']}", ""]
    return "\n".join(lines)


def where_it_lies(trainer):
    """Returns the folder of the model and the line of stock code that loads it."""
    output_dir = trainer.args.output_dir
    if hasattr(trainer.model, "peft_config"):
        config = next(iter(trainer.model.peft_config.values()))
        revision = f', revision="{config.revision}"' if config.revision else ""
        base = f'WhisperForConditionalGeneration.from_pretrained("{config.base_model_name_or_path}"{revision})'
        kind = "adapter"
        code = f'PeftModel.from_pretrained({base}, "{output_dir}")'
    else:
        kind = "model"
        code = f'WhisperForConditionalGeneration.from_pretrained("{output_dir}")'
    return (
        f"The {kind} is in {output_dir}, the results in {output_dir}/results.json, every test row in "
        f"{output_dir}/predictions.jsonl.\nLoad it with stock code:\n    model = {code}"
    )


def rate_text(score, name="wer"):
    """Returns one rate of a score with its interval, such as `12.3 % (10.1–14.2)`; `-` where there is none."""
    if not score or score.get(name) is None:
        return "-"
    low, high = score[f"{name}_low"], score[f"{name}_high"]
    return percent(score[name]) + (f" ({100 * low:.1f}–{100 * high:.1f})" if low is not None else "")


def percent(rate):
    """Returns a fraction as text, such as `12.3 %`."""
    return f"{100 * rate:.1f} %"
