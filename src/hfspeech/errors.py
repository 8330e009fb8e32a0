"""The one user-facing error: what went wrong, where, and what to type next."""

import functools
import logging
import os
import signal
import sys
import time
import warnings

# Seconds that the other processes leave the first one to say what all of them may have to say, a wrong flag for
# example: the launcher then ends them.
FIRST_SAYS_IT_S = 10

# How a program ends that was stopped: 75 is "try again" (EX_TEMPFAIL of sysexits.h), 130 is every shell's Ctrl-C.
EXIT_CODES = {signal.SIGTERM: os.EX_TEMPFAIL, signal.SIGINT: 130}

# Callables that are told the exit code of the program when it ends.
end_listeners = []


class UserError(Exception):
    """A mistake in the input that the user can mend.

    Args:
        message: one sentence (or one line for each fault) that says what is wrong, where, and what to type next.
        of_all: whether all processes of the run end by it, having agreed on it: the first one says it.
    """

    exit_code = 2

    def __init__(self, message, of_all=False):
        super().__init__(message)
        self.of_all = of_all


class Interrupted(UserError):
    """Training was stopped by Ctrl-C or SIGTERM; the message says what was saved and how to go on."""

    def __init__(self, message, signum=signal.SIGINT, of_all=False):
        super().__init__(message, of_all)
        self.exit_code = EXIT_CODES[signum]


def explain_errors(main):
    """Wraps a program's main function: a `UserError` ends it with its sentence on stderr and exit code 2.

    SIGTERM ends it as Ctrl-C does, in order, with the exit code of `EXIT_CODES`. Every other exception keeps its
    traceback, because it is a fault of the program and not of its user.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        _show_progress_notes()
        previous = signal.signal(signal.SIGTERM, _terminate)
        code = 1
        try:
            value = main(*args, **kwargs)
            code = 0
            return value
        except UserError as error:
            if error.of_all and _rank():
                code = 0  # else the launcher might end the first process before it has said why
            else:
                _tell(str(error))
                code = error.exit_code
        except RuntimeError as error:
            if not _is_lost_peer(error):
                raise
            _tell("Another process of this run has ended, and says why. Run the same command again to go on.")
        except KeyboardInterrupt as stop:
            print("Stopped." + " Run the same command again to go on." * bool(end_listeners), file=sys.stderr)
            code = EXIT_CODES[stop.args[0] if stop.args else signal.SIGINT]
        except SystemExit as end:
            code = end.code
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher sends it as soon as one process has ended
            while end_listeners:
                end_listeners.pop()(code)
            signal.signal(signal.SIGTERM, previous)
        sys.exit(code)

    return wrapper


def _terminate(signum, frame):
    # As Ctrl-C does it, because libraries that catch every Exception let this one through.
    raise KeyboardInterrupt(signum)


def _rank():
    """Returns the number of this process among those of its run."""
    return int(os.environ.get("RANK", 0))


def _tell(sentence):
    """Writes a sentence on stderr; if all processes of a run have come to the same end, the first one does."""
    from tqdm import tqdm

    if _rank():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(FIRST_SAYS_IT_S)
        sentence = f"process {_rank()}: {sentence}"
    # Not print: the sentence would stand at the end of a progress bar.
    tqdm.write(sentence, file=sys.stderr)


def _is_lost_peer(error):
    """Tells whether a collective failed because another process is gone: gloo's words, and NCCL's class."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return type(error).__name__ == "DistBackendError" or any(word in str(error) for word in words)


def nearest(name, known):
    """Returns the entry of `known` that `name` most likely means, as ` Did you mean X?`, or an empty string."""
    import difflib

    matches = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f" Did you mean {matches[0]}?" if matches else ""


def _show_progress_notes():
    """Shows the package's notes on stderr: all of them in the first process, warnings in the others."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("hfspeech")
    logger.handlers, logger.propagate = [handler], False
    # Libraries warn one another through the user's terminal, who can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning)
    logger.setLevel(logging.WARNING if _rank() else logging.INFO)
