"""ray job submit --working-dir . -- python -m jobs.train examples/tiny.yaml run.dir=/shared/runs/tiny"""

import sys

from raylm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
