"""OpenVINO without its telemetry, which writes into the home folder and sends an event at every import.

Import it from here, never directly.
"""

import sys

sys.modules["openvino_telemetry"] = None  # importing it fails then, and OpenVINO takes the stub that it brings along

import openvino  # noqa: E402, F401
