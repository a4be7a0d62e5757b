"""`python -m tierblk`, or this file by its path, is the same as the `tierblk` command."""

import sys
from pathlib import Path

if not __package__:
    # Started by path, as daemons are (with -P, so that nothing is imported from wherever the user is). An
    # installed tierblk is found anyway; in a checkout that was never installed, this finds it.
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from tierblk.cli import main

if __name__ == "__main__":
    sys.exit(main())
