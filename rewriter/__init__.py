"""rewriter: a torch.compile backend that makes Hugging Face models train faster, in less memory."""
