"""Tensors on their way between the device, host memory and files; knows nothing of graphs.

`swapper` is the page to read first. Below it: `places` (where bytes rest, and in which order transfers touch them),
`workers` (threads that move them), `device_copies` (between the device and host memory), `files` (past the page
cache), `host_memory` (outside torch's allocators), `run_directory` (whose files are removed when), `layout` (a
tensor as bytes).
"""

from fxzero.runtime.swap.swapper import Stored, Swapper, Traffic, Transfer

__all__ = ["Stored", "Swapper", "Traffic", "Transfer"]
