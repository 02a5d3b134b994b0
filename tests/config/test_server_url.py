"""An address of a server that nothing can connect to is refused with the settings."""

from __future__ import annotations

import pytest

from megatron_klear.config.server_url import is_server_url


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:30000", "https://gpu7.cluster:443", "HTTP://gpu7:1/", "http://[::1]:30000",
        "http://[fe80::1%eth0]:30000", "http://name:word@gpu_7:65535", "http://127.1:80", "http://gpu7.cluster.:80",
    ],
)  # fmt: skip
def test_an_address_with_a_port_is_accepted(url: str) -> None:
    assert is_server_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "", "gpu7:30000", "ftp://gpu7:21", "http://:30000", "http://gpu7", "http://gpu7:", "http://gpu7:0",
        "http://127.0.0.1:3000O", "http://gpu7:99999", "http://gpu7:-1", "http://[::1:30000", "http://[x]:30000",
        "http://999.1.1.1:30000", "http://gpu7:1?x=1", "http://gpu7:1?", "http://gpu7:1#", "http://gpu7:1/v1",
        "http://gpu7:1//", "http://gpu\n7:1", " http://gpu7:1", "http://gpu7:1 ", "http://gpu 7:1",
        "http://gpu\u20137:1", "http://gpu..7:1", f"http://{'g' * 64}:1", "http://gpu\\7:1",
    ],
)  # fmt: skip
def test_what_no_request_can_be_sent_to_is_refused(url: str) -> None:
    assert not is_server_url(url)
