"""`python -m raylm.cli`."""

import sys

from raylm.cli import main

if __name__ == "__main__":
    sys.exit(main())
