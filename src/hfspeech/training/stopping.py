"""How a run is asked to stop, and how it does: Ctrl-C and SIGTERM, in training and in its dataloader workers."""

import logging
import os
import signal
import threading
import time

from transformers.trainer_utils import seed_worker

from hfspeech.errors import EXIT_CODES, Interrupted

ECHO_S = 5.0  # a cluster signals all processes, and their launcher hands on to them what it got itself

logger = logging.getLogger("hfspeech")


class StopRequest:
    """Remembers that Ctrl-C or SIGTERM came, by its number; a second one ends the process at once."""

    def __init__(self):
        self.received = 0
        self.process = os.getpid()

    def note(self, signum):
        """Takes down a signal that has reached this process, or another one of this run; 0 is none."""
        if not self.received:
            self.received, self.since = int(signum), time.monotonic()

    def __call__(self, signum, frame):
        if os.getpid() != self.process:  # a process that has been forked and is not yet what it is to be
            return
        if not self.received:
            self.note(signum)
            logger.warning("Stopping after this step: saving a checkpoint (once more to stop at once, without saving)")
        elif signum == signal.SIGINT or time.monotonic() - self.since > ECHO_S:
            raise SystemExit(EXIT_CODES[signum])


def _shield():
    if isinstance(signal.getsignal(signal.SIGTERM), StopRequest):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _unshield():
    if isinstance(signal.getsignal(signal.SIGTERM), StopRequest):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


# While a run can be stopped, its dataloader workers are born with SIGTERM blocked: torch has them die of it before
# `begin_worker` is called.
os.register_at_fork(before=_shield, after_in_parent=_unshield)


def begin_worker(worker_id, num_workers, rank):
    """Seeds a dataloader worker; of the signals that reach every process it obeys its own process's only.

    Launchers and schedulers send theirs to all processes of a run, which needs its workers to stop well.
    """
    seed_worker(worker_id, num_workers, rank)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = os.getppid()

    def wait():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class Stoppable:
    """While open, Ctrl-C and SIGTERM ask for a stop; an evaluation cut short ends in a saved checkpoint."""

    def __init__(self, trainer):
        self.trainer = trainer

    def __enter__(self):
        signals = (signal.SIGINT, signal.SIGTERM)
        self.previous = {number: signal.signal(number, self.trainer.stop_request) for number in signals}

    def __exit__(self, kind, error, traceback):
        trainer, saved = self.trainer, ""
        try:
            if kind is KeyboardInterrupt and trainer.is_in_train:
                saved = trainer._save_what_is_trained()
        finally:
            for number, handler in self.previous.items():
                signal.signal(number, handler)
        if kind is KeyboardInterrupt:
            raise Interrupted(
                f"Stopped while evaluating.{saved or ' Run the same command again to go on.'}",
                trainer.stop_request.received,
                of_all=True,
            ) from None
