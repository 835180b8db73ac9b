"""What dfqvit and some of its extras need, a requirement a line: python scripts/requirements.py EXTRA ...

pip has no option to install what a project needs and not the project, which `make setup` compiles meanwhile.
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
print("\n".join(sum((project["optional-dependencies"][extra] for extra in sys.argv[1:]), project["dependencies"])))
