"""Sizes of blocks and grids. Triton's own functions of these names take 3 us a call on the host."""


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least one that is not below n; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()
