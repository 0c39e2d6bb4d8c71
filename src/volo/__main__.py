"""`python -m volo` is `volo`; torchrun starts it this way."""

import sys

from volo.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
