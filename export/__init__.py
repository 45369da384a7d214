"""From a compressed checkpoint to a verified graph and a bundle: twins, tracing, fusions, verification."""
