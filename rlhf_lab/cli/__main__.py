"""`python -m rlhf_lab.cli`: the command line where no script is installed."""

import sys

from .main import main

sys.exit(main())
