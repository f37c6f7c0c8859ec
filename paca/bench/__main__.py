"""`python -m paca.bench`, which is how the benchmark starts itself again in a prepared environment."""

import sys

from paca.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
