"""Measures the machine at hand and describes it: see docs/hardware.md, `fxzero calibrate`."""

from fxzero.calibrate.machine import Calibration

__all__ = ["Calibration"]
