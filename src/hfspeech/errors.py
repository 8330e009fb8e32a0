"""The one user-facing error: what went wrong, where, and what to type next."""

import functools
import logging
import os
import sys
import warnings


class UserError(Exception):
    """A mistake in the input that the user can mend.

    Args:
        message: one sentence (or one line for each fault) that says what is wrong, where, and what to type next.
    """

    exit_code = 2


class Interrupted(UserError):
    """Training was stopped by Ctrl-C or SIGTERM; the message says what was saved and how to go on."""

    exit_code = 130


def explain_errors(main):
    """Wraps a program's main function: a `UserError` ends it with its sentence on stderr and exit code 2.

    Every other exception keeps its traceback, because it is a fault of the program and not of its user.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        _show_progress_notes()
        try:
            return main(*args, **kwargs)
        except UserError as error:
            from tqdm import tqdm

            rank = int(os.environ.get("RANK", 0))
            # Not print: the sentence would stand at the end of a progress bar.
            tqdm.write(f"process {rank}: {error}" if rank else str(error), file=sys.stderr)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            print("Stopped.", file=sys.stderr)
            sys.exit(Interrupted.exit_code)

    return wrapper


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
