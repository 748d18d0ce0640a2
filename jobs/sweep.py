"""ray job submit --working-dir . -- python -m jobs.sweep tune/lora.yaml dir=/shared/sweeps/lora"""

import sys

from raylm.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
