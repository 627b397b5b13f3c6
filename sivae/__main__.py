"""`python -m sivae ...` and `torchrun ... -m sivae ...` are the `sivae` command."""

import sys

from sivae.cli import main

if __name__ == "__main__":
    sys.exit(main())
