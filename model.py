"""RNoPE-SWA and the hybrids around it: a decoder-only transformer whose layers differ in two facts,
where their positions come from and how far they see.

    paper (arXiv 2501.18795)        here
    ----------------------------    ------------------------------------------------------------
    RoPE layer                      letter R: rotated queries and keys, sees everything before it
    NoPE layer                      letter N: no position signal at all, sees everything before it
    SWA layer                       letter S: rotated, sees the last `window` keys, itself included
    W, the window                   window
    RNoPE-SWA (3 : 1)               pattern "SSSN", tiled over the layers; preset "rnope-swa"
    RoPE base, theta                rope_theta
    QK-Norm                         qk_norm, on rotated layers, before the rotation
    (not in the paper)              W: a window without positions; C: rotated, chunked (Llama 4)

Shapes: B rows, T query tokens, S key tokens (S >= T: the queries are the last T of them), H query
heads, G = n_kv_head key/value heads (H % G == 0), d = n_embd, D = d / H, V vocabulary. Attention
tensors are (B, T, H, D).
"""

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class UsageError(ValueError):
    """Something the user can put right. The scripts print it as one line and exit with status 2."""


def flag(default, help, **more):
    """A dataclass field that is also a command-line flag: its name, default and help, once."""
    return field(default=default, metadata=dict(help=help, **more))


def check_ranges(config):
    """UsageError where a field breaks choices, each (of a,b), least, above or most of its flag."""
    for f in fields(config):
        value, rule = getattr(config, f.name), f.metadata
        if value not in rule.get("choices", [value]):
            raise UsageError(f"--{f.name}={value}: choose from {', '.join(rule['choices'])}")
        if "each" in rule and set(value.split(",")) - set(rule["each"]):
            raise UsageError(f"--{f.name}={value}: choose from {', '.join(rule['each'])}")
        if "least" in rule and not rule["least"] <= value < math.inf:
            raise UsageError(f"--{f.name}={value}: it must be {rule['least']} or more")
        if "above" in rule and not rule["above"] < value < math.inf:
            raise UsageError(f"--{f.name}={value}: it must be more than {rule['above']}")
        if "most" in rule and value > rule["most"]:
            raise UsageError(f"--{f.name}={value}: it must be {rule['most']} or less")


class LayerKind(NamedTuple):
    rope: bool  # rotate queries and keys by position?
    span: str  # "full", "window" or "chunk"


LAYERS = {
    "R": LayerKind(True, "full"),
    "N": LayerKind(False, "full"),
    "S": LayerKind(True, "window"),
    "W": LayerKind(False, "window"),
    "C": LayerKind(True, "chunk"),
}

PRESETS = {
    "rnope-swa": dict(pattern="SSSN"),  # three local layers, then one that sees everything
    "rnope-swa-log": dict(pattern="SSSN", log_scale=True),  # and sharper queries as rows grow
    "rope": dict(pattern="R"),
    "nope": dict(pattern="N"),
    "qk-norm": dict(pattern="R", qk_norm=True),
    "rnope": dict(pattern="RN"),
    "swa": dict(pattern="S"),  # windows only: the control that cannot retrieve
    "smollm3": dict(pattern="RRRN"),
    "llama4": dict(pattern="CCCN", rope_theta=5e5, attn_scale=0.1),  # window = chunk
    "gemma3": dict(pattern="SSSSSR", rope_theta=1e4, rope_theta_full=1e6, qk_norm=True),
    "olmo3": dict(pattern="SSSR", rope_theta=5e5, qk_norm=True),
    "gpt-oss": dict(pattern="SR", rope_theta=1.5e5),  # without its learned sink logits
    "swan": dict(pattern="NSSS", log_scale=True),
}


@dataclass
class ModelConfig:
    vocab_size: int = flag(50304, "token ids the model knows", least=1)
    block_size: int = flag(1024, "training context, tokens; a model may be run beyond it", least=1)
    n_layer: int = flag(8, "blocks", least=1)
    n_head: int = flag(8, "query heads", least=1)
    n_kv_head: int = flag(0, "key/value heads (GQA); 0: as many as n_head", least=0)
    n_embd: int = flag(512, "width of the residual stream", least=1)
    ffn_dim: int = flag(0, "hidden width of the SwiGLU; 0: 8/3 n_embd, up to a 64", least=0)
    pattern: str = flag("SSSN", "kinds of layer, tiled over the depth: " + ", ".join(LAYERS))
    window: int = flag(128, "keys an S or W layer may see, itself included; C: its chunk", least=1)
    rope_theta: float = flag(1e4, "base of the rotary frequencies", above=0)
    rope_theta_full: float = flag(0.0, "base on R layers; 0: rope_theta", least=0)
    qk_norm: bool = flag(False, "normalise q and k per head before they are rotated")
    log_scale: bool = flag(False, "N layers: q *= max(1, ln(pos + 1) / ln(block_size))")
    attn_scale: float = flag(0.0, "N: q *= 1 + attn_scale ln(1 + (pos + 1) // block_size)", least=0)
    logit_scale: float = flag(1.0, "factor on the logits", above=0)
    norm_eps: float = flag(1e-5, "epsilon of the LayerNorms", above=0)
    attention: str = flag("auto", "path of attention",
                          choices=("auto", "mask", "blocks", "flash", "flex"))

    def __post_init__(self):
        check_ranges(self)
        self.n_kv_head = self.n_kv_head or self.n_head
        self.ffn_dim = self.ffn_dim or -(-8 * self.n_embd // 3 // 64) * 64
        if self.n_embd % self.n_head or self.n_embd // self.n_head % 2:
            raise UsageError(f"n_embd={self.n_embd} over n_head={self.n_head}: heads need an even, "
                             "whole width")
        if self.n_head % self.n_kv_head:
            raise UsageError(f"n_head={self.n_head}: not a multiple of n_kv_head={self.n_kv_head}")
        unknown = ", ".join(sorted(set(self.pattern) - set(LAYERS)))
        if unknown or not self.pattern:
            raise UsageError(f"pattern {self.pattern!r}: use letters of {', '.join(LAYERS)}"
                             + (f", not {unknown}" if unknown else ""))
        self.layers = (self.pattern * self.n_layer)[: self.n_layer]  # a letter a layer
        self.head_dim = self.n_embd // self.n_head
        missing = "".join(sorted(set(self.pattern) - set(self.layers)))
        if missing:
            raise UsageError(f"pattern {self.pattern!r} over {self.n_layer} layers never builds "
                             f"{missing!r}: use --n_layer={len(self.pattern)} or more, or a "
                             "shorter --pattern")

    def keys_seen(self, letter, T):
        """How many keys a query of a T-token row sees, averaged over the row."""
        i, W = torch.arange(T), self.window
        before = dict(full=i, window=i.clamp(max=W - 1), chunk=i % W)[LAYERS[letter].span]
        return (before + 1).double().mean().item()


# ---- Attention: one rule for who sees whom, and four ways to compute it -------------------------


def visible(i, j, window=None, chunked=False):
    """True where the query at position i may see the key at position j: the only mask rule here.

    Causal; with a window, the last `window` keys counting i itself; chunked, the keys of i's own
    chunk of `window` positions. i and j are integer tensors that broadcast.
    Source: arXiv 2501.18795; chunks as in Llama 4. Flash kernels want the number of keys to the
    LEFT of the query: that is window - 1.
    """
    seen = j <= i
    if window is None:
        return seen
    return seen & (i // window == j // window if chunked else i - j < window)


def attend(q, k, v, window=None, chunked=False, path="auto"):
    """Causal attention of the last T of S positions over what `visible` lets them see.

    q (B, T, H, D), k and v (B, S, G, D) -> (B, T, H, D). window None means everything before.
    Chunked, k must begin at a chunk's first position. Softmax scale is 1 / sqrt(D).
    path: "mask" is the definition, S x T memory; the others are linear in S, or nearly. "auto" is
    flash on CUDA in half precision, blocks elsewhere. "flex" is flash, but for the windows of a
    compiled model: faster, and slower to compile. Raises UsageError for these two anywhere else.
    """
    S = k.size(1)
    asked, path = path, path_taken(path, q.device, q.dtype, q.size(-1))
    if path == "mask":
        return attend_mask(q, k, v, window, chunked)
    if window is None or window >= S:  # nothing is out of sight
        if q.size(1) == S:
            return sdpa(q, k, v, causal=True)
        # Not is_causal: SDPA takes the queries for the first of the keys, here they are the last.
        return attend_flash(q, k, v) if path == "flash" else attend_mask(q, k, v)
    if path == "flash":
        # FlexAttention needs compiling, and lacks kernels for some short rows and wide heads.
        flex = asked == "flex" and torch.compiler.is_compiling()
        flex = flex and q.size(1) == S >= 128 and 16 <= q.size(-1) <= 128
        return (attend_flex if flex else attend_flash)(q, k, v, window, chunked)
    return attend_blocks(q, k, v, window, chunked)


def path_taken(path, device, dtype, head_dim):
    """What "auto" means there, and "flex" where it has no kernel; UsageError if flash has none."""
    half = dtype in (torch.bfloat16, torch.float16)
    flash_runs = device.type == "cuda" and half and head_dim % 8 == 0 and head_dim <= 256
    if path in ("flash", "flex") and not flash_runs:
        raise UsageError(f"--attention={path} needs CUDA, bfloat16, and heads of 8, 16, ... 256")
    if path == "auto":
        return "flash" if flash_runs else "blocks"
    return "flash" if path == "flex" else path


def sdpa(q, k, v, mask=None, causal=False):
    """torch's scaled_dot_product_attention on (B, T, H, D) tensors, with G <= H key/value heads."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or G, T, D)
    gqa = q.size(1) != k.size(1)
    if gqa and q.is_cuda and q.dtype == torch.float32:  # no kernel linear in memory has both
        k, v, gqa = *(x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v)), False
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=gqa)
    return y.transpose(1, 2)


def attend_mask(q, k, v, window=None, chunked=False):
    """The definition: every score computed, the invisible ones masked. The reference in tests."""
    T, S = q.size(1), k.size(1)
    i, j = torch.arange(S - T, S, device=q.device), torch.arange(S, device=q.device)
    return sdpa(q, k, v, mask=visible(i[:, None], j, window, chunked))


def attend_blocks(q, k, v, window, chunked=False):
    """Blocks of queries against the few keys they can see: linear memory in plain SDPA.

    keys      |--back--|--block--|                     A block of queries needs its own keys and
    queries            |--block--|                     the `back` before them. All blocks but the
    keys               |--back--|--block--|            first look alike: one batch for SDPA, under
    queries                     |--block--|            one mask of block x (back + block).
    """
    T, early = q.size(1), k.size(1) - q.size(1)  # early: keys from before the first query
    if chunked:
        back, block, drop = 0, window, early // window * window
        first = min(T, block - (early - drop))  # what is left of the chunk begun
    else:
        back, block, drop = window, max(window, 128), max(0, early - window)  # 128: fuller blocks
        first = min(T, block)
    k, v, end = k[:, drop:], v[:, drop:], early - drop + first  # no query sees those dropped
    y = attend_mask(q[:, :first], k[:, :end], v[:, :end], window, chunked)
    if first == T:
        return y
    n = -(-(T - first) // block)  # blocks still to do
    pad = (0, 0, 0, 0, 0, n * block - (T - first))  # padded keys come last: they are never seen
    q = F.pad(q[:, first:], pad).unflatten(1, (n, block)).flatten(0, 1)  # (B n, block, H, D)
    k, v = (F.pad(x[:, end - back :], pad).unfold(1, back + block, block) for x in (k, v))
    k, v = (x.movedim(-1, 2).flatten(0, 1) for x in (k, v))  # (B n, back + block, G, D)
    j = torch.arange(back + block, device=q.device)
    rest = sdpa(q, k, v, mask=visible(j[back:, None], j, window, chunked))
    rest = rest.unflatten(0, (-1, n)).flatten(1, 2)[:, : T - first]
    return torch.cat((y, rest), 1)


def attend_flash(q, k, v, window=None, chunked=False):
    """torch's varlen_attn: no mask, no padding, any length. A chunk is a sequence of its own.

    The rows are laid end to end, and cu_q and cu_k say where each sequence begins: with B = 2 and
    S = T = 5, at [0, 5, 10]; in chunks of 4, at [0, 4, 5, 9, 10].
    """
    from torch.nn.attention.varlen import varlen_attn

    (B, T, H, D), (S, G) = q.shape, k.shape[1:3]
    step = window if chunked else S
    ends = torch.arange(step, S + step, step, device=q.device).clamp(max=S)  # of a row's pieces
    row = torch.arange(B, device=q.device)[:, None]
    cu_k = F.pad((row * S + ends).flatten(), (1, 0)).int()
    cu_q = F.pad((row * T + (ends - (S - T)).clamp(min=0)).flatten(), (1, 0)).int()
    left = window - 1 if window is not None and not chunked else -1
    if G != H:  # torch 2.11's varlen_attn has no enable_gqa; expanding works on every version
        k, v = (x.repeat_interleave(H // G, 2) for x in (k, v))
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    y = varlen_attn(q, k, v, cu_q, cu_k, min(T, step), min(S, step), window_size=(left, 0))
    return y.view(B, T, H, D)


def tiles_seen(T, window, chunked, tile, device=None):
    """Which tiles of queries see some key of which tiles of keys, and which see every one.

    Two bools (n, n) over the n tiles of T positions: by the nearest pair of a query and a key, and
    by the farthest.
    """
    first = torch.arange(0, T, tile, device=device)
    last, tops = first + tile - 1, first[:, None]
    some = visible(tops, last, window, chunked) | (tops == first)
    return some, visible(last[:, None], first, window, chunked) & (tops > last)


def attend_flex(q, k, v, window, chunked=False, tile=128):
    """torch's FlexAttention: in a compiled model, a kernel made around `visible`. T = S.

    It is told which tiles of queries and keys it may skip, and which it need not mask: in four
    tables of (T / tile)^2 numbers.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    def listed(tiles):
        order = tiles.int().argsort(dim=-1, descending=True, stable=True)
        return tiles.sum(-1)[None, None].int(), order[None, None].int()

    T, gqa = q.size(1), q.size(2) != k.size(2)
    some, every = tiles_seen(T, window, chunked, tile, q.device)
    mask = BlockMask.from_kv_blocks(
        *listed(some & ~every), *listed(every), BLOCK_SIZE=tile, seq_lengths=(T, T),
        mask_mod=lambda b, h, i, j: visible(i, j, window, chunked))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=gqa).transpose(1, 2)


def attend_cached(q, k, v, held, path="auto"):
    """One new query a row, which sees the first `held` keys of a cache: all that it holds.

    q (B, 1, H, D), k and v (B, size, G, D), held (1,) int64 on their device -> (B, 1, H, D).
    On the flash path the host never reads `held`, so one CUDA graph serves while the cache fills:
    varlen_attn takes from a tensor where its sequences begin. The keys of a row are n of them, each
    with the H / G queries that share a head's keys, to fill the card however few the rows are; the
    softmaxes of the n are then joined (Flash-Decoding, Dao et al. 2023). A last one, of no query,
    skips the empty slots.
    """
    if path_taken(path, q.device, q.dtype, q.size(-1)) != "flash":
        return sdpa(q, k[:, : int(held)], v[:, : int(held)])
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    (B, _, H, D), (size, G) = q.shape, k.shape[1:3]
    R, n = H // G, max(1, min(256 // (B * G), size // 256))  # R queries share a head's keys
    row, piece = torch.arange(B, device=q.device)[:, None], torch.arange(n + 1, device=q.device)
    ends = held * piece // n  # of a row's pieces, and the beginning of the first
    cu_k = F.pad((row * size + ends).flatten(), (0, 1), value=B * size).int()
    cu_q = F.pad(((row * n + piece) * R).flatten(), (0, 1), value=B * n * R).int()
    q = q.view(B, 1, G, R, D).transpose(2, 3).expand(B, n, R, G, D).reshape(-1, G, D)
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    y, lse = varlen_attn(q, k, v, cu_q, cu_k, R, size, return_aux=AuxRequest(lse=True))
    lse = lse.view(G, B, n, R).masked_fill((ends[1:] == ends[:-1])[:, None], -math.inf)
    share = lse.softmax(2).permute(1, 2, 3, 0)[..., None]  # (B, n, R, G, 1)
    y = (y.view(B, n, R, G, D) * share).sum(1).to(q.dtype)
    return y.transpose(1, 2).reshape(B, 1, H, D)


# ---- Positions ----------------------------------------------------------------------------------


@torch.compiler.assume_constant_result  # or the compiler would redo sin and cos in every kernel
def rotary(start, T, head_dim, thetas, device):
    """cos and signed sin of the RoPE angles at start .. start + T - 1: (len(thetas), 2, T, 1, D).

    A pair (a, b) of channels turns into (a cos - b sin, b cos + a sin): so the table of sines has
    (-sin, sin) for each pair, to be multiplied with (b, a). Always fp32, and made for the length
    asked for: there is no table to outgrow.
    """
    power = -torch.arange(0, head_dim, 2, device=device).float() / head_dim
    freqs = torch.stack([theta**power for theta in thetas])[:, None]  # (thetas, 1, D / 2)
    angles = (start + torch.arange(T, device=device))[:, None].float() * freqs
    cos, sin = angles.cos(), angles.sin()
    pairs = torch.stack((cos, cos), -1), torch.stack((-sin, sin), -1)  # (thetas, T, D / 2, 2) each
    return torch.stack(pairs, 1).flatten(-2)[..., None, :]


def rotate(x, cos, sin):
    """Rotate the (even, odd) pairs of x (B, T, H, D): the interleaved form, as in cohere2."""
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (x.float() * cos + swapped.float() * sin).to(x.dtype)


class Cache:
    """Keys and values of one layer, no more than it can still see: slot = position % size.

    size is the window, or `most`, the number of tokens to come, where that is less.
    """

    def __init__(self, shape, span, most, **like):
        self.k, self.v = torch.empty(shape, **like), torch.empty(shape, **like)  # (B, size, G, D)
        self.span, self.most = span, most

    def update(self, k, v, start):
        """Store the n tokens from position `start`; return all keys and values they may see.

        k, v: (B, n, G, D) -> (B, S, G, D), in order of position, as `attend` needs them.
        With size 4, tokens 2 3 4 5 are held in slots 2 3 0 1; three more from start 6 take slots
        2 3 0, and what comes back is 2 3 4 5 6 7 8.
        """
        n, size = k.size(1), self.k.size(1)
        self.check(start + n)
        slots = torch.arange(start, start + n, device=k.device)[-size:] % size
        begun = start % size if self.span == "chunk" else start  # held, and may still be seen
        if begun + n > size:  # the slots wrap round: join old and new in order
            old = torch.arange(start - min(begun, size), start, device=k.device) % size
            seen = [torch.cat((kept[:, old], new), 1) for kept, new in ((self.k, k), (self.v, v))]
            self.k[:, slots], self.v[:, slots] = k[:, -size:], v[:, -size:]
            return seen
        self.k[:, slots], self.v[:, slots] = k, v
        return self.k[:, : begun + n], self.v[:, : begun + n]

    def append(self, k, v, start):
        """Store one token, k and v (B, 1, G, D), at position start (1,), a tensor.

        Returns how many of the first slots it may see, (1,): their order is of no matter to it.
        """
        size = self.k.size(1)
        self.k.index_copy_(1, start % size, k)
        self.v.index_copy_(1, start % size, v)
        return (start % size if self.span == "chunk" else start).clamp(max=size - 1) + 1

    def check(self, tokens):
        """Refuse more tokens than were announced, on every layer: those that see all lose some."""
        if tokens > self.most:
            raise ValueError(f"this cache was made for {self.most} tokens, not {tokens}")


# ---- The model ----------------------------------------------------------------------------------


class LayerNorm(nn.LayerNorm):
    """Computed in fp32, by kernel or autocast, whatever the residual stream is."""

    def forward(self, x):
        return super().forward(x).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config, letter):
        super().__init__()
        d, D, G = config.n_embd, config.head_dim, config.n_kv_head
        self.letter, (self.rope, span) = letter, LAYERS[letter]
        self.window = None if span == "full" else config.window
        self.chunked = span == "chunk"
        self.theta = (config.rope_theta_full if span == "full" else 0) or config.rope_theta
        self.head_dim, self.path = D, config.attention
        self.wq = nn.Linear(d, d, bias=False)
        self.wk = nn.Linear(d, G * D, bias=False)
        self.wv = nn.Linear(d, G * D, bias=False)
        self.wo = nn.Linear(d, d, bias=False)
        normed = config.qk_norm and self.rope
        self.q_norm = LayerNorm(D, config.norm_eps, bias=False) if normed else nn.Identity()
        self.k_norm = LayerNorm(D, config.norm_eps, bias=False) if normed else nn.Identity()

    def qkv(self, x, rotation, q_scale):
        """x (B, T, d) -> q (B, T, H, D), k and v (B, T, G, D), positioned and ready to attend."""
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        if self.rope:
            return rotate(self.q_norm(q), *rotation), rotate(self.k_norm(k), *rotation), v
        # No position signal here: this layer must find tokens by content, at any distance.
        if torch.is_tensor(q_scale) and self.letter == "N":
            # The more keys compete, the sharper the softmax has to be to keep finding one of them.
            q = (q * q_scale[:, None, None]).to(q.dtype)
        return q, k, v

    def forward(self, x, rotation, q_scale, cache=None, start=0, last=0):
        q, k, v = self.qkv(x, rotation, q_scale)
        if torch.is_tensor(start):  # one more token, after what the cache holds
            y = attend_cached(q, cache.k, cache.v, cache.append(k, v, start), self.path)
        else:
            if cache is not None:
                k, v = cache.update(k, v, start)
            y = attend(q[:, -last:], k, v, self.window, self.chunked, self.path)
        return self.wo(y.flatten(2))


class SwiGLU(nn.Module):
    """Source: Shazeer, arXiv 2002.05202."""

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.ffn_dim, bias=False)
        self.up = nn.Linear(config.n_embd, config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.n_embd, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and SwiGLU side by side under one norm, as in Command R and the paper."""

    def __init__(self, config, letter):
        super().__init__()
        self.ln = LayerNorm(config.n_embd, config.norm_eps, bias=False)
        self.attn = Attention(config, letter)
        self.mlp = SwiGLU(config)

    def forward(self, x, rotation, q_scale, cache=None, start=0, last=0):
        """x (B, T, d) -> the same of the next layer, or of its last `last` positions (0: all)."""
        h = self.ln(x)
        y = self.attn(h, rotation, q_scale, cache, start, last)
        return x[:, -last:] + y + self.mlp(h[:, -last:])


LOSS_SLICE = 2**29  # logits in memory at once while a loss is computed


def loss_slices(x, vocab_size, targets):
    """Split the rows of x (N, d) and targets (N,) alike, to LOSS_SLICE logits a slice."""
    n = max(1, LOSS_SLICE // vocab_size)
    return zip(x.split(n), targets.split(n), strict=True)


class LinearCrossEntropy(torch.autograd.Function):
    """F.cross_entropy of the logits scale * x @ weight.T, a slice of the rows at a time.

    x (N, d), weight (V, d), targets (N,) with -100 to ignore -> scalar. The gradients are made in
    the forward pass, while a slice of logits is at hand: three matmuls, none of them done again,
    and never more than LOSS_SLICE logits in memory. Source of the idea: Liger Kernel, arXiv
    2410.10989.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, scale):
        # Scaled here, not as logits: with a factor before the softmax, the compiler reads all
        # logits once for their maximum and again for their sum, in place of once for both.
        w = (weight * scale).to(x.dtype)
        count = (targets != -100).sum().clamp(min=1)
        loss, grad_w, grad_x = x.new_zeros((), dtype=torch.float32), torch.zeros_like(weight), []
        for rows, wanted in loss_slices(x, weight.size(0), targets):
            logp, use = (rows @ w.T).float().log_softmax(-1), wanted != -100
            hit = torch.arange(weight.size(0), device=x.device) == wanted[:, None]
            loss = loss - (logp * hit).sum()
            grad = ((logp.exp() - hit.float()) * (use / count)[:, None]).to(x.dtype)
            grad_x.append(grad @ w)
            grad_w = grad_w + grad.T @ rows
        ctx.save_for_backward(torch.cat(grad_x), grad_w * scale)
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grad.to(grad_x.dtype), grad_w * grad, None, None


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # tied: it is the head as well
        self.blocks = nn.ModuleList(Block(config, letter) for letter in config.layers)
        self.norm = LayerNorm(config.n_embd, config.norm_eps, bias=False)
        # N(0, 0.02), as GPT-2 and cohere2; what writes into the stream is scaled by its depth.
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.blocks:
            for out in (block.attn.wo, block.mlp.down):
                nn.init.normal_(out.weight, std=0.02 / math.sqrt(2 * config.n_layer))

    @property
    def dtype(self):
        """What the residual stream and the cache are made of: autocast's dtype, or the weights'."""
        device = self.wte.weight.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return self.wte.weight.dtype

    def positions(self, T, start=0):
        """What the layers need to know of positions start .. start + T - 1.

        Returns ({theta: cos and sin, of rotary}, q_scale): for the R, S and C layers, and the
        factor (T,) on the queries of N layers, or 1. Sources: log_scale, SWAN-GPT
        (arXiv 2504.08719) and arXiv 2404.12224; attn_scale, Llama 4.
        """
        c, device = self.config, self.wte.weight.device
        thetas = tuple(sorted({block.attn.theta for block in self.blocks if block.attn.rope}))
        tables = rotary(start, T, c.head_dim, thetas, device) if thetas else ()
        pos, scale = start + torch.arange(T, device=device), 1
        if c.log_scale:
            scale = ((pos + 1).log() / math.log(max(2, c.block_size))).clamp(min=1)
        if c.attn_scale:
            scale = scale * (1 + c.attn_scale * (1 + (pos + 1) // c.block_size).log())
        return dict(zip(thetas, tables, strict=True)), scale

    def body(self, idx, caches=None, start=0, last=0):
        """idx (B, T) int64 at positions start .. -> the normalised last hidden states (B, T, d).

        start: an int; or, for a single token after those in the caches, a tensor (1,).
        last: of the last so many positions only, (B, last, d). The last layer computes no others:
        in SSSNSSSN, that saves half of a long row's attention.
        """
        rotations, scale = self.positions(idx.size(1), start)
        x = self.wte(idx).to(self.dtype)
        for i, block in enumerate(self.blocks):
            cache = None if caches is None else caches[i]
            wanted = last if i == len(self.blocks) - 1 else 0
            x = block(x, rotations.get(block.attn.theta), scale, cache, start, wanted)
        return self.norm(x)

    def head(self, x):
        """Hidden states (..., d) -> logits (..., V), fp32."""
        return F.linear(x, self.wte.weight).float() * self.config.logit_scale

    def forward(self, idx, targets=None):
        """idx (B, T) int64 -> (logits (B, T, V) fp32, None).

        With targets (B, T) int64, -100 where none is wanted: (None, mean loss in nats). The logits
        of a batch are its largest tensor; the loss reads them a slice at a time and keeps none.
        While gradients are made, no other target outside 0 .. V - 1 is noticed: give none.
        """
        x = self.body(idx)
        if targets is None:
            return self.head(x), None
        x, targets = x.flatten(0, 1), targets.flatten()
        if torch.is_grad_enabled():
            args = x, self.wte.weight, targets, self.config.logit_scale
            return None, LinearCrossEntropy.apply(*args)
        count = (targets != -100).sum().clamp(min=1)
        slices = loss_slices(x, self.config.vocab_size, targets)
        total = sum(F.cross_entropy(self.head(r), t, reduction="sum") for r, t in slices)
        return None, total / count

    # -- counting --------------------------------------------------------------------------------

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T):
        """FLOPs of a training step per token of a T-token row: 6 a weight, 12 a key and channel.

        2 per multiply-add, backward twice the forward; masked scores are not counted.
        """
        c = self.config
        keys = sum(c.keys_seen(letter, T) for letter in c.layers)
        return 6 * sum(p.numel() for p in self.parameters() if p.dim() > 1) + 12 * c.n_embd * keys

    def kv_bytes(self, T, B=1):
        """Bytes of the KV cache of B rows of T tokens, in the dtype of the computation."""
        c = self.config
        keys = sum(self.cache_size(letter, T) for letter in c.layers)
        return 2 * B * keys * c.n_kv_head * c.head_dim * self.dtype.itemsize

    def cache_size(self, letter, T):
        """Keys that a layer's cache must hold for rows of T tokens."""
        return T if LAYERS[letter].span == "full" else min(T, self.config.window)

    def plan(self):
        """The layers in words: `0 S rope window=128 | ... | 3 N nope full`."""
        return " | ".join(f"{i} {x} {'rope' if LAYERS[x].rope else 'nope'} {LAYERS[x].span}"
                          + (f"={self.config.window}" if LAYERS[x].span != "full" else "")
                          for i, x in enumerate(self.config.layers))

    # -- inference -------------------------------------------------------------------------------

    def new_caches(self, B, T):
        """Empty caches, one a layer, for B rows of at most T tokens."""
        c = self.config
        return [Cache((B, self.cache_size(x, T), c.n_kv_head, c.head_dim), LAYERS[x].span, T,
                      dtype=self.dtype, device=self.wte.weight.device) for x in c.layers]

    @torch.no_grad()
    def prefill(self, idx, caches, start=0, slice=4096):
        """Read a prompt (B, T) into the caches, `slice` tokens at a time; its last state (B, d)."""
        if not idx.size(1):
            raise UsageError("an empty prompt: give one token at least")
        for a in range(0, idx.size(1), slice):
            x = self.body(idx[:, a : a + slice], caches, start + a, last=1)
        return x[:, -1]

    @torch.no_grad()
    def decoder(self, caches, start):
        """step(token (B, 1), position) -> its state (B, d): reads a token more into the caches.

        start: the first position to come. Launching the few hundred small kernels of a token one
        by one takes longer than running them, so with flash they are captured once, as a CUDA
        graph, and a state is overwritten by the next one.
        """
        for cache in caches:
            cache.check(start + 1)
        device, graph = self.wte.weight.device, None
        ids = torch.zeros(len(caches[0].k), 1, dtype=torch.int64, device=device)
        at = torch.tensor([start], device=device)
        if path_taken(self.config.attention, device, self.dtype, self.config.head_dim) == "flash":
            dtype, on = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
            with torch.autocast("cuda", dtype, on, cache_enabled=False):  # casts belong inside
                self.body(ids, caches, at)  # warms up, into slots that the first step overwrites
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    x = self.body(ids, caches, at)[:, -1]

        @torch.no_grad()
        def step(token, position):
            for cache in caches:
                cache.check(position + 1)
            ids.copy_(token)
            at.fill_(position)
            if graph is None:
                return self.body(ids, caches, at)[:, -1]
            graph.replay()
            return x

        return step

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=None,
                 generator=None):
        """Continue idx (B, T) by up to max_new_tokens: (B, T + n). temperature 0 is greedy.

        top_k keeps the k likeliest tokens, top_p the fewest that hold this probability. Ends early
        when every row has produced the token `stop`; a row that has, repeats it.
        """
        caches, step = self.new_caches(len(idx), idx.size(1) + max_new_tokens), None
        x, ended = self.prefill(idx, caches), torch.zeros(len(idx), dtype=torch.bool).to(idx.device)
        for n in range(max_new_tokens):
            token = sample_token(self.head(x), temperature, top_k, top_p, generator)
            if stop is not None:
                token = token.masked_fill(ended[:, None], stop)
                ended |= token[:, 0] == stop
            idx = torch.cat((idx, token), 1)
            if n + 1 == max_new_tokens or ended.all():
                break
            at = idx.size(1) - 1
            step = step or self.decoder(caches, at)
            x = step(token, at)
        return idx

    # -- to and from Hugging Face ------------------------------------------------------------------

    def save_pretrained(self, folder):
        """Write folder/{config.json, model.safetensors} as transformers' cohere2 reads them.

        UsageError where that format cannot say what this model does.
        """
        from safetensors.torch import save_file

        c = self.config
        if c.qk_norm or c.log_scale or c.attn_scale or set(c.layers) - {"S", "N"}:
            raise UsageError("cohere2 has layers S and N only, no qk_norm, log_scale or attn_scale:"
                             f" this model of pattern {c.pattern} cannot be saved in its format")
        hf = {theirs: getattr(c, ours) for ours, theirs in HF_CONFIG.items()} | HF_FIXED
        hf |= dict(
            architectures=["Cohere2ForCausalLM"], head_dim=c.head_dim, dtype="float32",
            layer_types=["sliding_attention" if x == "S" else "full_attention" for x in c.layers],
            rope_parameters=dict(rope_theta=c.rope_theta, rope_type="default"),
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {hf_name(name): w.float().contiguous() for name, w in self.state_dict().items()}
        save_file(weights, folder / "weights.tmp", metadata={"format": "pt"})
        (folder / "config.tmp").write_text(json.dumps(hf, indent=2))
        (folder / "weights.tmp").replace(folder / "model.safetensors")
        (folder / "config.tmp").replace(folder / "config.json")

    @staticmethod
    def from_pretrained(folder, dtype=None, **override):
        """A GPT with the weights of a cohere2 model: a folder, or an id on the hub.

        dtype: of the weights, theirs if None; override: fields of ModelConfig. UsageError for any
        other kind of model.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not Path(folder).is_dir():
            from huggingface_hub import snapshot_download

            try:
                folder = snapshot_download(folder, allow_patterns=["*.json", "*.safetensors"])
            except (OSError, ValueError) as e:
                raise UsageError(f"{folder} is no folder, and the hub does not give it: "
                                 f"{str(e).splitlines()[0]}") from None
        folder = Path(folder)
        try:
            hf = dict(json.loads((folder / "config.json").read_text()))
        except (OSError, ValueError, TypeError):
            raise UsageError(f"{folder} holds no readable config.json of a model") from None
        for key, value in HF_FIXED.items():
            if hf.get(key, value) != value or "model_type" not in hf:
                raise UsageError(f"{folder} has {key} {hf.get(key)}: only {value} can be read")
        rope = hf.get("rope_parameters") or {k: hf[k] for k in ("rope_theta",) if k in hf}
        if rope.get("rope_type", "default") != "default" or hf.get("rope_scaling"):
            raise UsageError(f"{folder} scales its RoPE ({rope}): that cannot be read")
        known = {ours: override.get(ours, hf.get(theirs)) for ours, theirs in HF_CONFIG.items()}
        absent = {HF_CONFIG[ours] for ours, value in known.items() if value is None} or (
            {"rope_theta"} - {*rope})
        if absent:
            raise UsageError(f"{folder}/config.json does not say {', '.join(sorted(absent))}")
        n = hf.get("num_hidden_layers") or known["n_layer"]
        every = hf.get("sliding_window_pattern") or 4
        letters = (("S" * (every - 1) + "N") * n)[:n]  # in configs older than layer_types
        if hf.get("layer_types"):
            kinds = dict(sliding_attention="S", full_attention="N")
            letters = "".join(kinds.get(x, "?") for x in hf["layer_types"])
            if "?" in letters or len(letters) != n:
                raise UsageError(f"{folder}/config.json has layer_types {hf['layer_types']}: it "
                                 f"takes {n}, each of {', '.join(kinds)}")
        tiles = (letters[:k] for k in range(1, n + 1) if (letters[:k] * n)[:n] == letters)
        known |= dict(pattern=next(tiles), rope_theta=rope["rope_theta"])
        with torch.device("meta"):  # no weights yet: they are about to be assigned
            model = GPT(ModelConfig(**known | override))
        weights = {}
        for shard in sorted(folder.glob("model*.safetensors")):
            try:
                weights |= load_file(shard)
            except (OSError, SafetensorError) as e:
                raise UsageError(f"{shard} is damaged, or no safetensors file ({e})") from None
        ours = {name: weights.get(hf_name(name)) for name in model.state_dict()}
        missing = [hf_name(name) for name, weight in ours.items() if weight is None]
        if missing:
            raise UsageError(f"{folder} lacks the weights {', '.join(missing[:3])}")
        try:
            model.load_state_dict(ours, assign=True)
        except RuntimeError as e:
            asked = f", or {override}" if override else ""
            raise UsageError(f"the weights in {folder} contradict its config.json{asked}: {e}"
                             ) from None
        return model.to(dtype).eval()


HF_CONFIG = {  # ModelConfig's name of a thing: transformers' Cohere2Config's
    "vocab_size": "vocab_size", "block_size": "max_position_embeddings",
    "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size", "ffn_dim": "intermediate_size",
    "window": "sliding_window", "logit_scale": "logit_scale", "norm_eps": "layer_norm_eps",
}  # fmt: skip
HF_FIXED = dict(model_type="cohere2", hidden_act="silu", attention_bias=False,
                tie_word_embeddings=True)
HF_WEIGHTS = {
    "wte": "embed_tokens", "blocks": "layers", "ln": "input_layernorm", "attn": "self_attn",
    "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj",
    "gate": "gate_proj", "up": "up_proj", "down": "down_proj",
}  # fmt: skip


def hf_name(name):
    """The name that transformers' cohere2 gives to one of our weights."""
    return ".".join(["model"] + [HF_WEIGHTS.get(part, part) for part in name.split(".")])


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Logits (B, V) -> token ids (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None:
        ranked, order = logits.sort(descending=True)
        probs = ranked.softmax(-1)
        # Keep a token while those likelier than it hold less than top_p, and the likeliest always.
        ranked[:, 1:].masked_fill_((probs.cumsum(-1) - probs)[:, 1:] >= top_p, -math.inf)
        logits = torch.full_like(logits, -math.inf).scatter(-1, order, ranked)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
