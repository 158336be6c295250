"""ONNX Runtime, imported with its telemetry off. Whatever needs it imports it from here.

From 1.29 on, its wheels for Linux write a device id into the home folder and look their maker's
collector up, both as soon as they are imported. `onnxruntime.disable_telemetry_events` comes too
late for that; this variable of the environment does not. A value that the user has set stays.
"""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

__all__ = ["onnxruntime"]
