"""`python -m tierblk` is the same as the `tierblk` command."""

import sys

from tierblk.cli import main

if __name__ == "__main__":
    sys.exit(main())
