"""`python -m seqops` is the `seqops` command."""

from seqops.cli import main

main(prog_name="seqops")
