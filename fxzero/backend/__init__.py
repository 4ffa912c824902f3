"""The torch.compile backend "fxzero": captured graphs as programs of fxzero, in a loop of the user's own.

`torch.compile(model, backend="fxzero", options={"plan": plan})`; docs/backend.md says what a plan may ask. With
`fxzero.shard(model, plan)` before it parameters are sharded over ranks.
"""

from fxzero.backend.accelerate_name import allow_in_accelerate
from fxzero.backend.door import fxzero_backend
from fxzero.backend.look import programs
from fxzero.backend.shard_model import shard

__all__ = ["allow_in_accelerate", "fxzero_backend", "programs", "shard"]
