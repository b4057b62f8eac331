"""What every program of the book shares: options from a dataclass, and a user's mistake told in one sentence.

Each program is a dataclass whose fields are its options and whose field docstrings are its help; `tyro` makes the
command line from it. Library code raises `ValueError` for what a user can cause and `assert` for what only a bug can
cause, so the line between "your input" and "our fault" is the exception's type.
"""

import difflib
import os
import sys
import time
from collections.abc import Callable, Iterable


def nearest(kind: str, name: str, names: Iterable[str]) -> str:
    """One sentence for an unknown `name`: the closest known ones first, then all there are."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    guess = f"did you mean {' or '.join(close)}? " if close else ""
    return f"unknown {kind} '{name}': {guess}there are {', '.join(names)}"


def run(main: Callable[[], int | None]) -> None:
    """Call a program's `main` and exit: 0 when it returns None, 2 with one line when the user made a mistake.

    `NANOGPTX_DEBUG=1` in the environment shows the traceback instead of the line.
    """
    try:
        status = main()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            # One of several processes: its work is done, and torch's threads sometimes abort while they are torn down.
            sys.stdout.flush()
            os._exit(status or 0)
        sys.exit(status)
    except BrokenPipeError:  # the reader of our output, say `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        if os.environ.get("NANOGPTX_DEBUG"):
            raise
        if os.environ.get("RANK", "0") != "0":
            # One of several processes: a mistake is made by all, rank 0 tells it, and torchrun ends this one meanwhile.
            time.sleep(3)
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
