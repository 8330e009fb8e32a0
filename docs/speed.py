"""Tables and the plot of docs/performance.md, made from the records under bench/results.

python docs/speed.py    # draws docs/performance.svg anew
"""

import hashlib
import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results"
PLOT = ROOT / "docs/performance.svg"
PLOTTED = ("train.json", "first_step.json")
RIVALS = {"B1": "as documented", "B2": "tuned"}

# What is measured: title, record, case in it, arm of ours, figure, unit, its scale, and whether more of it is better.
WORK = [
    ("training, utterances of 5 s", "train.json", "5 s", "ours", "audio_s_per_s", "s of audio a second", 1, True),
    ("training, utterances of 12 s", "train.json", "12 s", "ours", "audio_s_per_s", "s of audio a second", 1, True),
    (
        "LoRA, frozen encoder, its outputs kept, 5 s",
        "train.json",
        "5 s",
        "ours_lora",
        "audio_s_per_s",
        "s of audio a second",
        1,
        True,
    ),
    ("evaluation, 5 s", "evaluate.json", None, "ours", "rows_per_s", "rows a second", 1, True),
    ("launch to first step, 2,000 rows", "first_step.json", None, "ours 2000", "first_step_s", "s", 1, False),
    ("disk written by then", "first_step.json", None, "ours 2000", "disk_bytes", "MB", 1e-6, False),
    ("peak memory, training, 5 s, 16 rows", "train.json", "5 s", "ours", "peak_rss_bytes", "MB", 1e-6, False),
    ("launch to the same WER, nano, window of 30 s", "time_to_wer.json", None, "ours", "seconds_to_wer", "s", 1, False),
]


def read(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def origin(name):
    """Returns the sentence that says where a record comes from."""
    made = read(name)["environment"]
    hardware = made["hardware"]
    device = ", ".join(hardware["gpus"]) or f"{hardware['cores']} cores of {hardware['cpu']}"
    versions = f"torch {made['versions']['torch']}, transformers {made['versions']['transformers']}"
    return f"`bench/results/{name}`: {made['date'][:10]}, `{made['command']}`, commit {made['commit'][:12]}, {device}, {versions}."


def number(value):
    """Returns a number with three figures, and no more decimals than two."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 0.1 else f"{value:.2f}"


def speed_table(_):
    """Returns a Markdown table of our speed beside the published way's, with ratios."""
    lines = ["| work | ours | as documented | tuned | against documented | against tuned |", "|---" * 6 + "|"]
    for title, name, case, arm, figure, unit, scale, more_is_better in WORK:
        summary = read(name)["summary"]
        summary = summary[case] if case else summary
        cells = [f"{number(summary[arm]['median'][figure] * scale)} {unit}"]
        ratios = []
        for rival in RIVALS:
            found = next((key for key in summary if key.split()[0] == rival), None)
            value = summary[found]["median"][figure] if found else None
            cells.append(number(None if value is None else value * scale))
            ratio = (summary[arm]["ratio"].get(found) or {}).get(figure) if found else None
            ratios.append(f"**{times(better(ratio['median'], more_is_better))}**" if ratio else "–")
        lines.append(f"| {title} | {' | '.join([*cells, *ratios])} |")
    return "\n".join([*lines, "", *origins(dict.fromkeys(name for _, name, *_ in WORK))]) + "\n"


def times(ratio):
    return "over 1,000×" if ratio > 1000 else f"{number(ratio)}×"


def better(ratio, more_is_better):
    return ratio if more_is_better else 1 / ratio


def origins(names):
    return [line for name in names for line in (f"- {origin(name)}",)]


def levers_table(name):
    """Returns a Markdown table of what is left of our speed when one lever is taken away."""
    record = read(name)
    lines = ["| without | s of audio a second | of all levers' | peak memory |", "|---|---|---|---|"]
    for summary in record["summary"].values():
        for arm, entry in summary.items():
            base = "ours_lora" if arm.startswith("ours_lora") else "ours"
            ratio = (entry["ratio"].get(base) or {}).get("audio_s_per_s")
            title = (
                arm.removeprefix(f"{base} without ").replace("_", " ") if ratio else f"– ({base.replace('_', ' ')})"
            )
            share = f"{100 * ratio['median']:.0f} %" if ratio else "100 %"
            median = entry["median"]
            memory = f"{number(median['peak_rss_bytes'] / 1e6)} MB"
            lines.append(f"| {title} | {number(median['audio_s_per_s'])} | {share} | {memory} |")
    return "\n".join([*lines, "", origin(name)]) + "\n"


def peak_table(name):
    """Returns a Markdown table of the share of the machine's matrix-multiply peak that a training step uses."""
    record = read(name)
    lines = ["| arithmetic | peak, GFLOP/s | useful | with the padding |", "|---|---|---|---|"]
    for case, found in record["measurements"].items():
        for arm, runs in found.items():
            peak = sorted(run["matmul_peak_flops"] for run in runs)[len(runs) // 2]
            median = record["summary"][case][arm]["median"]
            shares = [f"{100 * median[figure]:.0f} %" for figure in ("share_of_peak", "share_of_peak_with_padding")]
            lines.append(f"| {arm.removeprefix('ours_')}, {case} | {peak / 1e9:,.0f} | {' | '.join(shares)} |")
    return "\n".join([*lines, "", origin(name)]) + "\n"


def first_step_table(name):
    """Returns a Markdown table of the seconds from the launch to the first optimizer step."""
    record = read(name)
    lines = ["| arm and rows | first step | of it until its batch is there | disk by then |", "|---|---|---|---|"]
    for arm, entry in record["summary"].items():
        median = entry["median"]
        found = [median[figure] for figure in ("first_step_s", "ready_s")]
        seconds = [number(value) + " s" * (value is not None) for value in found]
        lines.append(f"| {arm} | {' | '.join(seconds)} | {number(median['disk_bytes'] / 1e6)} MB |")
    return "\n".join([*lines, "", origin(name)]) + "\n"


def synthesize_table(name):
    """Returns a Markdown table of how fast a SpeechT5 speaks, beside stock generation."""
    cases = {"batch_1": "1 text", "batch_8": "8 texts", "batch_1_vocoder": "1 text, with HiFi-GAN",
             "batch_8_vocoder": "8 texts, with HiFi-GAN"}  # fmt: skip
    lines = ["| at once | ours | ours in fp32 | stock | against stock | fp32 against stock |", "|---" * 6 + "|"]
    for case, arms in read(name)["summary"].items():
        speeds = [number(arms[arm]["median"]["times_real_time"]) for arm in ("ours", "ours_fp32", "stock")]
        ratios = [arms[arm]["ratio"]["stock"]["frames_per_s"]["median"] for arm in ("ours", "ours_fp32")]
        ratios = [f"**{times(ratios[0])}**", times(ratios[1])]
        lines.append(f"| {cases[case]} | {speeds[0]} times real time | {' | '.join([*speeds[1:], *ratios])} |")
    return "\n".join([*lines, "", *origins([name])]) + "\n"


def train_tts_table(name):
    """Returns a Markdown table of SpeechT5 training beside the published course's way."""
    summary = read(name)["summary"]
    lines = ["| arm | s of audio a second | against B1 | padding | peak memory | disk |", "|---" * 6 + "|"]
    for arm, entry in summary.items():
        median, ratio = entry["median"], (entry["ratio"].get("B1") or {}).get("audio_s_per_s")
        lines.append(
            f"| {arm.replace('_', ' ')} | {number(median['audio_s_per_s'])} | {'**' + times(ratio['median']) + '**' if ratio else '–'} "
            f"| {100 * median['padding']:.0f} % | {number(median['peak_rss_bytes'] / 1e6)} MB "
            f"| {number(median['disk_bytes'] / 1e6)} MB |"
        )
    return "\n".join([*lines, "", *origins([name])]) + "\n"


def quality_table(names):
    """Returns a Markdown table of the error rates of models tuned unpadded, beside those tuned on full windows."""
    kinds = {"short": "rows", "long": "long, cut in pauses", "pipeline": "long, stock pipeline"}
    heads = [f"{title} | difference, 95 % under" for title in kinds.values()]
    lines = [f"| data | full_window_share | {' | '.join(heads)} | rows, decoded unpadded |", "|---" * 9 + "|"]
    datasets = [pair for name in names.split() for pair in read(name)["datasets"].items()]
    for data, entry in datasets:
        before = " | ".join(f"{100 * entry['before'][kind]:.1f} | " for kind in kinds)
        lines.append(f"| {data}, {entry['rows']} rows | before | {before} | |")
        for arm, found in entry["arms"].items():
            cells = []
            for kind in kinds:
                wer, gap = found["wer"][kind], found.get("against_padded", {}).get(kind)
                cells.append(f"{100 * sum(wer) / len(wer):.1f}")
                cells.append(f"{100 * gap['difference']:+.2f}, {100 * gap['high']:+.2f}" if gap else "")
            unpadded = found["unpadded_wer"]
            cells.append("" if None in unpadded else f"{100 * sum(unpadded) / len(unpadded):.1f}")
            lines.append(f"| {data} | {arm} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *origins(names.split())]) + "\n"


def digest():
    """Returns a hash of the records that the plot is drawn from; the plot carries it."""
    return hashlib.sha256(b"".join((RESULTS / name).read_bytes() for name in PLOTTED)).hexdigest()


def draw():
    """Draws cost against utterance length and against corpus size, for us and the published way."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "hfspeech"
    from matplotlib import pyplot

    titles = {"ours": "hfspeech", "B1": "published way, as documented", "B2": "published way, tuned"}
    colors = {"ours": "#1a7f4b", "B1": "#b03a2e", "B2": "#d68910"}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    lengths = read("train.json")["summary"]
    for arm, title in titles.items():
        points = [(float(case.split()[0]), found[arm]["median"]) for case, found in lengths.items() if arm in found]
        points = [(seconds, seconds / median["audio_s_per_s"]) for seconds, median in points]
        left.plot(*zip(*points), "o-", color=colors[arm], label=title)
    left.set(
        xlabel="utterance, s", ylabel="training, s for each utterance", yscale="log", title="Cost of an utterance"
    )
    for arm, title in {**titles, "ours, streaming": "hfspeech, streaming"}.items():
        summary = read("first_step.json")["summary"]
        found = {key: entry for key, entry in summary.items() if key.rsplit(" ", 1)[0] == arm}
        points = [(int(key.split()[-1]), entry["median"]["first_step_s"]) for key, entry in found.items()]
        if points:
            style = "o--" if "streaming" in arm else "o-"
            right.plot(*zip(*sorted(points)), style, color=colors[arm.split(",")[0]], label=title)
    right.set(xlabel="utterances in the corpus", xscale="log", yscale="log", ylabel="s", title="Launch to first step")
    left.set_ylim(0.05, 5)
    right.set_ylim(3, 150)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    right.xaxis.set_major_formatter("{x:,.0f}")
    right.xaxis.set_minor_formatter("")
    figure.savefig(PLOT, metadata={"Date": None, "Description": digest()})


if __name__ == "__main__":
    draw()
