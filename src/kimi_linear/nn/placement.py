"""Placement: which block stands at which layer. The per-layer list of names is the truth. No torch."""

from collections.abc import Mapping, Sequence

from kimi_linear.base.errors import ConfigError, shown


def hybrid(num_layers: int, *, ratio: int = 3, linear: str = "kda", full: str = "mla") -> tuple[str, ...]:
    """Return `ratio` linear layers, then one full-attention layer, repeated; the last layer is always full attention.

    Example:
        >>> [i for i, name in enumerate(hybrid(27)) if name == "mla"]
        [3, 7, 11, 15, 19, 23, 26]
    """
    if num_layers < 1 or ratio < 0:
        raise ConfigError(f"hybrid placement of {num_layers} layers with ratio {ratio}: expected at least 1 and 0.")
    is_full = [i % (ratio + 1) == ratio or i == num_layers - 1 for i in range(num_layers)]
    return tuple(full if here else linear for here in is_full)


def repeat(pattern: Sequence[str], num_layers: int) -> tuple[str, ...]:
    """Return the pattern repeated to `num_layers` names, the last repetition cut short where it must be.

    Example:
        >>> repeat(["gdn", "gqa"], 3)
        ('gdn', 'gqa', 'gdn')
    """
    if not pattern or num_layers < 1:
        raise ConfigError(
            f"pattern {list(pattern)} over {num_layers} layers: expected at least one name and one layer."
        )
    return tuple(pattern[i % len(pattern)] for i in range(num_layers))


def with_dense_start(layers: Sequence[str], count: int, suffix: str = "_dense") -> tuple[str, ...]:
    """Return the layers with `suffix` behind the first `count` names: blocks whose ffn is dense.

    Example:
        >>> with_dense_start(["kda", "kda", "mla"], 1)
        ('kda_dense', 'kda', 'mla')
    """
    if not 0 <= count <= len(layers):
        raise ConfigError(f"{count} dense layers of {len(layers)}: expected between 0 and {len(layers)}.")
    return tuple(name + suffix if i < count else name for i, name in enumerate(layers))


def from_lists(lists: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """Return one name a layer from lists of 1-based layer numbers, as released configurations write them.

    Raises:
        ConfigError: A number is below 1 or given twice, or a layer is missing.

    Example:
        >>> from_lists({"kda": [1, 2, 3], "mla": [4]})
        ('kda', 'kda', 'kda', 'mla')
    """
    names: dict[int, str] = {}
    for name, numbers in lists.items():
        for number in numbers:
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ConfigError(f"layer {shown(number)} of {name!r}: layer lists are 1-based, expected 1 or more.")
            if number in names:
                both = f"both {names[number]!r} and {name!r}"
                raise ConfigError(f"layer {shown(number)} is {both}; give each layer once.")
            names[number] = name
    # As many layers as numbers, whatever the largest number is.
    missing = sorted(set(range(1, len(names) + 1)) - set(names))
    if missing or not names:
        which = shown(missing) if missing else "all"
        raise ConfigError(f"layers {which} are in no list of {sorted(lists)}; the lists must cover every one.")
    return tuple(names[number] for number in sorted(names))


def to_lists(layers: Sequence[str]) -> dict[str, list[int]]:
    """Return the 1-based layer numbers of each name: the inverse of `from_lists`.

    Example:
        >>> to_lists(("kda", "kda", "mla"))
        {'kda': [1, 2], 'mla': [3]}
    """
    lists: dict[str, list[int]] = {}
    for number, name in enumerate(layers, start=1):
        lists.setdefault(name, []).append(number)
    return lists
