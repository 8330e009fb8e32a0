"""The checkpoints of a run: written under another name, and given their own when they are whole."""

import json
import logging
import os
import re
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hfspeech.errors import UserError
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


def clear_half_written(output_dir, last):
    """Deletes what a killed launch left of a checkpoint, and puts damaged ones aside: they would count among those to keep.

    Args:
        output_dir: of the run.
        last: its `last_checkpoint`, or None; every later one is damaged, or was written by something else.
    """
    part = Path(output_dir) / PART_FOLDER
    for folder in part.glob("*"):
        logger.warning("%s is half-written: it is deleted", folder)
    shutil.rmtree(part, ignore_errors=True)
    for folder in _checkpoints(output_dir):
        if last is None or _step(folder) > _step(Path(last)):
            aside = folder.with_name(f"damaged-{folder.name}")
            logger.warning("%s is half-written or damaged: it is put aside as %s", folder, aside.name)
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)


def is_whole_checkpoint(folder):
    """Tells whether every file of a checkpoint is as it was written: none cut off, filled with zeros, or gone.

    Raises:
        UserError: the disk does not let it be read, which says nothing of the checkpoint.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        return bool(manifest) and all(_fingerprint(folder / name) == found for name, found in manifest.items())
    except (FileNotFoundError, NotADirectoryError, ValueError, AttributeError):
        return False
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read ({error.strerror}): see to its disk and rights, then run the same command again."
        ) from None


def layout(folder):
    """Returns the launch configuration, or one like it, that a checkpoint was written under; three of them shard it."""
    folder = Path(folder)
    if (folder / "pytorch_model_fsdp_0").is_dir():
        return "fsdp2"
    if not list(folder.glob(f"*/{DEEPSPEED_SHARDS}")):
        return "several_gpus"
    return "deepspeed_zero3" if list(folder.glob("*/zero_pp_rank_*_model_states.pt")) else "deepspeed_zero2"


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
