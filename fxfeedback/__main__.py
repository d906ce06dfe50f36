"""`python -m fxfeedback` is the command line."""

import sys

from fxfeedback.command_line import main

sys.exit(main())
