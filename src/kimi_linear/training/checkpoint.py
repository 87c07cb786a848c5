"""Checkpoints of a run in progress: complete or absent, verified before use, and enough to go on bit for bit.

A checkpoint is a directory `step-00001200` with

    model.safetensors       parameters and buffers as they are in memory (float32 masters)
    optimizer.safetensors   optimizer state, flat
    state.json              step, tokens, seconds, latest metrics, data position, random states, groups, configuration
    manifest.json           size and SHA-256 of each of the above

It is written under another name and renamed when everything is on disk, so a kill at any moment leaves the previous
one. Nothing is pickled.
"""

import dataclasses
import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kimi_linear.base.errors import CheckpointError, ConfigError
from kimi_linear.base.files import atomic_directory
from kimi_linear.training.optim import Optimizers

# Field metadata of a config: a run may be resumed with another value of this field.
MAY_DIFFER = {"may_differ": True}

_FORMAT = 1
_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
_NAME = re.compile(r"step-(\d{8,})$")
_CHUNK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Where a run stands, tensors and random states aside.

    `position` is what the batches gave as their state, `precision` the choice made and its measurement.
    """

    step: int
    tokens: int
    seconds: float
    metrics: dict[str, float]
    precision: dict[str, Any]
    position: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run. One process at a time may use a directory.

    Args:
        directory: Holds the `step-*` directories; made when first needed.
        keep: How many of the newest to keep.
        config: Configuration of the whole run as plain values, written into every checkpoint.
        report: Takes one sentence about anything a person should know, such as a broken checkpoint passed over.

    Example:
        >>> from kimi_linear.training.optim import OptimConfig, build_optimizers
        >>> model = nn.Linear(4, 4)
        >>> optimizers = build_optimizers(model, OptimConfig())
        >>> store = CheckpointStore(Path("checkpoints"))
        >>> snapshot = Snapshot(step=1, tokens=64, seconds=0.5, metrics={}, precision={}, position={})
        >>> store.save(model, optimizers, snapshot).name
        'step-00000001'
        >>> store.resume(model, optimizers) == snapshot
        True
    """

    def __init__(
        self,
        directory: Path,
        keep: int = 2,
        config: dict[str, Any] | None = None,
        report: Callable[[str], None] = print,
    ) -> None:
        if keep < 1:
            raise ConfigError(f"keep is {keep}, expected at least 1 checkpoint.")
        self._directory = directory
        self._keep = keep
        self._config = config or {}
        self._report = report
        self._sweep()

    def save(self, model: nn.Module, optimizers: Optimizers, snapshot: Snapshot) -> Path:
        """Write a checkpoint, then delete all but the newest `keep`.

        Raises:
            CheckpointError: The disk is full or refuses; nothing half-written stays.
        """
        path = self._directory / f"step-{snapshot.step:08d}"
        try:
            with atomic_directory(path) as temporary:
                save_file(_model_tensors(model), temporary / "model.safetensors")
                optimizer = {name: tensor.contiguous() for name, tensor in optimizers.state_tensors().items()}
                save_file(optimizer, temporary / "optimizer.safetensors")
                _write_json(temporary / "state.json", self._state(optimizers, snapshot))
                _write_json(temporary / "manifest.json", _manifest(temporary))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"checkpoint {path} could not be written ({error}); free disk space or choose another directory, "
                f"then run again: earlier checkpoints are untouched."
            ) from error
        for old in self.paths()[self._keep :]:
            self._delete(old)
        return path

    def paths(self) -> list[Path]:
        """Return the checkpoint directories, newest first, unverified."""
        if not self._directory.is_dir():
            return []
        return sorted((p for p in self._directory.iterdir() if _NAME.match(p.name)), key=_step_of, reverse=True)

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint, or None where there is no checkpoint at all.

        Broken ones are passed over, with a sentence to `report`.

        Raises:
            CheckpointError: There are checkpoints and every one is broken.
        """
        paths = self.paths()
        for path in paths:
            try:
                verify(path)
            except CheckpointError as error:
                self._report(f"passing over a broken checkpoint: {error}")
            else:
                return path
        if paths:
            raise CheckpointError(
                f"none of the {len(paths)} checkpoints in {self._directory} is complete; delete them to start again."
            )
        return None

    def resume(self, model: nn.Module, optimizers: Optimizers) -> Snapshot | None:
        """Load the newest complete checkpoint into the model and its optimizers; None where there is none."""
        path = self.latest()
        return None if path is None else self._read(path, model, optimizers)

    def load(self, path: Path, model: nn.Module, optimizers: Optimizers) -> Snapshot:
        """Load one checkpoint into the model and its optimizers, and put back the random states.

        Raises:
            CheckpointError: It is missing, truncated, corrupt, or of another model; nothing was changed then.
        """
        verify(path)
        return self._read(path, model, optimizers)

    def _read(self, path: Path, model: nn.Module, optimizers: Optimizers) -> Snapshot:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if state["format"] != _FORMAT:
            raise CheckpointError(
                f"{path} has format {state['format']}, expected {_FORMAT}; use the version that wrote it."
            )
        _check_groups(path, state["groups"], optimizers.groups())
        _load_model(path, model, load_file(path / "model.safetensors"))
        optimizers.load_state_tensors(load_file(path / "optimizer.safetensors"))
        _restore_random(state["random"])
        if state["threads"] != torch.get_num_threads():
            self._report(
                f"the run used {state['threads']} threads so far and uses {torch.get_num_threads()} now: "
                f"losses may differ in their last bits from those of an unbroken run."
            )
        return Snapshot(**state["snapshot"])

    def _state(self, optimizers: Optimizers, snapshot: Snapshot) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "snapshot": dataclasses.asdict(snapshot),
            "config": self._config,
            "groups": optimizers.groups(),
            "random": _random_state(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    def _sweep(self) -> None:
        """Delete what a killed process left under temporary names."""
        for pattern in (".step-*.tmp", ".step-*.old"):
            for leftover in self._directory.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)

    def _delete(self, path: Path) -> None:
        # Renamed first: a kill during the deletion must not leave what looks like a broken checkpoint.
        doomed = path.with_name(f".{path.name}.old")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def verify(path: Path) -> None:
    """Compare a checkpoint's files with its manifest.

    Raises:
        CheckpointError: A file is missing, of another size, or of another content.

    Cost: reads every byte; about a second a gigabyte.

    Example:
        >>> verify(Path("missing"))
        Traceback (most recent call last):
        kimi_linear.base.errors.CheckpointError: missing is not a complete checkpoint (...).
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for name in _FILES:
            expected = manifest[name]
            size = (path / name).stat().st_size
            if size != expected["size"]:
                raise CheckpointError(f"{path / name} has {size} bytes, expected {expected['size']}; it is truncated.")
            if _digest(path / name) != expected["sha256"]:
                raise CheckpointError(f"{path / name} does not have the content its manifest states; it is corrupt.")
    except CheckpointError:
        raise
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path} is not a complete checkpoint ({error!r}).") from error


def require_same(old: Any, new: Any, may_differ: frozenset[str], where: str = "") -> None:
    """Compare two configurations as plain dictionaries, field by field, apart from the fields of `may_differ`.

    Args:
        old: The configuration a run was started with.
        new: The one it is to go on with.
        may_differ: Dotted names of the fields that change neither the network nor the order of the data.
        where: Dotted name of the part compared, for the message.

    Raises:
        ConfigError: A field differs; names it, with both values.

    Example:
        >>> require_same({"seed": 1, "threads": 2}, {"seed": 1, "threads": 4}, frozenset({"threads"}))
    """
    if where in may_differ:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            require_same(old.get(key), new.get(key), may_differ, f"{where}.{key}" if where else key)
    elif old != new:
        raise ConfigError(
            f"{where} was {old!r} when this run started and is {new!r} now; "
            f"put it back, or start a new run in another directory."
        )


def resumable_with(config: Any, where: str = "") -> frozenset[str]:
    """Return the dotted names of the fields of a config, and of its parts, that are marked `MAY_DIFFER`.

    Example:
        >>> from kimi_linear.training.loop import TrainConfig
        >>> "max_steps" in resumable_with(TrainConfig(max_steps=10))
        True
    """
    names: set[str] = set()
    for field in dataclasses.fields(config):
        name = f"{where}.{field.name}" if where else field.name
        value = getattr(config, field.name)
        if field.metadata == MAY_DIFFER:
            names.add(name)
        elif dataclasses.is_dataclass(value):
            names |= resumable_with(value, name)
    return frozenset(names)


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, tied ones once: a safetensors file holds no tensor twice."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach().contiguous()
    return tensors


@torch.no_grad()
def _load_model(path: Path, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    targets = _model_tensors(model)
    if targets.keys() != tensors.keys():
        name = min(targets.keys() ^ tensors.keys())
        raise CheckpointError(f"{path} is of another model: {name!r} is in one of them only.")
    for name, target in targets.items():
        if (target.shape, target.dtype) != (tensors[name].shape, tensors[name].dtype):
            raise CheckpointError(
                f"{path} is of another model: {name} is {tuple(tensors[name].shape)} {tensors[name].dtype}, "
                f"expected {tuple(target.shape)} {target.dtype}."
            )
    # In place, because the optimizers hold these tensors and views of them.
    state = model.state_dict()
    for name, tensor in tensors.items():
        state[name].copy_(tensor)


def _check_groups(path: Path, saved: list[dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    members = [(group["optimizer"], group["parameters"]) for group in groups]
    if [(group["optimizer"], group["parameters"]) for group in saved] != members:
        raise CheckpointError(f"{path} was written with other optimizer groups; resume with the same model and optim.")


def _random_state() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": _hex(torch.get_rng_state()),
        "cuda": [_hex(state) for state in devices],
    }


def _restore_random(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_bytes(value) for value in state["cuda"]])


def _hex(state: Tensor) -> str:
    return bytes(state.tolist()).hex()


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def _manifest(directory: Path) -> dict[str, dict[str, Any]]:
    return {name: {"size": (directory / name).stat().st_size, "sha256": _digest(directory / name)} for name in _FILES}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value) + "\n", encoding="utf-8")


def _step_of(path: Path) -> int:
    found = _NAME.match(path.name)
    assert found is not None
    return int(found.group(1))
