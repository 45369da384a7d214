"""A GGUF as a Hugging Face folder in float32, for other converters: dequantize_gguf.py SOURCE.gguf OUT

For an environment with transformers, gguf and accelerate.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

if len(sys.argv) != 3:
    sys.exit(__doc__)
source, out = Path(sys.argv[1]), sys.argv[2]
model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
# The weights are plain numbers now, but transformers still counts the model among the quantized.
model.hf_quantizer, model.is_quantized = None, False
if hasattr(model.config, "quantization_config"):
    del model.config.quantization_config
model.save_pretrained(out)
AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(out)

# transformers 5 nests it; transformers 4, which optimum-onnx needs, then silently takes its own default.
path = Path(out) / "config.json"
config = json.loads(path.read_text())
config.setdefault("rope_theta", (config.get("rope_parameters") or {}).get("rope_theta", 10000.0))
path.write_text(json.dumps(config, indent=2) + "\n")
