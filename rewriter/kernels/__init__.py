"""The fused ops: each with its reference in plain PyTorch; Triton is imported when first launched."""
