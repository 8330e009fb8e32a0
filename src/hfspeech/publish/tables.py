"""What a run found, as lines of text."""

from pathlib import Path

from hfspeech.models.loading import ADAPTER_CONFIG
from hfspeech.runs import RUN_FILE, SAMPLES_FOLDER, read_json

EXAMPLES = 10
MOST_GROUPS = 12  # values of a column that a card has a line for


def result_table(results):
    """Returns what was measured before and after, each figure with its interval, as lines of text."""
    before, after = results.get("before") or {}, results.get("after") or {}
    lines = _speech_lines(before, after) if "mcd" in after else _transcript_lines(before, after, results)
    width = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ["  ".join(cell.ljust(w) for cell, w in zip(line, width)).rstrip() for line in lines]
    rule = "─" * (sum(width) + 2 * len(width) - 2)
    note = f"95 % intervals: {after.get('interval', '')}; text normalised by {after.get('normalizer', '')}"
    train = results.get("train")
    if train:
        note += (
            f"\n{train['steps']} steps on {train['audio_seconds'] / 60:.1f} minutes of audio in "
            f"{train['seconds']:.0f} s ({train['audio_seconds_per_second']:.0f} times real time)"
        )
    return "\n".join(["", rule, rows[0], rule, *rows[1:], rule, note])


def _transcript_lines(before, after, results):
    lines = [("word error rate", "before", "after")]
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
    return lines


# What is measured of synthesised speech: title, name in the score, unit, factor, digits.
SPEECH_MEASURES = (
    ("words misheard", "wer", " %", 100, 1),
    ("characters misheard", "cer", " %", 100, 1),
    ("mel-cepstral distortion", "mcd", " dB", 1, 2),
    ("log-F0 error", "log_f0_rmse", "", 1, 3),
    ("speaker similarity", "speaker_similarity", "", 1, 3),
    ("seconds, against the recording's", "duration_ratio", "", 1, 2),
    ("mean opinion score, estimated", "mos", "", 1, 2),
)


def speech_measures(score):
    """Returns those of `SPEECH_MEASURES` that a score has: an opinion is only asked for where a run says so."""
    return [measure for measure in SPEECH_MEASURES if measure[1] in score]


def _speech_lines(before, after):
    lines = [("test", "before", "after", "recordings, vocoded")]
    ceiling = after["ceiling"]["vocoded"]
    for title, name, *form in speech_measures(after):
        best = figure_text(ceiling, name, *form)
        lines.append((title, figure_text(before, name, *form), figure_text(after, name, *form), best))
    stops = ["-" if not score else percent(score["stop"]["ok"]) for score in (before, after)]
    lines.append(("stops where it should", *stops, ""))
    for column, values in after["groups"].items():
        before_of = before.get("groups", {}).get(column, {})
        for value, of_value in values.items():
            lines.append(
                (f"  words misheard, {column}: {value}", rate_text(before_of.get(value)), rate_text(of_value), "")
            )
    return lines


def shown_groups(values):
    """Returns (value, score) for each value of a group column, of more than `MOST_GROUPS` the worst."""
    if len(values) <= MOST_GROUPS:
        return list(values.items())
    return sorted(values.items(), key=lambda item: -(item[1]["wer"] or 0))[:MOST_GROUPS]


def figure_text(score, name, unit, factor, digits):
    """Returns one figure of a score with its interval, such as `2.61 dB (2.55–2.70)`; `-` where there is none."""
    if not score or score.get(name) is None:
        return "-"
    low, high = (score.get(f"{name}_{end}") for end in ("low", "high"))
    interval = "" if low is None else f" ({factor * low:.{digits}f}–{factor * high:.{digits}f})"
    return f"{factor * score[name]:.{digits}f}{unit}{interval}"


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
    output_dir = Path(trainer.args.output_dir)
    kind = "adapter" if hasattr(trainer.model, "peft_config") else "model"
    samples = output_dir / SAMPLES_FOLDER
    heard = f"\nListen to it, before and after, in {samples}." if samples.exists() else ""
    return (
        f"The {kind} is in {output_dir}, its model card in {output_dir}/README.md, the record in {output_dir / RUN_FILE}, "
        f"every test row in {output_dir}/predictions.jsonl.{heard}\nLoad it with stock code:\n"
        f"    model = {loading_code(output_dir, output_dir)}"
    )


def loading_code(folder, name, revision=None):
    """Returns the stock code that loads the model of a folder by a path or its name on the Hub."""
    adapter, revision = folder / ADAPTER_CONFIG, f', revision="{revision}"' if revision else ""
    if not adapter.exists():
        (model_class,) = read_json(folder / "config.json")["architectures"]
        return f'{model_class}.from_pretrained("{name}"{revision})'
    config = read_json(adapter)
    base_revision = f', revision="{config["revision"]}"' if config.get("revision") else ""
    base = config["auto_mapping"]["base_model_class"]
    base = f'{base}.from_pretrained("{config["base_model_name_or_path"]}"{base_revision})'
    return f'PeftModel.from_pretrained({base}, "{name}"{revision})'


def rate_text(score, name="wer"):
    """Returns one rate of a score with its interval, such as `12.3 % (10.1–14.2)`; `-` where there is none."""
    if not score or score.get(name) is None:
        return "-"
    low, high = score[f"{name}_low"], score[f"{name}_high"]
    # Resampling finds no error where none was made: 0.0–0.0 would not mean certainty.
    return percent(score[name]) + (f" ({100 * low:.1f}–{100 * high:.1f})" if low is not None and high > 0 else "")


def percent(rate):
    """Returns a fraction as text, such as `12.3 %`."""
    return f"{100 * rate:.1f} %"
