"""The checkpoints of a run: written under another name, and given their own when they are whole."""

import json
import logging
import os
import re
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hfspeech.runs.files import sync, write_json

PROGRESS_FILE = "progress.json"  # in each checkpoint
MANIFEST_FILE = "whole.json"  # in each checkpoint: [bytes, CRC-32] of every other file
DEEPSPEED_SHARDS = "*_optim_states.pt"  # one for each process
PART_FOLDER = "checkpoint.part"  # holds the checkpoint that is being written

logger = logging.getLogger("hfspeech")


def last_checkpoint(output_dir, step=None):
    """Returns the newest whole checkpoint folder, or that of one step, as a str; None if there is none."""
    for folder in sorted(_checkpoints(output_dir), key=_step, reverse=True):
        if (step is None or _step(folder) == step) and is_whole_checkpoint(folder):
            return str(folder)
    return None


def remove_half_written(output_dir, last):
    """Deletes what a killed launch left of a checkpoint: it would count among those to keep.

    Args:
        output_dir: of the run.
        last: its `last_checkpoint`, or None; every later one is torn.
    """
    torn = [folder for folder in _checkpoints(output_dir) if last is None or _step(folder) > _step(Path(last))]
    for folder in [*torn, *Path(output_dir).glob(f"{PART_FOLDER}/*")]:
        logger.warning("%s is half-written: it is deleted", folder)
    for folder in [*torn, Path(output_dir) / PART_FOLDER]:
        shutil.rmtree(folder, ignore_errors=True)


def is_whole_checkpoint(folder):
    """Tells whether every file of a checkpoint is as it was written: none cut off, filled with zeros, or gone."""
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        return bool(manifest) and all(_fingerprint(folder / name) == found for name, found in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


def layout(folder):
    """Returns how a checkpoint was written: `fsdp` and `deepspeed` shard it over their processes' files, else `whole`."""
    if (Path(folder) / "pytorch_model_fsdp_0").is_dir():
        return "fsdp"
    return "deepspeed" if list(Path(folder).glob(f"*/{DEEPSPEED_SHARDS}")) else "whole"


def finish_checkpoint(part, folder):
    """Gives a checkpoint its name when all of it is on the disk, so that what bears such a name is whole.

    Args:
        part: folder in which it was written.
        folder: the name that it is to have; what is left of an earlier one makes room.
    """
    paths = sorted(part.rglob("*"))
    files = [path for path in paths if path.is_file()]
    with ThreadPoolExecutor() as pool:  # a disk that is asked for many files at once answers for all of them at once
        list(pool.map(sync, paths))
        manifest = dict(zip([path.relative_to(part).as_posix() for path in files], pool.map(_fingerprint, files)))
    write_json(part / MANIFEST_FILE, manifest)
    sync(part)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    sync(folder.parent)


def _checkpoints(output_dir):
    return [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]


def _step(folder):
    return int(folder.name.split("-")[1])


def _fingerprint(path):
    """Returns the size of a file and the CRC-32 of its content."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            crc = zlib.crc32(block, crc)
        return [file.tell(), crc]
