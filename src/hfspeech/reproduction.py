"""`hfspeech reproduce`: runs what a record says once more, and compares."""

import contextlib
import logging
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import torch
import yaml

from . import arguments
from .arguments import MAY_BE_NULL, NOT_IDENTITY, parse_arguments, read_arguments_file
from .data.fingerprint import other_rows
from .errors import EXIT_CODES, UserError
from .hub import fetch_file
from .publish import figure_text
from .publish.figures import aligned, figures, main_figure
from .runs import CHECKOUT, RUN_FILE, claim_folder, commit_of, environment, find_record, read_json, read_record

ARGUMENTS_FILE = "args.yaml"  # in the new output folder
# Of what is no part of a run's identity, this still decides whether it comes to its end, or how fine its log is.
KEPT = {
    "audio_root", "on_bad_audio", "per_device_eval_batch_size", "save_total_limit", "logging_steps", "logging_strategy"
}  # fmt: skip
# Settings that can be given anew, for what lies elsewhere by now.
MOVABLE = ("dataset_name", "retention_dataset_name", "audio_root", "model_name_or_path")

logger = logging.getLogger("hfspeech")


def reproduce(place, output_dir=None, moved=None, dry_run=False):
    """Runs the recipe of a record again, with its settings, revisions and number of processes, and compares.

    What is shown first: how this machine and checkout differ from those of the record. Then the settings are written
    into `args.yaml` of the new output folder and `accelerate launch` runs the recipe of this checkout on it. The new run
    is like any other: stopped, it goes on when the same command is given again.

    Args:
        place: output folder of a run, its record, a recipe's folder (for its demo), or the Hub id of a published run.
        output_dir: folder of the new run. Default: that of the record with `_reproduced` behind it; for a published run
            outputs/NAME_reproduced.
        moved: dict of where `MOVABLE` settings lie by now, if they lie elsewhere.
        dry_run: only show the differences, the settings and the command.

    Returns:
        Exit code: 0 if the figure that the record stands for lies within its recorded interval and the data are those of
        the record, 1 if not; as `EXIT_CODES` has it if the run was stopped, 2 if it failed.

    Raises:
        UserError: no such record, a recipe or setting that this checkout lacks, data or a model that are not here, more
            processes than there are GPUs.
    """
    file, is_published = _find(place)
    record = read_record(file)
    if main_figure(record) is None:
        raise UserError(f"The run of {place} is not finished, so it has no figure to reproduce: type its own command again.")
    if is_published:  # a record of others opens no folders here
        record["arguments"]["audio_root"] = None
    recipe = _recipe(record, file)
    processes = record["environment"]["processes"]
    if processes > max(1, torch.cuda.device_count()) and torch.cuda.is_available() and not _was_on_cpu(record):
        raise UserError(
            f"{file} was made by {processes} processes, and this machine has {torch.cuda.device_count()} GPUs: run it on "
            "one that has as many."
        )
    moved = {name: _absolute(value) for name, value in (moved or {}).items() if value}
    settings = settings_of(record, recipe, moved)
    folder = _folder_to_run_in(record, moved)
    if is_published:
        default = Path("outputs", str(place).partition("/")[2])
    else:
        default = file.parent if file.name == RUN_FILE else Path(record["arguments"]["output_dir"])
    output_dir = Path(output_dir or default.with_name(f"{default.name}_reproduced")).expanduser().resolve()
    if (output_dir / RUN_FILE).resolve() == file.resolve():
        raise UserError(f"{output_dir} is the run itself: give the new one another --output_dir.")
    settings["output_dir"] = str(output_dir)
    command = _command(recipe, output_dir / ARGUMENTS_FILE, record)

    print(environment_text(record["environment"], {**environment(), "processes": processes}))
    text = f"# What {place} was run with, its revisions pinned.\n"
    text += yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=1000)
    if dry_run:
        print(f"\n{text}\n{shlex.join(command)}")
        return 0
    claim_folder(output_dir)
    written = output_dir / ARGUMENTS_FILE
    if (output_dir / RUN_FILE).exists() and not (written.exists() and read_arguments_file(written) == settings):
        raise UserError(f"{output_dir} holds another run: choose another --output_dir.")
    written.write_text(text, encoding="utf-8")
    code = _launch(command, folder, output_dir / RUN_FILE, record)
    if code:
        logger.warning(
            "The run did not come to its end: mend what it says, if anything, and the same command goes on."
        )
        return code
    return _verdict(record, read_record(output_dir / RUN_FILE))


def _find(place):
    """Returns the path of a record, and whether it was fetched from the Hub, as the place is an id there."""
    if Path(place).expanduser().exists() or (CHECKOUT and (CHECKOUT / place).exists()) or str(place).count("/") != 1:
        return find_record(place), False
    file = fetch_file(str(place), RUN_FILE)
    if file is None:
        raise UserError(f"{place} on the Hub holds no {RUN_FILE}: it was not published by hfspeech.")
    return file, True


def _recipe(record, file):
    """Returns the run.py of this checkout that a record was made by."""
    if CHECKOUT is None:
        raise UserError("hfspeech is installed without its recipes: clone the repository, and pip install -e . in it.")
    in_command = re.search(r"recipes/\w+/run\.py", record["environment"].get("command") or "")
    recipe = record.get("recipe") or (in_command and in_command[0])
    if not recipe:
        raise UserError(f"{file} does not say which recipe made it, so it cannot be run again.")
    if not re.fullmatch(r"recipes/\w+/run\.py", str(recipe)) or not (CHECKOUT / recipe).is_file():
        raise UserError(f"{file} was made by {recipe}, which this checkout lacks: {_check_out(record)}.")
    return CHECKOUT / recipe


def _check_out(record):
    commit, _ = commit_of(record["environment"])
    return f"check out {commit[:12]}" if commit else "check out the commit that it was made by"


def _was_on_cpu(record):
    """Tells whether a run left the GPUs of its machine alone, or had none."""
    return bool(record["arguments"].get("use_cpu")) or not record["environment"]["hardware"]["gpus"]


def settings_of(record, recipe, moved=None):
    """Returns the settings of a record as an arguments file has them: what differs from the defaults, revisions pinned.

    What only says where a run writes and what it prints is left out, and so is what the machine decides without bearing
    on the result; the precision and the size of the batches are kept as they were chosen, and so is the number of the
    dataloader workers that share out a stream.

    Args:
        record: the record of a run.
        recipe: path of the run.py that is to take them.
        moved: dict of settings to put in place of the record's, such as where a dataset lies by now.

    Raises:
        UserError: the record sets what is no longer a setting.
    """
    names = dict.fromkeys(re.findall(r"\b\w+Arguments\b", recipe.read_text(encoding="utf-8")))
    types = [getattr(arguments, name) for name in names if hasattr(arguments, name)]
    needed = {"model_name_or_path": "any", "output_dir": "any", "use_cpu": True}
    defaults = parse_arguments(needed, [], types)[0].run_arguments
    recorded = {**record["arguments"], **record.get("chosen", {}), **_pinned(record), **(moved or {})}
    _require_known(record, recorded, defaults)
    settings = {}
    for name, value in recorded.items():
        is_placed_anew = name in NOT_IDENTITY - KEPT or name.startswith(("hub_", "push_to_hub"))
        was_derived = name == "accelerator_config" and isinstance(value, str)
        if name not in defaults or is_placed_anew or was_derived or value in (defaults[name], []):
            continue
        if value is not None or name in MAY_BE_NULL:
            settings[name] = value
    settings |= {name: bool(recorded.get(name)) for name in ("bf16", "fp16")}  # a machine may choose otherwise
    if recorded.get("streaming") and "dataloader_num_workers" in recorded:
        settings["dataloader_num_workers"] = recorded["dataloader_num_workers"]
    if _was_on_cpu(record) and torch.cuda.is_available():
        settings["use_cpu"] = True
    if settings["fp16"] and not torch.cuda.is_available():
        logger.warning("The record was made in fp16, which needs a GPU: without one the precision is chosen anew.")
        del settings["bf16"], settings["fp16"]
    return settings


def _require_known(record, recorded, known):
    """Names what a record sets and this version of the recipe does not know."""
    is_set = {name: value for name, value in recorded.items() if value not in (None, False, [], "")}
    gone = {name: value for name, value in is_set.items() if name not in known}
    sources = record.get("sources", {})
    given = [f"{name} ({value})" for name, value in gone.items() if sources.get(name, "default") != "default"]
    if given:
        raise UserError(
            f"The record sets {', '.join(given)}, which this version of the recipe does not know: {_check_out(record)}."
        )
    if gone:
        logger.warning(
            "No longer settings, and left out: %s", ", ".join(f"{name} ({value})" for name, value in gone.items())
        )


def _pinned(record):
    """Returns the revisions of a record's model and datasets as commits, where it knows them."""
    asked, pinned = record["arguments"], {}
    if (record.get("model") or {}).get("commit"):
        pinned["model_revision"] = record["model"]["commit"]
    opened = _opened(record)
    count = len(asked["dataset_name"])
    commits = [entry.get("commit") for entry in opened[:count]]
    if any(commits):
        revisions = asked.get("dataset_revision") or [None]
        revisions = revisions * count if len(revisions) == 1 else revisions
        pinned["dataset_revision"] = [commit or asked or "main" for commit, asked in zip(commits, revisions)]
    if len(opened) > count and opened[count].get("commit"):
        pinned["retention_dataset_revision"] = opened[count]["commit"]
    return pinned


def _opened(record):
    """Returns the account of the datasets that a run opened, the retention dataset last."""
    return record.get("rows", {}).get("account", {}).get("datasets", [])


def _folder_to_run_in(record, moved):
    """Returns the folder that the relative paths of a record start from: this one, or the checkout.

    Raises:
        UserError: something of the record lies in neither.
    """
    asked, model = record["arguments"], record.get("model") or {}
    # A dataset of the Hub has a commit in the account, if only None; a model of the Hub always has one.
    datasets = [entry["name"] for entry in _opened(record) if "commit" not in entry]
    paths = [(_setting(asked, name, "retention_dataset_name", "dataset_name"), name) for name in datasets]
    if model.get("name_or_path") and not model.get("commit"):
        name = model["name_or_path"]
        paths.append((_setting(asked, name, "config_name", "model_name_or_path"), name))
    paths += [(role, one["name_or_path"]) for role, one in record.get("models", {}).items() if one.get("fingerprint")]
    paths += [("audio_root", path) for path in asked.get("audio_root") or []]
    paths = [(name, path) for name, path in paths if name not in moved]
    folders = Path.cwd(), CHECKOUT
    for folder in folders:
        if all((folder / Path(path).expanduser()).exists() for _, path in paths):
            return folder
    for name, path in paths:
        if not any((folder / Path(path).expanduser()).exists() for folder in folders):
            all_of_them = asked.get(name) if isinstance(asked.get(name), list) else [path]
            flag = f"--{name} {' '.join('PATH' if other == path else other for other in all_of_them)}"
            where = f"give {flag}, with where it lies by now" if name in MOVABLE else f"put it there, for the {name}"
            raise UserError(f"{path}, which the record names, is not here: {where}.")
    raise UserError(
        f"The paths of the record start from different folders ({', '.join(path for _, path in paths)}): go to the folder "
        "that the run was launched in."
    )


def _setting(asked, value, name, otherwise):
    return name if asked.get(name) == value else otherwise


def _absolute(value):
    """Returns one path or several as they are found from another folder; a Hub id stays as it is."""
    if isinstance(value, list):
        return [_absolute(one) for one in value]
    path = Path(value).expanduser()
    return str(path.resolve()) if path.exists() else value


def _command(recipe, arguments_file, record):
    """Returns the command that runs a recipe by as many processes as that of a record, sharded as there."""
    processes, sharding = record["environment"]["processes"], record["environment"].get("sharding")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", str(processes)]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    if sharding:
        configs = {path.stem: str(path) for path in (CHECKOUT / "recipes/launch").glob("*.yaml")}
        if sharding not in configs:
            raise UserError(f"The run was sharded by {sharding}, which this checkout lacks: {_check_out(record)}.")
        launch += ["--config_file", configs[sharding]]
    elif processes > 1:
        launch += ["--multi_gpu"]
    return [*launch, str(recipe), str(arguments_file)]


def _launch(command, folder, file, record):
    """Runs a launcher to its end, and says as soon as the record of its run tells if it is made of something else.

    The signals that would end this process go to the run instead, which saves its state, and is waited for.

    Returns:
        0, what `EXIT_CODES` has for the signal that stopped it, else 2.
    """
    signums = []

    def pass_on(signum, frame):
        signums.append(signum)
        with contextlib.suppress(psutil.NoSuchProcess):
            # The launcher waits for the processes of the run, unless it was signalled, too.
            for one in psutil.Process(process.pid).children() or [process]:
                one.send_signal(signum)

    # In a session of its own it hears Ctrl-C once: a second one would end it without saving.
    process = subprocess.Popen(command, cwd=folder, start_new_session=True)
    heard = [number for number in (*EXIT_CODES, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, pass_on) for number in heard}
    is_told = False
    try:
        while True:
            try:
                code = process.wait(timeout=None if is_told else 1)
                return 0 if code == 0 else EXIT_CODES.get(signums[0], 2) if signums else 2
            except subprocess.TimeoutExpired:
                new = read_json(file) if file.exists() else {}
            if "rows" in new:
                is_told = True
                for sentence in differences_of_material(record, new):
                    logger.warning(sentence)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def differences_of_material(record, new):
    """Returns a sentence for each split and for the model if a new run has others than its record had."""
    accounts = [one.get("rows", {}).get("account", {"splits": {}}) for one in (record, new)]
    sentences = [f"The {split} rows are not those of the record." for split in other_rows(*accounts)]
    for split, entry in accounts[0]["splits"].items():
        count = accounts[1]["splits"].get(split, {}).get("rows")
        if not entry.get("fingerprint") and count not in (None, entry["rows"]):
            sentences.append(f"The {split} rows are not those of the record: {count} instead of {entry['rows']}.")
    there, here = ({"model": one.get("model") or {}, **(one.get("models") or {})} for one in (record, new))
    for role in there.keys() & here.keys():
        for kind in ("commit", "fingerprint"):
            old, now = there[role].get(kind), here[role].get(kind)
            if old and now and old != now:
                sentences.append(f"The {role.replace('_', ' ')} has other weights than in the record ({kind} {now}).")
    return sentences


def environment_text(recorded, here):
    """Returns how two environments differ, as lines of text."""
    there, here = _flat(recorded), _flat(here)
    lines = [(name, str(there[name]), str(here.get(name))) for name in there if there[name] != here.get(name)]
    if not lines:
        return "The environment is that of the record."
    return aligned([("environment", "recorded", "here"), *lines])


def _flat(made):
    commit, is_dirty = commit_of(made)
    flat = {"commit": commit[:12], "uncommitted changes": is_dirty}
    hardware = dict(made["hardware"])
    if "memory_bytes" in hardware:
        hardware["memory"] = f"{hardware.pop('memory_bytes') / 2**30:.0f} GB"
    hardware["gpus"] = ", ".join(hardware["gpus"]) or "none"
    return {**flat, **hardware, "processes": made["processes"], **made["versions"]}


def _verdict(record, new):
    """Prints the figures of both runs side by side; returns the exit code."""
    recorded, found = figures(record), figures(new)
    lines = [("figure", "recorded", "now", "")]
    verdicts = {}
    for title, (score, name, *form) in recorded.items():
        value = found[title][0][name] if title in found else None
        verdicts[title] = _place(value, score, name)
        now = "-" if value is None else figure_text({name: value}, name, *form)
        lines.append((title, figure_text(score, name, *form), now, verdicts[title]))
    print("\n" + aligned(lines) + "\n")
    material = differences_of_material(record, new)
    for sentence in material:
        print(sentence)
    title = main_figure(record)
    is_within = verdicts[title] in ("equal to the digit", "within the interval")
    if not is_within or material:
        print(f"Not reproduced: {title} is {verdicts[title]}{', but of something else' if is_within else ''}.")
        return 1
    if set(verdicts.values()) == {"equal to the digit"}:
        print("Reproduced: every figure is equal to the digit.")
    else:
        print(f"Reproduced: {title} lies within the recorded interval.")
    return 0


def _place(value, score, name):
    """Says where a new figure lies against the recorded one and its interval."""
    low, high = score.get(f"{name}_low"), score.get(f"{name}_high")
    if value is None:
        return "not measured now"
    if value == score[name]:
        return "equal to the digit"
    if low is None:
        return "another number"
    return "within the interval" if low <= value <= high else "outside the interval"
