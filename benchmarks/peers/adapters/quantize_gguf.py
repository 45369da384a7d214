"""Another format of a GGUF, by llama.cpp itself: quantize_gguf.py SOURCE.gguf q4_0|q4_k_m|q8_0|f16 OUT

For the environment of llama-cpp-python, whose wheel brings the quantizer as a library but not as a program.
"""

import ctypes
import os
import sys

import llama_cpp as llama

if len(sys.argv) != 4 or not hasattr(llama, f"LLAMA_FTYPE_MOSTLY_{sys.argv[2].upper()}"):
    sys.exit(__doc__)
parameters = llama.llama_model_quantize_default_params()
parameters.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{sys.argv[2].upper()}")
parameters.allow_requantize, parameters.nthread = True, os.cpu_count()
if llama.llama_model_quantize(sys.argv[1].encode(), sys.argv[3].encode(), ctypes.byref(parameters)):
    sys.exit("llama.cpp could not quantize the model")
