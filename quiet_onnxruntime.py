"""onnxruntime without its telemetry, which writes into the home folder and asks the network from its import on.

Import it from here, never directly: the variable must be there before.
"""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime  # noqa: F401
