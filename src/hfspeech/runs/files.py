"""Files that are written whole or not at all, on disks that may be full."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import shutil
import socket
import tempfile
from pathlib import Path

from hfspeech.errors import UserError

LOCK_FILE = ".lock"  # says which process a folder belongs to

logger = logging.getLogger("hfspeech")

_locks = {}  # open files: a lock is held for as long as its file is open

_DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def claim_folder(folder, flag="--output_dir"):
    """Makes a folder and sees that it can be written, before any work is done for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"Cannot write to {folder} ({error.strerror}): choose another place with {flag}.") from None


def lock_folder(folder):
    """Keeps a second launch out of a folder until this process ends, in whatever way.

    It is a POSIX lock: the kernel lets go of it at kill -9, no dataloader worker inherits it, and NFS knows it too.
    """
    if folder.resolve() in _locks:
        return
    with writing(folder):
        file = (folder / LOCK_FILE).open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            logger.warning("%s cannot be locked (%s): see to it that no second launch uses it", folder, error.strerror)
            return
        file.seek(0)
        raise UserError(
            f"{folder} is in use ({file.read().strip()}): wait until that run has ended, or choose another --output_dir."
        ) from None
    with writing(folder):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    _locks[folder.resolve()] = file


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
    with _whole_file(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_jsonl(path):
    """Reads one JSON object a line, or says that the file is damaged; a file that is not there has none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
        return [json.loads(line) for line in lines]
    except (OSError, ValueError):
        raise UserError(f"{path} is damaged or cannot be read: delete its folder, or choose another.") from None


def write_jsonl(path, rows):
    """Writes one JSON object a line, whole or not at all."""
    with _whole_file(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@contextlib.contextmanager
def _whole_file(path):
    """Gives a text file to write that takes its name when all of it is on the disk."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with writing(path.parent):
        try:
            with part.open("w", encoding="utf-8") as file:
                yield file
            sync(part)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)  # on a full disk, the room that it takes is needed
            raise


@contextlib.contextmanager
def replacing_files(folder, writes=True):
    """Gives a folder to write into, whose files take their places in `folder` when all of them are on the disk.

    Args:
        folder: where the files are to be.
        writes: whether this is the process that writes them; the others only take part.
    """
    folder = Path(folder)
    part = folder / "files.part"
    if not writes:
        yield part
        return
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        paths = [path for path in sorted(part.rglob("*")) if path.is_file()]
        for path in paths:
            sync(path)
        for path in paths:
            (folder / path.relative_to(part)).parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, folder / path.relative_to(part))
    finally:
        shutil.rmtree(part, ignore_errors=True)


def sync(path):
    """Sees a file, or the names in a folder, through to the disk, so that they outlive a loss of power."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError:
        if not os.path.isdir(path):  # not every file system can do it for folders
            raise
    finally:
        os.close(number)
