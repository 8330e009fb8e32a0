"""Fills in the tables of the README files from the committed records, so that no number is typed by hand.

python docs/render.py          # rewrites what stands between `<!-- results: RECORD ... -->` and `<!-- end -->`
python docs/render.py --check  # says what would change, and fails if anything would
"""

import argparse
import dataclasses
import json
import re
from pathlib import Path

import speed

from hfspeech.publish import figure_text, percent, rate_text, speech_measures
from hfspeech.publish.figures import figures, main_figure

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- (\w+)(?:: ([^\n]*?))? -->\n).*?(<!-- end -->)", re.S)


def results_table(names):
    """Returns a Markdown table of records, a line for each test set and group, and how each record was made."""
    lines = ["| test rows | words | WER before | WER after |", "|---|---|---|---|"]
    origins = []
    for name in names.split():
        record = json.loads((ROOT / name).read_text(encoding="utf-8"))
        lines += [_line(name_of(record), record["before"], record["after"])]
        if record["after"].get("unpadded"):
            lines += [
                _line(
                    "– unpadded, as `hfspeech transcribe` does it", {}, record["after"] | record["after"]["unpadded"]
                )
            ]
        for column, values in record["after"]["groups"].items():
            for value, after in values.items():
                lines += [_line(f"– {column}: {value}", record["before"]["groups"][column].get(value), after)]
        if record.get("retention"):
            retention = record["retention"]
            lines += [_line("– old condition (forgetting)", retention["before"], retention["after"])]
        origins += ["", origin(name, record)]
    return "\n".join([*lines, *origins]) + "\n"


def synthesis_table(names):
    """Returns a Markdown table of records of speech synthesis, a line for each measure, and how each was made."""
    tables = []
    for name in names.split():
        record = json.loads((ROOT / name).read_text(encoding="utf-8"))
        before, after = record.get("before") or {}, record["after"]
        ceiling = after["ceiling"]["vocoded"]
        lines = ["| test rows | before | after | recordings, vocoded |", "|---|---|---|---|"]
        for title, measure, *form in speech_measures(after):
            cells = [figure_text(score, measure, *form) for score in (before, after, ceiling)]
            lines.append(f"| {title} | {cells[0]} | **{cells[1]}** | {cells[2]} |")
        stops = [percent(score["stop"]["ok"]) if score else "-" for score in (before, after)]
        lines.append(f"| stops where it should | {stops[0]} | **{stops[1]}** | |")
        tables += ["\n".join([*lines, "", origin(name, record)])]
    return "\n\n".join(tables) + "\n"


def voice_origin(title, entry):
    """Returns a line of Markdown that says how an entry of `bench/voice.py` was made."""
    made = entry["environment"]
    return (
        f"- {title}: {made['date'][:10]}, `{made['command']}`, commit {made['commit'][:12]}, {entry['rows']} rows, "
        f"{len(entry['seeds'])} seeds."
    )


def voice_table(name):
    """Returns a Markdown table of how models speak, heard by a recogniser of their own, and how it was made."""
    record = json.loads((ROOT / name).read_text(encoding="utf-8"))
    lines = [
        "| model | test rows | words misheard | recordings, vocoded | mel-cepstral distortion | speaker similarity "
        "| stops where it should |",
        "|---|---|---|---|---|---|---|",
    ]
    origins = []
    for title, entry in record["models"].items():
        wer, ceiling = entry["wer"], entry["ceiling"]
        spread = f"{100 * min(wer['of_seed']):.1f}–{100 * max(wer['of_seed']):.1f}"
        lines.append(
            f"| {title} | {Path(entry['dataset']).name} | **{percent(wer['mean'])}** ({spread}) "
            f"| {percent(ceiling['recordings']['wer'])}, {percent(ceiling['vocoded']['wer'])} "
            f"| {entry['mcd']['mean']:.2f} dB | {entry['speaker_similarity']['mean']:.3f} | {percent(entry['stop']['ok'])} |"
        )
        origins.append(voice_origin(title, entry))
    return (
        "\n".join([*lines, "", f"`{name}`; in brackets the least and the most over the seeds.", "", *origins]) + "\n"
    )


def new_voices_table(name):
    """Returns a Markdown table of how often a model speaks in the voice that it is asked for, and how it was made."""
    record = json.loads((ROOT / name).read_text(encoding="utf-8"))
    lines = [
        "| model | voice identified | by chance | recordings | speaker similarity | words misheard | stops where it should |",
        "|---|---|---|---|---|---|---|",
    ]
    origins = []
    for title, entry in record["models"].items():
        found = entry["identified"]
        low, high = 100 * found["low"], 100 * found["high"]
        lines.append(
            f"| {title} | **{percent(found['mean'])}** ({low:.1f}–{high:.1f}) | {percent(found['chance'])} "
            f"| {percent(found['recordings'])} | {entry['speaker_similarity']['mean']:.3f} "
            f"| {percent(entry['wer']['mean'])} | {percent(entry['stop']['ok'])} |"
        )
        origins.append(voice_origin(title, entry))
    return "\n".join([*lines, "", f"`{name}`; in brackets the 95 % interval over rows.", "", *origins]) + "\n"


def vocoders_table(name):
    """Returns a Markdown table of what is made of true spectrograms, and how the generator among it was trained."""
    record = json.loads((ROOT / name).read_text(encoding="utf-8"))
    lines = [
        "| test rows | sound | words misheard | mel-cepstral distortion | log-mel distance | CPU seconds for one of sound |",
        "|---|---|---|---|---|---|",
    ]
    titles = {"griffin_lim": "Griffin-Lim", "nano_hifigan": "nano HiFi-GAN"}
    for folder, test in record["tests"].items():
        lines.append(f"| {Path(folder).name} | recordings | {percent(test['recordings']['wer'])} | | | |")
        for key, title in titles.items():
            found = test[key]
            mcd, distance = (
                f"{found[measure]['mean']:.{digits}f} ± {1.96 * found[measure]['standard_error']:.{digits}f}"
                for measure, digits in (("mcd", 2), ("log_mel_distance", 4))
            )
            lines.append(
                f"| {Path(folder).name} | {title} | {rate_text(found)} | {mcd} dB | {distance} "
                f"| {found['cpu_seconds_per_second']:.3f} |"
            )
    made, train = record["environment"], record["training"]
    return (
        "\n".join(
            [
                *lines,
                "",
                f"`{name}`: {made['date'][:10]}, `{made['command']}`, commit {made['commit'][:12]}, one thread of "
                f"{made['hardware']['cpu']}, transformers {made['versions']['transformers']}. The generator has "
                f"{train['parameters'] / 1e6:.2f} million parameters, and was trained for {train['steps']} steps in "
                f"{train['cpu_seconds']:.0f} s. In brackets and after ± the 95 % interval over rows; log-mel distance is the "
                "mean difference of log10 mel from the true spectrogram.",
            ]
        )
        + "\n"
    )


def _line(title, before, after):
    return f"| {title} | {after['words']} | {rate_text(before)} | **{rate_text(after)}** |"


def name_of(record):
    """Returns the names of a record's datasets, those that it was trained and tested on."""
    return ", ".join(Path(name).name for name in record["arguments"]["dataset_name"])


def origin(name, record):
    """Returns the sentence that says where a record comes from."""
    train, made = record["train"], record["environment"]
    hardware = made["hardware"]
    device = ", ".join(hardware["gpus"]) or f"{hardware['cores']} cores of {hardware['cpu']}"
    return (
        f"`{name}`: {made['date'][:10]}, `{made['command']}`, commit {made['commit'][:12]}, {device}, "
        f"transformers {made['versions']['transformers']}; {train['steps']} steps in {train['seconds']:.0f} s, "
        f"{train['peak_rss_bytes'] / 2**30:.1f} GB at most. Rates are percent; in brackets the 95 % interval "
        f"({record['after']['interval']}); text normalised by `{record['after']['normalizer']}`."
    )


def arguments_table(_):
    """Returns a Markdown list of the settings of each dataclass with help and default."""
    from hfspeech import arguments

    lines = []
    for name in ("DataArguments", "WhisperArguments", "SpeechT5Arguments", "LoraArguments"):
        dtype = getattr(arguments, name)
        lines += _section(dtype, dataclasses.fields(dtype))
    for name in ("SpeechTrainingArguments", "WhisperTrainingArguments", "SpeechT5TrainingArguments"):
        dtype = getattr(arguments, name)
        lines += _section(dtype, [f for f in dataclasses.fields(dtype) if f.name in dtype.__annotations__])
    return "\n".join(lines) + "\n"


def _section(dtype, fields):
    lines = [f"## {dtype.__name__}", "", "| setting | default | what for |", "|---|---|---|"]
    for f in fields:
        default = f.default_factory() if f.default is dataclasses.MISSING else f.default
        default = "" if default is None else f"`{json.dumps(default)}`"
        choices = f.metadata.get("choices")
        chosen = f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else ""
        lines += [f"| `{f.name}` | {default} | {f.metadata['help']}{chosen} |"]
    return [*lines, ""]


def coverage_table(name):
    """Returns a Markdown table of how often intervals hold the truth, by the number of speakers."""
    record = json.loads((ROOT / name).read_text(encoding="utf-8"))
    counts, made = list(record["by_speaker"]), record["environment"]
    lines = [f"| speakers | {' | '.join(counts)} |", "|---" * (len(counts) + 1) + "|"]
    for title, shares in (("resampled by speaker", record["by_speaker"]), ("resampled by row", record["by_row"])):
        lines.append(f"| {title} | {' | '.join(f'{100 * shares[count]:.0f} %' for count in counts)} |")
    origin = (
        f"`{name}`: {made['date'][:10]}, `{made['command']}`, commit {made['commit'][:12]}, {record['tests']} tests for "
        "each column."
    )
    return "\n".join([*lines, "", origin]) + "\n"


def aims_table(name):
    """Returns a Markdown table of published numbers, each beside that of the recipe's record if there is one."""
    lines = ["| recipe | model and data | published | reached here |", "|---|---|---|---|"]
    notes = []
    for aim in json.loads((ROOT / name).read_text(encoding="utf-8")):
        published, record = aim["published"], ROOT / "recipes" / aim["recipe"] / "args.json"
        figure, reached = "no published number found", "an aim: no record yet"
        if published:
            figure = f"{published['figure']} ([source]({published['address']}))"
            notes.append(f"- {aim['recipe']}: {published['of']}. Source: {published['source']}.")
        if record.exists():
            record = json.loads(record.read_text(encoding="utf-8"))
            title = main_figure(record)
            reached = f"{title} **{figure_text(*figures(record)[title])}**"
        lines.append(f"| {aim['recipe']} | {aim['model']}; {aim['data']} | {figure} | {reached} |")
    return "\n".join([*lines, "", *notes]) + "\n"


MAKERS = {
    "aims": aims_table,
    "results": results_table,
    "synthesis": synthesis_table,
    "voice": voice_table,
    "new_voices": new_voices_table,
    "arguments": arguments_table,
    "coverage": coverage_table,
    "speed": speed.speed_table,
    "levers": speed.levers_table,
    "peak": speed.peak_table,
    "first_step": speed.first_step_table,
    "quality": speed.quality_table,
    "synthesize": speed.synthesize_table,
    "train_tts": speed.train_tts_table,
    "vocoders": vocoders_table,
}


def rendered(text):
    """Returns a document with every marked block made anew."""
    return BLOCK.sub(lambda match: match[1] + MAKERS[match[2]](match[3]) + match[4], text)


def documents():
    """Returns the paths of all Markdown files of the project."""
    folders = ("docs", "recipes", "assets", "bench")
    return sorted([ROOT / "README.md", *(path for folder in folders for path in (ROOT / folder).rglob("*.md"))])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    changed = []
    for path in documents():
        text = path.read_text(encoding="utf-8")
        if rendered(text) != text:
            changed.append(path)
            if not check:
                path.write_text(rendered(text), encoding="utf-8")
    for path in changed:
        print(f"{'differs from its records' if check else 'rewritten'}: {path.relative_to(ROOT)}")
    raise SystemExit(bool(check and changed))


if __name__ == "__main__":
    main()
