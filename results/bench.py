"""How fast models train, read and write, by preset, context length and attention path.

    python results/bench.py rope rnope-swa --lengths=1024,8192          # whole training steps
    python results/bench.py rope rnope-swa --lengths=1024,131072 --decode --window=4096

Training: the median time of a whole step (forward, backward, clipping, optimizer) on random
tokens, --batch_size rows of --block_size tokens or as many tokens in longer rows, beside what
counting FLOPs allows over the first preset. --decode: the bytes of the cache, and tokens per second
of prefill and of decoding, --rows at once, launched kernel by kernel and as one CUDA graph.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import prepare_data
import train
from model import GPT, PRESETS, ModelConfig, check, check_ranges, choose_path, flag, sample_token


@dataclass
class BenchConfig:
    presets: tuple[str, ...] = flag((), "of " + ", ".join(PRESETS), positional=True)
    lengths: str = flag("", "context lengths, e.g. 1024,8192; empty: --block_size")
    paths: str = flag("auto", "attention paths, e.g. mask,blocks")
    decode: bool = flag(False, "time reading and writing in place of training")
    rows: int = flag(8, "with --decode: rows at once", least=1)
    batch_size: int = flag(32, "rows of --block_size tokens in a training step", least=1)
    optimizer: str = flag("muon", "of the hidden matrices", choices=("muon", "adamw"))
    steps: int = flag(20, "to take the median of", least=1)
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = flag("auto", "bfloat16 where the GPU has it", choices=train.DTYPES)
    out: str = flag("", "file for the numbers, as JSON; empty: none")

    def __post_init__(self):
        check_ranges(self)
        unknown = set(self.presets) - set(PRESETS)
        check(self.presets and not unknown, f"name presets to time, of {', '.join(PRESETS)}")
        numbers = all(n.isdigit() for n in self.lengths.split(","))
        check(numbers or not self.lengths, f"--lengths={self.lengths}: give them as in 1024,8192")
        folder = Path(self.out).parent
        right = folder.is_dir() and not Path(self.out or "x").is_dir()
        check(right, f"--out={self.out}: name a file in a folder that exists")


def take_step(model, optimizers, batch, machine):
    """One training step as in train.py's loop, with one micro-batch. Its loss, on the device."""
    with machine.autocast():
        _, loss = model(*batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def clock_steps(step, machine, count):
    """Time `count` calls of step, after two that compile: (median, the first one's, peak GB)."""
    times = []
    for n in range(count + 2):
        if n == 2 and machine.cuda:
            torch.cuda.reset_peak_memory_stats()
        began = machine.clock()
        step()
        times.append(machine.clock() - began)
    peak = torch.cuda.max_memory_allocated() / 1e9 if machine.cuda else None
    return float(np.median(times[2:])), times[0], peak


def time_training(cfg, config, rows, machine):
    """A row of the table of training speeds."""
    torch.manual_seed(0)
    torch.compiler.reset()
    model = GPT(config).to(machine.device)
    recipe = train.TrainConfig(optimizer=cfg.optimizer, learning_rate=1e-4)
    compiled = train.compile_model(model, recipe, machine)
    optimizers = train.make_optimizers(model, recipe)
    shape = (rows, config.block_size)
    batch = [torch.randint(config.vocab_size, shape, device=machine.device) for _ in "xy"]
    median, first, peak = clock_steps(
        lambda: take_step(compiled, optimizers, batch, machine), machine, cfg.steps)
    return dict(tokens_per_second=rows * config.block_size / median, step_ms=median * 1e3,
                first_step_s=first, peak_gb=peak,
                flops_per_token=model.flops_per_token(config.block_size))


@torch.no_grad()
def time_decoding(cfg, config, rows, machine):
    """A row of the table of reading and writing speeds."""
    torch.manual_seed(0)
    model = GPT(config).to(machine.device)
    T = config.block_size
    idx = torch.randint(config.vocab_size, (rows, T), device=machine.device)
    with machine.autocast():
        model.prefill(idx[:, :4096], model.new_caches(rows, T))  # warms up
        caches = model.new_caches(rows, T + 4 * cfg.steps + 8)
        began = machine.clock()
        x = model.prefill(idx, caches)
        found = dict(prefill_tokens_per_second=rows * T / (machine.clock() - began))
        found["cache_mb"] = sum(c.k.nbytes + c.v.nbytes for c in caches) / 1e6
        token = sample_token(model.head(x), temperature=0)
        position = torch.tensor([T], device=machine.device)

        def step():
            x = model.read(token, caches, position)
            token.copy_(sample_token(model.head(x), temperature=0))
            position.add_(1)

        median, _, _ = clock_steps(step, machine, cfg.steps)
        found["decode_tokens_per_second"] = rows / median
        if machine.cuda:
            graph = torch.cuda.CUDAGraph()
            with torch.autocast("cuda", machine.dtype, cache_enabled=False):  # casts belong inside
                step()
                with torch.cuda.graph(graph):
                    step()
            median, _, _ = clock_steps(graph.replay, machine, cfg.steps)
            found["graph_tokens_per_second"] = rows / median
    return found


def main(argv):
    given = prepare_data.parse_flags({"bench": BenchConfig, "model": ModelConfig}, argv, __doc__)
    check("attention" not in given, "use --paths in place of --attention")
    mine = {name: given.pop(name) for name in list(given) if hasattr(BenchConfig, name)}
    cfg = BenchConfig(**mine)
    machine = train.Machine(cfg.device, cfg.dtype)
    base = ModelConfig(**dict(vocab_size=320) | given)
    lengths = [int(n) for n in (cfg.lengths or str(base.block_size)).split(",")]
    jobs = []  # all of them now: a wrong flag fails before minutes of timing, not after
    for T in lengths:
        for path in cfg.paths.split(","):
            for preset in cfg.presets:
                flags = dict(vocab_size=320) | PRESETS[preset] | given
                config = ModelConfig(**flags | dict(block_size=T, attention=path))
                choose_path(path, machine.device, machine.dtype, config.head_dim)
                jobs.append((preset, config))
    measure = time_decoding if cfg.decode else time_training
    print(f"{machine.name}, {machine.dtype}, torch {torch.__version__}, {cfg.optimizer}")
    found = []
    for preset, config in tqdm(jobs, "timing", disable=not sys.stderr.isatty(), leave=False):
        T = config.block_size
        rows = cfg.rows if cfg.decode else max(1, cfg.batch_size * base.block_size // T)
        row = dict(preset=preset, T=T, rows=rows, path=config.attention, window=config.window)
        row |= measure(cfg, config, rows, machine)
        first = next((r for r in found if (r["T"], r["path"]) == (T, config.attention)), row)
        for name in [name for name in row if name.endswith("tokens_per_second")]:
            row[f"{name}_over_{first['preset']}"] = row[name] / first[name]
        if not cfg.decode:
            row["flops_allow"] = first["flops_per_token"] / row["flops_per_token"]
        found.append(row)
        cells = [f"{k} {v:,.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()]
        print(" | ".join(cells), flush=True)
        if cfg.out:
            about = dict(command=" ".join(sys.argv), device=machine.name, torch=torch.__version__,
                         revision=train.git_revision(), settings=asdict(cfg), rows=found)
            prepare_data.write_atomically(Path(cfg.out), json.dumps(about, indent=1))


if __name__ == "__main__":
    prepare_data.run_main(main)
