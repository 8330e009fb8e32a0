"""The model card: what a run found, as a README.md that the Hub reads too, and a picture of how the model learnt.

Everything in it comes from the run's record, so that no number is typed by hand and nothing is made up.
"""

import dataclasses
import json
from pathlib import Path

from hfspeech import arguments
from hfspeech.models.speecht5 import SPEAKERS_FILE
from hfspeech.publish.facts import Facts, last_name
from hfspeech.publish.tables import MOST_GROUPS, figure_text, percent, rate_text, shown_groups, speech_measures
from hfspeech.runs import RUN_FILE, SAMPLES_FOLDER, commit_of, writing

CARD_FILE = "README.md"
CURVE_FILE = "training_curve.png"
FEW_SPEAKERS = 20  # below which an interval is too narrow, as docs/metrics.md shows


def write_card(folder, record, repo_id=None, is_merged=False, has_checkpoint=False):
    """Writes README.md and the training curve into the folder of a model.

    Args:
        folder: of the model, with its samples and voices, if there are any.
        record: the run's record, as `public_record` returns it.
        repo_id: the repository that the folder is to become, `owner/name`; None for a folder that stays.
        is_merged: the adapter has been merged into the weights.
        has_checkpoint: the last checkpoint lies beside the model.
    """
    folder, facts = Path(folder), Facts(record, repo_id, is_merged)
    with writing(folder):
        draw_curve(record["train"]["log"], record["train"]["best_step"], folder / CURVE_FILE)
        text = model_card(facts, _sounds(folder), (folder / SPEAKERS_FILE).exists(), has_checkpoint)
        (folder / CARD_FILE).write_text(text, encoding="utf-8")


def model_card(facts, sounds=(), has_voices=False, has_checkpoint=False):
    """Returns the text of the card.

    Args:
        facts: `Facts`.
        sounds: paths in the repository of the speech to listen to.
        has_voices: the repository holds speaker embeddings.
        has_checkpoint: and the last checkpoint.
    """
    from huggingface_hub import ModelCard

    sections = {
        "": _what_it_is(facts),
        "Results": _speech_results(facts) if facts.speaks else _transcript_results(facts),
        "What it forgot": _forgetting(facts),
        "Listen": _samples(facts, sounds),
        "Use": _use(facts, has_voices),
        "How it learnt": _curve(facts),
        "Data": _data(facts),
        "Settings": _settings(facts),
        "Hardware, time and energy": _cost(facts),
        "Reproduce": _reproduce(facts, has_checkpoint),
        "Limits": _limits(facts),
    }
    parts = [f"---\n{facts.metadata().to_yaml()}\n---", f"# {facts.name}"]
    for title, text in sections.items():
        parts += [f"## {title}"] * bool(title and text) + [text] * bool(text)
    text = "\n\n".join(parts) + "\n"
    ModelCard(text)  # raises if what was just written cannot be read back
    return text


def _what_it_is(facts):
    how = "by a LoRA adapter" if facts.is_lora else "as a whole"
    does = "speaks text" if facts.speaks else f"writes down {facts.language} speech"
    if facts.settings.get("task") == "translate":
        does = f"writes down {facts.language} speech in English"
    from_what = f"{facts.base_link} fine-tuned {how}" if facts.base else f"A {facts.family}, trained from scratch,"
    holds = ""
    if facts.is_adapter:
        holds = " This repository holds the adapter; the base model is loaded beneath it."
    elif facts.is_lora:
        holds = " The adapter has been merged into the weights, so it loads like any other model."
    trained = facts.splits.get("train", {})
    amount = f"{_length(trained['hours'])} of {facts.language}" if trained.get("hours") else facts.language
    return f"{from_what} on {amount} speech ({facts.dataset_names}); it {does}.{holds}"


# Results


def _transcript_results(facts):
    before, after = facts.record.get("before") or {}, facts.record["after"]
    lines = [("test", before, after)]
    if after.get("unpadded"):
        lines += [("unpadded, as `hfspeech transcribe` does it", {}, after["unpadded"])]
    lines += _group_lines(before, after)
    if facts.retention:
        lines += [("old condition", facts.retention.get("before") or {}, facts.retention["after"])]
        if facts.retention["after"].get("unpadded"):
            lines += [("old condition, unpadded", {}, facts.retention["after"]["unpadded"])]
    table = [
        "| rows of | rows | words | WER before | WER after | CER before | CER after |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, one, other in lines:
        rates = [rate_text(score, name) for name in ("wer", "cer") for score in (one, other)]
        rates[1] = f"**{rates[1]}**"
        table += [f"| {title} | {other['rows']} | {other['words']} | {' | '.join(rates)} |"]
    raw = f"{percent(after['raw_wer'])} of the words and {percent(after['raw_cer'])} of the characters"
    if before:
        raw += f" (before: {percent(before['raw_wer'])} and {percent(before['raw_cer'])})"
    return "\n".join(
        [
            *table,
            "",
            f"In brackets the 95 % interval; that of all test rows is by {after['interval']}, the others alike. "
            f"Both sides were normalised by `{after['normalizer']}` before counting. As written, where case and punctuation count, {raw} are wrong.",
            "",
            f"Of the {after['words']} words of the test rows {after['substitutions']} were taken for another, "
            f"{after['deletions']} left out, and {after['insertions']} added that nobody said.",
            *_left_groups(after),
        ]
    )


def _speech_results(facts):
    before, after = facts.record.get("before") or {}, facts.record["after"]
    ceiling = after["ceiling"]
    table = ["| test rows | before | after | recordings, vocoded |", "|---|---|---|---|"]
    for title, name, *form in speech_measures(after):
        cells = [figure_text(score, name, *form) for score in (before, after, ceiling["vocoded"])]
        table += [f"| {title} | {cells[0]} | **{cells[1]}** | {cells[2]} |"]
    for title, name in (("stops where it should", "ok"), ("never stops", "never")):
        cells = [percent(score["stop"][name]) if score else "-" for score in (before, after)]
        table += [f"| {title} | {cells[0]} | **{cells[1]}** | |"]
    for title, one, other in _group_lines(before, after):
        table += [f"| words misheard, {title} | {rate_text(one)} | **{rate_text(other)}** | |"]
    return "\n".join(
        [
            *table,
            "",
            f"In brackets the 95 % interval; that of all test rows is by {after['interval']}, the others alike. "
            f"`{facts.settings['asr_model_name_or_path']}` listens, and "
            f"its text is normalised by `{after['normalizer']}`; as written, {percent(after['raw_wer'])} of the words and "
            f"{percent(after['raw_cer'])} of the characters are other than they should be.",
            "",
            f"That is to be read beside what it hears of the true recordings: {percent(ceiling['recordings']['wer'])} of "
            f"their words are misheard, and {percent(ceiling['vocoded']['wer'])} where their spectrograms go through the "
            f"vocoder `{facts.settings['vocoder']}`, as those of a perfect model would. Of the {after['words']} words of "
            f"{after['rows']} rows it repeated {after['repeated_words']} and left out {after['skipped_words']}.",
            *_opinion(facts.settings, ceiling),
            *_left_groups(after),
        ]
    )


def _opinion(settings, ceiling):
    if "mos" not in ceiling["recordings"]:
        return []
    true, vocoded = (figure_text(ceiling[name], "mos", "", 1, 2) for name in ("recordings", "vocoded"))
    return [
        "",
        f"The mean opinion scores, from 1 to 5, are guesses of the model `{settings['mos_model']}` and not people's. It gives "
        f"the true recordings {true}, and vocoded {vocoded}.",
    ]


def _group_lines(before, after):
    """Returns (title, score before, score after) for each value of each column, of many the worst."""
    lines = []
    for column, values in after.get("groups", {}).items():
        earlier = (before.get("groups") or {}).get(column) or {}
        lines += [(_cell(f"{column}: {value}"), earlier.get(value) or {}, of) for value, of in shown_groups(values)]
    return lines


def _left_groups(after):
    many = [
        f"the {MOST_GROUPS} worst of {len(v)} values of {c}"
        for c, v in after["groups"].items()
        if len(v) > MOST_GROUPS
    ]
    return ["", f"The table shows {' and '.join(many)}; `{RUN_FILE}` has them all."] if many else []


def _forgetting(facts):
    if not facts.retention:
        return (
            "Not measured: no data of the old condition was given (`--retention_dataset_name`), so nothing is known of "
            "what the model could do before and cannot any more."
        )
    before, after = facts.retention.get("before"), facts.retention["after"]
    rows = f"{after['rows']} rows of `{last_name(facts.settings['retention_dataset_name'])}`, the old condition,"
    came = f"after {rate_text(before)} before" if before else "and was not measured before"
    replay = facts.settings["retention_share"]
    played = f" {percent(replay)} of the training rows came from there." if replay else ""
    rate = "the share of words misheard" if facts.speaks else "the word error rate"
    return f"On {rows} {rate} is {rate_text(after)} after training, {came}.{played}"


def _samples(facts, sounds):
    if not sounds:
        return ""
    players = {}
    for sound in sounds:
        number, when = Path(sound).stem.split("_")
        players.setdefault(number, {})[when] = f'<audio controls src="{facts.url(sound)}"></audio>'
    lines = ["| test row | before | after |", "|---|---|---|"]
    lines += [f"| {number} | {of.get('before', '-')} | {of.get('after', '-')} |" for number, of in players.items()]
    lines += ["", "The first of them as a spectrogram, above what of the text the model attended to meanwhile:"]
    for when in players["0"]:
        lines += ["", f"![Test row 0, {when} training]({SAMPLES_FOLDER}/0_{when}.png)"]
    return "\n".join(lines)


# Use


def _use(facts, has_voices):
    code = _speech_code(facts, has_voices) if facts.speaks else _transcript_code(facts)
    if facts.speaks:
        command = f'hfspeech synthesize {facts.where} --text "Good morning." --output good_morning.wav'
        note = "which also spells out numbers and abbreviations, and takes texts of any length"
    else:
        command = f"hfspeech transcribe {facts.where} recording.wav"
        note = "which also takes recordings of any length, and writes subtitles"
    return f"With stock code:\n\n```python\n{code}\n```\n\nOr with hfspeech, {note}:\n\n```bash\n{command}\n```"


def _transcript_code(facts):
    if not facts.is_adapter:
        return f"""import soundfile
from transformers import pipeline

recognise = pipeline("automatic-speech-recognition", model="{facts.where}")
waveform, sampling_rate = soundfile.read("recording.wav", dtype="float32")
recording = {{"raw": waveform, "sampling_rate": sampling_rate}}
print(recognise(recording, generate_kwargs={{"num_beams": 1}})["text"])  # greedily, as it was measured"""
    return f"""import soundfile
from peft import PeftModel
from transformers import GenerationConfig, WhisperForConditionalGeneration, WhisperProcessor

base = WhisperForConditionalGeneration.from_pretrained({facts.base_call})
base.generation_config = GenerationConfig.from_pretrained("{facts.where}")  # language and task
model = PeftModel.from_pretrained(base, "{facts.where}")
processor = WhisperProcessor.from_pretrained("{facts.where}")

waveform, _ = soundfile.read("recording.wav", dtype="float32")  # 16 kHz, mono
features = processor(waveform, sampling_rate=16000, return_tensors="pt").input_features
print(processor.batch_decode(model.generate(input_features=features), skip_special_tokens=True)[0])"""


def _speech_code(facts, has_voices):
    base = facts.base_call if facts.is_adapter else f'"{facts.where}"'
    model = f"SpeechT5ForTextToSpeech.from_pretrained({base})"
    imports = ["from transformers import SpeechT5ForTextToSpeech, SpeechT5HifiGan, SpeechT5Processor"]
    if facts.is_adapter:
        model = f'PeftModel.from_pretrained({model}, "{facts.where}").merge_and_unload()'
        imports += ["from peft import PeftModel"]
    if has_voices:
        file = f'"{facts.where}/{SPEAKERS_FILE}"'
        if facts.repo_id:
            file = f'hf_hub_download("{facts.where}", "{SPEAKERS_FILE}")'
            imports += ["from huggingface_hub import hf_hub_download"]
        voice = f"next(iter(load_file({file}).values()))"
        imports += ["from safetensors.torch import load_file"]
    else:
        voice = 'torch.from_numpy(numpy.load("voice.npy"))  # 512 numbers'
        imports += ["import numpy", "import torch"]
    imports = "\n".join(sorted([*imports, "import soundfile"], key=lambda line: (line.startswith("from"), line)))
    return f"""{imports}

model = {model}
processor = SpeechT5Processor.from_pretrained("{facts.where}")
vocoder = SpeechT5HifiGan.from_pretrained("microsoft/speecht5_hifigan")
voice = {voice}

input_ids = processor(text="good morning", return_tensors="pt").input_ids
waveform = model.generate_speech(input_ids, voice[None], vocoder=vocoder)
soundfile.write("good_morning.wav", waveform.numpy(), 16000)"""


# How it was made


def _curve(facts):
    train = facts.record["train"]
    kept = "The last step was kept."
    if facts.settings["load_best_model_at_end"]:
        kept = f"Step {train['best_step']} was kept, the best by validation {facts.settings['metric_for_best_model'].upper()}."
    return (
        f"![Training loss and validation error rates over {train['steps']} steps]({CURVE_FILE})\n\n"
        f"{train['steps']} steps on {_length(train['audio_seconds'] / 3600)} of audio. {kept}"
    )


def _data(facts):
    lines = ["| split | rows | hours | speakers | left out |", "|---|---|---|---|---|"]
    for name, entry in facts.splits.items():
        name = "old condition" if name == "retention" else name
        left_out = "; ".join(f"{of['count']} {_cell(reason)}" for reason, of in entry["dropped"].items()) or "none"
        cells = (name, _known(entry["rows"]), _known(entry.get("hours")), _known(entry.get("speakers")), left_out)
        lines += [f"| {' | '.join(map(str, cells))} |"]
    lines += [""]
    for dataset in facts.datasets:
        parts = [f"configuration `{dataset['config']}`"] if dataset.get("config") else []
        parts += [f"commit `{dataset['commit']}`"] if dataset.get("commit") else []
        parts += [f"license {dataset.get('license') or 'not stated'}"]
        link = f"[{dataset['name']}](https://huggingface.co/datasets/{dataset['name']})"
        name = link if "commit" in dataset else f"`{last_name(dataset['name'])}`, a dataset that is not on the Hub"
        lines += [f"- {name}: {', '.join(parts)}."]
    rows = facts.record["rows"]
    lines += [f"- {_cell(note)}" for note in rows["account"].get("notes", [])]
    lines += [
        f"- {entry['count']} recordings could not be read ({stage.replace('_', ', ')}) and were left out."
        for stage, entry in rows.get("bad_audio", {}).items()
    ]
    lines += ["", "The rows themselves, and what the model said to each, are not in this repository."]
    return "\n".join(lines)


def _settings(facts):
    lines = ["Those that differ from their defaults:", "", "| setting | value | set by |", "|---|---|---|"]
    for name, (value, source) in changed_settings(facts.record).items():
        value = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines += [f"| `{name}` | {_cell(value)} | {_cell(source)} |"]
    batch = facts.settings["per_device_train_batch_size"]
    rows = batch * facts.settings["gradient_accumulation_steps"] * facts.record["environment"]["processes"]
    if not facts.settings.get("max_batch_seconds"):
        lines += ["", f"One optimizer step is {rows} rows."]
    return "\n".join(lines)


def changed_settings(record):
    """Returns name → (value, what set it) for the settings that differ from their defaults and bear on the result."""
    settings, sources = record["arguments"], record.get("sources")
    if sources:
        changed = {name: (settings[name], of) for name, of in sources.items() if of not in ("default", "hardware")}
    else:  # a record from before it was kept
        family = "SpeechT5" if "vocoder" in settings else "Whisper"
        names = ("DataArguments", f"{family}Arguments", f"{family}TrainingArguments", "LoraArguments")
        default = {}
        for f in [f for name in names for f in dataclasses.fields(getattr(arguments, name))]:
            default[f.name] = f.default_factory() if f.default is dataclasses.MISSING else f.default
        derived = {"bf16", "fp16", "accelerator_config", "do_eval"}
        changed = {
            name: (value, "file or command line")
            for name, value in settings.items()
            if name in default and (default[name] or None) != (value or None) and name not in derived
        }
    return {name: of for name, of in changed.items() if name not in arguments.NOT_IDENTITY}


def _cost(facts):
    made, train = facts.record["environment"], facts.record["train"]
    hardware = made["hardware"]
    memory = f", {hardware['memory_bytes'] / 2**30:.0f} GB of memory" if hardware.get("memory_bytes") else ""
    gpus = f"{made['processes']} × {facts.gpu}" if facts.gpu else "none"
    lines = [f"- Hardware: {hardware['cores']} cores of {hardware['cpu']}{memory}; GPUs: {gpus}."]
    lines += [f"- Processes: {made['processes']}. {'; '.join(facts.record.get('choices', []))}."]
    lines += [
        f"- Training: {_seconds(train['seconds'])} without evaluations, {train['audio_seconds_per_second']:.0f} times "
        f"faster than the audio lasts, {train['peak_rss_bytes'] / 2**30:.1f} GB of main memory at most."
    ]
    timings = facts.record.get("timings") or {}
    if timings:
        lines += [f"- Stages: {', '.join(f'{stage} {_seconds(timings[stage])}' for stage in sorted(timings, key='total'.__eq__))}."]
    kwh, assumption = facts.energy()
    estimate = f"{kwh:.2g} kWh" if kwh >= 0.1 else f"{1000 * kwh:.2g} Wh"
    lines += [
        f"- Energy, an estimate and not a measurement: {estimate}. It is the {_seconds(train['seconds'])} of "
        f"training times {assumption}, as if all of that were drawn all the time; evaluations, memory and cooling are left "
        "out."
    ]
    return "\n".join(lines)


def _reproduce(facts, has_checkpoint):
    made = facts.record["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items() if version)
    commit, is_dirty = commit_of(made)
    changed = " with changes that are in no commit" if is_dirty else ""
    lines = [f"```bash\nhfspeech reproduce {facts.where}\n```", "", "It was made by", ""]
    lines += [f"```bash\n{made['command']}\n```", ""]
    lines += [
        f"on {made['date'][:10]}, commit `{commit or 'not known'}` of hfspeech{changed}, seed {facts.settings['seed']}."
    ]
    lines += [f"Versions: {versions}."]
    marks = {f"rows of {name}": entry.get("fingerprint") for name, entry in facts.splits.items()}
    marks = {
        name: mark for name, mark in {"base model": facts.record["model"].get("fingerprint"), **marks}.items() if mark
    }
    if marks:
        lines += [f"Fingerprints: {', '.join(f'{name} `{mark}`' for name, mark in marks.items())}."]
    lines += [f"Every figure, and every setting, is in [{RUN_FILE}]({RUN_FILE})."]
    if has_checkpoint:
        lines += [
            "",
            "`last-checkpoint/` is there to train on: its optimizer, scheduler and random state are pickled files, which run "
            "code when they are loaded, so load them only if you trust whoever made this repository. The model itself is "
            "in safetensors, which cannot.",
        ]
    return "\n".join(lines)


def _limits(facts):
    after, train, settings = facts.record["after"], facts.splits.get("train", {}), facts.settings
    limits = []
    if train.get("hours"):
        whose = f" of {train['speakers']} {_plural('speaker', train['speakers'])}" if train.get("speakers") else ""
        how = "fine-tuned" if facts.base else "trained"
        limits += [f"It was {how} on no more than {_length(train['hours'])}{whose}."]
    if "speakers" not in after["interval"]:
        limits += [
            f"It was measured on {after['rows']} rows with {after['words']} words; the interval speaks for the people in "
            "them, and not for others."
        ]
    elif int(after["interval"].split()[-2]) < FEW_SPEAKERS:
        limits += [f"The interval ({after['interval']}) rests on few speakers, and is rather too narrow."]
    for column, values in after["groups"].items():
        known = {value: of for value, of in values.items() if of["wer"] is not None}
        if len(known) > 1:
            worst, best = (pick(known, key=lambda value: known[value]["wer"]) for pick in (max, min))
            limits += [
                f"By {column}, it is worst on {worst} ({rate_text(known[worst])}) and best on {best} "
                f"({rate_text(known[best])})."
            ]
    window_s = facts.record["model"].get("window_s")
    if window_s and not facts.speaks:
        limits += [
            f"It hears {window_s:g} s at a time; stock code cuts longer recordings there unless told otherwise, "
            "`hfspeech transcribe` in pauses."
        ]
    if not facts.retention:
        limits += ["What it has forgotten was not measured."]
    if after.get("unfinished"):
        cause = "speech came to no end" if facts.speaks else "the text was cut off, as it grew too long for its sound"
        limits += [f"In {after['unfinished']} of {after['rows']} test rows {cause}."]
    if settings.get("encoder_window") == "auto":
        limits += [
            "It was trained on recordings padded no further than they need; stock tools pad to the full window."
        ]
    if settings.get("load_in_8bit") or settings.get("load_in_4bit"):
        bits = 8 if settings.get("load_in_8bit") else 4
        limits += [
            f"The adapter was trained and measured on a base held in {bits} bits; on the whole base it may differ."
        ]
    unknown = facts.record["rows"]["account"].get("unknown_characters")
    if unknown:
        limits += [f"It cannot read {' '.join(f'`{character}`' for character in unknown)}: its tokenizer lacks them."]
    return "\n".join(f"- {limit}" for limit in limits)


# Words


def _length(hours):
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def _seconds(seconds):
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds:.0f} s"


def _plural(noun, count):
    return noun if count == 1 else f"{noun}s"


def _known(value):
    return "not known" if value is None else value


def _cell(text):
    """Returns a text that stays within its cell of a table."""
    return " ".join(str(text).replace("|", "\\|").replace("<", "&lt;").split())


def _sounds(folder):
    """Returns what the model said of the first test rows, before and after, as paths in the repository."""
    numbers = sorted({path.stem.split("_")[0] for path in (folder / SAMPLES_FOLDER).glob("*_*.wav")})
    found = [f"{SAMPLES_FOLDER}/{number}_{when}.wav" for number in numbers for when in ("before", "after")]
    return [path for path in found if (folder / path).exists()]


def draw_curve(log, best_step, path):
    """Draws the losses above the error rates of the validation rows, over the steps of a run, as a PNG.

    Args:
        log: list of dicts as `Trainer` keeps them: `step`, and `loss` or `eval_loss`, `eval_wer` and `eval_cer`.
        best_step: step whose checkpoint was kept.
        path: of the picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    lines = (
        (upper, "loss", "training", "#9aa5b1", 1),
        (upper, "eval_loss", "validation", "#1f5fa8", 1),
        (lower, "eval_wer", "word error rate", "#1f5fa8", 100),
        (lower, "eval_cer", "character error rate", "#d1702c", 100),
    )
    for axes, name, label, colour, factor in lines:
        points = [(entry["step"], factor * entry[name]) for entry in log if name in entry]
        if points:
            marker = None if name == "loss" else "o"
            axes.plot(*zip(*points), color=colour, label=label, marker=marker, markersize=4)
    for axes, label in ((upper, "loss"), (lower, "validation errors, %")):
        axes.axvline(best_step, color="#bbbbbb", linestyle=":", zorder=0, label="kept" if axes is upper else None)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    lower.set_xlabel("optimizer step")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=110)
