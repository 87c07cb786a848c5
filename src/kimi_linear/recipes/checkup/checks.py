"""The list of checks that need no tensor. Each yields what it finds; the callers decide what to show."""

from collections.abc import Callable, Iterator

from kimi_linear.recipes.checkup import configuration, files, side_files, tensors
from kimi_linear.recipes.checkup.evidence import Evidence
from kimi_linear.recipes.checkup.finding import Finding

# Name, what is right where nothing is found, and the check.
_CHECKS: tuple[tuple[str, str, Callable[[Evidence], Iterator[Finding]]], ...] = (
    ("config", "config.json describes this network", configuration.network),
    ("keys", "every engine finds its keys", configuration.keys),
    ("layers", "the layer schedule is the same for every engine", configuration.layers),
    ("files", "safetensors files, whole and named as usual", files.shards),
    ("index", "the index and the files agree", files.index),
    ("tensors", "every tensor is there once", tensors.presence),
    ("layout", "names and shapes are the release's", tensors.layout),
    ("dtypes", "decays are float32, the rest has one dtype", tensors.dtypes),
    ("tokenizer", "there is one, and its ids fit the embedding", side_files.tokenizer),
    ("chat", "there is a chat template", side_files.chat_template),
    ("stopping", "every end token stops generation", side_files.stopping),
)


def check(evidence: Evidence) -> list[Finding]:
    """Return what every check finds, one of severity "ok" for each that finds nothing.

    Example:
        >>> import tempfile
        >>> from kimi_linear import KimiLinearForCausalLM, preset
        >>> from kimi_linear.recipes.checkup.evidence import gather
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     KimiLinearForCausalLM(preset("tiny")).save_pretrained(directory)
        ...     [finding.check for finding in check(gather(directory)) if finding.severity != "ok"]
        ['tokenizer', 'chat']
    """
    found: list[Finding] = []
    for name, good, run in _CHECKS:
        found += list(run(evidence)) or [Finding(name, "ok", good)]
    return found
