"""What do steering and capture cost by what people use today, and by ours?

    python benchmarks/peers.py [MODEL.gguf] [--llama-bench PROGRAM [--weights FILE.gguf ..]] [--torch] [--pairs 30]
        [--save NAME]
    python benchmarks/peers.py --table NAME

A prompt of 128 tokens, then 40 tokens one by one, on the same file with the same number of threads. Every run stands
right beside one of our engine without the hook, which the ratios are to; tokens per second are medians.

- llama.cpp: its own program llama-bench; a bare loop; its control vector at all blocks but the first; a callback in C
  (cb_eval) that copies every block's output, as llama.cpp's own tools capture; the same callback in Python by ctypes.
  With --weights, llama-bench also on other files of the same weights, which are named as their files are.
- transformers on the file's dequantized weights, in float32 and in bfloat16: unsteered; repeng's ControlModel with one
  direction at all blocks; forward hooks that take the mean of every block's output. (--torch; a llama file.)
- Ours: additions, caps, readings, the mean of all block outputs but the last, sixteen personas in one batch.

Checked in the same run: the callback and our capture see the same states.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import results
from plain import PlainContext

import personasteer as ps
from personasteer.evaluate.overhead import N_PERSONAS, PHASES, Mode, Runner, interleave, random_vectors, ratio, sentence
from personasteer.model import demo_model_path

N_PROMPT, N_DECODE = 128, 40
CALLBACK = """
#include "ggml-backend.h"
#include <stdlib.h>
#include <string.h>

/* of the last decode: every block's output, one after the other */
float * states;
size_t n_states, size_states;

bool capture(struct ggml_tensor * t, bool ask, void * user_data) {
    (void) user_data;
    if (strncmp(ggml_get_name(t), "l_out-", 6) != 0) {
        return !ask;
    }
    if (!ask) {
        const size_t n = ggml_nelements(t);
        if (n_states + n > size_states) {
            size_states = 2 * (n_states + n);
            states = realloc(states, size_states * sizeof(float));
        }
        ggml_backend_tensor_get(t, states + n_states, 0, n * sizeof(float));
        n_states += n;
    }
    return true;
}
"""


def compiled_callback(folder: Path) -> Any:
    """The callback in C as a library, built against the installed llama.cpp."""
    source, library = folder / "capture.c", folder / "capture.so"
    source.write_text(CALLBACK)
    here = Path(llama_cpp.__file__).parent
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    command = [
        compiler, "-O2", "-shared", "-fPIC", f"-I{here.parent / 'include'}", str(source), "-o", str(library),
        f"-L{here / 'lib'}", "-lggml-base", f"-Wl,-rpath,{here / 'lib'}",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


class Bare:
    """A prompt and single tokens by llama.cpp through ctypes, without our engine."""

    def __init__(self, context: PlainContext, n_vocab: int, before: Callable[[], None] = lambda: None) -> None:
        self.context, self.before = context, before
        rng = np.random.default_rng(1)
        self.tokens = [int(t) for t in rng.integers(0, n_vocab, N_PROMPT + N_DECODE)]

    def run(self) -> Mapping[str, float]:
        self.context.clear()
        start = time.perf_counter()
        self.before()
        self.context.decode(self.tokens[:N_PROMPT], range(N_PROMPT), [0] * N_PROMPT, 1)
        first = time.perf_counter()
        for i in range(N_DECODE):
            self.before()
            self.context.decode([self.tokens[N_PROMPT + i]], [N_PROMPT + i], [0], 1)
        return {"prefill": first - start, "decode": (time.perf_counter() - first) / N_DECODE}


class LlamaBench:
    """llama.cpp's own benchmark program, one repetition a run; it loads the model each time, which is not counted."""

    def __init__(self, program: str, path: str, n_threads: int) -> None:
        self.command = [program, "-m", path, "-t", str(n_threads), "-ngl", "0", "-r", "1", "-o", "json"]

    def run(self) -> Mapping[str, float]:
        return {
            "prefill": N_PROMPT / self._speed("-p", str(N_PROMPT), "-n", "0"),
            "decode": 1 / self._speed("-p", "0", "-n", str(N_DECODE), "-d", str(N_PROMPT)),
        }

    def _speed(self, *what: str) -> float:
        done = subprocess.run([*self.command, *what], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        return float(json.loads(done.stdout)[0]["avg_ts"])


class InTorch:
    """A mode of the child process that holds the model in transformers."""

    def __init__(self, child: subprocess.Popen[str], mode: str) -> None:
        self.child, self.mode = child, mode

    def run(self) -> Mapping[str, float]:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write(self.mode + "\n")
        self.child.stdin.flush()
        answer: dict[str, float] = json.loads(self.child.stdout.readline())
        return answer


def torch_child(path: str, precision: str, n_threads: int) -> None:
    """Reads names of modes from stdin, runs each and writes its seconds to stdout."""
    import torch

    torch.set_num_threads(n_threads)
    if not hasattr(np, "float_"):  # repeng 0.4 names types that NumPy 2 no longer has
        np.float_ = np.float64  # type: ignore[attr-defined]
    import repeng
    from torch_llama import as_transformers

    model = as_transformers(Path(path), attention="sdpa").to(getattr(torch, precision))
    n_layer, n_embd, n_vocab = (getattr(model.config, k) for k in ("num_hidden_layers", "hidden_size", "vocab_size"))
    rng = np.random.default_rng(1)
    tokens = torch.tensor(rng.integers(0, n_vocab, (1, N_PROMPT + N_DECODE)))
    states: dict[int, Any] = {}

    def keep(il: int) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            states[il] = (output[0] if isinstance(output, tuple) else output).float().mean(1)

        return hook

    def run() -> dict[str, float]:
        with torch.inference_mode():
            start = time.perf_counter()
            out = model(tokens[:, :N_PROMPT], use_cache=True, logits_to_keep=1)
            first = time.perf_counter()
            for i in range(N_PROMPT, N_PROMPT + N_DECODE):
                out = model(tokens[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
                out.logits.argmax()
            return {"prefill": first - start, "decode": (time.perf_counter() - first) / N_DECODE}

    controlled = None
    vector = repeng.ControlVector("llama", {il: rng.standard_normal(n_embd) for il in range(n_layer)})
    for line in sys.stdin:
        mode = line.strip()
        hooks = []
        if mode == "hooks":
            hooks = [layer.register_forward_hook(keep(il)) for il, layer in enumerate(model.model.layers)]
        elif mode == "repeng":
            controlled = repeng.ControlModel(model, list(range(n_layer)))
            controlled.set_control(vector, 0.05)
        took = run()
        for hook in hooks:
            hook.remove()
        if controlled is not None:
            model = controlled.unwrap()
            controlled = None
        print(json.dumps(took), flush=True)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    children: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory() as folder, ps.Model(args.model, n_ctx=N_PROMPT + N_DECODE + 8) as model:
        vectors = random_vectors(model, 2 * N_PERSONAS)
        rows = 0.05 * vectors[0].directions[1:]
        c = compiled_callback(Path(folder))
        n_states = ctypes.c_size_t.in_dll(c, "n_states")
        in_python = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)(_python_callback())

        def bare(callback: Any = None, before: Callable[[], None] = lambda: None) -> Bare:
            context = PlainContext(
                args.model, n_ctx=N_PROMPT + N_DECODE + 8, n_parallel=1, n_threads=model.n_threads, callback=callback
            )
            return Bare(context, model.n_vocab, before)

        def begin() -> None:
            n_states.value = 0

        captured = bare(c.capture, begin)
        controlled = bare()
        controlled.context.set_control_vector(np.ascontiguousarray(rows, np.float32))
        shape = (N_PROMPT, N_DECODE)
        contexts: dict[Any, Any] = {}
        peers: dict[str, Any] = {}
        if args.llama_bench:
            peers["llama-bench"] = LlamaBench(args.llama_bench, args.model, model.n_threads)
            for path in args.weights:
                name = f"llama-bench, weights as {Path(path).stem}"
                peers[name] = LlamaBench(args.llama_bench, path, model.n_threads)
        peers["llama.cpp, a bare loop"] = bare()
        peers["llama.cpp, its control vector"] = controlled
        peers["llama.cpp, capture by a callback in C"] = captured
        peers["llama.cpp, capture by a callback in Python"] = bare(in_python)
        for precision in ("float32", "bfloat16") if args.torch else ():
            command = [sys.executable, __file__, args.model, "--child", precision, "--threads", str(model.n_threads)]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            children.append(subprocess.Popen(command, text=True, **pipes))
            for mode, what in (("plain", "unsteered"), ("repeng", "repeng"), ("hooks", "capture by hooks")):
                peers[f"transformers {precision}, {what}"] = InTorch(children[-1], mode)
        modes = {
            "personasteer, 1 addition": Mode("add", 1),
            "personasteer, 8 additions": Mode("add", 8),
            "personasteer, 8 caps": Mode("cap", 8),
            "personasteer, 8 readings": Mode("readings", 8),
            "personasteer, capture": _capture(model),
        }
        ours = {name: Runner(model, mode, vectors, shape, contexts) for name, mode in modes.items()}
        many = {
            "unsteered, 16 in a batch": Runner(
                model, Mode("off x16", hook=False, n_sequences=N_PERSONAS), vectors, shape, {}
            ),
            "personasteer, 16 personas in a batch": Runner(
                model, Mode("personas x16", 2, n_sequences=N_PERSONAS), vectors, shape, contexts
            ),
        }
        plain, plain16 = (
            Runner(model, Mode("plain", hook=False, n_sequences=n), vectors, shape, {}) for n in (1, N_PERSONAS)
        )
        agree = _check(model, captured, c)
        one = peers | {"unsteered, once more": Runner(model, Mode("off", hook=False), vectors, shape, {})} | ours
        found = interleave(
            [(plain, list(one.values())), (plain16, list(many.values()))],
            pairs=args.pairs,
            progress=lambda done, total: print(f"\r{done}/{total}", end="", file=sys.stderr),
        )
        for child in children:
            child.communicate()
        table = []
        for name, runner in (one | many).items():
            n = {"prefill": N_PROMPT, "decode": 1} if runner not in many.values() else runner.n_tokens
            row: dict[str, Any] = {"what": name}
            for phase in PHASES:
                pairs = [(own[phase], other[phase]) for own, other in found[runner]]
                row[phase] = {
                    "tokens_per_second": n[phase] / float(np.median([own for own, _ in pairs])),
                    "ratio": ratio(pairs),
                }
            table.append(row)
        return {
            "model": f"{model.name} ({model.description})",
            "threads": model.n_threads,
            "pairs": args.pairs,
            "states_differ_by": agree,
            "rows": table,
        }


def _capture(model: ps.Model) -> Mode:
    from personasteer.engine import Taps

    return Mode("capture", taps=Taps(pool_layers=tuple(range(model.n_layer - 1))))


def _python_callback() -> Callable[[int, bool, int], bool]:
    ggml = llama_cpp.llama_cpp._lib  # finds the symbols of the libraries that it needs, too
    get_name, n_bytes, get = ggml.ggml_get_name, ggml.ggml_nbytes, ggml.ggml_backend_tensor_get
    get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    n_bytes.restype, n_bytes.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
    get.restype, get.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]

    def on_node(tensor: int, ask: bool, _: int) -> bool:
        if not get_name(tensor).startswith(b"l_out-"):
            return not ask
        if not ask:
            states = np.empty(n_bytes(tensor) // 4, np.float32)
            get(tensor, states.ctypes.data, 0, states.nbytes)
        return True

    return on_node


def _check(model: ps.Model, captured: Bare, c: Any) -> float:
    """Largest difference between the callback's block outputs and our capture of the same tokens, over their size."""
    from personasteer import engine

    captured.context.clear()
    ctypes.c_size_t.in_dll(c, "n_states").value = 0
    tokens = captured.tokens[:N_PROMPT]
    captured.context.decode(tokens, range(N_PROMPT), [0] * N_PROMPT, 1)
    blocks = tuple(range(model.n_layer - 1))
    n = len(blocks) * N_PROMPT * model.n_embd
    theirs = np.ctypeslib.as_array(ctypes.POINTER(ctypes.c_float).in_dll(c, "states"), (n,)).copy()
    request = engine.Request(tokens, raw=(0, N_PROMPT))
    ours = engine.run(model._session, model, [request], taps=engine.Taps(raw_layers=blocks))[0]["raw"].ravel()
    return float(np.abs(theirs - ours).max() / np.abs(theirs).max())


def table(content: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| | prefill, tokens/s | its time, of unsteered | 95 % | decode, tokens/s | its time, of unsteered | 95 % |",
        "| --- | ---: | ---: | --- | ---: | ---: | --- |",
    ]
    for row in content["rows"]:
        cells = [row["what"]]
        for phase in PHASES:
            median, low, high = row[phase]["ratio"]
            cells += [f"{row[phase]['tokens_per_second']:.0f}", f"{median:.3f}", f"{low:.3f} … {high:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def describe(content: dict[str, Any]) -> str:
    """What the table is of."""
    pairs, threads, where = (content[k] for k in ("pairs", "threads", "machine"))
    return sentence(content["model"], N_PROMPT, N_DECODE, pairs, threads, where)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a GGUF file; the demo model without")
    parser.add_argument("--llama-bench", metavar="PROGRAM")
    parser.add_argument("--weights", metavar="FILE", nargs="+", default=[], help="the same weights in other types")
    parser.add_argument("--torch", action="store_true", help="needs torch, transformers and repeng")
    parser.add_argument("--pairs", type=int, default=30)
    results.options(parser)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--child", metavar="PRECISION", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        torch_child(args.model, args.child, args.threads)
        return
    args.model = args.model or str(demo_model_path())
    content = results.measured_or_saved(args, measure, peers=True)
    print(f"{describe(content)}\n\n{table(content)}")


if __name__ == "__main__":
    main()
