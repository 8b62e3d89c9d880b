"""`python -m fa4_prefixlm` is the command `fa4-prefixlm`."""

import sys

from .cli import main

sys.exit(main())
