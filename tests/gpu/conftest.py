"""Runs on a bare machine too: no packages beside JAX, numpy and pytest, no settings elsewhere."""

import os
import sys
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several workers share the device
sys.path.insert(0, str(Path(__file__).parent.parent))
