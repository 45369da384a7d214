"""`python -m gemini.cli` is the command `gemini-edge`."""

import sys

from gemini.cli import main

sys.exit(main())
