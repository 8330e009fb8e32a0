"""`hfspeech compare`: what differs between runs, in their settings and on the same test rows."""

from collections import Counter
from types import SimpleNamespace

import numpy as np

from .arguments import NOT_IDENTITY
from .metrics import paired_difference, paired_ratios
from .publish import figure_text
from .publish.figures import aligned, figures
from .publish.tables import SPEECH_MEASURES
from .runs import PREDICTIONS_FILE, find_record, read_json, read_jsonl, read_record
from .text import normalizer

MEASURED_BY_ROW = {name: title for title, name, *_ in SPEECH_MEASURES if name not in ("wer", "cer")}


def compare(places, metric="wer"):
    """Compares runs: their settings, their figures, and each of them with the first on the rows that both have.

    Args:
        places: folders of runs, or records; the first is what the others are held against. A record without
            `predictions.jsonl` beside it has no rows to test.
        metric: `wer` or `cer`: the rate that is tested. Of synthesised speech the other measures are tested, too.

    Returns:
        JSON-able dict: `runs` (a letter for each place), `settings` (name → the value of each run, where they differ), `figures` (title
        → the figure of each run as text), `tests` (for each other run and set of rows: `run`, `against`, `set`,
        `measure`, `rows`, `left_out` and what `hfspeech.metrics.paired_difference` returns; `difference` is that run minus
        the first), and `notes` (sentences: what could not be tested, and why).

    Raises:
        UserError: something is no record, or a file of predictions is damaged.
    """
    files = [find_record(place) for place in places]
    records = [read_record(file) for file in files]
    found = [figures(record) for record in records]
    titles = list(dict.fromkeys(title for of_run in found for title in of_run))
    result = {
        "runs": {chr(ord("A") + number): str(place) for number, place in enumerate(places)},
        "settings": differing([_settings(record) for record in records]),
        "figures": {
            title: [figure_text(*of_run[title]) if title in of_run else "-" for of_run in found] for title in titles
        },
        "tests": [],
        "notes": [],
    }
    predictions = [_read_rows(file.with_name(PREDICTIONS_FILE)) for file in files]
    for place, rows in zip(places, predictions):
        if not rows:
            result["notes"].append(
                f"{place} has no {PREDICTIONS_FILE} with what was said after training: nothing to test."
            )
    for letter, record, file, rows in list(zip(result["runs"], records, files, predictions))[1:]:
        if rows and predictions[0]:
            scored = {"test": record.get("after"), "retention": (record.get("retention") or {}).get("after")}
            cleaners = {split: _normalizer(score, file.parent) for split, score in scored.items()}
            _test(result, letter, rows, predictions[0], cleaners, metric)
    return result


def differing(settings):
    """Returns name → the value in each of several dicts of settings, for those that are not the same in all."""
    names = list(dict.fromkeys(name for of_run in settings for name in of_run))
    values = {name: [of_run.get(name) for of_run in settings] for name in names}
    return {name: of_name for name, of_name in values.items() if any(value != of_name[0] for value in of_name)}


def _settings(record):
    settings = {name: value for name, value in record["arguments"].items() if name not in NOT_IDENTITY}
    return {**settings, "processes": record["environment"]["processes"]}


def _read_rows(path):
    """Returns (set, id, text, which of several such) → row, of the rows that were measured after training."""
    seen, found = Counter(), {}
    for row in read_jsonl(path):
        key = row["set"], row["id"], row["text"]
        if row.get("after") is not None:
            found[*key, seen[key]] = row
            seen[key] += 1
    return found


def _normalizer(score, folder):
    """Returns the normaliser of a score, with the table of spellings that lies beside the run's model."""
    table = folder / "normalizer.json"
    tokenizer = SimpleNamespace(english_spelling_normalizer=read_json(table) if table.exists() else None)
    return normalizer((score or {}).get("normalizer", "basic"), tokenizer=tokenizer)


def _test(result, letter, rows, first, cleaners, metric):
    """Adds to a comparison the tests of a run's rows against those of the first run, set by set."""
    for split in dict.fromkeys(key[0] for key in first):
        own, others = ({key for key in of_run if key[0] == split} for of_run in (rows, first))
        shared = [key for key in first if key in own & others]
        about = {"run": letter, "against": "A", "set": split, "rows": len(shared), "left_out": len(own ^ others)}
        if not shared:
            result["notes"].append(f"A and {letter} have no row of {split} in common: nothing to test.")
            continue
        if about["left_out"]:
            result["notes"].append(
                f"{split}: {about['left_out']} rows that only one of A and {letter} has are left out."
            )
        pairs = [(rows[key], first[key]) for key in shared]
        speakers = [row.get("speaker") for row, _ in pairs]
        texts = ([row["after"] for row in column] for column in zip(*pairs))
        clean = cleaners[split]
        found = paired_difference(*texts, [key[2] for key in shared], speakers, clean, metric=metric)
        result["tests"].append({**about, "measure": metric, "normalizer": clean.__name__, **found})
        for measure in MEASURED_BY_ROW:
            _test_means(result, about, measure, pairs, speakers)


def _test_means(result, about, measure, pairs, speakers):
    """Adds the test of a measure that each row has a number of, on the rows where both runs have it."""
    values = [[row.get(f"after_{measure}") for row in pair] for pair in pairs]
    known = [number for number, pair in enumerate(values) if None not in pair]
    if known:
        counts = np.array([[values[number][0], 1, values[number][1], 1] for number in known], dtype=float)
        found = paired_ratios(counts, [speakers[number] for number in known])
        left_out = about["left_out"] + len(pairs) - len(known)
        result["tests"].append({**about, "rows": len(known), "left_out": left_out, "measure": measure, **found})


def as_text(result):
    """Returns a comparison as tables of text."""
    names = list(result["runs"])
    parts = ["\n".join(f"{name}  {place}" for name, place in result["runs"].items())]
    settings = [(name, *map(_value_text, values)) for name, values in result["settings"].items()]
    parts.append(
        aligned([("setting", *names), *settings]) if settings else "No setting differs that bears on the result."
    )
    if result["figures"]:
        parts.append(aligned([("figure", *names), *((title, *texts) for title, texts in result["figures"].items())]))
    if result["tests"]:
        lines = [("difference on the same rows", "", "95 % interval", "p", "rows", "")]
        for test in result["tests"]:
            is_rate = test["measure"] in ("wer", "cer")
            factor, unit, digits = (100, " points", 2) if is_rate else (1, "", 3)
            difference, low, high = (f"{factor * test[name]:+.{digits}f}" for name in ("difference", "low", "high"))
            what = test["measure"].upper() if is_rate else MEASURED_BY_ROW[test["measure"]]
            runs = f"{test['run']} - {test['against']}, {test['set']}: {what}"
            p_value = f"{test['p_value']:.3f}"
            lines.append((runs, difference + unit, f"{low} to {high}", p_value, str(test["rows"]), test["interval"]))
        parts.append(aligned(lines))
    if len(result["runs"]) > 2 and result["tests"]:
        parts.append("Each p-value is that of one comparison: of many, some are small by chance.")
    return "\n\n".join([*parts, *(["\n".join(result["notes"])] if result["notes"] else [])])


def _value_text(value):
    text = " ".join(map(str, value)) if isinstance(value, list) else "-" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
