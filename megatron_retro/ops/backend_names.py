"""How backends and precisions are called in wishes, tables and verdicts."""

AUTO, REFERENCE, NATIVE, COMPILED = "auto", "reference", "native", "compile"
TORCH, TRANSFORMER_ENGINE, APEX = "torch", "transformer_engine", "apex"
NONE = "none"
CPU, CUDA = "cpu", "cuda"
# float16 and bfloat16 are one precision: one decision serves both.
FLOAT64, FLOAT32, HALF = "float64", "float32", "half"
