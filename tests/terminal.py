"""Running a command inside a terminal, to see what a person would."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path


def run_in_terminal(command: Sequence[str], folder: Path, columns: int = 100) -> tuple[int, str]:
    """Return the exit code of `command` and all that it wrote to the terminal."""
    ours, theirs = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns)}
    environment.pop("NO_COLOR", None)
    written = b""
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, cwd=folder, env=environment) as process:
        os.close(theirs)
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # how Linux reports that the other side is closed
                break
            if not piece:
                break
            written += piece
    os.close(ours)
    return process.returncode, written.decode()
