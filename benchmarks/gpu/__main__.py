"""Run the steps; see ``benchmarks.gpu.runner``."""

import sys

from benchmarks.gpu.runner import main

sys.exit(main())
