"""``python -m torch_fp4ops``."""

import sys

from .cli import main

sys.exit(main())
