"""rewriter: a torch.compile backend that makes Hugging Face models train faster, in less memory.

model.compile(backend="rewriter")
"""

from rewriter.accelerate_entry import register as _register_with_accelerate
from rewriter.check import CheckError, check
from rewriter.huggingface import prepare, restore
from rewriter.pattern import PatternError, maybe, require
from rewriter.profile import Profile, profile
from rewriter.registry import rewrite
from rewriter.report import Report, inspect, report

__all__ = [
    "CheckError",
    "PatternError",
    "Profile",
    "Report",
    "check",
    "inspect",
    "maybe",
    "prepare",
    "profile",
    "report",
    "require",
    "restore",
    "rewrite",
]

_register_with_accelerate()
