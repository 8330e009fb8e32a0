"""The figures of a record that two runs are compared by."""

from hfspeech.publish.tables import SPEECH_MEASURES

RATES = (("WER", "wer", " %", 100, 1), ("CER", "cer", " %", 100, 1))


def figures(record):
    """Returns the figures of a record, as a dict of their title to (score, name, unit, factor, digits).

    `score` holds the value as `score[name]`, with its interval; the rest is what `figure_text` takes. They are: what the
    test rows gave before training and after it, the rate of each group, and that of the old condition. A record
    without results has none.
    """
    found = {}
    before, after = record.get("before") or {}, record.get("after") or {}
    measures = SPEECH_MEASURES if "mcd" in after or "mcd" in before else RATES
    for when, score in (("before training", before), ("test", after)):
        for title, *form in measures:
            if score.get(form[0]) is not None:
                found[f"{when}: {title}"] = (score, *form)
    title, *rate = measures[0]
    for column, values in after.get("groups", {}).items():
        found |= {f"{column} {value}: {title}": (score, *rate) for value, score in values.items()}
    old = (record.get("retention") or {}).get("after")
    if old:
        found |= {f"old condition: {title}": (old, *form) for title, *form in RATES}
    return {title: figure for title, figure in found.items() if figure[0].get(figure[1]) is not None}


def main_figure(record):
    """Returns the title of the figure that a record stands for: what chose the checkpoint, of the test rows."""
    name = record["arguments"].get("metric_for_best_model")
    of_test = {form[1]: title for title, form in figures(record).items() if title.startswith("test: ")}
    return of_test.get(name) or next(iter(of_test.values()), None)


def aligned(lines):
    """Returns lines of cells as text, each column as wide as its widest cell."""
    width = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, width)).rstrip() for line in lines)
