"""The GPU's page: made of records alone. The record here is made up, and never stored as a result."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kimi_linear.recipes.bench.record import Row

# At these rates every aim is just reached, and at half of them missed.
COPY, PRODUCTS = 4000.0, 800.0
TIMES = {"fwd 1x8192x96": 1.15, "fwd 1x8192x64": 0.9, "fwd+bwd 1x8192x96": 5.0}
LAYERS = {"KDA": 1.0, "KDA plain": 30.0, "MLA SDPA": 2.0, "MLA SDPA padded": 1.5}


def contenders(gpu: SimpleNamespace, case: Any, slower: float) -> dict[str, float]:
    """Return made-up milliseconds of everyone on a case."""
    if case.section == "layer":
        # Quadratic against linear.
        scale = {name: case.T / 4096 * (1 if name.startswith("KDA") else (case.T / 4096) ** 0.5) for name in LAYERS}
        found = {name: ms * scale[name] for name, ms in LAYERS.items()}
        return {**found, "KDA": found["KDA"] * slower}
    floor = case.work().bytes / COPY / 1e6
    if case.section == "decode":
        ours = floor / 0.8 + (0.003 if case.token_heads < 1000 else 0)
        return {"kimi-linear": ours * slower, "plain": 6 * ours, "fla": 1.5 * ours}
    if case.section == "operators":
        return {"kimi-linear": 1.2 * floor * slower, "plain": 6 * floor, "torch": 3 * floor}
    ours = TIMES.get(case.label, 3 * floor + (0.02 if case.graph else 0.08))
    times = 4.0 if case.T <= 1024 else 2.4
    return {"kimi-linear": ours * slower, "fla": ours * (1.8 if case.backward else times)}


def made_up(gpu: SimpleNamespace, slower: float = 1.0) -> dict[str, Any]:
    """Return a record in which every aim can be judged; `slower` scales our times."""
    rows = []
    for group in gpu.shapes.GROUPS.values():
        for case in group:
            work = case.work()
            for engine, ms in contenders(gpu, case, slower).items():
                extra = {"bytes": work.bytes, "flop": work.flop, "host_us": 35.0, "peak_bytes": 2**28}
                extra |= {"token_heads": case.token_heads} if case.token_heads else {}
                row = Row(case.section, engine, case.as_dict(), "ms", [ms, 1.02 * ms, 0.99 * ms], extra=extra)
                rows.append(row.as_dict())
    failing = gpu.shapes.find("fwd 1x65536x4")
    rows.append(
        Row("kda", "plain", failing.as_dict(), "ms", reason="wrong result, not timed: off in o | d_q").as_dict()
    )
    suite = {"passed": 120, "failed": 0, "skipped": 1, "seconds": 60.0, "failures": []}
    machine = {"machine": "toy-gpu", "gpu": "Toy GPU", "commit": "abc1234", "torch": "2.11", "triton": "3.6.0"}
    machine |= {
        "fla": "0.5",
        "ptxas": "V12.8.93",
        "python": "3.12",
        "driver": "580",
        "clocks": {"clocks.sm": "345 MHz"},
    }
    return {
        "schema": gpu.record.SCHEMA,
        "date": "2026-01-01 00:00 UTC",
        "rehearsal": False,
        "seconds": 500.0,
        "machine": {**machine, "multiprocessors": 132},
        "ceilings": {"copy_gigabytes": COPY, "read_gigabytes": 3500.0, "gemm_bfloat16": PRODUCTS, "gemm_tf32": 400.0},
        "contracts": {"tests/ops/delta_rule/test_triton.py": suite},
        "problems": [],
        "unmeasured": ["kda fwd 9x9x9"],
        "rows": json.loads(json.dumps(rows)),
    }


def judged(gpu: SimpleNamespace, record: dict[str, Any]) -> dict[tuple[str, str], Any]:
    return {(verdict.what, verdict.aim): verdict for verdict in gpu.aims.verdicts(record)}


def test_every_aim_is_judged_from_the_record(gpu: SimpleNamespace) -> None:
    found = judged(gpu, made_up(gpu))
    assert len(found) == 11
    assert found["forward, T=8192, H=96", "<= 1.15 ms"].reached == "1.150 ms"
    assert found["forward, T=8192, H=96", "<= 1.15 ms"].mark == "reached, 100 %"
    assert found["forward, T=8192, H=64", ">= 2x the incumbent"].mark == "reached, 120 %"
    short = found["forward, T <= 1024, eager", ">= 4x the incumbent"]
    assert short.reached.startswith("4.00x (")
    assert short.reached.endswith("the least of 6 shapes)")
    assert found["forward + backward, T=8192, H=96", ">= 1.8x the incumbent"].ratio == pytest.approx(1.0)
    decode = found["decode, 1,000 to 8,192 state-heads", ">= 80 % of bandwidth"]
    assert decode.reached.startswith("79 % at ") or decode.reached.startswith("80 % at ")
    layer = found["KDA layer beside SDPA-based MLA, forward + backward, T=32768", "measured"]
    # Beside the faster form of the other.
    assert layer.reached.startswith("4.24x (")
    assert layer.mark == "measured"


def test_slower_kernels_miss_their_aims(gpu: SimpleNamespace) -> None:
    found = judged(gpu, made_up(gpu, slower=2.0))
    marks = [verdict.mark for verdict in found.values() if verdict.ratio is not None]
    assert marks[0] == "reached, 100 %"
    assert all(mark.startswith("missed") for mark in marks[1:])
    assert found["forward, T=8192, H=96", "<= 1.15 ms"].mark == "missed, 50 %"


def test_an_aim_without_figures_says_so(gpu: SimpleNamespace) -> None:
    empty = {**made_up(gpu), "rows": [], "contracts": {}}
    assert {verdict.mark for verdict in gpu.aims.verdicts(empty)} == {"not measured"}
    record = made_up(gpu)
    alone = {**record, "rows": [row for row in record["rows"] if row["engine"] != "fla"]}
    found = judged(gpu, alone)["forward, T=8192, H=64", ">= 2x the incumbent"]
    assert (found.reached, found.mark) == ("ours 0.900 ms; the incumbent was not measured", "not measured")


@pytest.mark.parametrize(
    ("change", "reached", "mark"),
    [
        ({"failed": 30}, "120 passed, 30 failed", "missed, 80 %"),
        ({}, "120 passed, 0 failed", "reached, 100 %"),
    ],
)
def test_a_failed_contract_is_a_missed_aim(gpu: SimpleNamespace, change: Any, reached: str, mark: str) -> None:
    record = made_up(gpu)
    (suite,) = record["contracts"].values()
    suite |= change
    first = gpu.aims.verdicts(record)[0]
    assert (first.reached, first.mark) == (reached, mark)


def test_contracts_that_did_not_all_run_are_not_reached(gpu: SimpleNamespace) -> None:
    record = made_up(gpu)
    record["contracts"]["tests/ops/conv/test_triton.py"] = gpu.contracts.Outcome().as_dict()
    first = gpu.aims.verdicts(record)[0]
    assert (first.reached, first.mark) == ("120 passed, 0 failed; not all were run", "not measured")


def test_the_page_holds_aims_tables_and_pictures(gpu: SimpleNamespace, tmp_path: Path) -> None:
    gpu.record.store({"rehearsal": False, **made_up(gpu)}, tmp_path)
    gpu.report.write(tmp_path, tmp_path / "GPU.md")
    text = (tmp_path / "GPU.md").read_text()
    assert "| forward, T=8192, H=96 | <= 1.15 ms | 1.150 ms | reached, 100 % |" in text
    assert "| fwd 1x8192x96 | kimi-linear | 1.150 | 1.144 to 1.161 | 1.46 | 22 % | 14 % | 35 | 256 | 2.40x |" in text
    assert "off in o / d_q" in text
    assert "| copy, read plus written | 4,000 GB/s |" in text
    assert "| tests/ops/delta_rule/test_triton.py | 120 | 0 | 1 |" in text
    assert "kda fwd 9x9x9." in text
    assert "A rehearsal" not in text
    for picture in gpu.plots.PICTURES:
        assert f"(./toy-gpu-{picture}.png)" in text
        assert (tmp_path / f"toy-gpu-{picture}.png").read_bytes().startswith(b"\x89PNG")
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_what_a_record_comes_back_with_fits_into_eight_files(gpu: SimpleNamespace) -> None:
    """The record, the page and the pictures: what a machine that is lent sends back."""
    assert 2 + len(gpu.plots.PICTURES) <= 8


@pytest.mark.parametrize("section", ["kda", "decode", "layer", "operators"])
def test_a_partial_record_makes_a_page_too(gpu: SimpleNamespace, tmp_path: Path, section: str) -> None:
    record = made_up(gpu)
    record["rows"] = [row for row in record["rows"] if row["section"] == section]
    record["ceilings"] = record["ceilings"] if section == "decode" else {}
    gpu.record.store(record, tmp_path)
    gpu.report.write(tmp_path, tmp_path / "GPU.md")
    text = (tmp_path / "GPU.md").read_text()
    assert all(path.name in text for path in tmp_path.glob("*.png"))
    assert gpu.report.SECTIONS[section][0] in text


def test_steps_taken_later_are_added_to_the_record(gpu: SimpleNamespace, tmp_path: Path) -> None:
    first = made_up(gpu)
    decode = [row for row in first["rows"] if row["section"] == "decode"]
    first["rows"] = [row for row in first["rows"] if row["section"] != "decode"]
    first["unmeasured"] = [gpu.record.key(decode[0]), "kda fwd 9x9x9"]
    path = gpu.record.store(first, tmp_path)
    assert path.name == "toy-gpu-abc1234.json"
    again = [{**row, "median": 9.0} for row in first["rows"] if row["case"].get("H") == 64]
    second = {**made_up(gpu), "rows": [*decode, *again], "contracts": {}, "ceilings": {}, "unmeasured": []}
    assert gpu.record.store(second, tmp_path) == path
    merged = json.loads(path.read_text())
    assert len(merged["rows"]) == len(first["rows"]) + len(decode)
    assert {row["median"] for row in merged["rows"] if row["case"].get("H") == 64 and row["section"] == "kda"} == {9.0}
    assert merged["unmeasured"] == ["kda fwd 9x9x9"]
    assert merged["contracts"] == first["contracts"]
    assert merged["ceilings"] == first["ceilings"]


def test_the_newest_record_of_a_gpu_is_shown(gpu: SimpleNamespace, tmp_path: Path) -> None:
    for commit, date in (("zzz", "2026-01-01"), ("aaa", "2026-02-02")):
        record = made_up(gpu)
        gpu.record.store({**record, "date": date, "machine": {**record["machine"], "commit": commit}}, tmp_path)
    (tmp_path / "other.json").write_text(json.dumps({"machine": {"machine": "toy-gpu"}, "date": "2027"}))
    (found,) = gpu.record.load_newest(tmp_path)
    assert found["machine"]["commit"] == "aaa"


def test_a_page_without_records_claims_nothing(gpu: SimpleNamespace) -> None:
    assert gpu.report.render([], "results/gpu").endswith("run `make gpu-check` on one.\n")


def test_the_published_page_is_that_of_the_published_records(gpu: SimpleNamespace) -> None:
    """Tables are generated, never typed; the page of the CPU does not read these records."""
    report = gpu.report
    assert report.PAGE.read_text("utf-8") == report.render(report.record.load_newest(report.RESULTS), "results/gpu")
    assert report.RESULTS.parent.name == "results"
