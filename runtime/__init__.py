"""densemoe.runtime: open artifact sets, choose a variant, load it, launch it. Needs cuda-bindings and the standard library only."""

__all__: list[str] = []
