"""`python -m fxfeedback` is the command line."""

import sys

from fxfeedback.commands.main import main

sys.exit(main())
