"""placeholder"""
from rewriter.fusion import pattern_pass
gated_mlp = pattern_pass("gated_mlp", [], ["silu"])
