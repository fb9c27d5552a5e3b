"""Train one model of model.py, on one device or on many under torchrun.

    python train.py                                      # RNoPE-SWA on the default text
    python train.py --preset=rope                        # the baseline, everything else equal
    python train.py --init_from=out/rnope-swa --long_rows=8192 --learning_rate=1e-3 --max_iters=200
    python train.py --resume --out_dir=out/rnope-swa     # go on with a run that was stopped
    torchrun --standalone --nproc_per_node=8 train.py --gradient_accumulation_steps=8

No question and no fact is trained on: rows are plain text in which some spans are copied from
earlier in the row.
--init_from starts a second stage: give it a lower rate, and long rows for some of its steps.
A run lives in out/NAME: config.json (how it was made), log.jsonl (what it did) and ckpt.pt (where
it stands). Micro-batch n is a pure function of the seed, the stage and n. So resuming needs no
position in the data, and N processes see the batches that one would.
On a CPU that works for others, too, set OMP_WAIT_POLICY=passive: threads that wait then sleep.
"""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import prepare_data
from model import (
    GPT,
    PRESETS,
    ModelConfig,
    UsageError,
    check,
    check_ranges,
    choose_path,
    flag,
    warn,
)

SCALES = {  # defaults that fit the machine; flags given beat them
    "cpu": dict(
        n_layer=4, n_head=4, n_embd=128, block_size=256, window=32,
        batch_size=8, max_iters=1500, warmup_iters=60, learning_rate=8e-3, weight_decay=0.3,
        shortest_span=96,
    ),
    "gpu": dict(),  # the dataclasses' own defaults: 25.9M parameters
}  # fmt: skip

DTYPES = ("auto", "float32", "bfloat16")
STOPS = (signal.SIGINT, signal.SIGTERM)  # a run ends after its step when it hears one

PEAK_FLOPS = {  # dense bf16 by exact name, from the vendors' datasheets; for MFU
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}


data_flag = partial(flag, group="data")
output_flag = partial(flag, group="output")


@dataclass
class TrainConfig:
    preset: str = flag("rnope-swa", "named set of model flags", choices=PRESETS, group="model")
    scale: str = flag("auto", "named set of defaults", choices=("auto", *SCALES), group="model")
    dataset: str = data_flag("python", "folder under data_dir that prepare_data.py wrote")
    data_dir: str = data_flag("data", "where prepared datasets are")
    repeat_frac: float = data_flag(0.28, "copy spans, one at least, up to this share of a row; "
                                   "0: none", most=0.9)
    shortest_span: int = data_flag(12, "fewest tokens of a copied span", least=1)
    longest_span: int = data_flag(192, "most tokens of a copied span, half a row at most", least=1)
    long_rows: int = data_flag(0, "tokens of a row in long steps; 0: none")
    long_frac: float = data_flag(0.5, "share of steps that are long", most=1)
    out_dir: str = output_flag("", "folder of the run; empty: out/PRESET, numbered if taken")
    resume: bool = output_flag(False, "go on with out_dir, or with the newest run")
    eval_interval: int = output_flag(500, "steps between evaluations, each followed by a save",
                                     least=1)
    eval_iters: int = output_flag(10, "batches of an evaluation", least=1)
    log_interval: int = output_flag(10, "steps between lines of log.jsonl", least=1)
    init_from: str = flag("", "stage two: a run, or a cohere2 model, whose weights to start from")
    batch_size: int = flag(32, "rows of a micro-batch, per process", least=1)
    gradient_accumulation_steps: int = flag(1, "micro-batches a step, of all processes", least=1)
    max_iters: int = flag(7000, "optimiser steps", least=1)
    optimizer: str = flag("muon", "optimizer of the hidden matrices", choices=("muon", "adamw"))
    learning_rate: float = flag(4e-3, "peak learning rate")
    min_lr: float = flag(0.0, "learning rate at the end")
    norm_rate: float = flag(5.0, "rate of the norms' weights, over that of the others")
    warmup_iters: int = flag(30, "steps of linear warm-up")
    weight_decay: float = flag(0.2, "weight decay of the matrices")
    beta1: float = flag(0.9, "AdamW's decay of its mean gradient", most=0.9999)
    beta2: float = flag(0.95, "AdamW's decay of its mean squared gradient", most=0.9999)
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0: no clipping")
    seed: int = flag(1337, "seed of the weights and the batches", most=2**32 - 1)
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = flag("auto", "auto: bfloat16 where the GPU has it", choices=DTYPES)
    compile: bool = flag(True, "torch.compile, on GPUs from Ampere on")

    def __post_init__(self):
        self.dataset = str(self.dataset)  # Python code may give a Path
        self.data_dir = str(self.data_dir)
        self.init_from = str(self.init_from)
        check_ranges(self)
        check(self.shortest_span <= self.longest_span,
              f"--shortest_span={self.shortest_span}: above --longest_span={self.longest_span}, "
              "lower it or raise the other")
        check(self.min_lr <= self.learning_rate,
              f"--min_lr={self.min_lr}: above --learning_rate={self.learning_rate}")


# What --resume may change: nothing here changes what the next step computes, up to rounding.
RESUMABLE = {"resume", "out_dir", "data_dir", "device", "compile", "attention", "eval_interval",
             "eval_iters", "log_interval"}
# What --init_from takes over from the run before, beside the model.
INHERITED = ("preset", "dataset", "data_dir", "repeat_frac", "shortest_span", "longest_span")


# ---- The machine --------------------------------------------------------------------------------


class Machine:
    """Where this process computes, in which dtype, and which of `world` processes it is."""

    def __init__(self, device="auto", dtype="auto", rank=0, world=1):
        self.rank = rank
        self.world = world
        if device == "auto":
            device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        if str(device) == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        try:
            self.device = torch.device(device)
            torch.empty(1, device=self.device).item()  # the device "meta" cannot
        except (RuntimeError, AssertionError):
            raise UsageError(f"--device={device} does not work here: use --device=cpu") from None
        self.cuda = self.device.type == "cuda"
        self.name = torch.cuda.get_device_name(self.device) if self.cuda else self.device.type
        # Cards before Ampere have no bfloat16, and no kernels for what a compiled model wants.
        self.modern = self.cuda and torch.cuda.get_device_capability(self.device) >= (8, 0)
        if dtype == "auto":
            dtype = "bfloat16" if self.modern else "float32"
        self.has_bfloat16 = self.modern or not self.cuda
        check(dtype == "float32" or self.has_bfloat16,
              f"--dtype=bfloat16: {self.name} has none, drop the flag")
        self.dtype = getattr(torch, dtype)
        if self.cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if world > 1:  # tensors of the CPU travel by gloo, those of GPUs by NCCL
            backend = "cpu:gloo,cuda:nccl" if self.cuda else "gloo"
            dist.init_process_group(backend, device_id=self.device if self.cuda else None)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def to_device(self, rows):
        """Token ids, an array or a tensor, as an int64 tensor on the device."""
        rows = torch.as_tensor(rows, dtype=torch.int64)
        if self.cuda:  # from pinned memory, the host need not wait for the copy
            rows = rows.pin_memory()
        return rows.to(self.device, non_blocking=True)

    def all_reduce(self, tensor, op=dist.ReduceOp.SUM):
        """The sum, or another op, of the processes' tensors, in place."""
        if self.world > 1:
            dist.all_reduce(tensor, op)
        return tensor

    def barrier(self):
        """Until all processes have come here."""
        if self.world > 1:
            dist.barrier()

    def print0(self, text):
        """Print, once for all processes, above the bar where there is one."""
        if self.rank == 0:
            tqdm.write(text)
            sys.stdout.flush()

    def clock(self):
        """Seconds, read once the device has finished its work."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def torchrun_ranks():
    """(rank, world) of this process, from torchrun; (0, 1) without it."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return 0, 1
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    check(not missing, f"WORLD_SIZE={world} is set without {', '.join(missing)}: start with "
          "torchrun, or unset WORLD_SIZE")
    return int(os.environ["RANK"]), world


# ---- Batches ------------------------------------------------------------------------------------


def stream(name, *numbers):
    """A random generator of its own for each use, told by a name, and for each number in it.

    No name may begin another one, or their numbers might meet.
    """
    return np.random.default_rng([*name.encode(), *numbers])


def repeat_spans(row, cfg, rng):
    """Copy spans of a row (T,) to later places in it, in place.

    Spans are copied until their lengths add up to repeat_frac * T or more. Lengths are log-uniform
    from shortest_span to longest_span, and half of the row at most. Distances are any. To predict a
    copy, a model has to find the span in its context: that is how it learns to retrieve.
    """
    T = len(row)
    longest = min(cfg.longest_span, T // 2)
    shortest = min(cfg.shortest_span, longest)
    left = cfg.repeat_frac * T
    while left > 0:
        length = round(shortest * (longest / shortest) ** rng.random())
        target = rng.integers(length, T - length + 1)
        source = rng.integers(0, target - length + 1)
        row[target : target + length] = row[source : source + length]
        left -= length


def repeated_share(T, cfg):
    """The share of a row's tokens that are copies, by trial: copies overlap."""
    places = np.arange(T + 1)
    rows = np.tile(places, (32, 1))
    for n, row in enumerate(rows):
        repeat_spans(row, cfg, stream("share", n))
    return (rows != places).mean()


@dataclass
class Batches:
    """The micro-batches of a run. Number n is a function of (cfg.seed, stage, n) and the text."""
    data: prepare_data.Data
    cfg: TrainConfig
    T: int  # tokens of a row, except in long steps
    stage: int

    def __getitem__(self, n):
        """Inputs and targets, int64 (rows, tokens) each: a token's target is the next one."""
        cfg = self.cfg
        step = n // cfg.gradient_accumulation_steps
        length = self.T
        # Evenly spread: the share of the steps so far that are long stays close to long_frac.
        if cfg.long_rows and int((step + 1) * cfg.long_frac) > int(step * cfg.long_frac):
            length = cfg.long_rows
        count = cfg.batch_size * self.T // length  # as many tokens, whatever the length
        rng = stream("batch", cfg.seed, self.stage, n)
        starts = rng.integers(0, len(self.data.train) - length, count)
        rows = self.data.rows(self.data.train, starts, length + 1)
        for row in rows:
            repeat_spans(row, cfg, rng)
        rows = torch.from_numpy(rows).long()
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def load(self, step, machine):
        """Iterate over this process's micro-batches from a step on, made ahead for a GPU."""
        micro_steps = self.cfg.gradient_accumulation_steps
        mine = range(step * micro_steps + machine.rank, self.cfg.max_iters * micro_steps,
                     machine.world)
        # A worker ignores Ctrl-C: the loop, which hears it too, still needs a batch or two.
        return iter(DataLoader(self, batch_size=None, sampler=mine,
                               num_workers=int(machine.cuda), worker_init_fn=ignore_stops))


def ignore_stops(worker):
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


# ---- Evaluation ---------------------------------------------------------------------------------


def passage_length(T):
    """Tokens of the passage that is scored the second time it comes; T: training context."""
    return max(1, min(160, T // 4))


def plant_passage(rows, n, places):
    """Copy the last n tokens of each row to an earlier place in it, in place.

    rows (B, tokens); places (B,) from 0 (the row's beginning) to 1 (right before the passage).
    """
    room = rows.shape[1] - 2 * n
    for row, place in zip(rows, places, strict=True):
        start = round(place * room)
        row[start : start + n] = row[-n:]


@torch.no_grad()
def estimate_loss(model, data, cfg, T, machine):
    """Mean nats per token of fixed rows of validation text, and of a passage that comes again.

    The rows are evenly spaced, and the same for any number of processes, which share them. Then
    the last passage_length(T) tokens of each are also copied into the row, and scored alone.
    """
    n = min(cfg.eval_iters * cfg.batch_size, len(data.val) // T)
    starts = np.linspace(0, len(data.val) - T - 1, n).astype(int)
    places = stream("again").random(n)
    passage = passage_length(T)
    sums = torch.zeros(2, device=machine.device)
    stride = cfg.batch_size * machine.world
    for i in range(machine.rank, n, stride):
        some = slice(i, i + stride, machine.world)
        rows = data.rows(data.val, starts[some], T + 1)
        sums[0] += sum_losses(model, rows, T, machine)
        plant_passage(rows, passage, places[some])
        sums[1] += sum_losses(model, rows, passage, machine)
    return [nats / n for nats in machine.all_reduce(sums).tolist()]


def sum_losses(model, rows, n, machine):
    """Mean nats of the last n tokens of each row (B, tokens), summed over the rows."""
    x = machine.to_device(rows)
    targets = x[:, 1:].clone()
    targets[:, :-n] = -100
    with machine.autocast():
        _, loss = model(x[:, :-1], targets)
    return loss * len(rows)


def bits_per_byte(nats, meta):
    """Mean nats per token of the validation text -> bits per byte of it. meta: its meta.json."""
    return nats / math.log(2) * meta["val_tokens"] / meta["val_bytes"]


# ---- Optimisation -------------------------------------------------------------------------------


class BatchedMuon(torch.optim.Muon):
    """torch.optim.Muon with one pass over all matrices of a shape, in place of one over each.

    The hidden matrices are many and small: one by one, their kernels take as long to launch as the
    rest of a step takes to run. Nesterov momentum. An update has the size of AdamW's, as with
    adjust_lr_fn="match_rms_adamw" (arXiv 2502.16982).
    """

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        alike = defaultdict(list)  # by shape, all turned wide: gate, up and down are alike
        for p in group["params"]:
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            trio = [p, p.grad, state["momentum_buffer"]]
            if len(p) > p.size(1):
                trio = [matrix.mT for matrix in trio]
            alike[trio[0].shape].append(trio)
        for shape, trios in alike.items():
            params, grads, moments = zip(*trios, strict=True)
            torch._foreach_lerp_(moments, grads, 1 - group["momentum"])
            updates = torch.stack(torch._foreach_lerp(grads, moments, group["momentum"]))
            updates = orthogonalise(updates, group).to(params[0].dtype)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            size = 0.2 * math.sqrt(shape[1])
            torch._foreach_add_(params, updates.unbind(), alpha=-group["lr"] * size)


def orthogonalise(x, group):
    """Newton-Schulz: bring all singular values of each matrix of x (n, short, long) towards 1."""
    if x.is_cuda:  # on many a CPU bfloat16 is 15 times slower
        x = x.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    a, b, c = group["ns_coefficients"]
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x


def make_optimizers(model, cfg):
    """AdamW, or Muon for the hidden matrices. Decay is on matrices only.

    All learn at learning_rate, but the norms' weights at norm_rate times that.
    """
    norms = [p for p in model.parameters() if p.dim() == 1]
    matrices = [p for p in model.parameters() if p.dim() == 2]
    optimizers = []
    if cfg.optimizer == "muon":
        embedding, *hidden = matrices
        optimizers.append(BatchedMuon(hidden, cfg.learning_rate, cfg.weight_decay))
        matrices = [embedding]
    groups = [dict(params=matrices, weight_decay=cfg.weight_decay),
              dict(params=norms, weight_decay=0.0, rate=cfg.norm_rate)]
    betas = (cfg.beta1, cfg.beta2)
    optimizers.append(torch.optim.AdamW(groups, cfg.learning_rate, betas, fused=True))
    return optimizers


def compile_model(model, cfg, machine):
    """The model as it is trained: compiled if cfg.compile says so and the machine can."""
    if cfg.compile and machine.modern and sys.platform != "win32":  # there is no Triton there
        # DDP would cut the graph into buckets: no faster, and fullgraph refuses it.
        torch._dynamo.config.optimize_ddp = False
        model = torch.compile(model, fullgraph=True, dynamic=False)
    if machine.world > 1:
        model = DistributedDataParallel(model)
    return model


def learning_rate(step, cfg):
    """The rate of a step: linear warm-up, then a cosine down to min_lr."""
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / cfg.warmup_iters
    done = (step - cfg.warmup_iters) / (cfg.max_iters - cfg.warmup_iters)
    share = (1 + math.cos(math.pi * done)) / 2
    return cfg.min_lr + (cfg.learning_rate - cfg.min_lr) * share


def set_rate(optimizers, lr):
    """Let all weights learn at the rate lr, or at a multiple of it that their group names."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("rate", 1)


# ---- Runs: what is kept of them -----------------------------------------------------------------


VERSION = 3  # raised when a step computes something else: older runs cannot resume then


def save_checkpoint(run, step):
    """Write another file, then rename it to ckpt.pt: there is never half a checkpoint."""
    state = dict(version=VERSION, step=step, stage=run.stage, meta=run.data.meta,
                 model=run.model.state_dict(), model_config=asdict(run.model.config),
                 train_config=asdict(run.cfg),
                 optimizers=[optimizer.state_dict() for optimizer in run.optimizers])
    beside = run.folder / "ckpt.pt.tmp"
    try:
        torch.save(state, beside)
        os.replace(beside, run.folder / "ckpt.pt")
    except (OSError, RuntimeError) as error:
        raise UsageError(f"could not write {run.folder}/ckpt.pt ({error}): make room. If one "
                         "was there, it is intact: use --resume") from None
    finally:
        beside.unlink(missing_ok=True)


def newest_run(root="out"):
    """The folder under root whose checkpoint was written last."""
    runs = sorted(Path(root).glob("*/ckpt.pt"), key=os.path.getmtime)
    check(runs, f"no run in {root}/: train one with python train.py, or name its folder")
    return runs[-1].parent


def is_pretrained(name):
    """True for a folder with a model of transformers, and for ORGANISATION/NAME on its hub."""
    config = Path(name, "config.json")
    if config.is_file():
        return "model_type" in config.read_text(errors="replace")
    hub = re.fullmatch(r"(?!out/)[\w.-]+/[\w.-]+", str(name))
    return bool(hub) and not Path(name).parent.exists()


def load_pretrained(folder):
    """A cohere2 model of transformers with its tokenizer, as load_checkpoint gives a run."""
    if not Path(folder).exists():
        warn(f"there is no folder {folder} here: asking the hub for it")
    model = GPT.from_pretrained(folder)
    dtype = "bfloat16" if model.dtype == torch.bfloat16 else "float32"
    cfg = TrainConfig(dtype=dtype)
    meta = dict(tokenizer=prepare_data.locate(folder))
    return dict(folder=folder, step=cfg.max_iters, stage=0, meta=meta, model=model.state_dict(),
                model_config=model.config, train_config=cfg)


def load_model(folder):
    """The checkpoint of a run or, if folder is none, a cohere2 model of transformers."""
    if not Path(folder, "ckpt.pt").exists() and is_pretrained(folder):
        return load_pretrained(folder)
    return load_checkpoint(folder)


def load_checkpoint(folder):
    """What save_checkpoint wrote, on the CPU, with its configs made, and the folder it is from.

    Nothing in it is executed.
    """
    path = Path(folder, "ckpt.pt")
    runs = " ".join(str(run.parent) for run in Path("out").glob("*/ckpt.pt"))
    check(path.is_file(), f"there is no {path}: {folder} is no run, or one that has saved nothing "
          f"yet. Runs here: {runs or 'none, python train.py trains one'}")
    try:
        written = path.stat().st_mtime_ns
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["model_config"] = ModelConfig(**state["model_config"])
        state["train_config"] = TrainConfig(**state["train_config"])
        state["folder"] = folder
        state["written"] = written
    except Exception as error:  # torch.load raises many kinds; each means the same to the user
        raise UsageError(f"{path} is not a checkpoint of this version of train.py, or is damaged "
                         f"({str(error)[:100]})") from None
    return state


def load_weights(model, state, assign=False):
    """Copy the weights of a checkpoint into the model, or make them the model's own."""
    try:
        model.load_state_dict(state["model"], assign=assign)
    except RuntimeError:
        raise UsageError(f"the weights of {state['folder']} do not fit: only flags that change no "
                         "shape may differ, e.g. --block_size, --window, --rope_theta, "
                         "--log_scale; or they are of an older version") from None


def load_run(folder, device="cpu", **override):
    """A trained run: (GPT, TrainConfig, meta, with the run's step). override: of ModelConfig."""
    state = load_model(folder)
    with torch.device("meta"):  # no weights yet: they are about to be assigned
        model = GPT(replace(state["model_config"], **override))
    load_weights(model, state, assign=True)
    meta = state["meta"] | dict(step=state["step"])
    return model.to(device).eval(), state["train_config"], meta


def choose_out_dir(cfg, pattern):
    """The folder of a run: never one that holds another run, or a model of transformers."""
    name = cfg.preset if PRESETS[cfg.preset]["pattern"] == pattern else pattern
    folder = Path(cfg.out_dir or f"out/{name}")
    number = 1
    while folder.exists() and not cfg.out_dir:
        number += 1
        folder = Path(f"out/{name}-{number}")
    taken = any((folder / name).exists() for name in ("config.json", "ckpt.pt", "log.jsonl"))
    check(cfg.resume or not taken, f"{folder} holds a run or a model: name another --out_dir, or "
          "add --resume if a ckpt.pt is in it")
    return folder


@contextmanager
def open_log(run):
    """Open log.jsonl of a run that is about to go on. A second process in the run is refused.

    The open file is locked. A lock ends with its process, however that ends, and leaves no file.
    """
    folder = run.folder
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.jsonl", "a+b") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process trains in {folder}, or did a moment ago: use "
                             "another --out_dir") from None
        except (ImportError, OSError):  # Windows, or a file system without locks
            pass
        check_untouched(run)
        # Later steps will be done again, so their lines go. A kill may have left half a line.
        file.seek(0)
        size = 0
        try:
            for line in file:
                if not line.endswith(b"\n") or json.loads(line)["step"] > run.step:
                    break
                size += len(line)
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{folder}/log.jsonl has a line that train.py did not write: move "
                             "the file away") from None
        file.truncate(size)
        yield file


def check_untouched(run):
    """UsageError if another process has saved in the run's folder before this one locked it."""
    path = run.folder / "ckpt.pt"
    written = path.stat().st_mtime_ns if path.exists() else None
    check(written == run.written, f"another process has just trained in {run.folder}: start again")


def git_revision():
    command = ["git", "rev-parse", "--short", "HEAD"]
    with suppress(OSError):  # there is no git
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip() or None


def provenance(machine, **about):
    """What a file of numbers says about itself."""
    return dict(about, command=shlex.join(sys.argv), git=git_revision(),
                device=f"{machine.name} {machine.dtype}", torch=torch.__version__)


@contextmanager
def catch_signals():
    """A list that Ctrl-C and SIGTERM add their number to: the loop stops after its step."""
    heard = [0]
    before = {}

    def note(number, frame):
        heard.append(number)
        signal.signal(number, before[number])  # a second one ends the program at once

    with suppress(ValueError):  # another thread than the main one hears no signals
        for number in STOPS:
            before[number] = signal.signal(number, note)
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Log:
    """What a run tells of its steps: in log.jsonl, and by a bar, or a line now and then."""

    def __init__(self, run):
        self.run = run
        self.bar = tqdm(total=run.cfg.max_iters, initial=run.step, unit="step",
                        disable=run.machine.rank > 0 or None)  # None: unless on a terminal
        self.shown = 0.0  # when there was a line last

    def write(self, **record):
        if self.run.log_file:
            self.run.log_file.write(json.dumps(record).encode() + b"\n")
            self.run.log_file.flush()

    def start_clock(self, step):
        self.began = time.perf_counter()
        self.first = step

    def progress(self, step, loss, lr):
        """Tell of a step, and of the speed of the steps since start_clock."""
        run = self.run
        cfg = run.cfg
        now = time.perf_counter()
        rate = None
        eta = ""
        text = f"loss {loss:.4f} | lr {lr:.1e}"
        if run.machine.cuda:
            text += f" | {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
        if step > self.first:
            seconds = (now - self.began) / (step - self.first)  # of a step
            rate = cfg.batch_size * run.T * cfg.gradient_accumulation_steps / seconds
            text += f" | {rate:,.0f} tok/s"
            peak = PEAK_FLOPS.get(run.machine.name)
            if peak and cfg.dtype == "bfloat16" and not cfg.long_rows:
                used = rate * run.model.flops_per_token(run.T) / run.machine.world
                text += f" | mfu {used / peak:.0%}"
            eta = f" | eta {(cfg.max_iters - step) * seconds / 60:.1f}m"
        self.write(step=step, loss=loss, lr=lr, tokens_per_second=rate)
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and now - self.shown > 5:
            run.machine.print0(f"step {step:5d}/{cfg.max_iters} | {text}{eta}")
            self.shown = now


# ---- From flags to a run ------------------------------------------------------------------------


def make_configs(given):
    """Flags given -> (TrainConfig, ModelConfig): they beat the preset, which beats the scale."""
    preset = given.get("preset", TrainConfig.preset)
    flags = SCALES.get(given["scale"], {}) | PRESETS.get(preset, {}) | given
    ours = {name: flags.pop(name) for name in flags.keys() & TrainConfig.__annotations__}
    unknown = flags.keys() - ModelConfig.__annotations__
    check(not unknown, f"{', '.join(sorted(unknown))}: not a flag of train.py")
    return TrainConfig(**ours), ModelConfig(**flags)


def warn_idle(given, config):
    """Say on stderr which flags change nothing with these layers."""
    used = {"log_scale": "N", "attn_scale": "N", "window": "SWC", "rope_theta": "RSC",
            "rope_theta_full": "R"}
    for name, letters in used.items():
        if given.get(name) and not set(letters) & set(config.layers):
            warn(f"--{name} changes nothing: pattern {config.pattern} has no layer "
                 f"{' or '.join(letters)}")


def open_dataset(cfg, T, machine):
    """The prepared dataset, long enough for the rows; the default one is made if missing."""
    folder = Path(cfg.data_dir, cfg.dataset)
    if cfg.dataset == "python" and not folder.exists() and machine.rank == 0:
        prepare_data.prepare(prepare_data.DataConfig(data_dir=cfg.data_dir))
    machine.barrier()
    data = prepare_data.load_data(folder)
    check(len(data.val) > T, f"{folder} has {len(data.val)} validation tokens: too few for "
          f"--block_size={T}")
    train_tokens = f"{folder} has {len(data.train)} training tokens"
    check(len(data.train) > T, f"{train_tokens}: too few for --block_size={T}")
    check(len(data.train) > cfg.long_rows,
          f"{train_tokens}: too few for --long_rows={cfg.long_rows}")
    return data


@dataclass
class Run:
    """All that the loop needs."""
    machine: Machine
    cfg: TrainConfig
    data: prepare_data.Data
    model: GPT
    optimizers: list
    folder: Path
    T: int  # tokens of a row, except in long steps
    step: int = 0  # where it begins
    stage: int = 0  # how many runs came before, by --init_from
    written: int | None = None  # when its ckpt.pt was, by the clock of the file system
    log_file: object = None  # log.jsonl, in the first process


def read_parent(given):
    """Flags given -> (checkpoint to start from or None, flags with what its run hands down)."""
    if given.get("resume"):
        folder = str(given.get("out_dir") or newest_run())
        other = [f"--{name}" for name in sorted(set(given) - RESUMABLE)]
        check(not other, f"{', '.join(other)} cannot change with --resume: drop it, or start a "
              f"second stage with --init_from={shlex.quote(folder)}")
        checkpoint = load_checkpoint(folder)
        check(checkpoint.get("version") == VERSION, f"{folder} was begun by another version of "
              "train.py, whose steps differ: resume it there, or use "
              f"--init_from={shlex.quote(folder)}")
        flags = asdict(checkpoint["train_config"]) | asdict(checkpoint["model_config"]) | given
        return checkpoint, flags | dict(out_dir=folder)
    if given.get("init_from"):
        checkpoint = load_model(given["init_from"])
        kept = {name: getattr(checkpoint["train_config"], name) for name in INHERITED}
        preset = kept["preset"]
        check(given.get("preset", preset) == preset,
              f"--preset: {checkpoint['folder']} is {preset} and stays so; single flags of the "
              "model may differ, such as --log_scale")
        return checkpoint, kept | asdict(checkpoint["model_config"]) | given
    return None, given


def make_run(given):
    """Flags -> a Run, new or resumed. Errors come before any file of the run is written."""
    checkpoint, given = read_parent(given)
    machine = Machine(given.get("device", "auto"), given.get("dtype", "auto"), *torchrun_ranks())
    if given.get("scale", "auto") == "auto":
        given = given | dict(scale="gpu" if machine.cuda else "cpu")
    cfg, model_cfg = make_configs(given)
    T = model_cfg.block_size
    check_rows(cfg, T, machine.world)
    choose_path(model_cfg.attention, machine.device, machine.dtype, model_cfg.head_dim)
    data = open_dataset(cfg, T, machine)
    folder = choose_out_dir(cfg, model_cfg.pattern)
    machine.barrier()  # until all have chosen, before one of them makes the folder
    size = data.meta["vocab_size"]
    if "vocab_size" not in given:  # a multiple of 64 keeps the matmuls of the head well aligned
        model_cfg = replace(model_cfg, vocab_size=math.ceil(size / 64) * 64)
    check(size <= model_cfg.vocab_size, f"{data.folder} has {size} token ids, the model only "
          f"{model_cfg.vocab_size}: prepare the text with the model's tokenizer, or raise "
          "--vocab_size")
    cfg = replace(cfg, out_dir=str(folder), dtype=str(machine.dtype).removeprefix("torch."))
    torch.manual_seed(cfg.seed)
    model = GPT(model_cfg).to(machine.device)
    run = Run(machine, cfg, data, model, make_optimizers(model, cfg), folder, T)
    if checkpoint:
        restore(run, checkpoint)
    return run


def restore(run, checkpoint):
    """Start from a checkpoint: from its weights, and in a resumed run from where it stood."""
    meta = run.data.meta
    told = checkpoint["meta"]
    meta["earlier_texts"] = told.get("earlier_texts", [])  # of the stages before, by their hashes
    if not run.cfg.resume:
        meta["earlier_texts"] = [*meta["earlier_texts"], told.get("train_sha256")]
        check(meta["tokenizer"] == told["tokenizer"],
              f"{checkpoint['folder']} needs a text in its own tokens: prepare_data.py "
              f"--tokenizer={told['tokenizer']} --name=NAME makes one for --dataset=NAME")
        load_weights(run.model, checkpoint)
        run.stage = checkpoint["stage"] + 1
        return
    check(meta["train_sha256"] == told["train_sha256"],
          f"{run.data.folder} is not the text that {checkpoint['folder']} learns from")
    load_weights(run.model, checkpoint)
    run.stage = checkpoint["stage"]
    run.step = checkpoint["step"]
    run.written = checkpoint["written"]
    for optimizer, saved in zip(run.optimizers, checkpoint["optimizers"], strict=True):
        optimizer.load_state_dict(saved)


def check_rows(cfg, T, world):
    """UsageError for rows and micro-batches that cannot be shared out."""
    tokens = cfg.batch_size * T
    longest = cfg.long_rows or T
    check(longest % T == 0 and tokens % longest == 0,
          f"--long_rows={longest}: it must be a multiple of --block_size={T} that divides the "
          f"{tokens} tokens of a micro-batch, --batch_size={cfg.batch_size} times {T}")
    micro = cfg.gradient_accumulation_steps
    check(micro % world == 0, f"--gradient_accumulation_steps={micro}: it must be a multiple of "
          f"{world}, the number of processes")


def print_header(run):
    """Write config.json and tell the user what is going to happen."""
    cfg = run.cfg
    size = run.model.num_params()
    layers = run.model.plan()
    about = provenance(run.machine, train=asdict(cfg), model=asdict(run.model.config),
                       layers=layers, parameters=size, processes=run.machine.world)
    if not run.step:
        prepare_data.write_atomically(run.folder / "config.json", json.dumps(about, indent=2))
    print(f"{run.folder}: scale {cfg.scale}, {size / 1e6:.2f}M parameters, "
          f"{run.machine.world} x {run.machine.name} in {cfg.dtype}, {cfg.optimizer}")
    share = repeated_share(run.T, cfg)
    print(f"text    {run.data.folder}, {share:.0%} of a training row repeats earlier spans of it "
          "(--repeat_frac=0: none)")
    print(f"layers  {layers}", flush=True)


# ---- The loop -----------------------------------------------------------------------------------


def train(given):
    """Train by these flags. -> (folder of the run, number of the signal that stopped it, or 0)."""
    run = make_run(given)
    began = time.time()
    main = run.machine.rank == 0
    log_file = open_log(run) if main else nullcontext()
    with log_file as run.log_file, catch_signals() as heard:
        if main:
            warn_idle(given, run.model.config)
            print_header(run)
        step, stopped = train_loop(run, heard)
    folder = shlex.quote(run.cfg.out_dir)
    told = f"done in {time.time() - began:.0f} s: python sample.py {folder}"
    if stopped:
        told = f"stopped at step {step}: python train.py --resume --out_dir={folder} goes on"
    run.machine.print0(told)
    if run.machine.world > 1:
        dist.destroy_process_group()
        # Gloo's threads may need the GIL to let go of the last tensors, and freeing the DDP model
        # waits for them with the GIL held: some runs never ended (pytorch/pytorch#56297).
        time.sleep(0.5)
    return run.folder, stopped


def train_loop(run, heard):
    """Steps until the last, or until a signal. -> (steps done, number of that signal, or 0)."""
    cfg = run.cfg
    machine = run.machine
    step = run.step
    model = compile_model(run.model, cfg, machine)
    batches = Batches(run.data, cfg, run.T, run.stage).load(step, machine)
    micro_steps = cfg.gradient_accumulation_steps // machine.world  # of this process
    log = Log(run)
    lengths = set()  # of rows, met so far
    stopped = 0
    while step < cfg.max_iters and not stopped:
        began = time.perf_counter()
        lr = learning_rate(step, cfg)
        step_loss = 0
        for micro in range(micro_steps):
            x, y = map(machine.to_device, next(batches))
            if machine.world > 1:  # gradients are averaged once, with the last micro-batch
                model.require_backward_grad_sync = micro == micro_steps - 1
            with machine.autocast():
                loss = model(x, y)[1] / micro_steps
            loss.backward()
            step_loss += loss.detach()
        if cfg.grad_clip:
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), cfg.grad_clip)
        set_rate(run.optimizers, lr)
        for optimizer in run.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        length = x.size(1)
        if length not in lengths:  # the first step of a length compiles: it is timed apart
            lengths.add(length)
            seconds = machine.clock() - began
            machine.print0(f"first step of {length}-token rows took {seconds:.1f} s")
            log.start_clock(step)
        # A signal that any process has heard stops all of them, at one step.
        stopped = int(machine.all_reduce(torch.tensor(heard[-1]), dist.ReduceOp.MAX))
        due = stopped or step % cfg.eval_interval == 0 or step == cfg.max_iters
        if due or step % cfg.log_interval == 0:
            loss = machine.all_reduce(step_loss).item() / machine.world
            check_finite("loss", loss, step, run)
            log.progress(step, loss, lr)
            if due:
                evaluate_and_save(run, step, log)
            log.start_clock(step)
    if step == cfg.max_iters:
        stopped = 0  # a signal during the last step changes nothing
    return step, stopped


def evaluate_and_save(run, step, log):
    """Evaluate, and save the weights if they are sound."""
    loss, again = estimate_loss(run.model, run.data, run.cfg, run.T, run.machine)
    check_finite("validation loss", loss, step, run)
    bits = bits_per_byte(loss, run.data.meta)
    copy = bits_per_byte(again, run.data.meta)
    log.write(step=step, val_loss=loss, bits_per_byte=bits, copy=copy)
    run.machine.print0(f"step {step:5d}/{run.cfg.max_iters} | val loss {loss:.4f} nats | "
                       f"{bits:.4f} bits per byte, {copy:.4f} in a passage seen again")
    if run.machine.rank == 0:
        save_checkpoint(run, step)


def check_finite(name, value, step, run):
    check(math.isfinite(value),
          f"the {name} is {value} at step {step}: {run.folder} keeps the last good checkpoint, if "
          "there was one; start again with a lower --learning_rate and another --out_dir")


@contextmanager
def explain_lost_process():
    """Say in one line that another process has ended: torch has many errors for that."""
    try:
        yield
    except (EOFError, ConnectionError, RuntimeError) as error:
        why = repr(error)
        lost = "DataLoader worker|EOFError|onnection|closed by peer|imed out|NCCL(?! built in)"
        check(not re.search(lost, why),
              f"another process of this run has ended ({why[:100]}): see what it said, then use "
              "--resume")
        raise


def main(argv):
    scales = f"  --scale=cpu: {SCALES['cpu']}\n  --scale=gpu: the defaults above"
    groups = {"model": ModelConfig, "training": TrainConfig}
    given = prepare_data.parse_flags(groups, argv, __doc__, scales)
    # Twice: a signal may tell torch that a worker has died while its first error is explained.
    with explain_lost_process(), explain_lost_process():
        folder, signalled = train(given)
    if signalled:
        sys.exit(128 + signalled)  # as a shell counts it: `train && sample` does not go on
    return folder


if __name__ == "__main__":
    prepare_data.run_main(main)
