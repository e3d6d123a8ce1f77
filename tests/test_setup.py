"""setup.cfg promises the versions that `make test-oldest` installs."""

from configparser import ConfigParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
EXTRAS = ("test", "tensorboard", "dinov2")  # those that `make install` installs


def test_the_oldest_constraints_are_the_lower_bounds_of_setup_cfg():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"].split()
    lines += [line for extra in EXTRAS for line in setup["options.extras_require"][extra].split()]
    bounds = {}
    for requirement in map(Requirement, lines):
        (bound,) = requirement.specifier
        assert bound.operator == ">=", requirement
        bounds[canonicalize_name(requirement.name)] = Version(bound.version)
    pinned = {}
    for line in (ROOT / "constraints-oldest.txt").read_text("utf-8").splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            pinned[canonicalize_name(name)] = Version(version)
    assert pinned == bounds
