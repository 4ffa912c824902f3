"""`python -m fxzero.cli` is `fxzero`."""

import sys

from fxzero.cli import main

if __name__ == "__main__":
    sys.exit(main())
