"""`python -m fa4_prefixlm` is the command `fa4-prefixlm`."""

import sys

from fa4_prefixlm.tools.cli import main

sys.exit(main())
