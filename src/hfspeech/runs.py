"""Run records: what was run, on what, by which command; one output folder, one run, and its whole checkpoints."""

import contextlib
import datetime
import errno
import importlib.metadata
import json
import logging
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .arguments import NOT_IDENTITY
from .errors import UserError

RUN_FILE = "run.json"
RESULTS_FILE = "results.json"
PROGRESS_FILE = "progress.json"  # in each checkpoint
SAMPLES_FOLDER = "samples"  # speech to listen to, before and after
PACKAGES = ["torch", "torchaudio", "transformers", "datasets", "accelerate", "peft", "evaluate", "jiwer"]

logger = logging.getLogger("hfspeech")

_NEEDED_BYTES = 50 * 2**20
_DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def open_run(train_args):
    """Claims the output folder for this run: a new one, or the one in which the same run stopped.

    Two launches are the same run if their settings agree in everything that bears on the result. Only the first
    process looks and writes.

    Raises:
        UserError: the folder holds another run, or something else; it cannot be written; its disk is full.
    """
    if train_args.process_index:
        return
    output_dir = Path(train_args.output_dir)
    identity = {k: v for k, v in train_args.run_arguments.items() if k not in NOT_IDENTITY}
    identity["processes"] = train_args.world_size  # more of them make a larger global batch
    claim_folder(output_dir)
    require_space(output_dir, _NEEDED_BYTES)
    record = output_dir / RUN_FILE
    if record.exists():
        try:
            earlier = read_json(record)["identity"]
        except (KeyError, TypeError):
            raise UserError(f"{record} is not the record of a run: choose another --output_dir.") from None
        differing = [k for k in sorted(identity.keys() | earlier.keys()) if identity.get(k) != earlier.get(k)]
        if differing:
            shown = ", ".join(f"{k} {earlier.get(k)!r} there, {identity.get(k)!r} here" for k in differing[:3])
            more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise UserError(
                f"{output_dir} holds another run ({shown}{more}): choose another --output_dir, or delete that folder."
            )
        return
    foreign = [p.name for p in output_dir.iterdir() if p.name.startswith("checkpoint-") or p.name == RESULTS_FILE]
    if foreign:
        raise UserError(
            f"{output_dir} holds {foreign[0]} of a run that has no {RUN_FILE}: choose another --output_dir."
        )
    write_json(record, {"identity": json.loads(json.dumps(identity)), "environment": environment()})


def claim_folder(folder, flag="--output_dir"):
    """Makes a folder and sees that it can be written, before any work is done for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"Cannot write to {folder} ({error.strerror}): choose another place with {flag}.") from None


def require_space(folder, num_bytes):
    """Raises a `UserError` unless the disk of `folder` has `num_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise UserError(
            f"The disk of {folder} has {free / 2**20:.0f} MB free and the run needs about {num_bytes / 2**20:.0f} MB: "
            "free some space, or choose another folder with --output_dir."
        )


@contextlib.contextmanager
def writing(folder):
    """Turns a disk that fills up, or turns read-only, into one sentence; what was written before stays."""
    import safetensors

    try:
        yield
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        fault = _disk_fault(error)
        if fault is None:
            raise
        raise UserError(
            f"Writing to {folder} failed ({fault}): free some space and run the same command again "
            "to go on from the last checkpoint."
        ) from None


def _disk_fault(error):
    """Returns what is wrong with the disk if an error says that, else None."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in _DISK_FAULTS else None
    code = re.search(r"os error (\d+)", str(error))  # safetensors puts the number into its own error
    if code:
        return os.strerror(int(code[1])) if int(code[1]) in _DISK_FAULTS else None
    # torch.save loses the reason: what it wrote is shorter than it should be.
    unwritten = "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error)
    return "a file could not be written to its end" if unwritten else None


def read_json(path):
    """Reads one JSON file, or says that it is damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        raise UserError(f"{path} is damaged or cannot be read: delete its folder, or choose another.") from None


def write_json(path, value):
    """Writes one JSON file whole or not at all."""
    path = Path(path)
    with writing(path.parent):
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(part, path)


def write_jsonl(path, rows):
    """Writes one JSON object a line, whole or not at all."""
    path = Path(path)
    with writing(path.parent):
        part = path.with_name(path.name + ".part")
        with part.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.replace(part, path)


def last_checkpoint(output_dir, step=None):
    """Returns the newest whole checkpoint folder, or that of one step, as a str; None if there is none."""
    folders = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    for folder in sorted(folders, key=lambda p: -int(p.name.split("-")[1])):
        if step is not None and folder.name != f"checkpoint-{step}":
            continue
        if is_whole_checkpoint(folder):
            return str(folder)
    return None


def remove_half_written(output_dir):
    """Deletes the checkpoints of a run that were not written to their end: they would count among those to keep."""
    for folder in Path(output_dir).glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-\d+", folder.name) and not is_whole_checkpoint(folder):
            logger.warning("%s is half-written: it is deleted", folder)
            shutil.rmtree(folder, ignore_errors=True)


def is_whole_checkpoint(folder):
    """Tells whether a checkpoint was written to its end: Trainer writes its state last, and a disk may fill up before."""
    import safetensors
    from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

    folder = Path(folder)
    weights = [folder / name for name in (SAFE_WEIGHTS_NAME, ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)]
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
        for path in weights[:2]:
            if path.exists():
                safetensors.safe_open(path, "pt")
    except (OSError, ValueError, safetensors.SafetensorError):
        return False
    return any(path.exists() for path in weights) and zipfile.is_zipfile(folder / "optimizer.pt")


def environment():
    """Returns what a result depends on besides its arguments: date, commit, command, hardware and versions."""
    import torch

    versions = {"python": platform.python_version(), "hfspeech": _version("hfspeech")}
    versions |= {name: _version(name) for name in PACKAGES}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _commit(),
        "command": command(),
        "hardware": {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0)), "gpus": gpus},
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "versions": versions,
    }


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
    """Returns the commit of the checkout that this package stands in (with `+` if it is changed), or None."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "-C", here, "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip()


def _cpu():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
