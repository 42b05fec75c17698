"""`python -m refspan.conformance.mutants`: list the mutants."""

from refspan.conformance.mutants import MUTANTS


def main() -> None:
    """A line for each: name, what is wrong, which checks are to reject it, where it was seen."""
    for one in MUTANTS.values():
        seen = f" (seen in {one.seen_in})" if one.seen_in else ""
        change = " ".join(one.change.split())
        print(f"{one.area:<10} {one.name:<36} {change} [{', '.join(one.killed_by)}]{seen}")  # noqa: T201


if __name__ == "__main__":
    main()
