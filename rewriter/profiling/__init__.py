"""What stands behind ``rewriter.profile``: reading PyTorch's trace, and naming and weighing what is in it."""
