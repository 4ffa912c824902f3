"""A model in a loop of one's own, its parameters sharded over ranks: torchrun --nproc-per-node 2 this_file.py

fxzero.shard lets parameters rest as rows; torch.compile(backend=fxzero) gathers and reduces as the plan says.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import fxzero
from fxzero.backend import fxzero_backend, programs  # once fxzero is installed, backend="fxzero" will do

STEPS = 20


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def main() -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(256, 64), *(Block(64) for _ in range(4)), nn.Linear(64, 256))
    fxzero.shard(model, {"recompute": ["[1-4]"], "bucket_bytes": "256 KiB"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  # after shard: it owns rows
    compiled = torch.compile(model, backend=fxzero_backend)

    torch.manual_seed(dist.get_rank())  # from here on ranks draw batches of their own
    for step in range(STEPS):
        x = torch.randint(256, (8, 32))
        loss = F.cross_entropy(compiled(x).flatten(0, 1), x.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0 and step % 5 == 4:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    if dist.get_rank() == 0:
        forward, backward = programs()
        print(f"forward gathers {str(forward).count('all_gather ')} parameters", end=", ")
        print(f"backward {str(backward).count('all_gather ')}, and reduces {str(backward).count('reduce_scatter ')}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
