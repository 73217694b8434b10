"""Compiles the programs that the simulator is held against and records their schedules and memory beside it.

    python tests/simulate/record.py [NAME ...]        (after scripts/setup cuda12; all of them take minutes, no GPU)

Schedules lose what the simulator does not read. The tests compare with what stands here, so
run this after a change of the programs, and see what moved.
"""

import json
import sys

from moe_ep.aot.compile import compile_program
from moe_ep.aot.topology import use_no_gpu
from moe_ep.checks import check
from moe_ep.override import apply, load
from moe_ep.simulate.compiled import FOLDER

# Name -> config, settings. Of those in MEMORY_ONLY the schedule is not kept.
PROGRAMS = {
    "train_single": ("single_gpu", ("aot.program=train", "aot.context=2048", "aot.tokens_per_gpu=24576")),
    "prefill_single": ("single_gpu", ("aot.program=prefill", "aot.context=2048", "aot.tokens_per_gpu=16384")),
    "decode_single": ("single_gpu", ("aot.program=decode", "aot.context=2048", "aot.tokens_per_gpu=131072")),
    **{
        f"{program}_{experts}_{overlap}": (
            f"seed_e{experts}",
            (f"aot.program={program}", f"dispatch.overlap={overlap}", "aot.context=1024", "aot.tokens_per_gpu=2048"),
        )
        for program in ("prefill", "decode")
        for experts in (16, 32, 64, 128)
        for overlap in ("none", "staggered")
    },
}
MEMORY_ONLY = tuple(name for name in PROGRAMS if "_32_" in name or "_64_" in name)
_READ = ("kind", "op", "flops", "bytes", "gemms", "product_dtype", "attention", "dtype", "scope", "backward", "name",
         "start", "body", "trip_count", "group_size", "group_stride")  # fmt: skip


def record(name: str) -> dict:
    """Compiles one program, writes its schedule unless only its memory is wanted, and returns its memory."""
    config, settings = PROGRAMS[name]
    compiled = compile_program(check(apply(load(f"configs/{config}.py"), settings)))
    if name not in MEMORY_ONLY:
        (FOLDER / f"{name}.json").write_text(as_text(compiled.schedule))
    memory = compiled.memory
    return {"config": config, "settings": settings, "arguments": memory.arguments, "outputs": memory.outputs,
            "temporaries": memory.temporaries, "total": memory.total}  # fmt: skip


def as_text(schedule: dict) -> str:
    """Returns the schedule as JSON, a line an instruction."""
    head = json.dumps({name: value for name, value in schedule.items() if name != "computations"})
    computations = []
    for name, instructions in schedule["computations"].items():
        kept = ({key: entry[key] for key in _READ if entry.get(key) not in (None, "", [])} for entry in instructions)
        computations.append(f'"{name}": [\n' + ",\n".join(" " + json.dumps(entry) for entry in kept) + "\n]")
    return head[:-1] + ', "computations": {\n' + ",\n".join(computations) + "\n}}\n"


def main(names: list[str]) -> None:
    """Records the programs named, or all of them; the figures of the others stay."""
    use_no_gpu()
    path = FOLDER / "memory.json"
    figures = json.loads(path.read_text()) if names else {}
    for name in names or PROGRAMS:
        figures[name] = record(name)
        print(f"{name}: {figures[name]['total'] / 1e9:.3f} GB", flush=True)
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(figure)}" for name, figure in figures.items())
    path.write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
