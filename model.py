"""RNoPE-SWA and the hybrids around it: a decoder-only transformer whose layers differ in two ways:
how they know where a token stands and how far back they see.

    paper (arXiv 2501.18795)        here
    ----------------------------    ------------------------------------------------------------
    RoPE layer                      letter R: rotated queries and keys, sees everything before it
    NoPE layer                      letter N: no position signal at all, sees everything before it
    SWA layer                       letter S: rotated, sees the last `window` keys, itself included
    size of the window              window
    RNoPE-SWA (3 : 1)               pattern "SSSN", tiled over the layers; preset "rnope-swa"
    RoPE base, theta                rope_theta
    QK-Norm                         qk_norm, on every layer, before the rotation where there is one
    (not in the paper)              W: a window without positions; C: rotated, chunked (Llama 4)

Where to look: the idea is in Attention.qkv, the one mask rule in visible, the hybrids in PRESETS.

Shapes: B rows, T query tokens, S key tokens (the queries are the last T of them), H query heads,
G key/value heads (H is a multiple of G), d = n_embd, D = d / H, V = vocab_size. Queries, keys and
values are (B, heads, tokens, D). Weights are named as transformers' cohere2 names them.
Does NOT include: dropout, biases, attention sinks, RoPE scaling, other block styles.
"""

import math
import sys
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# ---- Settings -----------------------------------------------------------------------------------


class UsageError(ValueError):
    """Something the user can put right. The scripts print it as one line and exit with status 2."""


def check(ok, message):
    """Raise UsageError(message) unless ok."""
    if not ok:
        raise UsageError(message)


def warn(message):
    print(message, file=sys.stderr)


def flag(default, help, **rules):
    """A dataclass field that is also a command-line flag.

    rules: choices=(...), the only values allowed; least= and most=, of a number, which has to be 0
    or more unless they say otherwise; group=, its heading in --help; positional=True, no dashes.
    """
    return field(default=default, metadata=dict(help=help, **rules))


def check_ranges(config):
    """Raise UsageError where a field breaks the choices, the least or the most of its flag."""
    for f in fields(config):
        value = getattr(config, f.name)
        rules = f.metadata
        given = f"--{f.name}={value}"
        if "choices" in rules:
            check(value in rules["choices"], f"{given}: choose from {', '.join(rules['choices'])}")
        if type(value) in (int, float):
            least = rules.get("least", 0)
            most = rules.get("most", sys.float_info.max)  # so infinity is refused
            check(value >= least, f"{given}: it must be {least} or more")
            check(value <= most, f"{given}: it must be {most} or less")


LAYERS = {  # letter: (how it knows where a token stands, how far it sees)
    "R": ("rope", "full"),
    "N": ("nope", "full"),
    "S": ("rope", "window"),
    "W": ("nope", "window"),
    "C": ("rope", "chunk"),
}

PRESETS = {
    "rnope-swa": dict(pattern="SSSN"),  # three local layers, then one that sees everything
    "rnope-swa-log": dict(pattern="SSSN", log_scale=True),  # and sharper queries as rows grow
    "rope": dict(pattern="R"),
    "nope": dict(pattern="N"),
    "qk-norm": dict(pattern="R", qk_norm=True),
    "rnope": dict(pattern="RN"),
    "swa": dict(pattern="S"),  # windows only: the control that cannot retrieve
    "exaone4": dict(pattern="SSSN", qk_norm=True),  # also on its N layers
    "smollm3": dict(pattern="RRRN"),
    "llama4": dict(pattern="CCCN", rope_theta=5e5, attn_scale=0.1),  # window = chunk
    "gemma3": dict(pattern="SSSSSR", rope_theta=1e4, rope_theta_full=1e6, qk_norm=True),
    "olmo3": dict(pattern="SSSR", rope_theta=5e5, qk_norm=True),
    "gpt-oss": dict(pattern="SR", rope_theta=1.5e5),  # without its learned sink logits
    "swan": dict(pattern="NSSS", log_scale=True),
}

PATHS = ("auto", "mask", "blocks", "flash")


@dataclass
class ModelConfig:
    vocab_size: int = flag(50304, "token ids; train.py takes its tokenizer's number", least=1)
    block_size: int = flag(1024, "training context, tokens; a model may be run beyond it", least=1)
    n_layer: int = flag(8, "blocks", least=1)
    n_head: int = flag(8, "query heads", least=1)
    n_kv_head: int = flag(0, "key/value heads (GQA); 0: as many as n_head")
    n_embd: int = flag(512, "width of the residual stream", least=1)
    ffn_dim: int = flag(0, "hidden width of the SwiGLU; 0: 8/3 n_embd, in steps of 64")
    pattern: str = flag("SSSN", "kinds of layer, tiled over the depth: " + ", ".join(LAYERS))
    window: int = flag(128, "keys an S or W layer sees, itself included; C: its chunk", least=1)
    rope_theta: float = flag(1e4, "base of the rotary frequencies", least=1)
    rope_theta_full: float = flag(0.0, "base on R layers; 0: rope_theta")
    qk_norm: bool = flag(False, "normalise q and k per head, on every layer")
    log_scale: bool = flag(False, "N layers: q *= max(1, ln(pos + 1) / ln(block_size))")
    attn_scale: float = flag(0.0, "N: q *= 1 + attn_scale ln(1 + (pos + 1) // block_size)")
    logit_scale: float = flag(1.0, "factor on the logits", least=1e-6)
    norm_eps: float = flag(1e-5, "epsilon of the LayerNorms", least=1e-12)
    attention: str = flag("auto", "path of attention; auto: what the device has", choices=PATHS)

    def __post_init__(self):
        check_ranges(self)
        self.n_kv_head = self.n_kv_head or self.n_head
        self.ffn_dim = self.ffn_dim or math.ceil(8 * self.n_embd / 3 / 64) * 64
        self.head_dim = self.n_embd // self.n_head
        check(self.n_embd % (2 * self.n_head) == 0,
              f"n_embd={self.n_embd} over n_head={self.n_head}: heads need an even, whole width")
        check(self.n_head % self.n_kv_head == 0,
              f"n_head={self.n_head}: not a multiple of n_kv_head={self.n_kv_head}")
        check(self.pattern and set(self.pattern) <= set(LAYERS),
              f"pattern {self.pattern!r}: use letters of {', '.join(LAYERS)}")
        self.layers = (self.pattern * self.n_layer)[: self.n_layer]  # one letter for each layer
        missing = "".join(sorted(set(self.pattern) - set(self.layers)))
        check(not missing, f"pattern {self.pattern!r} over {self.n_layer} layers never builds "
              f"{missing!r}: use --n_layer={len(self.pattern)} or more, or a shorter --pattern")


# ---- Attention: one rule for who sees whom, and the ways to compute it --------------------------


def visible(i, j, window=None, chunked=False):
    """True where the query at position i may see the key at position j. There is no other rule.

    Causal; with a window, the last `window` keys counting i itself; chunked, the keys of i's own
    chunk of `window` positions. i and j are integer tensors that broadcast.
    Sources: arXiv 2501.18795; chunks as in Llama 4.
    """
    seen = j <= i
    if window is None:
        return seen
    if chunked:
        return seen & (i // window == j // window)
    return seen & (i - j < window)


def attend(q, k, v, window=None, chunked=False, path="auto"):
    """Causal attention of the last T of S positions over what `visible` lets them see.

    q (B, H, T, D), k and v (B, G, S, D) -> (B, H, T, D). window None: all that came before.
    Chunked, k must begin at the first position of a chunk. Scores are divided by sqrt(D).
    path: "mask" is the definition and takes T x S memory. With "flash" or "blocks" memory is linear
    in S; both leave whole causal rows to SDPA, which has kernels for them. "auto" is flash on an
    NVIDIA GPU from Ampere on in half precision, else blocks. UsageError where flash cannot run.
    """
    T = q.size(2)
    S = k.size(2)
    path = choose_path(path, q.device, q.dtype, q.size(3))
    group = q.size(1) // k.size(1)
    if group > 1:  # not every kernel takes fewer key heads than query heads
        k = k.repeat_interleave(group, 1)
        v = v.repeat_interleave(group, 1)
    if path == "mask":
        return attend_mask(q, k, v, window, chunked)
    window = window or S
    if T == S <= window:  # no key is out of sight
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if chunked and T == S and S % window == 0:
        return attend_chunks(q, k, v, window)
    if path == "blocks" or chunked:
        return attend_blocks(q, k, v, window, chunked)
    return attend_flash(q, k, v, window)


@torch.compiler.assume_constant_result  # the compiler cannot trace questions to the driver
def flash_runs(device, dtype, head_dim):
    """True where FlashAttention runs on this device for tensors of this dtype and head size."""
    if device.type != "cuda" or torch.version.hip:
        return False
    modern = torch.cuda.get_device_capability(device) >= (8, 0)
    built = torch.backends.cuda.is_flash_attention_available()
    half = dtype in (torch.bfloat16, torch.float16)
    return modern and built and half and head_dim % 8 == 0 and head_dim <= 256


def choose_path(path, device, dtype, head_dim):
    """The path to take: "auto" becomes flash or blocks. UsageError where flash cannot run."""
    flash = flash_runs(device, dtype, head_dim)
    if path == "auto":
        return "flash" if flash else "blocks"
    check(flash or path != "flash", "--attention=flash needs an NVIDIA GPU from Ampere on, "
          "bfloat16, and heads of 8, 16, ... 256: use --attention=auto")
    return path


def attend_mask(q, k, v, window, chunked):
    """The definition: every score is computed, the invisible ones are masked. Tests go by it."""
    j = torch.arange(k.size(2), device=q.device)
    i = j[-q.size(2) :, None]
    return F.scaled_dot_product_attention(q, k, v, visible(i, j, window, chunked))


def attend_blocks(q, k, v, window, chunked):
    """Some queries at a time, against the keys that they can see: memory is linear in S."""
    start = k.size(2) - q.size(2)  # position of a block's first query
    done = []
    # Smaller blocks spend their time on launches, larger ones hold a large mask.
    for some in q.split(max(128, min(window, 1024)), 2):
        stop = start + some.size(2)
        first = max(0, start - window + 1)  # position of the first key they see
        if chunked:
            first = start // window * window
        keys = k[:, :, first:stop]
        values = v[:, :, first:stop]
        done.append(attend_mask(some, keys, values, window, chunked))
        start = stop
    return torch.cat(done, 2)


def attend_chunks(q, k, v, window):
    """Whole chunks, each as a row of its own."""
    B = q.size(0)

    def rows(x):  # (B, H, T, D) -> (B chunks, H, window, D)
        return x.unflatten(2, (-1, window)).transpose(1, 2).flatten(0, 1)

    y = F.scaled_dot_product_attention(rows(q), rows(k), rows(v), is_causal=True)
    return y.unflatten(0, (B, -1)).transpose(1, 2).flatten(2, 3)


def attend_flash(q, k, v, window):
    """torch's varlen_attn: no mask, no padding. The rows are laid end to end, as it wants them."""
    from torch.nn.attention.varlen import varlen_attn

    B = q.size(0)
    T = q.size(2)
    S = k.size(2)
    q = q.transpose(1, 2).flatten(0, 1)  # (B T, H, D)
    k = k.transpose(1, 2).flatten(0, 1)
    v = v.transpose(1, 2).flatten(0, 1)
    row = torch.arange(B + 1, dtype=torch.int32, device=q.device)
    seen = (window - 1, 0)  # how many keys to the left and to the right of a query's own position
    y = varlen_attn(q, k, v, row * T, row * S, T, S, window_size=seen)
    return y.unflatten(0, (B, T)).transpose(1, 2)


# ---- Positions ----------------------------------------------------------------------------------


def rotary(positions, head_dim, theta):
    """Tables of cos and sin for RoPE at positions (T,): (2, T, 1, D), fp32.

    A pair (a, b) of channels becomes (a cos - b sin, b cos + a sin). `rotate` computes it as
    (a, b) * (cos, cos) + (b, a) * (-sin, sin). The tables are made for the positions asked for, so
    no row is too long for them. Source: arXiv 2104.09864.
    """
    channel = torch.arange(0, head_dim, 2, device=positions.device)
    frequencies = theta ** (-channel.float() / head_dim)
    angles = positions[:, None].float() * frequencies  # (T, D / 2)
    cos = angles.cos()
    sin = angles.sin()
    cos_pairs = torch.stack((cos, cos), 2).flatten(1)  # (T, D)
    sin_pairs = torch.stack((-sin, sin), 2).flatten(1)
    return torch.stack((cos_pairs, sin_pairs))[:, :, None]


@torch.compiler.assume_constant_result  # or the compiler computes sin and cos in every kernel
def rotary_tables(T, head_dim, thetas, device):
    """rotary for the positions 0 .. T - 1, once for each of the thetas.

    A list from one call: torch cannot compile two calls of a function with this decorator, nor a
    dictionary that comes from it.
    """
    positions = torch.arange(T, device=device)
    return [rotary(positions, head_dim, theta) for theta in thetas]


def rotate(x, rotation):
    """Rotate the (even, odd) pairs of x (B, T, H, D): the interleaved form, as in cohere2."""
    cos, sin = rotation
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (x * cos + swapped * sin).to(x.dtype)  # the tables are fp32, and so is the sum


# ---- The model ----------------------------------------------------------------------------------


class LayerNorm(nn.LayerNorm):
    """LayerNorm without bias. It computes in fp32 and returns the dtype of its input."""

    def __init__(self, width, config):
        super().__init__(width, config.norm_eps, bias=False)

    def forward(self, x):
        return super().forward(x).to(x.dtype)


def linear(width, out):
    """A linear layer without bias: no layer here has one."""
    return nn.Linear(width, out, bias=False)


class Attention(nn.Module):
    def __init__(self, config, letter):
        super().__init__()
        position, span = LAYERS[letter]
        self.letter = letter
        self.rope = position == "rope"
        self.window = None if span == "full" else config.window
        self.chunked = span == "chunk"
        self.path = config.attention
        self.head_dim = config.head_dim
        d = config.n_embd
        kv_dim = config.n_kv_head * config.head_dim
        self.q_proj = linear(d, d)
        self.k_proj = linear(d, kv_dim)
        self.v_proj = linear(d, kv_dim)
        self.o_proj = linear(d, d)
        norm = LayerNorm if config.qk_norm else nn.Identity
        self.q_norm = norm(config.head_dim, config)
        self.k_norm = norm(config.head_dim, config)

    def qkv(self, x, rotation, query_scale):
        """x (B, T, d) -> q (B, H, T, D), k and v (B, G, T, D), ready to attend.

        rotation: tables from `rotary`, or None on N and W layers. query_scale: (T,) or None.
        """
        q = self.q_norm(self.q_proj(x).unflatten(2, (-1, self.head_dim)))  # (B, T, H, D)
        k = self.k_norm(self.k_proj(x).unflatten(2, (-1, self.head_dim)))
        v = self.v_proj(x).unflatten(2, (-1, self.head_dim))
        if self.rope:  # R, S and C layers know where a token stands
            q = rotate(q, rotation)
            k = rotate(k, rotation)
        # else: no position signal at all. This layer finds tokens by content, at any distance.
        if query_scale is not None:
            # The more keys compete, the sharper the softmax must be for one of them to win.
            q = (q * query_scale[:, None, None]).to(q.dtype)
        # Transposed after the rotation: the kernels like this memory layout, a step is 2 % faster.
        q = q.transpose(1, 2)  # (B, H, T, D)
        k = k.transpose(1, 2)
        v = v.transpose(1, 2)
        return q, k, v

    def forward(self, x, first, rotation, query_scale, cache, positions):
        """x (B, T, d) -> (B, kept, d): the outputs of x[:, first:] alone.

        positions (T,): where x stands in its row. cache: what stands before x, None in training.
        """
        q, k, v = self.qkv(x, rotation, query_scale)
        if cache is not None and x.size(1) == 1:
            y = cache.attend_one(q, k, v, positions)
        else:
            if cache is not None:
                k, v = cache.extend(k, v, positions)
            y = attend(q[:, :, first:], k, v, self.window, self.chunked, self.path)
        y = y.transpose(1, 2).flatten(2)  # (B, kept, d)
        return self.o_proj(y)


class SwiGLU(nn.Module):
    """Source: arXiv 2002.05202."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = linear(config.n_embd, config.ffn_dim)
        self.up_proj = linear(config.n_embd, config.ffn_dim)
        self.down_proj = linear(config.ffn_dim, config.n_embd)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and SwiGLU side by side under one norm, as in Command R and the paper."""

    def __init__(self, config, letter):
        super().__init__()
        self.input_layernorm = LayerNorm(config.n_embd, config)
        self.self_attn = Attention(config, letter)
        self.mlp = SwiGLU(config)

    def forward(self, x, first, **where):
        """x (B, T, d) -> (B, kept, d), of x[:, first:]. where: passed on to Attention.forward."""
        h = self.input_layernorm(x)
        attended = self.self_attn(h, first=first, **where)
        return x[:, first:] + attended + self.mlp(h[:, first:])


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)  # tied: also the head
        self.layers = nn.ModuleList(Block(config, letter) for letter in config.layers)
        self.norm = LayerNorm(config.n_embd, config)
        local = config.rope_theta
        thetas = dict(R=config.rope_theta_full or local, S=local, C=local)
        self.thetas = {x: theta for x, theta in thetas.items() if x in config.layers}
        # N(0, 0.02) as in GPT-2 and cohere2; what writes into the stream is scaled by the depth.
        for name, weight in self.named_parameters():
            std = 0.02
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std = 0.02 / math.sqrt(2 * config.n_layer)
            if weight.dim() == 2:
                nn.init.normal_(weight, std=std)

    @property
    def dtype(self):
        """Dtype of the residual stream and the cache: autocast's if it is on, else the weights'."""
        weight = self.embed_tokens.weight
        if torch.is_autocast_enabled(weight.device.type):
            return torch.get_autocast_dtype(weight.device.type)
        return weight.dtype

    def forward(self, idx, targets=None):
        """idx (B, T) int64 -> (logits (B, T, V) fp32, None).

        With targets (B, T) int64, -100 where none is wanted: (None, mean loss in nats).
        """
        x = self.hidden(idx)
        if targets is None:
            return self.head(x), None
        return None, self.loss(x.flatten(0, 1), targets.flatten())

    def hidden(self, idx, first=0):
        """idx (B, T) int64 -> last hidden states (B, kept, d) of the tokens idx[:, first:].

        The last layer computes its outputs for these alone, which saves time where only the end of
        a row is wanted. first: -1 for the last token alone.
        """
        T = idx.size(1)
        thetas = tuple(self.thetas.values())
        made = rotary_tables(T, self.config.head_dim, thetas, idx.device)
        tables = dict(zip(self.thetas, made, strict=True))
        positions = torch.arange(T, device=idx.device)
        caches = [None] * len(self.layers)
        return self.run_layers(idx, positions, tables, first, caches)

    def run_layers(self, idx, positions, tables, first, caches):
        """The pass through the layers. tables: {letter: its rotation at the positions (T,)}.

        first: of which tokens the last layer computes outputs, as in `hidden`.
        """
        scales = {"N": self.query_scale(positions)}
        x = self.embed_tokens(idx).to(self.dtype)
        for n, letter in enumerate(self.config.layers):
            wanted = first if n == len(self.layers) - 1 else 0
            x = self.layers[n](
                x, wanted,
                rotation=tables.get(letter),
                query_scale=scales.get(letter),
                cache=caches[n],
                positions=positions,
            )  # fmt: skip
        return self.norm(x) * self.config.logit_scale

    def query_scale(self, positions):
        """The factor (T,) on the queries of N layers at positions (T,), or None.

        Sources: log_scale, SWAN-GPT (arXiv 2504.08719) and arXiv 2404.12224; attn_scale, Llama 4.
        """
        c = self.config
        if not c.log_scale and not c.attn_scale:
            return None
        seen = positions + 1  # tokens that compete for the query's attention
        scale = 1.0
        if c.log_scale:
            ratio = seen.log() / math.log(max(2, c.block_size))
            scale = ratio.clamp(min=1)
        if c.attn_scale:
            chunks = 1 + seen // c.block_size
            scale = scale * (1 + c.attn_scale * chunks.log())
        return scale

    def head(self, x):
        """Last hidden states (..., d) -> logits (..., V), fp32."""
        return F.linear(x, self.embed_tokens.weight).float()

    def loss(self, x, targets):
        """Mean cross-entropy in nats of last hidden states x (rows, d) against targets (rows,)."""
        weight = self.embed_tokens.weight
        if torch.is_grad_enabled() and torch.compiler.is_compiling() and x.is_cuda:
            return LinearCrossEntropy.apply(x, weight, targets)
        total = 0.0
        for rows, wanted in loss_slices(x, weight, targets):
            logits = self.head(rows)
            total = total + F.cross_entropy(logits, wanted, reduction="sum")
        count = (targets != -100).sum()
        return total / count.clamp(min=1)

    # -- counting --------------------------------------------------------------------------------

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T):
        """FLOPs of a training step per token of a T-token row.

        6 for each weight: 2 for a multiply-add, times 3, since the backward pass costs twice the
        forward. 12 n_embd for each key that a query sees: its score and its value, 6 each. Masked
        scores are not counted.
        """
        position = torch.arange(T).double()
        keys = 0.0  # that a query sees, on average, summed over the layers
        for block in self.layers:
            window = block.self_attn.window or T
            earlier = position.clamp(max=window - 1)
            if block.self_attn.chunked:
                earlier = position % window
            keys += earlier.mean().item() + 1
        weights = sum(p.numel() for p in self.parameters() if p.dim() == 2)
        return 6 * weights + 12 * self.config.n_embd * keys

    def plan(self):
        """The layers in words: `0 S rope window=128 | ... | 3 N nope full`."""
        words = []
        for n, letter in enumerate(self.config.layers):
            position, span = LAYERS[letter]
            if span != "full":
                span += f"={self.config.window}"
            for name in ("log_scale", "attn_scale"):
                if letter == "N" and getattr(self.config, name):
                    span += f" {name}"
            words.append(f"{n} {letter} {position} {span}")
        return " | ".join(words)

    # -- inference -------------------------------------------------------------------------------

    def new_caches(self, B, T):
        """Empty caches, one a layer, for B rows of at most T tokens."""
        like = dict(dtype=self.dtype, device=self.embed_tokens.weight.device)
        return [Cache(B, T, block.self_attn, self.config, like) for block in self.layers]

    @torch.no_grad()
    def read(self, idx, caches, positions):
        """Read idx (B, T) at positions (T,) into the caches. The last token's state (B, d).

        For one token the host reads nothing from the device, so a CUDA graph can capture the call.
        """
        D = self.config.head_dim
        tables = {x: rotary(positions, D, theta) for x, theta in self.thetas.items()}
        return self.run_layers(idx, positions, tables, -1, caches)[:, 0]

    def prefill(self, idx, caches, at_once=4096):
        """Read a prompt (B, T) into empty caches, `at_once` tokens at a time. Last state (B, d)."""
        check(idx.size(1) > 0, "an empty prompt: give one token at least")
        positions = torch.arange(idx.size(1), device=idx.device)
        for where in positions.split(at_once):
            x = self.read(idx[:, where], caches, where)
        return x

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=None,
                 generator=None, n_vocab=None):
        """Continue idx (B, T) by up to max_new_tokens: (B, T + n). temperature 0 is greedy.

        top_k keeps the k likeliest tokens, top_p the fewest that hold this probability. Ends early
        when every row has produced the token `stop`; a row that has, repeats it. n_vocab: ids from
        there on are never produced, since the rows of an embedding are often padded.
        """
        check(temperature >= 0, f"temperature={temperature}: it must be 0 or more")
        caches = self.new_caches(len(idx), idx.size(1) + max_new_tokens)
        x = self.prefill(idx, caches)
        position = torch.tensor([idx.size(1)], device=idx.device)
        ended = torch.zeros_like(idx[:, :1], dtype=torch.bool)

        def read_one(token, position):
            return self.read(token, caches, position)

        if idx.is_cuda:  # to launch a token's kernels one by one takes longer than to run them
            token = idx[:, -1:].clone()  # the graph reads each new token here
            on = torch.is_autocast_enabled("cuda")
            with torch.autocast("cuda", self.dtype, enabled=on, cache_enabled=False):
                read_one = torch.cuda.make_graphed_callables(read_one, (token, position))
        for _ in range(max_new_tokens):
            logits = self.head(x)[:, :n_vocab]
            token = sample_token(logits, temperature, top_k, top_p, generator)
            if stop is not None:
                token = token.masked_fill(ended, stop)
                ended = token == stop
            idx = torch.cat((idx, token), 1)
            if ended.all():
                break
            x = read_one(token, position)
            position = position + 1
        return idx

    # -- to and from Hugging Face ----------------------------------------------------------------

    def save_pretrained(self, folder, tokenizer=None):
        """Write folder/{config.json, model.safetensors}, which transformers reads as cohere2.

        tokenizer: one of transformers', to be written beside them. UsageError where that format
        cannot say what this model does.
        """
        from transformers import Cohere2Config, Cohere2ForCausalLM

        c = self.config
        kinds = {letter: kind for kind, letter in COHERE2_LAYERS.items()}
        extra = c.qk_norm or c.log_scale or c.attn_scale
        check(set(c.layers) <= set(kinds) and not extra,
              "cohere2 has layers S and N only, no qk_norm, log_scale or attn_scale: this model of "
              f"pattern {c.pattern} cannot be saved in its format")
        sizes = {theirs: getattr(c, ours) for ours, theirs in COHERE2_SIZES.items()}
        config = Cohere2Config(
            **sizes,
            layer_types=[kinds[letter] for letter in c.layers],
            rope_theta=c.rope_theta,
            bos_token_id=None, pad_token_id=None,
            eos_token_id=tokenizer.eos_token_id if tokenizer else None)
        config.rope_theta = c.rope_theta  # transformers 4 reads it here, or else takes 10,000
        with torch.device("meta"):  # no weights yet: they are about to be assigned
            theirs = Cohere2ForCausalLM(config)
        theirs.model.load_state_dict(self.state_dict(), assign=True)
        theirs.tie_weights()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            theirs.save_pretrained(beside)
            if tokenizer:
                tokenizer.save_pretrained(beside)
            for file in Path(beside).iterdir():
                file.replace(folder / file.name)

    @staticmethod
    def from_pretrained(folder, dtype="auto", **override):
        """A GPT with the weights of a cohere2 model: a folder, or an id on the hub.

        dtype: as transformers takes it; "auto": that of the file. override: fields of ModelConfig.
        UsageError for any other kind of model, and for what this one would ignore.
        """
        from transformers import Cohere2Config, Cohere2ForCausalLM

        try:
            written, _ = Cohere2Config.get_config_dict(folder)
            kind = written.get("model_type")
            check(kind == "cohere2", f"it has model_type {kind}{OTHER_BLOCKS.get(kind, '')}")
            hf = Cohere2Config.from_pretrained(folder)
            refuse_unlike_ours(hf, written)
            theirs, found = Cohere2ForCausalLM.from_pretrained(
                folder, config=hf, dtype=dtype, output_loading_info=True,
                ignore_mismatched_sizes=True)  # they are found here, and told below
            for kind, keys in found.items():
                check(not keys, f"its weights contradict config.json: {kind} {sorted(keys)[:3]}")
            tied = theirs.lm_head.weight.equal(theirs.model.embed_tokens.weight)
            check(tied, "its head is not its embedding: only tied weights can be read")
        except Exception as error:  # transformers raises many kinds for a file that is not right
            why = " ".join(str(error).split())[:300] or type(error).__name__
            raise UsageError(f"{folder} cannot be read as a cohere2 model: {why}") from None
        known = {ours: getattr(hf, name) for ours, name in COHERE2_SIZES.items()}
        known["pattern"] = "".join(COHERE2_LAYERS[kind] for kind in hf.layer_types)
        known["rope_theta"] = hf.rope_parameters["rope_theta"]
        known = known | override
        check(known["window"] is not None,
              f"{folder} has no sliding_window: give window to from_pretrained")
        with torch.device("meta"):
            model = GPT(ModelConfig(**known))
        model.load_state_dict(theirs.model.state_dict(), assign=True)
        return model.eval()


def refuse_unlike_ours(hf, written):
    """UsageError if the config of a model in transformers' form says what GPT does not do.

    written: config.json as it is. hf has defaults for what it leaves out.
    """
    width = hf.hidden_size // hf.num_attention_heads
    told = [  # name, what the config says, the one thing that can be read
        ("hidden_act", hf.hidden_act, "silu"),
        ("attention_bias", hf.attention_bias, False),
        ("tie_word_embeddings", hf.tie_word_embeddings, True),
        ("quantization_config", written.get("quantization_config"), None),
        ("RoPE of type", hf.rope_parameters.get("rope_type"), "default"),
        ("heads of", written.get("head_dim") or width, width),
    ]
    for name, said, ours in told:
        check(said == ours, f"it has {name} {said}: only {ours} can be read")
    rope = written | (written.get("rope_parameters") or {})  # older files say it at the top
    check(rope.get("rope_theta"), "its config.json does not say rope_theta")
    kinds = set(hf.layer_types) - set(COHERE2_LAYERS)
    check(not kinds, f"it has layers of {kinds}: only sliding and full ones can be read")


OTHER_BLOCKS = {  # models of the same layout, and why they cannot be read all the same
    "exaone4": ", whose norms stand after attention and after SwiGLU",
    "exaone_moe": ", which has experts",
    "cohere2_moe": ", which has experts",
    "afmoe": ", which gates its attention and has experts",
    "muse_glimmer": ", which gates its attention",
    "kolibri1": ", which has experts",
    "smollm3": ", whose SwiGLU comes after attention, not beside it",
}

COHERE2_LAYERS = {"sliding_attention": "S", "full_attention": "N"}  # cohere2 knows no others

COHERE2_SIZES = {  # ModelConfig's name of a size: Cohere2Config's
    "vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
    "ffn_dim": "intermediate_size",
    "window": "sliding_window",
    "logit_scale": "logit_scale",
    "norm_eps": "layer_norm_eps",
}

# ---- The cache ----------------------------------------------------------------------------------


class Cache:
    """Keys and values of one layer, no more than it can still see: position p in slot p % size.

    A layer that sees everything has T slots, and no more than T tokens may come. A layer with a
    window has `window` slots. They begin as zeros: attention multiplies a masked value by 0, and 0
    times whatever unused memory holds can be nan.
    """

    def __init__(self, B, T, attention, config, like):
        self.window = attention.window
        self.chunked = attention.chunked
        self.size = min(T, self.window or T)
        shape = (B, config.n_kv_head, self.size, config.head_dim)
        self.k = torch.zeros(shape, **like)
        self.v = torch.zeros(shape, **like)

    def store(self, k, v, positions):
        last = slice(-self.size, None)  # of more tokens than there are slots
        slots = positions[last] % self.size
        self.k[:, :, slots] = k[:, :, last]
        self.v[:, :, slots] = v[:, :, last]

    def extend(self, k, v, positions):
        """Store tokens at positions (T,). All keys and values that they may see, in order.

        k, v: (B, G, T, D) -> (B, G, S, D), as `attend` needs them. With 4 slots, tokens 2 3 4 5 are
        held in slots 2 3 0 1; three more from 6 on take slots 2 3 0, and 2 .. 8 come back.
        """
        start = int(positions[0])
        earlier = start % self.window if self.chunked else min(start, self.size)
        slots = torch.arange(start - earlier, start, device=k.device) % self.size
        seen_k = torch.cat((self.k[:, :, slots], k), 2)
        seen_v = torch.cat((self.v[:, :, slots], v), 2)
        self.store(k, v, positions)
        return seen_k, seen_v

    def attend_one(self, q, k, v, position):
        """Store one token at position (1,) and let it attend: q (B, H, 1, D) -> the same."""
        self.store(k, v, position)
        slot = torch.arange(self.size, device=q.device)
        # The position whose token each slot holds. It is negative in a slot that is still empty.
        held = position - (position - slot) % self.size
        seen = visible(position, held, self.window, self.chunked)
        seen = seen & (held >= 0)
        # The H / G queries that share a head's keys stand where SDPA expects the tokens of a row.
        shared = q.reshape(len(k), k.size(1), -1, k.size(3))  # (B, G, H / G, D)
        y = F.scaled_dot_product_attention(shared, self.k, self.v, seen[None])
        return y.reshape(q.shape)


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Logits (B, V) -> token ids (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if not top_k and top_p is None:  # to rank a large vocabulary takes longer than to draw from it
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)
    size = logits.size(-1)
    ranked, ids = logits.topk(min(top_k or size, size))  # the likeliest first
    probs = ranked.softmax(-1)
    if top_p is not None:
        # A token stays while those likelier than it hold less than top_p. The likeliest stays.
        drop = probs.cumsum(-1) - probs >= top_p
        drop[:, 0] = False
        probs = probs.masked_fill(drop, 0)
    place = torch.multinomial(probs, 1, generator=generator)
    return ids.gather(1, place)


# ---- The loss, in slices ------------------------------------------------------------------------

LOSS_SLICE = 2**29  # logits in memory at once while a loss is computed


def loss_slices(x, weight, targets):
    """Split x (rows, d) and targets (rows,) alike, so that a slice has LOSS_SLICE logits."""
    rows = max(1, LOSS_SLICE // len(weight))
    return zip(x.split(rows), targets.split(rows), strict=True)


class LinearCrossEntropy(torch.autograd.Function):
    """F.cross_entropy of the logits x @ weight.T, a slice of the rows at a time.

    x (rows, d), weight (V, d), targets (rows,) with -100 to ignore -> scalar. The logits of a batch
    are its largest tensor. Here each slice of them gives its gradients at once: three matmuls, none
    of them repeated by the backward pass, and never more than LOSS_SLICE logits in memory. It pays
    where it is compiled. Source of the idea: Liger Kernel, arXiv 2410.10989.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):
        w = weight.to(x.dtype)
        count = (targets != -100).sum().clamp(min=1)
        loss = 0.0
        grad_w = torch.zeros_like(weight)
        grad_x = []
        token = torch.arange(len(weight), device=x.device)
        for rows, wanted in loss_slices(x, weight, targets):
            logp = (rows @ w.T).float().log_softmax(-1)
            hit = token == wanted[:, None]  # nowhere where the target is -100
            loss = loss - (logp * hit).sum()
            share = (wanted != -100) / count
            grad = (logp.exp() - hit.float()) * share[:, None]
            grad = grad.to(x.dtype)
            grad_x.append(grad @ w)
            grad_w = grad_w + grad.T @ rows
        ctx.save_for_backward(torch.cat(grad_x), grad_w)
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grad.to(grad_x.dtype), grad_w * grad, None
