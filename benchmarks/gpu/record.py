"""What a run leaves behind: one JSON file a GPU and commit; steps taken later are added to it."""

import datetime
import json
from pathlib import Path
from typing import Any

from gpu.session import Found
from gpu.shapes import case_of
from kimi_linear.recipes.bench.record import save

SCHEMA = 1
Record = dict[str, Any]


def make(found: Found, rehearsal: bool, seconds: float) -> Record:
    """Return the record of a session."""
    now = datetime.datetime.now(datetime.UTC)
    return {
        "schema": SCHEMA,
        "date": now.strftime("%Y-%m-%d %H:%M UTC"),
        "rehearsal": rehearsal,
        "seconds": round(seconds, 1),
        "machine": found.facts,
        "ceilings": found.ceilings,
        "contracts": found.contracts,
        "problems": found.problems,
        "unmeasured": found.unmeasured,
        "rows": found.rows,
    }


def key(row: dict[str, Any]) -> str:
    """Return the name of a row's case."""
    return case_of(row["section"], row["case"]).key


def merge(old: Record, new: Record) -> Record:
    """Return the new record with what only the old one has: a case, a suite or the ceilings."""
    measured = {key(row) for row in new["rows"]}
    rows = [row for row in old["rows"] if key(row) not in measured] + new["rows"]
    known = {key(row) for row in rows}
    unmeasured = dict.fromkeys([*old["unmeasured"], *new["unmeasured"]])
    return {
        **new,
        "ceilings": new["ceilings"] or old["ceilings"],
        "contracts": {**old["contracts"], **new["contracts"]},
        "problems": list(dict.fromkeys([*old["problems"], *new["problems"]])),
        "unmeasured": [name for name in unmeasured if name not in known],
        "rows": rows,
    }


def path_of(record: Record, folder: Path) -> Path:
    """Return where a record is kept."""
    machine = record["machine"]
    return folder / f"{machine.get('machine', 'unknown')}-{machine.get('commit', 'unknown')}.json"


def store(record: Record, folder: Path) -> Path:
    """Write a record, whole or not at all, over an earlier one of the same GPU and commit; return its path."""
    path = path_of(record, folder)
    if path.exists():
        old = json.loads(path.read_text("utf-8"))
        if old.get("schema") == SCHEMA and old["rehearsal"] == record["rehearsal"]:
            record = merge(old, record)
    save(record, path)
    return path


def load_newest(folder: Path) -> list[Record]:
    """Return the newest record of each GPU, by its name."""
    newest: dict[str, Record] = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text("utf-8"))
        if record.get("schema") != SCHEMA:
            continue
        name = record["machine"].get("machine", "unknown")
        if name not in newest or record["date"] > newest[name]["date"]:
            newest[name] = record
    return [newest[name] for name in sorted(newest)]
