"""The commands of `refspan`, a module each: the one place that knows the specification, the export and the checks."""
