"""OpenVINO without its telemetry, which writes into the home folder and sends an event at every import.

Import it from here, never directly.
"""

import os
import sys

from settings import cpu_has

sys.modules["openvino_telemetry"] = None  # importing it fails then, and OpenVINO takes the stub that it brings along
# With AMX, OpenVINO's int8 kernels are made anew for each length, at 4.5 CPU seconds and 4 GB: so it goes without AMX.
# Not on CPUs without AVX-512, where the limit would shut out AVX-VNNI.
if cpu_has("avx512_vnni"):
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")

import openvino  # noqa: E402, F401
