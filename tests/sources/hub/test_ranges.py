"""Are selected tensors of a shard fetched as byte ranges, once, and over broken connections?

Through the real huggingface_hub against a server on the loopback that counts what it sends, each
in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from tests.helpers.files import raw_safetensors
from tests.helpers.hub_models import (
    CONFIG_FILE,
    SECRET,
    SHARDS,
    Client,
    digest,
    sharded,
    single,
)
from tests.helpers.hub_server import HubServer, Repo, commit_of

Tensors = dict[str, torch.Tensor]
LAYERS = 6
ONE = "layers\\.1\\."


def layered(seed: int = 3) -> Tensors:
    """Six layers of a matrix and a norm: with `sharded`, every shard holds some of each layer."""
    generator = torch.Generator().manual_seed(seed)
    found: Tensors = {}
    for layer in range(LAYERS):
        for module in ("mlp.up_proj", "self_attn.q_proj"):
            weight = torch.randn(192, 160, generator=generator, dtype=torch.float32)
            found[f"model.layers.{layer}.{module}.weight"] = weight.bfloat16()
        norm = torch.randn(160, generator=generator, dtype=torch.float32)
        found[f"model.layers.{layer}.input_layernorm.weight"] = norm.bfloat16()
    return found


def chosen(tensors: Tensors, layer: int = 1) -> Tensors:
    return {name: one for name, one in tensors.items() if f"layers.{layer}." in name}


def nbytes(tensors: Tensors) -> int:
    return sum(one.numel() * one.element_size() for one in tensors.values())


def ranges(hub: HubServer) -> list[tuple[int, int]]:
    """The ranges that were asked for, without those of headers, which begin at 0."""
    asked = [headers["range"] for method, _, headers in hub.log if "range" in headers]
    spans = [one.removeprefix("bytes=").split("-") for one in asked]
    return [(int(begin), int(end)) for begin, end in spans if begin != "0"]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    one = layered()
    repos = {"org/sharded": Repo(sharded(one)), "org/single": Repo(single(one))}
    with HubServer(repos) as server:
        yield server


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    return Client(hub, tmp_path / "home")


def bits(tensors: Tensors) -> dict[str, str]:
    return {name: digest(one) for name, one in sorted(tensors.items())}


# --- what is fetched ----------------------------------------------------------------------------


def test_selected_tensors_come_as_ranges_and_nothing_else(hub: HubServer, client: Client) -> None:
    found = client("org/sharded", ONE, "read")
    wanted = chosen(layered())
    assert found["bits"] == bits(wanted)
    assert client.cached() == set()
    fetched = sum(end - begin + 1 for begin, end in ranges(hub))
    assert nbytes(wanted) <= fetched == found["to_fetch"] < 1.2 * nbytes(wanted)
    assert found["left_to_fetch"] == 0
    kept = [path for path in (client.home / "geo scope").rglob("*-*") if path.is_file()]
    assert sum(path.stat().st_size for path in kept if "-" in path.name and "." not in path.name)
    assert not list(client.home.rglob("*.part"))


def test_progress_counts_the_bytes_of_the_ranges(hub: HubServer, client: Client) -> None:
    found = client("org/sharded", ONE)
    by_file = {file: [step[1:] for step in found["progress"] if step[0] == file] for file in SHARDS}
    ends = {file: steps[-1] for file, steps in by_file.items() if steps}
    assert sum(total for _, total in ends.values()) == found["to_fetch"]
    for steps in by_file.values():
        done = [one for one, _ in steps]
        assert done == sorted(done)
        assert not steps or steps[-1][0] == steps[-1][1]


def test_a_rerun_asks_for_the_commit_and_nothing_more(hub: HubServer, client: Client) -> None:
    client("org/sharded", ONE, "read")
    hub.log.clear()
    again = client("org/sharded", ONE, "read")
    assert again["bits"] == bits(chosen(layered()))
    assert again["to_fetch"] == 0
    asked = [path.split("?")[0] for _, path, _ in hub.log if "/org/" in path or "/blobs/" in path]
    assert asked == ["/api/models/org/sharded"]


def test_kept_tensors_are_read_offline_and_others_are_named(client: Client) -> None:
    commit = client("org/sharded", ONE)["commit"]
    offline = client("org/sharded", ONE, "read", HF_HUB_OFFLINE="1")
    assert offline["bits"] == bits(chosen(layered()))
    missing = client("org/sharded", "layers.2", HF_HUB_OFFLINE="1")["error"]
    assert missing.startswith("offline, and model-0000")
    assert missing.endswith(f"-of-00003.safetensors of org/sharded@{commit} is not cached.")


def test_most_of_a_shard_is_fetched_as_a_whole(hub: HubServer, client: Client) -> None:
    found = client("org/single", r"layers\.[0-4]\.", "read")
    assert client.cached() == {"model.safetensors"}
    assert found["to_fetch"] == len(hub.repos["org/single"].files["model.safetensors"])
    assert ranges(hub) == []


def test_what_was_kept_is_not_counted_again(hub: HubServer, client: Client) -> None:
    """Layer by layer, all of a shard by ranges: no byte of it twice."""
    total = 0
    for layer in range(LAYERS):
        total += client("org/single", rf"layers\.{layer}\.")["to_fetch"]
    assert client.cached() == set()
    assert total == nbytes(layered())
    whole = client("org/single", "layers", "read", HF_HUB_OFFLINE="1")
    assert whole["bits"] == bits(layered())


def test_a_tensor_that_was_not_fetched_comes_when_it_is_read(client: Client) -> None:
    """How a worker of another process reads."""
    found = client("org/sharded", ONE, "read alone")
    assert found["bits"] == bits(chosen(layered()))
    assert client.cached() == set()


def test_parts_of_a_kept_tensor(client: Client) -> None:
    found = client("org/sharded", ONE, "parts")
    expected = {name: digest(one.reshape(-1)[7:99]) for name, one in chosen(layered()).items()}
    assert found["bits"] == expected


# --- broken connections -------------------------------------------------------------------------


def test_a_range_that_breaks_goes_on_where_it_broke(hub: HubServer, client: Client) -> None:
    whole = client("org/single", ONE)["to_fetch"]
    other = Client(hub, client.home / "other")
    hub.log.clear()
    hub.sent.clear()
    hub.cut["model.safetensors"] = [10**9, 30_000, 1, 50_000]  # the first is the header's
    found = other("org/single", ONE, "read")
    assert hub.cut["model.safetensors"] == []
    assert found["bits"] == bits(chosen(layered()))
    begins = [begin for begin, _ in ranges(hub)]
    assert [begin - begins[0] for begin in begins] == [0, 30_000, 30_001, 80_001]
    header = next(one.nbytes for one in hub.sent if "/blobs/" in one.path)
    assert hub.bodies("/blobs/") - header == whole  # no byte twice


def test_an_interrupted_run_goes_on_where_it_stopped(hub: HubServer, client: Client) -> None:
    client("org/single")
    hub.log.clear()
    hub.cut["model.safetensors"] = [30_000]
    hub.busy["/blobs/"] = [0, 403]
    assert "HTTP 403 from" in client("org/single", ONE, "read")["error"]
    assert len(list(client.home.rglob("*.part"))) == 1
    first_begin = ranges(hub)[0][0]
    hub.log.clear()
    again = client("org/single", ONE, "read")
    assert again["bits"] == bits(chosen(layered()))
    assert ranges(hub)[0][0] == first_begin + 30_000
    assert again["to_fetch"] == nbytes(chosen(layered())) - 30_000


def test_a_connection_that_never_lasts_is_given_up(hub: HubServer, client: Client) -> None:
    client("org/single")
    hub.log.clear()
    hub.cut["model.safetensors"] = [0] * 20
    found = client("org/single", ONE, "no waiting")
    assert found["error"].startswith("model.safetensors of org/single@")
    assert "the connection to the Hub failed (" in found["error"]
    assert len(found["error"].splitlines()) == 1
    assert found["waits"] == [0.25, 0.5, 1, 2, 4, 8]
    assert len(ranges(hub)) == 7


def test_a_busy_server_is_asked_again(hub: HubServer, client: Client) -> None:
    client("org/single")
    hub.busy["/blobs/"] = [503, 429]
    assert client("org/single", ONE, "read")["bits"] == bits(chosen(layered()))
    assert hub.busy["/blobs/"] == []


# --- answers that are not what was asked for ----------------------------------------------------


def test_a_server_without_ranges_gives_the_whole_shard(hub: HubServer, client: Client) -> None:
    hub.ignore_range = True
    found = client("org/single", ONE, "read")
    assert found["bits"] == bits(chosen(layered()))
    assert client.cached() == {"model.safetensors"}
    assert found["left_to_fetch"] == 0


def test_a_header_from_a_server_without_ranges_is_not_the_whole_file(
    hub: HubServer, client: Client
) -> None:
    big = {"model.layers.0.up.weight": torch.zeros(4096, 4096, dtype=torch.bfloat16)}
    hub.repos["org/big"] = Repo(single(big))
    hub.ignore_range = True
    assert len(client("org/big")["tensors"]) == 1
    assert hub.bodies("/blobs/") < 16 << 20  # of 32 MB: what the sockets hold of it


@pytest.mark.parametrize(
    ("told", "words"),
    [({"Content-Range": "bytes 0-9/10"}, "'bytes 0-9/10'"),
     pytest.param({"X-Repo-Commit": "b" * 40}, f"the commit {'b' * 40}", marks=pytest.mark.slow),
     pytest.param({"X-Linked-Size": "12"}, "12 bytes, where its listing says",
                  marks=pytest.mark.slow)],
)  # fmt: skip
def test_an_answer_that_was_not_asked_for(
    hub: HubServer, client: Client, told: dict[str, str], words: str
) -> None:
    client("org/single")  # the header is known
    hub.told = told
    found = client("org/single", ONE)
    assert words in found["error"]
    assert found["error"].startswith("model.safetensors of org/single@")
    assert found["error"].endswith("; retry, or check HF_ENDPOINT and the proxy")
    assert not [path for path in client.home.rglob("*-*") if path.name[0].isdigit()]


def test_a_file_that_changes_between_two_ranges(hub: HubServer, client: Client) -> None:
    client("org/single")
    hub.cut["model.safetensors"] = [30_000]
    hub.told_after = {"X-Linked-ETag": '"other"'}
    found = client("org/single", ONE)
    assert "another ETag than before: the file was changed meanwhile" in found["error"]


@pytest.mark.parametrize(
    ("status", "words"),
    [(403, "log in again (`hf auth login`)"),
     pytest.param(404, "retry, or set HF_ENDPOINT", marks=pytest.mark.slow),
     pytest.param(416, "the file there is shorter than its listing says: retry",
                  marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_store_that_refuses_is_one_line(
    hub: HubServer, client: Client, status: int, words: str
) -> None:
    client("org/single")
    hub.fail["/blobs/"] = status
    hub.log.clear()
    found = client("org/single", ONE)
    assert f"HTTP {status} from {hub.storage}/blobs/" in found["error"]
    assert found["error"].endswith(words)
    assert len(ranges(hub)) == 1  # not asked again


def test_a_repository_that_was_gated_meanwhile(hub: HubServer, client: Client) -> None:
    client("org/single")
    hub.repos["org/single"].gated = True
    assert "org/single is gated" in client("org/single", ONE)["error"]


def test_the_login_stays_with_the_hub(hub: HubServer, client: Client) -> None:
    client("org/sharded", ONE)
    at_store = [headers for _, path, headers in hub.log if path.startswith("/blobs/")]
    at_hub = [headers for _, path, headers in hub.log if "/org/" in path]
    assert at_store and not any("authorization" in headers for headers in at_store)
    assert {headers["authorization"] for headers in at_hub} == {f"Bearer {SECRET}"}
    assert {headers["host"] for headers in at_store} == {hub.storage.removeprefix("http://")}


def test_a_small_file_on_the_hub_itself_is_read_with_the_login(
    hub: HubServer, client: Client
) -> None:
    tiny = {f"layers.{i}.up": torch.full((4, 4), float(i)) for i in range(4)}
    hub.repos["org/tiny"] = Repo(single(tiny))
    found = client("org/tiny", "layers.1", "read")
    assert found["bits"] == bits(chosen(tiny))
    gets = [(path, headers) for method, path, headers in hub.log if "range" in headers]
    assert gets and all("/resolve/" in path for path, _ in gets)
    assert {headers["authorization"] for _, headers in gets} == {f"Bearer {SECRET}"}


# --- room on the disk ---------------------------------------------------------------------------


def test_a_full_disk_is_said_before_the_first_byte(hub: HubServer, client: Client) -> None:
    found = client("org/sharded", ONE, "full disk")
    wanted = nbytes(chosen(layered())) / 1e3
    assert found["error"].startswith(
        f"{wanted:.2f} kB must be downloaded, but only 5 bytes are free at "
    )
    assert ranges(hub) == []


def test_a_cache_that_cannot_be_written_is_one_line(client: Client) -> None:
    (client.home / "file").write_text("no folder")
    found = client("org/sharded", ONE, GEOSCOPE_CACHE=str(client.home / "file" / "below"))
    assert found["error"].startswith(str(client.home / "file" / "below" / "hub"))
    assert found["error"].endswith(
        "cannot be written: Not a directory; set GEOSCOPE_CACHE to a folder that can be"
    )


# --- headers that claim too much ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [((2**63).to_bytes(8, "little") + b"{}" * 600, "it claims 9223372036854775808 bytes, 25000000"),
     ((2**20).to_bytes(8, "little") + b"{}" * 600, "it claims 1048576 bytes, the file has 1208"),
     (b"abc", "the file has 3 bytes, a header needs 8")],
)  # fmt: skip
def test_a_header_that_claims_too_much(
    hub: HubServer, client: Client, content: bytes, reason: str
) -> None:
    hub.repos["org/bad"] = Repo({**CONFIG_FILE, "model.safetensors": content})
    found = client("org/bad")
    assert f"header is damaged: {reason}" in found["error"]
    assert hub.bodies("model.safetensors") + hub.bodies("/blobs/") <= len(content)


@pytest.mark.parametrize(
    ("offsets", "reason"),
    [([-16, 0], "impossible offsets"), ([0, 2**62], "does not fill"), ([0, 32], "does not fill"),
     ([16, 0], "impossible offsets"), ([0, 16], "has bytes that belong to no tensor")],
)  # fmt: skip
def test_offsets_that_lead_elsewhere(
    hub: HubServer, client: Client, offsets: list[int], reason: str
) -> None:
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": offsets}
    content = raw_safetensors({"a": entry}, b"\0" * 2000)
    hub.repos["org/bad"] = Repo({**CONFIG_FILE, "model.safetensors": content})
    assert reason in client("org/bad")["error"]
    assert not list((client.home / "geo scope").rglob("header"))


def test_a_file_that_is_shorter_than_its_header_says(hub: HubServer, client: Client) -> None:
    whole = save(chosen(layered()))
    hub.repos["org/cut"] = Repo({**CONFIG_FILE, "model.safetensors": whole[:-2]})
    assert "the file is truncated" in client("org/cut")["error"]


def test_a_commit_that_is_no_hash_is_no_folder(hub: HubServer, client: Client) -> None:
    hub.sha = "../../../elsewhere"
    assert "the Hub names no commit" in client("org/single")["error"]
    assert not list(client.home.rglob("*elsewhere*"))


def test_overlapping_tensors(hub: HubServer, client: Client) -> None:
    table = {
        name: {"dtype": "F32", "shape": [4], "data_offsets": [begin, begin + 16]}
        for name, begin in (("a", 0), ("b", 8))
    }
    content = raw_safetensors(table, b"\0" * 24)
    hub.repos["org/bad"] = Repo({**CONFIG_FILE, "model.safetensors": content})
    assert "overlaps its neighbour" in client("org/bad")["error"]
    assert commit_of(hub.repos["org/bad"].files) in client("org/bad")["error"]
