"""What the benches share: launching an arm under the clock, running the arms in turn, and writing down what came out."""

import datetime
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

# Threads that spin while they wait take the core from those that work; the same for every arm.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import yaml

from hfspeech.runs import environment, read_json, write_json

BENCH = Path(__file__).resolve().parent
# What the rival does not do, either: a step of 16 rows as they are, no checkpoint and no evaluation on the way.
SAME_WORK = {
    "language": "english",
    "per_device_train_batch_size": 16,
    "encoder_window": "auto",
    "learning_rate": 1e-5,
    "warmup_steps": 0,
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "report_to": "none",
    "max_eval_samples": 1,  # rows that a recipe cannot do without
    "max_test_samples": 1,
    "generation_max_length": 8,
}


def ours(folder, model, data, recipe="whisper_full", off=None, **settings):
    """Runs a recipe under the clock and returns its timing; `off` names an entry of `levers.PATCHES`.

    `settings` win over `SAME_WORK`, and None takes a setting away; what neither says has the recipe's own default.
    """
    arguments = SAME_WORK | {"model_name_or_path": str(model), "dataset_name": str(data)} | settings
    arguments = {name: value for name, value in arguments.items() if value is not None}
    arguments["output_dir"] = str(folder / "written" / "output")
    folder.mkdir(parents=True)
    (folder / "arguments.yaml").write_text(yaml.safe_dump(arguments))
    script = BENCH.parent / "recipes" / recipe / "run.py"
    return launch(folder, script, [str(folder / "arguments.yaml")], {"HFSPEECH_BENCH_OFF": off or ""})


def rival(arm, folder, model, data, *flags, script="whisper_hf.py", **settings):
    """Runs the published way under the clock and returns its timing; `flags` have no value, `settings` have one.

    A setting of None is left to the script, one of `rivals`.
    """
    settings = {
        "arm": arm,
        "model_name_or_path": model,
        "dataset_dir": data,
        "output_dir": folder / "written" / "output",
        "per_device_train_batch_size": SAME_WORK["per_device_train_batch_size"],
        "learning_rate": SAME_WORK["learning_rate"],
        "warmup_steps": SAME_WORK["warmup_steps"],
    } | settings
    argv = [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]
    folder.mkdir(parents=True)
    return launch(folder, BENCH / "rivals" / script, argv + [f"--{flag}" for flag in flags])


def launch(folder, script, argv, variables=()):
    """Runs a script under `timed.py`, all that it writes in `folder/written`, and returns what the clock noted."""
    written, log = folder / "written", folder / "log.txt"
    for name in ("home", "temporary"):
        (written / name).mkdir(parents=True)
    child = os.environ | {
        "HF_HOME": str(written / "home"),
        "HF_DATASETS_CACHE": str(written / "home" / "datasets"),
        "XDG_CACHE_HOME": str(written / "home"),
        "TMPDIR": str(written / "temporary"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HFSPEECH_BENCH_WRITTEN": str(written),
        **dict(variables),
    }
    with log.open("w") as out:
        child["HFSPEECH_BENCH_STARTED"] = str(time.time())
        command = [sys.executable, str(BENCH / "timed.py"), str(folder / "timing.json"), str(script), *argv]
        code = subprocess.run(command, env=child, stdout=out, stderr=subprocess.STDOUT).returncode
    if code or not (folder / "timing.json").exists():
        raise SystemExit(f"{script} failed (exit status {code}); the end of {log}:\n{log.read_text()[-3000:]}")
    return read_json(folder / "timing.json")


def alternate(arms, rounds, work_dir):
    """Runs every arm once, then every arm once more, and so on.

    Args:
        arms: dict, name → callable that takes an empty place for its files and the number of the round, which is its seed,
            and returns a dict.
        rounds: how often.
        work_dir: folder for the files, which are deleted after each run.

    Returns:
        name → list of what its runs returned.
    """
    found = {name: [] for name in arms}
    for number in range(rounds):
        for name, run in arms.items():
            folder = work_dir / f"run_{os.getpid()}"
            began = time.time()
            found[name].append(run(folder, number))
            shutil.rmtree(folder, ignore_errors=True)
            print(
                f"{datetime.datetime.now():%H:%M:%S}  round {number + 1}  {name}  {time.time() - began:.0f} s",
                flush=True,
            )
    return found


def median_of(runs, figure):
    """Returns the median of one figure over the runs of an arm; None if it has none."""
    values = [run[figure] for run in runs if run.get(figure) is not None]
    return statistics.median(values) if values else None


def ratios(runs, against, figure):
    """Returns the figure of each run divided by that of the same round of another arm: median, least and most."""
    pairs = zip((run.get(figure) for run in runs), (run.get(figure) for run in against))
    values = [ours / theirs for ours, theirs in pairs if ours is not None and theirs]
    return {"median": statistics.median(values), "least": min(values), "most": max(values)} if values else None


def summarise(found, figures, references):
    """Returns name → the median of each figure, and its ratios to each of the reference arms."""
    return {
        name: {
            "median": {figure: median_of(runs, figure) for figure in figures},
            "ratio": {
                reference: {figure: ratios(runs, found[reference], figure) for figure in figures}
                for reference in references
                if reference in found and reference != name
            },
        }
        for name, runs in found.items()
    }


def print_table(title, summary, columns, references):
    """Prints one line for each arm: the medians, and the ratios to the reference arms (median over the rounds).

    columns: list of (figure, heading, format, scale, whether its ratio is shown).
    """
    lines = [["", *(heading for _, heading, *_ in columns)]]
    for reference in references:
        lines[0] += [f"{heading} / {reference}" for _, heading, *_, has_ratio in columns if has_ratio]
    for name, entry in summary.items():
        medians = [(entry["median"][figure], form, scale) for figure, _, form, scale, _ in columns]
        line = [name, *("-" if value is None else format(value * scale, form) for value, form, scale in medians)]
        for reference in references:
            found = entry["ratio"].get(reference, {})
            ratios = [found.get(figure) for figure, *_, has_ratio in columns if has_ratio]
            line += ["-" if ratio is None else f"{ratio['median']:.3g}" for ratio in ratios]
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    print(f"\n{title}")
    for line in lines:
        print(
            "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:]))]).rstrip()
        )


def write_record(output, args, **parts):
    """Writes the record of a bench: where and by which command it ran, its settings, all figures and their summary."""
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    threads = {name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")}
    settings = {
        name: os.path.relpath(value) if isinstance(value, Path) else value for name, value in vars(args).items()
    }
    write_json(output, {"environment": environment() | threads, "settings": settings, **parts})
    print(f"\nwritten to {output}")


def add_common_flags(parser, output, shapes=("tiny", "small", "large-v3")):
    """Adds the flags that every bench has; the first of the shapes is the default."""
    shapes = list(shapes)
    parser.add_argument("--output", type=Path, default=BENCH / "results" / output)
    parser.add_argument(
        "--work_dir", type=Path, default=BENCH.parent / "outputs" / "bench", help="material and run files"
    )
    parser.add_argument("--shape", default=shapes[0], help=f"model of random weights: {', '.join(shapes)}")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each arm, each with a seed of its own")
