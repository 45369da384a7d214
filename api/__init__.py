"""gemini-edge: compress a trained Transformer, prove it, run it without torch."""


def __getattr__(name: str) -> str:
    # Reading the installed version costs 40 ms, more than the runtime's own import: only when asked for.
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("gemini-edge")
        except PackageNotFoundError:  # a source tree that was never installed
            return "0+unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
