"""Mutate the reference's source automatically, and see which mutants the conformance suite lets pass.

    pip install cosmic-ray
    python tests/mutation/run.py [MODULE ..] [--json FILE] [--again FILE]
    python tests/mutation/run.py --check ID [--check ID ..]   # do new checks reject what survived so far?

cosmic-ray makes the mutants: it replaces operators, comparisons, numbers, booleans. Left out are changes to argument
checks, which conformance does not ask about, and to annotations. Survivors are compared with `survivors.toml`, where
each is explained: the exit status is 1 if one is not, or if an entry there is not a survivor any more.
"""

import ast
import contextlib
import json
import multiprocessing
import os
import select as io
import signal
import sys
import time
import tomllib
from pathlib import Path

import click
import numpy as np

HERE = Path(__file__).resolve().parent
MODULES = [
    "mask", "visibility", "row", "tile", "tiles", "position", "attention",
    "span", "shorten", "span_loss", "layer_norm", "linear", "feedforward", "embedding", "cross_entropy",
    "memory", "stream", "layer", "model",
]  # fmt: skip
OPERATORS = [
    *(f"ReplaceBinaryOperator_{pair}" for pair in (
        "Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_Add", "Pow_Mul", "BitOr_BitAnd",
        "BitAnd_BitOr",
    )),
    *(f"ReplaceComparisonOperator_{pair}" for pair in (
        "Eq_NotEq", "NotEq_Eq", "Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Lt_Gt", "Gt_Lt", "LtE_GtE", "GtE_LtE",
        "Is_IsNot", "IsNot_Is",
    )),
    "ReplaceUnaryOperator_Delete_USub", "ReplaceUnaryOperator_Delete_Invert", "ReplaceUnaryOperator_Delete_Not",
    "ReplaceAndWithOr", "ReplaceOrWithAnd", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "NumberReplacer",
    "ReplaceContinueWithBreak", "ZeroIterationForLoop",
]  # fmt: skip
TILED, STEPS = ("mask", "visibility", "row", "tile", "tiles", "position", "attention"), ("attention", "gradient")
"""Modules whose mutants are tried once more with small tiles, and the levels that this is for."""
PATIENCE = 240.0
"""Seconds for one mutant."""


def mutants_of(module):
    """(line before, line after, source) of each mutant of a module."""
    from cosmic_ray.mutating import MutationVisitor
    from cosmic_ray.plugins import get_operator

    from refspan.conformance.mutants.edited import source_of

    source = source_of(f"refspan.{module}")
    seen = {what_runs(source)}
    for name in OPERATORS:
        operator = get_operator(f"core/{name}")()
        for occurrence in range(10**6):
            changed = MutationVisitor.mutate_code(source, operator, occurrence)
            if changed is None:
                break
            if (runs := what_runs(changed)) not in seen:
                seen.add(runs)
                pairs = zip(source.splitlines(), changed.splitlines(), strict=True)
                number, (before, after) = next((i, pair) for i, pair in enumerate(pairs, 1) if pair[0] != pair[1])
                yield number, before.strip(), after.strip(), changed


def what_runs(source):
    """The source without what does not compute: documentation, annotations, argument checks."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None  # all of them alike, so that none is tried

    class Strip(ast.NodeTransformer):
        def visit_If(self, node):
            self.generic_visit(node)
            return ast.Pass() if all(isinstance(one, ast.Raise | ast.Pass) for one in node.body) else node

        def visit_Raise(self, node):
            return ast.Pass()

        def visit_AnnAssign(self, node):
            self.generic_visit(node)
            node.annotation = ast.Constant(None)
            return node

        def visit_FunctionDef(self, node):
            self.generic_visit(node)
            node.returns = None
            names = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]  # how they are passed: no matter
            node.args = ast.arguments([], names, None, [], [], None, [])
            return ast.Pass() if node.name.startswith(("check_", "_check", "_as_numbers")) else node

        def visit_arg(self, node):
            node.annotation = None
            return node

        def visit_Call(self, node):
            self.generic_visit(node)
            name = getattr(node.func, "id", "")
            return ast.Constant(name) if name.startswith("check_") else node

    return ast.dump(Strip().visit(tree))


def all_cases(ids):
    """(check, its cases) of the checks, all if none is named, those that kill most and cost least first."""
    from refspan.conformance.drawing import drawn
    from refspan.conformance.runner import select

    cheap = ("gradient.values", "attention.position", "training.gradients", "memory.state_machine", "model.pre_norm")
    checks = sorted(select(ids=ids), key=lambda check: (check.id not in cheap, check.cost, check.id))
    return [(check, drawn(check, np.dtype(np.float32), 0, 100)) for check in checks]


def killer_of(backend, asked):
    """The check that rejects a backend and what it says, or None."""
    from refspan.conformance.guard import Misbehaviour
    from refspan.conformance.registry import Probe
    from refspan.conformance.sessions import InProcess

    session = InProcess(backend, timeout=20)
    for check, cases in asked:
        probe = Probe(session)
        for case in cases:
            try:
                check.body(probe, case)
            except Misbehaviour as error:
                return check.id, str(error)[:200]
    return None


def apart(function, patience):
    """What `function` returns in a process of its own, which has a copy of our memory; a reason if it does not."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(readable)
        with contextlib.suppress(BaseException):
            os.write(writable, json.dumps(function()).encode())
        os._exit(0)
    os.close(writable)
    ready, _, _ = io.select([readable], [], [], patience)
    said = os.read(readable, 65536) if ready else b""
    os.close(readable)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if said:
        return json.loads(said)
    return ["nothing", "it crashed" if ready else f"it did not end within {patience:g} s"]


def work(tasks, results, ids):
    """In a process: try mutants until there are no more."""
    from refspan.conformance.backends.reference import SmallTiles
    from refspan.conformance.memo import remembering
    from refspan.conformance.mutants import RIGHT
    from refspan.conformance.mutants.edited import Edited

    np.seterr(all="ignore")
    import warnings

    warnings.simplefilter("ignore")
    asked = all_cases(ids)
    with remembering():
        assert killer_of(RIGHT["numpy"](), asked) is None
        while (task := tasks.get()) is not None:
            module, number, before, after, source = task
            start = time.perf_counter()

            def attempt(module=module, source=source):
                try:
                    backend = Edited(f"refspan.{module}", source)
                except Exception as error:  # noqa: BLE001
                    return "import", str(error)[:200]
                killer = killer_of(backend, asked)
                if killer is None and module in TILED:
                    backend.limits = SmallTiles.limits
                    killer = killer_of(backend, [(check, cases) for check, cases in asked if check.level in STEPS])
                return killer

            results.put((module, number, before, after, apart(attempt, PATIENCE), time.perf_counter() - start))
    results.put(None)


@click.command()
@click.argument("modules", nargs=-1, type=click.Choice(MODULES))
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write all mutants and what became of them.")
@click.option("--again", type=click.Path(path_type=Path, exists=True), help="Only what survives in this record.")
@click.option("--check", "ids", multiple=True, help="Try these alone, on the mutants of survivors.toml alone.")
@click.option("--processes", default=os.cpu_count(), show_default=True)
def main(modules, path, again, ids, processes):
    """Mutate the reference, and try the conformance suite on the mutants."""
    from refspan.conformance.runner import select
    from refspan.errors import SetupError

    try:
        select(ids=ids)
    except SetupError as error:
        raise click.UsageError(str(error)) from None
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    tasks, results = context.Queue(), context.Queue()
    count = 0
    groups = tomllib.loads((HERE / "survivors.toml").read_text())["group"]
    groups = [group for group in groups if group["module"] in (modules or MODULES)]
    names = {(group["module"], *pair) for group in groups for pair in group["mutants"]}
    kept = json.loads(again.read_text()) if again else []
    rejected = {(one["module"], one["before"], one["after"]) for one in kept if one["killer"] is not None}
    for module in modules or MODULES:
        for number, before, after, source in mutants_of(module):
            if (module, before, after) not in rejected and (not ids or (module, before, after) in names):
                tasks.put((module, number, before, after, source))
                count += 1
    for _ in range(processes):
        tasks.put(None)
        context.Process(target=work, args=(tasks, results, ids)).start()
    print(f"{count} mutants", flush=True)
    found, ended = [], 0
    while ended < processes:
        one = results.get()
        if one is None:
            ended += 1
            continue
        module, number, before, after, killer, seconds = one
        entry = {"module": module, "line": number, "before": before, "after": after, "killer": killer}
        found.append(entry | {"seconds": round(seconds, 1)})
        if killer is None and not ids:
            print(f"{len(found)}: {module}.py:{number} survives\n   {before}\n   {after}", flush=True)
        if path:
            path.write_text(json.dumps(found, indent=1) + "\n")
    alive = {(one["module"], one["before"], one["after"]) for one in found if one["killer"] is None}
    for one in sorted(alive - names):
        print("not explained:", *one, sep="\n   ")
    for one in sorted(names - alive):
        print("explained, and no survivor:", *one, sep="\n   ")
    print(f"{len(found)} mutants, {len(found) - len(alive)} rejected, {len(alive)} survive")
    sys.exit(alive != names)


if __name__ == "__main__":
    main()
