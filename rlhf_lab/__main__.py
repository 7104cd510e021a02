"""`python -m rlhf_lab`: the command line where no script is installed."""

import sys

from .cli.main import main

sys.exit(main())
