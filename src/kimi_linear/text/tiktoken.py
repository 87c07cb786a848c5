"""The released tokenizer: a `tiktoken.model` of byte-level BPE ranks, turned into a `tokenizers.Tokenizer`.

The file has one token a line: base64 of its bytes, a space, its rank, which is its id. The 258 ids behind the ranks are
control tokens; `tokenizer_config.json` names some of them and the others are `<|reserved_token_{id}|>`. Such a
vocabulary has no list of merges: two neighbours merge when their bytes together are a token, lowest rank first. Each
token is then only ever merged from one pair, which its own bytes show, so merges in order of rank say the same.
"""

import binascii
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from kimi_linear.base.config import read_json
from kimi_linear.base.errors import DataError
from kimi_linear.text.byte_level import spell
from kimi_linear.text.unicode import check_unicode

RANKS_NAME = "tiktoken.model"
CONFIG_NAME = "tokenizer_config.json"
CONTROL_SLOTS = 258

# The released file has 3 MB, and no vocabulary we know has a token of a tenth of this length. Merges are recovered in
# time that grows with the square of a token's length.
_MOST_BYTES = 16 << 20
_LONGEST_TOKEN = 1024

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_ONE_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# How text is cut before bytes are merged. The dialects of tiktoken and of `tokenizers` both read it, and mean the same.
PATTERN = "|".join(
    [
        r"\p{Han}+",
        f"{_ONE_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTION}",
        f"{_ONE_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

PIECE_CHARACTERS = 400_000
RUN_CHARACTERS = 25_000
_RUN = re.compile(r"\s+|\S+")


def pieces(text: str) -> Iterator[str]:
    """Yield the pieces of a text that the released tokenizer encodes each by itself; nothing for an empty text.

    A piece ends after 400,000 characters, and where a run of whitespace, or of anything else, passes 25,000.

    Raises:
        DataError: The text holds a lone surrogate.

    Example:
        >>> [len(piece) for piece in pieces("x" * 30_000 + " " + "y" * 400_000)][:3]
        [25000, 30001, 25000]
    """
    for start in range(0, len(text), PIECE_CHARACTERS):
        part = text[start : start + PIECE_CHARACTERS]
        check_unicode(part)
        begin = 0
        for run in _RUN.finditer(part):
            for cut in range(run.start() + RUN_CHARACTERS, run.end(), RUN_CHARACTERS):
                yield part[begin:cut]
                begin = cut
        yield part[begin:]


def is_released_kind(backend: tokenizers.Tokenizer) -> bool:
    """Return whether a tokenizer cuts text as the released one does."""
    if backend.pre_tokenizer is None:
        return False
    return backend.pre_tokenizer.__getstate__() == _pre_tokenizer().__getstate__()


def read_tiktoken(directory: Path, vocab_size: int | None = None) -> tokenizers.Tokenizer:
    """Return the tokenizer of a directory that has a `tiktoken.model` and a `tokenizer_config.json`.

    Args:
        directory: The checkpoint.
        vocab_size: Leave out the control tokens from this id up, if the ranks fit below it.

    Raises:
        DataError: A file is missing or damaged; says where.
        ConfigError: The configuration is not JSON.

    Cost: about 3 s for 163,584 ranks on one core.
    """
    ranks = read_ranks(directory / RANKS_NAME)
    config = directory / CONFIG_NAME
    if not config.is_file():
        raise DataError(f"{directory} has no {CONFIG_NAME}, which names the control tokens of {RANKS_NAME}; add it.")
    control_tokens = _control_tokens(config, len(ranks))
    if vocab_size is not None and vocab_size >= len(ranks):
        del control_tokens[vocab_size - len(ranks) :]
    return build(ranks, control_tokens)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Return the rank of each token of a `tiktoken.model`.

    Raises:
        DataError: The file is missing, too large, has a line that is not base64 and a rank, a token or a rank twice, a
            gap in the ranks, or not every byte.
    """
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise DataError(f"{path} has {size} bytes, expected at most {_MOST_BYTES}; it is not a {RANKS_NAME}.")
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        if not (line := line.rstrip()):
            continue
        token, rank = _read_line(line, f"{path}, line {number}")
        if token in ranks:
            raise DataError(f"{path}, line {number}: the token {token!r} stands there twice; get the file again.")
        ranks[token] = rank
    seen = set(ranks.values())
    if len(seen) < len(ranks):
        raise DataError(f"{path}: {len(ranks)} tokens share {len(seen)} ranks, expected one each; get the file again.")
    gap = next((rank for rank in range(len(ranks)) if rank not in seen), None)
    if gap is not None:
        raise DataError(f"{path}: no token has rank {gap}, expected 0 to {len(ranks) - 1}; get the file again.")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise DataError(f"{path}: {len(missing)} of the 256 bytes are no token, the first {missing[0]:#04x}.")
    return ranks


def _read_line(line: bytes, where: str) -> tuple[bytes, int]:
    encoded, _, rank = line.partition(b" ")
    try:
        token = binascii.a2b_base64(encoded, strict_mode=True)
    except binascii.Error as error:
        raise DataError(f"{where}: {encoded[:40]!r} is not base64 ({error}); get the file again.") from error
    if not token or len(token) > _LONGEST_TOKEN:
        raise DataError(f"{where}: the token has {len(token)} bytes, expected 1 to {_LONGEST_TOKEN}.")
    # No rank has ten digits, and int() of a million of them is slow.
    if not rank.isdigit() or len(rank) > 9:
        raise DataError(f"{where}: the rank is {rank[:40]!r}, expected a whole number; get the file again.")
    return token, int(rank)


def _control_tokens(config: Path, first: int) -> list[AddedToken]:
    """Return the control tokens, which take the ids from `first` up."""
    named = read_json(config).get("added_tokens_decoder", {})
    last = first + CONTROL_SLOTS - 1
    if not isinstance(named, dict):
        raise DataError(f"{config}: added_tokens_decoder is a {type(named).__name__}, expected an object.")
    tokens = {
        id: AddedToken(f"<|reserved_token_{id}|>", normalized=False, special=True) for id in range(first, last + 1)
    }
    for key, value in named.items():
        content = value.get("content") if isinstance(value, dict) else None
        if not isinstance(content, str) or not content:
            raise DataError(f"{config}: added token {key!r} is {value!r}, expected an object with its content.")
        if not key.isdecimal() or len(key) > 9 or int(key) not in tokens:
            raise DataError(f"{config}: added token {content!r} has the id {key!r}, expected one of {first} to {last}.")
        tokens[int(key)] = AddedToken(content, normalized=False, special=value.get("special") is not False)
    contents = [token.content for token in tokens.values()]
    if twice := next((content for content in contents if contents.count(content) > 1), None):
        raise DataError(f"{config}: the added token {twice!r} has two ids; leave one.")
    return list(tokens.values())


def build(ranks: dict[bytes, int], control_tokens: list[AddedToken]) -> tokenizers.Tokenizer:
    """Return a tokenizer from ranks, with control tokens behind them.

    Raises:
        DataError: A control token is spelled like an ordinary one.
    """
    spelled = {spell(token): rank for token, rank in ranks.items()}
    if clash := next((token.content for token in control_tokens if token.content in spelled), None):
        raise DataError(f"the control token {clash!r} is spelled like an ordinary token; give it another text.")
    by_rank = sorted(ranks, key=ranks.__getitem__)
    merges = [(spell(pair[0]), spell(pair[1])) for token in by_rank if (pair := _last_merge(token, ranks))]
    # A piece of text that is a token stays whole, whether or not merges lead to it.
    backend = tokenizers.Tokenizer(models.BPE(vocab=spelled, merges=merges, ignore_merges=True))
    backend.pre_tokenizer = _pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(control_tokens)
    return backend


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """Return the two tokens that merging the token's bytes ends with, or None if it does not end with two."""
    splits = [i for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
    if len(splits) > 1:
        return _merge_to_two(token, ranks)
    # With one way to split it, it is that one; if merging never gets there, the merge is never asked for either.
    return (token[: splits[0]], token[splits[0] :]) if splits else None


def _merge_to_two(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    parts = [token[i : i + 1] for i in range(len(token))]
    none = len(ranks)
    # The rank of each part with its right neighbour.
    pairs = [ranks.get(left + right, none) for left, right in pairwise(parts)]
    while len(parts) > 2:
        best = min(pairs)
        if best == none:
            return None
        i = pairs.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del pairs[i]
        if i < len(pairs):
            pairs[i] = ranks.get(parts[i] + parts[i + 1], none)
        if i > 0:
            pairs[i - 1] = ranks.get(parts[i - 1] + parts[i], none)
    return parts[0], parts[1]
