"""`python -m loraclr` is `loraclr`."""

from __future__ import annotations

import sys

from loraclr.cli import main

sys.exit(main())
