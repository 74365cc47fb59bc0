"""``python -m obmlite`` is the command line."""

import sys

from obmlite.cli import main

sys.exit(main())
