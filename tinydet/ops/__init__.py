"""The mathematics, one file per op: pure functions, `forward(...) -> y, cache` and `backward(dy, cache) -> dx, ...`."""
