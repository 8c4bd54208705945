"""What the `class_path`s of configs may name. A config is data and may come from a stranger, as may the config of a
downloaded checkpoint: reading one must not run code of its choice.

jsonargparse alone refuses the paths that it lists; here everything is refused but what is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import set_parsing_settings

ALLOWED = ("mm", "torch", "lightning")
# Parts of torch that load or build code, or start processes, from what their arguments say. Of two entries that match a
# path, the longer decides.
DENIED = (
    "*",
    "torch.classes",
    "torch.distributed.elastic",
    "torch.distributed.launch",
    "torch.distributed.launcher",
    "torch.distributed.run",
    "torch.hub",
    "torch.jit",
    "torch.load",
    "torch.multiprocessing",
    "torch.ops",
    "torch.package",
    "torch.save",
    "torch.serialization",
    "torch.utils.cpp_extension",
)


def allow_imports(names: Sequence[str] = ()) -> None:
    """Lets configs parsed by this process name `mm`, `torch`, `lightning` and the packages in `names` (dotted names),
    and nothing else. Where a class was defined counts too, so `mm.x.os.system` is `os.system`.

    Raises ValueError for a name that is no dotted name, or that jsonargparse never allows.
    """
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"--allow-import takes a package's dotted name, such as my_package; not {name!r}")
    set_parsing_settings(
        import_path_denylist=list(DENIED),
        import_path_allowlist=[*ALLOWED, *names],
        instantiate_subclass_spec_in_any=False,  # an argument typed Any stays the data that the config says
    )
