"""`python -m paca`, where the `paca` command is not on the path."""

import sys

from paca.cli import main

sys.exit(main())
