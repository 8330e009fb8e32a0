"""Files that are written whole or not at all, on disks that may be full."""

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from hfspeech.errors import UserError

_DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


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
def writing(folder, advice="free some space and run the same command again to go on from the last checkpoint"):
    """Turns a disk that fills up, or turns read-only, into one sentence; what was written before stays."""
    import safetensors

    try:
        yield
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        fault = _disk_fault(error)
        if fault is None:
            raise
        raise UserError(f"Writing to {folder} failed ({fault}): {advice}.") from None


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
