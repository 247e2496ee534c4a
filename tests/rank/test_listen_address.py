"""MLX's listener on all addresses becomes one on a single address, before NCCL is started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from k2cli.agent.ports import free_ports
from k2cli.errors import ClusterError
from k2cli.rank.listen_address import bind_only_to, imported_slots

# MLX's ring stands in for NCCL: it listens on the address in its host file, here on all of them.
_RANK = """
import sys
import mlx.core as mx
from k2cli.rank.listen_address import bind_only_to
if sys.argv[1]:
    bind_only_to(sys.argv[1])
mx.distributed.init(strict=True, backend="ring")
"""

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="NCCL is for Linux")


@linux_only
@pytest.mark.parametrize(("wanted", "address"), [("127.0.0.1", "127.0.0.1"), ("", "0.0.0.0")])
def test_mlx_listens_where_it_should(tmp_path: Path, wanted: str, address: str) -> None:
    port, other = free_ports(2)
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"0.0.0.0:{port}"], [f"127.0.0.1:{other}"]]))
    environment = {**os.environ, "MLX_RANK": "0", "MLX_HOSTFILE": str(hosts)}
    rank = subprocess.Popen([sys.executable, "-c", _RANK, wanted], env=environment)
    try:
        deadline = time.monotonic() + 30
        found: list[str] = []
        while not found and time.monotonic() < deadline:
            assert rank.poll() is None
            found = [
                each.laddr.ip
                for each in psutil.Process(rank.pid).net_connections("tcp4")
                if each.status == "LISTEN" and each.laddr.port == port
            ]
            time.sleep(0.05)
        assert found == [address]
    finally:
        rank.kill()
        rank.wait()


@linux_only
def test_a_library_without_the_import_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from k2cli.rank import listen_address

    no_library = tmp_path / "libmlx.so"
    no_library.write_bytes(b"\x7fELF" + bytes(60))
    assert imported_slots(no_library, b"bind") == []
    monkeypatch.setattr(listen_address, "_loaded_library", lambda: (0, no_library))
    with pytest.raises(ClusterError, match="listen on every address") as refused:
        bind_only_to("127.0.0.1")
    assert refused.value.hint == "--backend ring"
