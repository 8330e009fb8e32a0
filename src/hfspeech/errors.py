"""The one user-facing error: what went wrong, where, and what to type next."""

import functools
import logging
import os
import signal
import sys
import warnings

# How a program ends that was stopped: 75 is "try again" (EX_TEMPFAIL of sysexits.h), 130 is every shell's Ctrl-C.
EXIT_CODES = {signal.SIGTERM: os.EX_TEMPFAIL, signal.SIGINT: 130}

# Callables that are told the exit code of the program when it ends.
end_listeners = []


class UserError(Exception):
    """A mistake in the input that the user can mend.

    Args:
        message: one sentence (or one line for each fault) that says what is wrong, where, and what to type next.
    """

    exit_code = 2


class Interrupted(UserError):
    """Training was stopped by Ctrl-C or SIGTERM; the message says what was saved and how to go on."""

    def __init__(self, message, signum=signal.SIGINT):
        super().__init__(message)
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
            from tqdm import tqdm

            rank = int(os.environ.get("RANK", 0))
            # Not print: the sentence would stand at the end of a progress bar.
            tqdm.write(f"process {rank}: {error}" if rank else str(error), file=sys.stderr)
            code = error.exit_code
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
    logger.setLevel(logging.WARNING if int(os.environ.get("RANK", 0)) else logging.INFO)
