import pytest

from kimi_linear.base.errors import CheckpointError
from kimi_linear.checkpoint.hub import resolve


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def put(cache, name, revision="abc123"):
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    return snapshot


def test_a_directory_is_itself(tmp_path):
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path


def test_a_directory_comes_before_a_hub_name(cache, tmp_path):
    put(cache, "org/model")
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert resolve("org/model").resolve() == tmp_path / "org" / "model"


def test_a_hub_name_is_found_in_the_cache(cache):
    snapshot = put(cache, "org/model-1.5_b")
    assert resolve("org/model-1.5_b") == snapshot


def test_the_cache_follows_hf_home(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    snapshot = put(tmp_path / "home" / "hub", "org/model")
    assert resolve("org/model") == snapshot


def test_a_hub_name_that_is_not_there_says_to_download_it(cache):
    with pytest.raises(CheckpointError, match="download it first"):
        resolve("org/model")


@pytest.mark.parametrize("revision", ["", "../../../../etc", "gone"])
def test_a_reference_that_leads_nowhere_is_not_followed(cache, revision):
    put(cache, "org/model", revision)
    with pytest.raises(CheckpointError, match="download it first"):
        resolve("org/model")


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "../x/y", "org/..", "/nowhere/at/all"])
def test_a_path_that_does_not_exist(cache, name):
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve(name)


def test_a_file_is_not_a_checkpoint(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file, expected the directory"):
        resolve(tmp_path / "model.safetensors")
