"""`python -m fa4_prefixlm.check` is the command `fa4-prefixlm check`."""

import sys

from .command import run

sys.exit(run())
