"""The record of a run: what was run, on what, by which command, and what came out of it."""

import contextlib
import datetime
import functools
import importlib.metadata
import json
import logging
import os
import platform
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import psutil

from hfspeech.arguments import NOT_IDENTITY
from hfspeech.errors import EXIT_CODES, UserError, end_listeners
from hfspeech.hub import PushFailed, require_write_access
from hfspeech.runs.files import claim_folder, lock_folder, read_json, require_space, write_json

RUN_FILE = "run.json"
PACKAGES = ["torch", "torchaudio", "transformers", "datasets", "accelerate", "peft", "evaluate", "jiwer"]

# The checkout that this package stands in, with its recipes; None where it was installed without them.
CHECKOUT = Path(__file__).resolve().parents[3]
CHECKOUT = CHECKOUT if (CHECKOUT / "recipes").is_dir() else None

_NEEDED_BYTES = 50 * 2**20
ROWS, BATCHES = "rows in a step", "batches in a step"  # of all processes

logger = logging.getLogger("hfspeech")


def open_run(train_args):
    """Claims the output folder for this run: a new one, or the one in which the same run stopped.

    Two launches are the same run if their settings agree in everything that bears on the result; the number of processes
    does not if a step takes in the same rows. Only the first process looks and writes, and the others end with it. If
    the result is to be pushed, it also sees that it may be. The record's `state` is `running` from here on; `publish`
    makes it `finished`, a signal `interrupted`, a fault `failed`. What is killed outright stays `running`.

    Raises:
        UserError: the folder holds another run, or something else; another launch uses it; it cannot be written; its
            disk is full; the Hub would not take the result.
    """
    fault = None
    if train_args.process_index == 0:
        try:
            _claim_run(train_args)
        except UserError as error:
            fault = error
    if train_args.world_size > 1:
        from accelerate.utils import broadcast_object_list

        (fault,) = broadcast_object_list([fault])
    if fault:
        fault.of_all = True
        raise fault


def _claim_run(train_args):
    output_dir = Path(train_args.output_dir)
    claim_folder(output_dir)
    require_space(output_dir, _NEEDED_BYTES)
    lock_folder(output_dir)
    record = json.loads(json.dumps(what_is_run(train_args)))
    file = output_dir / RUN_FILE
    if train_args.push_to_hub:
        require_push_allowed(train_args)
    earlier = read_record(file) if file.exists() else None
    if earlier and earlier.get("state") == "failed" and not _has_begun(earlier, output_dir):
        earlier = None  # a mistake in the settings ended it, and mending that makes it another run
    if earlier:
        there, here = _identity(earlier), _identity(record)
        differing = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
        if differing:
            shown = ", ".join(f"{n} {there.get(n)!r} there, {here.get(n)!r} here" for n in differing[:3])
            more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
            advice = _how_to_share(there, record) if differing in ([ROWS], [BATCHES]) else ""
            raise UserError(
                f"{output_dir} holds another run ({shown}{more}): {advice}choose another --output_dir, or delete that "
                "folder."
            )
        record = earlier
    elif not file.exists() and (foreign := [path.name for path in output_dir.iterdir() if path.name.startswith("checkpoint-")]):
        raise UserError(
            f"{output_dir} holds {foreign[0]} of a run that has no {RUN_FILE}: choose another --output_dir."
        )
    write_json(file, record | {"state": "running"})
    end_listeners.append(functools.partial(_note_end, file))


def _has_begun(record, output_dir):
    """Tells whether a run has come to something that must not be lost."""
    return "before" in record or "train" in record or any(output_dir.glob("checkpoint-*"))


def _note_end(file, exit_code):
    """Writes into the record how a launch ended that did not finish."""
    if exit_code:
        with contextlib.suppress(UserError, OSError):  # the disk may be full, or the folder gone
            state = "interrupted" if exit_code in EXIT_CODES.values() else "failed"
            write_json(file, read_json(file) | {"state": state})


def require_push_allowed(train_args):
    """Sees that the Hub will take what a run is to push; returns the repository's id.

    Raises:
        UserError: as `require_write_access`, or nobody else could load what would be pushed.
    """
    settings, output_dir = train_args.run_arguments, Path(train_args.output_dir)
    model = settings.get("model_name_or_path")
    if "lora_r" in settings and not train_args.hub_merge and model and Path(model).expanduser().exists():
        raise UserError(
            f"Nobody else could load an adapter on {model}, a folder of this machine: give --hub_merge true to push the "
            "whole model, or leave --push_to_hub out."
        )
    is_new = not (output_dir / RUN_FILE).exists()
    repo_id = train_args.hub_model_id or default_repo_name(output_dir)
    try:
        return require_write_access(
            repo_id,
            private=train_args.hub_private_repo,
            revision=train_args.hub_revision,
            tag=train_args.hub_tag if is_new else None,  # a run that goes on may have been pushed already
            create_pr=train_args.hub_create_pr,
        )
    except PushFailed as error:
        if is_new:
            raise
        logger.warning("%s The run goes on all the same.", error)
        return repo_id


def default_repo_name(run_dir):
    """Returns what a run is called on the Hub unless it is given a name."""
    return Path(run_dir).resolve().name


def what_is_run(train_args):
    """Returns what a record says of a run before anything is known of its data and results.

    Returns:
        dict: `recipe` (the path of its run.py in this checkout, or None), `arguments` and `sources` (each setting, and
        where it comes from; see `hfspeech.arguments.parse`), and `environment`.
    """
    return {
        "recipe": _recipe(),
        "arguments": train_args.run_arguments,
        "sources": train_args.run_sources,
        "environment": environment(),
    }


def find_record(place):
    """Returns the path of a record: of a run's output folder, of a recipe's folder (its demo), or that file itself.

    Raises:
        UserError: there is none.
    """
    path = Path(place).expanduser()
    if not path.exists() and CHECKOUT and (CHECKOUT / path).exists():  # recipes/… from another folder
        path = CHECKOUT / path
    found = [file for file in (path, path / RUN_FILE, path / "demo.json") if file.is_file()]
    if not found:
        raise UserError(f"There is no record of a run in {place}: give the output folder of a run, or its {RUN_FILE}.")
    return found[0]


def read_record(file):
    """Reads the record of a run.

    Raises:
        UserError: the file is damaged, or something else.
    """
    record = read_json(file)
    if not isinstance(record, dict) or not {"arguments", "environment"} <= record.keys():
        raise UserError(f"{file} is not the record of a run: choose another folder, or delete it.")
    return record


def _identity(record):
    """Returns what makes a run this one: its settings, and what a step takes in, however many processes share it."""
    settings = {name: value for name, value in record["arguments"].items() if name not in NOT_IDENTITY}
    processes = record["environment"]["processes"]
    batches = settings.pop("gradient_accumulation_steps", 1) * processes
    if settings.get("streaming"):  # rows are dealt out batch by batch
        return settings | {BATCHES: batches}
    rows = settings.pop("per_device_train_batch_size", None)
    if rows is None or settings.get("max_batch_seconds"):
        return settings | {BATCHES: batches}
    return settings | {ROWS: rows * batches}


def _how_to_share(there, record):
    """Returns what to type so that the processes of this launch share the steps of a run, as the start of a sentence."""
    processes, rows = record["environment"]["processes"], record["arguments"].get("per_device_train_batch_size")
    share, left = divmod(there.get(ROWS) or there[BATCHES], processes)
    if left:
        return f"{processes} processes cannot share its steps evenly; launch as many as can, "
    if BATCHES in there:
        return f"keep its steps with --gradient_accumulation_steps {share}, "
    rows = rows if share % rows == 0 else share
    return (
        f"keep its steps with --per_device_train_batch_size {rows} --gradient_accumulation_steps {share // rows}, "
    )


def environment():
    """Returns what a result depends on besides its arguments, as a dict.

    Returns:
        `date` (UTC), `commit` (40 hexadecimal digits) and `dirty` (whether the checkout differs from it; both None where
        the package stands in no checkout; `commit_of` reads them), `command`, `hardware` (`cpu`, `cores`, `memory_bytes`,
        `gpus`), `processes`, `sharding` (the configuration in recipes/launch by which, or by one like it, they share one
        model out; None if they do not) and `versions`.
    """
    import torch

    versions = {"python": platform.python_version(), "hfspeech": _version("hfspeech")}
    versions |= {name: _version(name) for name in PACKAGES}
    commit, dirty = _commit()
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit,
        "dirty": dirty,
        "command": command(),
        "hardware": {
            "cpu": _cpu(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": psutil.virtual_memory().total,
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "sharding": _sharding(),
        "versions": versions,
    }


def commit_of(made):
    """Returns the commit of an `environment`, empty if it is not known, and whether its checkout differed from it.

    Records from before `dirty` have a `+` at the end of the commit instead.
    """
    commit = made.get("commit") or ""
    return commit.removesuffix("+"), bool(made.get("dirty")) or commit.endswith("+")


def command():
    """Returns the command line as it was typed, with `accelerate launch` in front where that started it."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    script = os.path.relpath(sys.argv[0]) if os.path.exists(sys.argv[0]) else sys.argv[0]
    return shlex.join([*(("accelerate", "launch") if launched else ("python",)), script, *sys.argv[1:]])


def peak_rss_bytes():
    """Returns the most memory that this process has held, in bytes."""
    scale = 1 if sys.platform == "darwin" else 1024  # getrusage counts in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit():
    """Returns the commit of the checkout that this package stands in, and whether the checkout differs from it."""
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "-C", here, "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None, None
    return described.removesuffix("+"), described.endswith("+")


def _sharding():
    def says(name, value):
        return os.environ.get(f"ACCELERATE_{name}", "").lower() == value

    if says("USE_DEEPSPEED", "true"):
        return "deepspeed_zero3" if says("DEEPSPEED_ZERO_STAGE", "3") else "deepspeed_zero2"
    return "fsdp2" if says("USE_FSDP", "true") else None


def _recipe():
    script = Path(sys.argv[0]).resolve()
    if CHECKOUT and script.name == "run.py" and script.is_relative_to(CHECKOUT / "recipes"):
        return script.relative_to(CHECKOUT).as_posix()
    return None


def _cpu():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
