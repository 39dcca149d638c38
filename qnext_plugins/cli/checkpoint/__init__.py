"""``qnext checkpoint``: Qwen3-Next checkpoints made to measure, written tensor by tensor.

:mod:`spec` says what can be asked for, :mod:`structure` how a model comes to have a known continuation, :mod:`tensors`
makes the values of one tensor, :mod:`writer` writes them all.
"""

from qnext_plugins.cli.checkpoint.spec import Kind, Spec, SpecError
from qnext_plugins.cli.checkpoint.structure import Structure
from qnext_plugins.cli.checkpoint.writer import Plan, plan, write

__all__ = ["Kind", "Plan", "Spec", "SpecError", "Structure", "plan", "write"]
