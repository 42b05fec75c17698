"""The JSON file of a run: written anew, whole, after each result."""

import json

from refspan.errors import SetupError
from refspan.files import write_whole


class Record:
    """What a run found out so far.

    Args:
        path: where it is written.
        head: what stands before the parts.
    """

    def __init__(self, path, head):
        self.path = path
        self.parts = {}
        self.tree = {"refspan_gpu": 1, **head, "status": "interrupted", "skipped": {}, "parts": self.parts}
        self._printed = None

    def told(self, part, name):
        """Write the file and print how far a section is."""
        self.save()
        record = self.parts[part]["results"][name]
        said = record if isinstance(record, dict) else {}
        words = [str(said[key]) for key in ("status", "summary", "reason") if key in said]
        words += [who for who, row in said.get("contenders", {}).items() if row.get("status") == "running"]
        text = " | ".join([f"{part}: {name}", *words])[:240]
        if text != self._printed and words != ["running"]:
            print(text, flush=True)
            self._printed = text

    def save(self, *, last=False):
        """Write the file. If that fails, say so and go on, the results may fit the next time; not so the last time."""
        self.tree["skipped"] = skipped_in(self.parts)
        finite = json.loads(json.dumps(self.tree, default=str), parse_constant=str)  # NaN: a string
        try:
            write_whole(self.path, f"{json.dumps(finite, indent=1)}\n".encode())
        except SetupError as error:
            if last:
                print(json.dumps(finite))  # better there than nowhere
                raise
            print(f"not saved: {error}", flush=True)


def skipped_in(parts):
    """What there was no time for -> why."""
    found = {}
    for part, state in parts.items():
        if state["status"] == "out of time" and not state["results"]:
            found[part] = state["reason"]
        for name, record in state["results"].items():
            if not isinstance(record, dict):
                continue
            rows = {f"{part}: {name}: {who}": row for who, row in record.get("contenders", {}).items()}
            late = {where: row["reason"] for where, row in rows.items() if row.get("status") == "out of time"}
            if record.get("status") == "out of time" and not late:
                found[f"{part}: {name}"] = record["reason"]
            found |= late
    return found
