"""`python -m macosnet_hf` is the command `macosnet`."""

import sys

from .commands.main import main

if __name__ == "__main__":
    sys.exit(main())
