"""Print the pins of requirement files whose packages this Python does not have in any version.

python requirements/lacking.py FILE...
"""

import re
import sys
from importlib.metadata import distributions


def canonical(name: str) -> str:
    """Spell a package's name as indexes do."""
    return re.sub(r"[-_.]+", "-", name).lower()


present = {canonical(distribution.name) for distribution in distributions()}
for path in sys.argv[1:]:
    with open(path, encoding="utf-8") as file:
        pins = [line.strip() for line in file if "==" in line and not line.startswith("#")]
    for pin in pins:
        if canonical(pin.partition("==")[0]) not in present:
            print(pin)
