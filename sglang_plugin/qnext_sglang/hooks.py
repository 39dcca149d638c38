"""Which SGLang functions are replaced or wrapped, and the check that every one of them is still there.

On any device: ``attn_backend_wrapper``, around which our Gated DeltaNet backend comes in. The rest belongs to the plain
CPU and stands in :mod:`qnext_sglang.cpu.hooks`. Nothing is touched in a process that does not serve our model.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

from sglang.srt.plugins.hook_registry import HookRegistry, HookType


class Hook(NamedTuple):
    target: str
    function: Callable[..., Any]
    around: bool = False
    """The function gets the original one as its first argument; else it takes its place."""


def _attention(original: Callable[..., Any], runner: Any, full_attn_backend: Any) -> Any:
    from qnext_sglang.gated_delta_net import wrap_attention

    ours = getattr(runner.model, "is_qnext", False)
    return wrap_attention(runner, full_attn_backend) if ours else original(runner, full_attn_backend)


HOOKS = [Hook("sglang.srt.layers.attention.attention_registry.attn_backend_wrapper", _attention, around=True)]


def unresolved(hooks: list[Hook]) -> list[str]:
    """Targets that this SGLang does not have."""
    missing = []
    for hook in hooks:
        try:
            pkgutil.resolve_name(hook.target)
        except (ImportError, AttributeError):
            missing.append(hook.target)
    return missing


def install(hooks: list[Hook]) -> None:
    """Apply ``hooks`` once a process.

    Raises:
        LookupError: a target does not exist; none has been touched.
    """
    hooks = [hook for hook in hooks if hook.target not in HookRegistry._patched]
    if missing := unresolved(hooks):
        raise LookupError(f"this SGLang has no {', '.join(missing)}")
    for hook in hooks:
        HookRegistry.register(hook.target, hook.function, HookType.AROUND if hook.around else HookType.REPLACE)
    HookRegistry.apply_hooks()
    # apply_hooks only logs what went wrong.
    if failed := [hook.target for hook in hooks if hook.target not in HookRegistry._patched]:
        raise LookupError(f"SGLang could not hook {', '.join(failed)}")
