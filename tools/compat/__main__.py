"""`python -m tools.compat`: see tools/compat/main.py."""

import sys

from tools.compat.main import main

if __name__ == "__main__":
    sys.exit(main())
