"""Runs a script with its arguments and ends the process at once.

On a CUDA driver that does nothing, PyTorch's threads sometimes abort while the interpreter shuts down.
"""

import os
import runpy
import sys

sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
    status = 0
except SystemExit as end:
    status = int(end.code or 0)
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)
