"""Triton's interpreter without what it repeats: half of its time goes into replacing `triton.language` once more.

A launch replaces the functions of `triton.language` by interpreted ones, and puts them back at its end. Every call of a
device function replaces them too, though nothing of them is left to replace.
"""

from typing import Any

# Whose private names are known. Another version interprets as it comes: slower, and right.
KNOWN = ("3.9.0",)


def patch_once_a_launch() -> bool:
    """Device functions replace only what none of their file has replaced in the same launch. Says whether it took."""
    try:
        import triton
        from triton.runtime import interpreter
    except ImportError:
        return False
    if triton.__version__ not in KNOWN:
        return False
    patch, launch, scope = interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter._LangPatchScope
    replaced: set[int] = set()

    def patch_first(fn: Any) -> Any:
        """What is replaced depends on the modules that the function's file sees."""
        file = id(fn.__globals__)
        if file in replaced:
            return scope()
        replaced.add(file)
        return patch(fn)

    def launch_anew(self: Any, *args: Any, **options: Any) -> None:
        replaced.clear()
        try:
            launch(self, *args, **options)
        finally:
            replaced.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_first, launch_anew
    return True
