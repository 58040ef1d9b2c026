"""What the watched tests (`watch.py`) and the run that started them (`gpu.py`) agree on; the standard library only."""

import json
from pathlib import Path
from typing import Any

# The exit code of a process that another one has to continue.
GOES_ON = 77
# Printed before each test, where a tool's reports have to be told apart.
MARKER = "seqops-test: "
# Beside a file of lines: where a test stood that ran too long.
TRACE = ".trace"


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; none where there is no file. A line that a dying process cut short is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines
