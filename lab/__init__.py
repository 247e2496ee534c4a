"""A laboratory of several hosts on one Linux machine, for k2's tests and for trying k2 by hand.

Each host has its own network, host name, mounts and process ids, a home folder and a real sshd;
the hosts are joined by a link whose latency, rate, loss, silence and breaks can be chosen. Nothing
outside is touched: no bridge, no rule and no file of the machine itself. The lab is not part of
the package: ``scripts/lab`` and ``tests/lab`` use it.
"""

from lab.errors import LabError
from lab.laboratory import Host, Lab
from lab.link import Link
from lab.requirements import missing_requirements

__all__ = ["Host", "Lab", "LabError", "Link", "missing_requirements"]
