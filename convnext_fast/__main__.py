"""``python -m convnext_fast`` is the command ``convnext-fast``; ``torchrun -m convnext_fast train …`` works too."""

import sys

from .cli.commands import main

sys.exit(main())
