"""One HTML file from records: opens anywhere, asks no network, and is the same bytes for the same records.

The page is the verdict and then the sections below, in the order in which a reader needs them. A section is one file
of `reports/sections` that turns records into plain facts and drawings, and one template that shows them.
"""

import os
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from reports.newest import newest
from reports.sections import (
    acceptance,
    audit,
    bisect,
    claims,
    clocks,
    compared,
    cost,
    failures,
    history,
    kernels,
    ledger,
    planted,
    prompts,
    provenance,
    rig,
    separation,
    shards,
    speed,
    verdict,
)
from reports.sections.comparable import warnings
from reports.store import Records, gather

TEMPLATES = Path(__file__).with_name("templates")
SECTIONS = (
    ledger,
    rig,
    claims,
    failures,
    planted,
    audit,
    acceptance,
    prompts,
    separation,
    compared,
    speed,
    cost,
    kernels,
    shards,
    history,
    clocks,
    bisect,
    provenance,
)


def render(paths: list[str | Path] | str | Path, out: str | Path) -> Path:
    """Write the page of record files or folders; several runs are read as one state, see `newest`."""
    return write(html(gather(*([paths] if isinstance(paths, (str, Path)) else paths))), out)


def write(text: str, out: str | Path) -> Path:
    """A whole file or none: a reader that comes meanwhile sees the one before."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, out)
    return out


def html(records: Records) -> str:
    """The page as text."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    now = newest(records)
    sections = [section for module in SECTIONS if (section := module.build(now, records)) is not None]
    shown = [(s, Markup(environment.get_template(s.template).render(s.facts))) for s in sections]
    return environment.get_template("page.html").render(
        headline=verdict.headline(now), sections=shown, warnings=warnings(records)
    )
