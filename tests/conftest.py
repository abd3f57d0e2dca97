"""For all tests: where hosts are found that no registry has, and no deadlines, since no test asserts a time."""

import pathlib
import sys

import hypothesis

hypothesis.settings.register_profile("workspace", deadline=None)
hypothesis.settings.load_profile("workspace")

# Sources of hosts, each in a folder of its name, such as scenic/scenic. Installed ones come first.
for folder in sorted((pathlib.Path.home() / ".cache" / "jaxpruner" / "frameworks").glob("*")):
    if (folder / folder.name).is_dir():
        sys.path.append(str(folder))
