"""What users install: one version, complete metadata, and wheels that work away from this repository."""

from __future__ import annotations

import email
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.metadata import Metadata

import jaxpruner

ROOT = Path(__file__).parents[2]
CORE = ROOT / "core"
MEMBERS = [CORE, ROOT / "baselines", *sorted(path.parent for path in (ROOT / "integrations").glob("*/pyproject.toml"))]
PROJECTS = {member: tomllib.loads((member / "pyproject.toml").read_text()) for member in MEMBERS}
BIN = Path(sys.executable).parent
COMMON = ("license", "license-files", "authors", "classifiers", "requires-python")


def name_of(member: Path) -> str:
    return PROJECTS[member]["project"]["name"]


def package_of(member: Path) -> str:
    return name_of(member).replace("-", "_")


def run(*command: str | Path, **kwargs) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("member", MEMBERS, ids=name_of)
def test_every_member_reads_its_version_from_the_core_and_asks_for_that_core(member):
    project = PROJECTS[member]
    source = member / project["tool"]["hatch"]["version"]["path"]
    assert source.resolve() == CORE / "src" / "jaxpruner" / "__init__.py"
    assert project["project"]["dynamic"] == ["version"]
    needs_core = [need for need in project["project"]["dependencies"] if re.match(r"jaxpruner\b", need)]
    assert needs_core == ([] if member == CORE else [f"jaxpruner=={jaxpruner.__version__}"])


@pytest.mark.parametrize("member", MEMBERS, ids=name_of)
def test_members_say_the_same_of_what_they_share(member):
    project, core = PROJECTS[member]["project"], PROJECTS[CORE]["project"]
    assert {key: project[key] for key in COMMON} == {key: core[key] for key in COMMON}
    assert project["description"]
    assert set(project["keywords"]) >= {"jax", "pruning", "sparsity"}
    assert (member / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_the_change_log_begins_with_this_version():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == jaxpruner.__version__
    assert len(set(headings)) == len(headings)


def test_the_citation_is_of_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == PROJECTS[CORE]["project"]["license"]
    assert {"message", "title", "authors"} <= set(citation)
    paper = citation["preferred-citation"]
    assert paper["title"] == "JaxPruner: A Concise Library for Sparsity Research"
    assert len(paper["authors"]) == 25


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """What `make build` makes."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    run("sh", ROOT / "tools" / "build.sh", BIN, folder)
    return folder


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory, dist):
    """The python of an environment with the core and what it asks for, and with the other wheels on their own."""
    folder = tmp_path_factory.mktemp("elsewhere")
    python = folder / "venv" / "bin" / "python"
    install = (BIN / "uv", "pip", "install", "--quiet", "--python", python)
    run(BIN / "uv", "venv", "--quiet", "--python", sys.executable, folder / "venv")
    wheels = {member: dist / f"{package_of(member)}-{jaxpruner.__version__}-py3-none-any.whl" for member in MEMBERS}
    run(*install, "--constraints", ROOT / "constraints.txt", wheels[CORE])
    run(*install, "--no-deps", *(wheels[member] for member in MEMBERS if member != CORE))
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return lambda program: run(python, "-c", program, cwd=folder, env=clean)


@pytest.mark.slow
@pytest.mark.parametrize("member", MEMBERS, ids=name_of)
def test_wheels_and_source_distributions_are_whole(member, dist):
    package, version = package_of(member), jaxpruner.__version__
    files_here = [path for path in (member / "src" / package).rglob("*") if path.is_file()]
    sources = {str(path.relative_to(member / "src")) for path in files_here if path.parent.name != "__pycache__"}
    with zipfile.ZipFile(dist / f"{package}-{version}-py3-none-any.whl") as wheel:
        info = f"{package}-{version}.dist-info"
        files = {path for path in wheel.namelist() if not path.startswith(info)}
        license_text = wheel.read(f"{info}/licenses/LICENSE").decode()
        metadata = Metadata.from_email(wheel.read(f"{info}/METADATA"), validate=True)
    assert files == sources
    assert f"{package}/py.typed" in files
    assert license_text == (ROOT / "LICENSE").read_text()
    assert (metadata.name, str(metadata.version)) == (name_of(member), version)
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.license_files == ["LICENSE"]
    assert metadata.description_content_type == "text/markdown"
    assert metadata.description == (member / "README.md").read_text()

    with tarfile.open(dist / f"{package}-{version}.tar.gz") as source:
        top = f"{package}-{version}"
        members = {found.name: found for found in source.getmembers()}
        assert {f"{top}/{name}" for name in ("LICENSE", "README.md", "pyproject.toml", "PKG-INFO")} <= set(members)
        assert {f"{top}/src/{path}" for path in sources} <= set(members)
        assert all(found.isfile() for found in members.values())
        assert source.extractfile(f"{top}/LICENSE").read().decode() == license_text
        assert email.message_from_bytes(source.extractfile(f"{top}/PKG-INFO").read())["Version"] == version


TRAIN = """
import jax, jax.numpy as jnp, jaxpruner, optax

tx = jaxpruner.sparsify(
    optax.adam(0.1), algorithm="magnitude", sparsity=0.75, update_start_step=2, update_end_step=6, update_freq=2
)
params = {"w": jax.random.normal(jax.random.key(0), (8, 16))}
state = tx.init(params)
step = jax.jit(lambda params, state: tx.update(jax.grad(lambda p: jnp.sum((p["w"] - 1) ** 2))(params), state, params))
for _ in range(10):
    updates, state = step(params, state)
    params = optax.apply_updates(params, updates)
print(jnp.count_nonzero(params["w"]))
"""


@pytest.mark.slow
def test_the_installed_core_trains_sparse(elsewhere):
    assert elsewhere(TRAIN).split() == ["32"]


@pytest.mark.slow
def test_installed_packages_are_found_away_from_the_repository(elsewhere):
    names = [package_of(member) for member in MEMBERS]
    found = json.loads(
        elsewhere(f"""
import json
from importlib import metadata, util
print(json.dumps({{name: [util.find_spec(name).origin, metadata.version(name)] for name in {names}}}))
""")
    )
    assert {version for _, version in found.values()} == {jaxpruner.__version__}
    assert not [origin for origin, _ in found.values() if Path(origin).is_relative_to(ROOT)]


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/quick-start.md"])
def test_the_first_code_of_a_page_runs_with_the_installed_core(page, elsewhere):
    elsewhere(re.search(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)[1])
