"""`python -m fa4_prefixlm.tools.check` is the command `fa4-prefixlm check`."""

import sys

from fa4_prefixlm.tools.check.command import run

sys.exit(run())
