"""A Llama of 8 billion parameters on the meta device, to look at its training step without holding it.

    fxzero dump examples/llama_meta.py:llama_8b --world 64 --zero 3 --format report
    fxzero dump examples/llama_meta.py:llama_tiny --world 4 --zero 3

Each function without parameters returns what `fxzero dump` asks for: model, optimizer and an example batch, here of
tokens and targets. Nothing has memory; the shapes are those of Llama 3.1 8B.
Shapes: B batch of one rank, T tokens, D model width, H heads, K heads of keys and values, E width of a head,
F width of the perceptron, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn


def rotate(x_BHTE, cos_TE, sin_TE):
    """Each pair of features is turned by an angle that grows with the position (rotary embedding)."""
    a, b = x_BHTE.chunk(2, dim=-1)
    cos_TE, sin_TE = cos_TE.to(x_BHTE.dtype), sin_TE.to(x_BHTE.dtype)  # tables stay in fp32 under precision="bf16"
    return x_BHTE * cos_TE + torch.cat((-b, a), dim=-1) * sin_TE


class Attention(nn.Module):
    """Causal attention; several query heads share one head of keys and values."""

    def __init__(self, *, dim, heads, kv_heads):
        super().__init__()
        self.heads, self.kv_heads, width = heads, kv_heads, dim // heads
        self.wq = nn.Linear(dim, heads * width, bias=False)
        self.wk = nn.Linear(dim, kv_heads * width, bias=False)
        self.wv = nn.Linear(dim, kv_heads * width, bias=False)
        self.wo = nn.Linear(heads * width, dim, bias=False)

    def forward(self, x_BTD, cos_TE, sin_TE):
        q_BHTE = self.wq(x_BTD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_BKTE = self.wk(x_BTD).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        v_BKTE = self.wv(x_BTD).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        q_BHTE, k_BKTE = rotate(q_BHTE, cos_TE, sin_TE), rotate(k_BKTE, cos_TE, sin_TE)
        shared = self.heads // self.kv_heads
        k_BHTE, v_BHTE = k_BKTE.repeat_interleave(shared, 1), v_BKTE.repeat_interleave(shared, 1)
        mixed_BHTE = F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, is_causal=True)
        return self.wo(mixed_BHTE.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """The gated perceptron: silu(w1 x) * w3 x, back to the model's width by w2."""

    def __init__(self, *, dim, ffn):
        super().__init__()
        self.w1 = nn.Linear(dim, ffn, bias=False)
        self.w2 = nn.Linear(ffn, dim, bias=False)
        self.w3 = nn.Linear(dim, ffn, bias=False)

    def forward(self, x_BTD):
        return self.w2(F.silu(self.w1(x_BTD)) * self.w3(x_BTD))


class Layer(nn.Module):
    """Attention, then the perceptron, each on normalized input and added to the residual stream."""

    def __init__(self, *, dim, ffn, heads, kv_heads):
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim, eps=1e-5), nn.RMSNorm(dim, eps=1e-5)
        self.attention = Attention(dim=dim, heads=heads, kv_heads=kv_heads)
        self.feed_forward = MLP(dim=dim, ffn=ffn)

    def forward(self, x_BTD, cos_TE, sin_TE):
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), cos_TE, sin_TE)
        return x_BTD + self.feed_forward(self.ffn_norm(x_BTD))


class Llama(nn.Module):
    """Mean negative log-likelihood of the targets, in nats per token."""

    def __init__(self, *, layers, dim, ffn, heads, kv_heads, vocab, seq):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        sizes = {"dim": dim, "ffn": ffn, "heads": heads, "kv_heads": kv_heads}
        self.layers = nn.ModuleList(Layer(**sizes) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.output = nn.Linear(dim, vocab, bias=False)
        width = dim // heads
        frequencies = 500_000.0 ** (-torch.arange(0, width, 2) / width)
        angles = torch.outer(torch.arange(seq), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens_BT, targets_BT):
        x_BTD = self.embed(tokens_BT)
        cos_TE, sin_TE = self.cos[: tokens_BT.shape[1]], self.sin[: tokens_BT.shape[1]]
        for layer in self.layers:
            x_BTD = layer(x_BTD, cos_TE, sin_TE)
        logits_BTV = self.output(self.norm(x_BTD))
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def llama(*, layers=32, dim=4096, ffn=14336, heads=32, kv_heads=8, vocab=128256, seq=2048, batch=1):
    """Model, optimizer and batch of any size, on the meta device."""
    with torch.device("meta"):
        model = Llama(layers=layers, dim=dim, ffn=ffn, heads=heads, kv_heads=kv_heads, vocab=vocab, seq=seq)
        tokens_BT = torch.zeros(batch, seq, dtype=torch.int64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    return model, optimizer, (tokens_BT, tokens_BT.clone())


def llama_8b():
    """Llama 3.1 8B: 32 layers, 8.03 billion parameters."""
    return llama()


def llama_70b(layers=80, batch=1, seq=8192):
    """Llama 3 70B: 70.6 billion parameters; precision="bf16" is what it is trained in."""
    return llama(layers=layers, dim=8192, ffn=28672, heads=64, kv_heads=8, seq=seq, batch=batch)


def llama_8b_64_layers():
    """The same with twice the layers."""
    return llama(layers=64)


def llama_tiny():
    """The same program in small: two layers, for reading a whole dump."""
    return llama(layers=2, dim=64, ffn=128, heads=4, kv_heads=2, vocab=256, seq=32, batch=2)
