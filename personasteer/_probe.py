"""Child process: decode one token of a tiny quantized model with repacked CPU weights. Crashes where the build does."""

import tempfile
from pathlib import Path

import gguf

from personasteer._native import load_core
from personasteer.tiny_model import write_tiny_model


def main() -> None:
    core = load_core()
    with tempfile.TemporaryDirectory() as folder:
        for quantization in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0):
            path = write_tiny_model(
                Path(folder) / f"{quantization.name}.gguf", n_layer=1, n_embd=256, quantization=quantization
            )
            model = core.Model(str(path), use_extra_bufts=True)
            session = core.Session(model=model, n_ctx=64, n_parallel=1, n_batch=64, n_threads=1, n_outputs=1)
            session.submit(tokens=list(range(3, 35)), max_tokens=2)
            while session.busy:
                session.step()


if __name__ == "__main__":
    main()
