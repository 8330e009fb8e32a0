"""The checkpoints of a run: which of them are whole, and which is the last."""

import json
import logging
import re
import shutil
import zipfile
from pathlib import Path

PROGRESS_FILE = "progress.json"  # in each checkpoint

logger = logging.getLogger("hfspeech")


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
