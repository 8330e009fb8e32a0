"""Kills one run of a recipe again and again, and compares what comes of it with the same run left in peace.

python tests/torture.py --kills 100                     # prints a line for each kill, and what differs in the end
python tests/torture.py --kills 40 --terms 20 --recipe whisper_lora --seed 7

Each launch is a process forked from this one, which has imported everything; it runs the recipe's own `main` with the
command line of a user, and is killed with SIGKILL, its dataloader workers too: while it starts, measures, trains,
evaluates, writes a checkpoint, deletes an old one, or saves its model; or just before the n-th file operation in its
output folder. A third run is stopped with SIGTERM instead, as often as `--terms` says, and must end with exit code 75
and the state `interrupted`. All moments are drawn from the seed.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import random
import runpy
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from conftest import NEW_DIGITS, VOICE, copy_rows, recipe_command

OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
# What no two runs have in common.
VOLATILE = {"environment", "timings", "seconds", "evaluation_seconds", "audio_seconds_per_second", "peak_rss_bytes", "output_dir", "eval_runtime",
            "eval_samples_per_second", "eval_steps_per_second"}  # fmt: skip
SAID = {
    "before": "Measuring test rows before",
    "train": "  loss ",
    "after": "Measuring test rows after",
}


@dataclasses.dataclass
class Moment:
    """When a launch is killed: `delay_s` after `event`, or just before its n-th file operation."""

    event: str
    delay_s: float = 0.0
    operation: int | None = None

    def __str__(self):
        return f"operation {self.operation}" if self.operation else f"{self.event} + {self.delay_s:.3f} s"

    def has_come(self, run, folders_before):
        """Tells whether the event has been seen in a launch of `run`, before which there were these folders."""
        if self.event == "start":
            return True
        if run.folders("checkpoint-*") - folders_before:  # no launch goes further, lest the run ends too early
            return True
        if self.event in SAID:
            return SAID[self.event] in run.said()
        pattern = {"write": "checkpoint.part/checkpoint-*", "new": "checkpoint-*", "publish": "files.part"}[self.event]
        return bool(run.folders(pattern) - folders_before)


class Operations:
    """An audit hook that kills this process, and its workers, just before an operation on files in a folder."""

    def __init__(self, folder, last):
        self.folder, self.left, self.process = str(folder), last, os.getpid()

    def __call__(self, event, args):
        if event not in OPERATIONS or os.getpid() != self.process or not str(args[0]).startswith(self.folder):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
        self.left -= 1
        if self.left == 0:
            os.killpg(0, signal.SIGKILL)


class Run:
    """One run of a recipe in an output folder, launched as often as it takes."""

    def __init__(self, name, folder, recipe, settings):
        self.output_dir = folder / name / "run"
        self.log = folder / name / "log"
        self.log.parent.mkdir(parents=True)
        self.command = recipe_command(
            recipe, *settings, data=folder / "data", output_dir=self.output_dir, launcher="python"
        )

    def launch(self, moment=None, signum=signal.SIGKILL):
        """Launches the run once and returns its exit code, which is -n if signal n has ended it."""
        folders_before = self.folders("checkpoint*") | self.folders("checkpoint*/*") | self.folders("files.part")
        self.log.write_text("")
        process = os.fork()
        if process == 0:
            self._become_launch(moment)
        due = None
        while True:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                break
            if due is None and moment and not moment.operation and moment.has_come(self, folders_before):
                due = time.monotonic() + moment.delay_s
            if due is not None and time.monotonic() >= due:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process, signum)
                due = float("inf")
            time.sleep(0.004)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)  # workers
        return os.waitstatus_to_exitcode(status)

    def _become_launch(self, moment):
        code = 1
        try:
            os.setsid()
            for number in (1, 2):
                os.dup2(os.open(self.log, os.O_WRONLY | os.O_APPEND), number)
            sys.stdout.reconfigure(line_buffering=True)
            if moment and moment.operation:
                sys.addaudithook(Operations(self.output_dir, moment.operation))
            sys.argv = self.command[1:]
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            self.log.with_name("modules").write_text("\n".join(sys.modules))
            sys.stdout.flush()
            os._exit(code)

    def said(self):
        return self.log.read_text(errors="replace")

    def folders(self, pattern):
        """Returns the inodes of what matches a pattern in the output folder."""
        found = set()
        for path in self.output_dir.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                found.add(path.stat().st_ino)
        return found

    def record(self):
        path = self.output_dir / "run.json"
        return json.loads(path.read_text()) if path.exists() else {}


def draw_moment(share, rng):
    """Draws when a launch is to be killed: early kills meet the start of the run, late ones its end."""
    if share < 0.15:
        return rng.choice([Moment("start", rng.uniform(0.1, 2)), Moment("before", rng.uniform(0, 0.5))])
    if share < 0.8:
        kinds = [Moment("start", rng.uniform(0.3, 4)), Moment("train", rng.uniform(0, 0.5))]
        kinds += [Moment("new", rng.uniform(0, 0.03)), Moment("new", rng.uniform(0, 0.8))]
        return rng.choice(kinds + 4 * [Moment("write", rng.uniform(0, 0.1))])
    return rng.choice([Moment("after", rng.uniform(0, 1)), Moment("publish", rng.uniform(0, 0.05))])


def torture(run, num_kills, rng, signum=signal.SIGKILL):
    """Kills a run so often, then lets it finish; returns how many kills landed at which event."""
    landed, kills = {}, 0
    while kills < num_kills:
        moment = draw_moment(kills / num_kills, rng)
        if signum == signal.SIGKILL and rng.random() < 0.3:
            moment = Moment("start", operation=rng.randint(1, 60))
        if "train" in run.record():  # the run is over: its end comes once more
            moment = draw_moment(1, rng)
        started = time.monotonic()
        code = run.launch(moment, signum)
        if code not in (0, -signal.SIGKILL if signum == signal.SIGKILL else os.EX_TEMPFAIL):
            raise RuntimeError(f"A launch ended with {code}: {run.said()[-3000:]}")
        torn = list(run.output_dir.glob("checkpoint.part/checkpoint-*"))
        if code:
            kills += 1
            name = "operation" if moment.operation else moment.event
            landed[name] = landed.get(name, 0) + 1
            landed["half-written"] = landed.get("half-written", 0) + bool(torn)
        if signum == signal.SIGTERM and run.record()["state"] != ("interrupted" if code else "finished"):
            raise RuntimeError(f"Exit code {code}, state {run.record()['state']}: {run.said()[-3000:]}")
        names = sorted(path.name for path in [*run.output_dir.glob("checkpoint-*"), *torn])
        print(f"{kills:4d}  exit code {code:3d}  {time.monotonic() - started:5.1f} s  {moment}  {' '.join(names)}")
    if code := run.launch():
        raise RuntimeError(f"The last launch ended with {code}: {run.said()[-3000:]}")
    return landed


def differences(one, other):
    """Returns the names of what differs between two finished output folders; volatile figures aside.

    The model card is made from run.json, and names such figures among its words.
    """
    found = []

    def compare(name, a, b):
        if isinstance(a, dict) and isinstance(b, dict):
            for key in sorted((a.keys() | b.keys()) - VOLATILE):
                compare(f"{name}.{key}", a.get(key), b.get(key))
        elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            for number, (x, y) in enumerate(zip(a, b)):
                compare(f"{name}[{number}]", x, y)
        elif a != b:
            found.append(f"{name}: {a!r} != {b!r}")

    compare("run", *(json.loads((folder / "run.json").read_text()) for folder in (one, other)))
    names = sorted({path.name for folder in (one, other) for path in folder.iterdir() if path.is_file()})
    for name in names:
        contents = [(folder / name).read_bytes() if (folder / name).exists() else None for folder in (one, other)]
        if name not in ("run.json", "README.md", "training_args.bin", ".lock") and contents[0] != contents[1]:
            found.append(name)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--terms", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", default="whisper_full")
    parser.add_argument("--folder", type=Path, help="where the runs go (default: a temporary one)")
    args, flags = parser.parse_known_args()
    folder, rng = args.folder or Path(tempfile.mkdtemp()), random.Random(args.seed)
    for split, count in (("train", 24), ("validation", 4), ("test", 4)):
        copy_rows(folder / "data", split, count, VOICE if "speecht5" in args.recipe else NEW_DIGITS)
    num_steps = 4 + 3 * args.kills // 2  # a launch trains two steps at most, and late kills come after training
    settings = ["--max_steps", num_steps, "--eval_steps", 2, "--save_steps", 2, "--logging_steps", 3,
                "--max_test_samples", 4, "--per_device_train_batch_size", 4, "--warmup_steps", 0,
                "--dataloader_num_workers", 1, "--save_total_limit", 1, *flags]  # fmt: skip
    peaceful, killed, stopped = (
        Run(name, folder, args.recipe, settings) for name in ("peaceful", "killed", "stopped")
    )
    runpy.run_path(peaceful.command[1], run_name="imported")
    started = time.monotonic()
    if code := peaceful.launch():
        raise RuntimeError(f"The run that nobody killed ended with {code}: {peaceful.said()[-3000:]}")
    print(f"{num_steps} steps in peace: {time.monotonic() - started:.1f} s")
    for name in peaceful.log.with_name("modules").read_text().split():
        with contextlib.suppress(Exception):
            importlib.import_module(name)  # so that no launch has to
    outcome = {"steps": num_steps, "killed": torture(killed, args.kills, rng)}
    outcome["differences"] = differences(peaceful.output_dir, killed.output_dir)
    if args.terms:
        outcome["stopped"] = torture(stopped, args.terms, rng, signal.SIGTERM)
        outcome["differences"] += differences(peaceful.output_dir, stopped.output_dir)
    print(json.dumps(outcome | {"seconds": round(time.monotonic() - started)}))
    sys.exit(bool(outcome["differences"]))


if __name__ == "__main__":
    main()
