"""``python -m kvcm_ray.cli``: the same as ``kvcm``."""

import sys

from kvcm_ray.cli.main import main

sys.exit(main())
