"""Every pass is importable from here, and only under the name `fxzero.passes`."""

if __name__ != "fxzero.passes":
    # From the checkout's root this folder is also reachable as bare `passes`: one process would then hold two
    # copies of a pass, each with its own registry.
    raise ImportError(
        f"imported as {__name__!r}, expected 'fxzero.passes' (the folder passes/ is a part of fxzero): "
        "write `import fxzero.passes`"
    )
