"""`python -m dxmi_ext`: the command `dxmi`."""

import sys

from dxmi_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
