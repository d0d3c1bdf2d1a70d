"""Several servers as one engine: seeds, new weights by request and by command, and the server that has wrong ones."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from conversion.sources import WeightSource, open_source
from megatron_ads.config.generation import EndpointConfig, GenerationConfig, Method
from megatron_ads.config.rl import RolloutConfig, RolloutMode
from megatron_ads.errors import ConfigError, DataError, DiskFullError
from megatron_ads.inference import server_pool
from megatron_ads.inference.server_pool import Probe, ServerPool, WrongWeightsError
from megatron_ads.journal import Journal
from tests.inference.scripted_server import Controls, Record, Reply, scripted_server

SAMPLED = GenerationConfig(method=Method.sampled, samples=4, max_new_tokens=4, log_probabilities=True, seed=7)
PROBE = ([[5, 6]], [[1, 2]])
DONE = Reply(raw=b"")


@pytest.fixture(scope="module")
def source(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> WeightSource:
    """The random model, without the MTP layer that its config has and transformers does not write."""
    folder = shutil.copytree(random_model, tmp_path_factory.mktemp("source") / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    return open_source(folder)


class Loaded:
    """A server whose numbers are those of the weights it has: token t of a prompt has -t * the number of the update."""

    def __init__(self, stack: ExitStack, *, ignores_updates: bool = False, speaks: str = "vllm") -> None:
        self.update, self.ignores_updates = 0, ignores_updates
        self.restarts: Path | None = None
        """Where a command for tests leaves the folder it started a server on."""
        vllm: Controls = {
            "/collective_rpc": lambda body: self.load(body["kwargs"]["weights_path"]),
            "/reset_prefix_cache": lambda _: DONE,
        }
        sglang: Controls = {"/update_weights_from_disk": lambda body: self.load(body["model_path"])}
        controls: dict[str, Controls] = {"vllm": vllm, "sglang": sglang, "neither": {}}
        self.server = stack.enter_context(scripted_server(self.script, controls=controls[speaks]))

    def load(self, folder: str) -> Reply:
        assert (Path(folder) / "config.json").exists()
        if not self.ignores_updates:
            self.update = int(folder[-6:])
        return Reply(raw=json.dumps({"success": True, "results": [None]}).encode())

    def script(self, body: dict[str, Any], _: int) -> Reply:
        if self.restarts is not None and self.restarts.exists():
            self.update = int(self.restarts.read_text().split()[-1][-6:])
        choice: dict[str, Any] = {"token_ids": [body["seed"], 1]} if "seed" in body else {}
        choice["logprobs"] = {"token_logprobs": [-0.5, -1.0]}
        if "prompt_logprobs" in body:
            known = [{str(token): {"logprob": -float(token) * self.update}} for token in body["prompt"][1:]]
            choice["prompt_logprobs"] = [None, *known]
        return Reply(content="said", choice=choice)


class BehindProxy(Loaded):
    """A server that is restarted at one request, which its proxy answers."""

    def __init__(self, stack: ExitStack) -> None:
        self.is_restarted = False
        self.answered_by: list[int] = []
        """The update that each answer was made by."""
        super().__init__(stack)

    def script(self, body: dict[str, Any], times: int) -> Reply:
        if self.is_restarted:
            self.is_restarted, self.update = False, 0
            return Reply(status=503)
        if "seed" in body:
            self.answered_by.append(self.update)
        return super().script(body, times)


def pool_of(servers: list[Loaded], source: WeightSource, folder: Path, **changes: Any) -> ServerPool:
    journal = changes.pop("journal", None)
    entries = [
        EndpointConfig(
            model="m",
            url=each.server.url,
            first_wait_seconds=0.01,
            longest_wait_seconds=0.02,
            attempts=2,
            concurrency=2,
        )
        for each in servers
    ]
    values: dict[str, Any] = {"server_wait_seconds": 5.0} | changes
    config = RolloutConfig(mode=RolloutMode.servers, servers=entries, **values)
    config.check()
    return ServerPool(config, source, folder, journal)


def weights_of(source: WeightSource) -> Iterator[tuple[str, Tensor]]:
    yield from load_file(source.path / "model.safetensors").items()


def probe(update: int) -> Probe:
    return Probe(*PROBE, [[-1.0 * update, -2.0 * update]])


def seeds_in(record: Record) -> set[int]:
    return {body["seed"] for body in record.bodies}


def test_seeds_are_those_of_one_server_whichever_answers(source: WeightSource, tmp_path: Path) -> None:
    with ExitStack() as stack:
        one, other, alone = (Loaded(stack) for _ in range(3))
        found = [
            [[answer.token_ids for answer in answers] for answers in pool.generate([[5], [6]], SAMPLED)]
            for pool in (pool_of([one, other], source, tmp_path), pool_of([alone], source, tmp_path))
        ]
        assert found[0] == found[1]
        assert one.server.bodies and other.server.bodies
        assert seeds_in(one.server) | seeds_in(other.server) == seeds_in(alone.server)


@pytest.mark.parametrize("speaks", ["vllm", "sglang"])
def test_servers_are_asked_to_load_a_folder_that_older_ones_make_room_for(
    source: WeightSource, tmp_path: Path, speaks: str
) -> None:
    with ExitStack() as stack:
        servers = [Loaded(stack, speaks=speaks) for _ in range(2)]
        pool = pool_of(servers, source, tmp_path)
        for update in (1, 2):
            pool.update_weights(weights_of(source))
            assert pool.version == update
            assert [each.update for each in servers] == [update, update]
            assert [path.name for path in tmp_path.iterdir()] == [f"update-{update:06d}"]
            assert pool.require_agreement(probe(update)) == 0
        asked = [path for path, _ in servers[0].server.controls]
    vllm = ["/collective_rpc", "/reset_prefix_cache"]
    assert asked == (vllm * 2 if speaks == "vllm" else ["/collective_rpc", "/update_weights_from_disk"] * 2)


def test_a_server_that_says_it_took_the_weights_and_did_not_is_named(source: WeightSource, tmp_path: Path) -> None:
    with ExitStack() as stack:
        right, wrong = Loaded(stack), Loaded(stack, ignores_updates=True)
        pool = pool_of([right, wrong], source, tmp_path)
        pool.update_weights(weights_of(source))
        said = rf"server at {wrong.server.url} differs from the trainer by 1\.5 nats .*Set rollout\.reload_command"
        with pytest.raises(WrongWeightsError, match=said):
            pool.require_agreement(probe(1))


@pytest.mark.parametrize("helps", [True, False])
def test_a_server_with_wrong_numbers_is_restarted_once(source: WeightSource, tmp_path: Path, helps: bool) -> None:
    ran, works = tmp_path / "ran", tmp_path / "works"
    command = f'echo "$URL $SERVED_MODEL $MODEL" >> {ran}; [ $(wc -l < {ran}) -lt 2 ] || cp {ran} {works}'
    with ExitStack() as stack:
        server = Loaded(stack)
        pool = pool_of([server], source, tmp_path / "weights", reload_command=command)
        pool.update_weights(weights_of(source))
        server.restarts = works if helps else None
        if helps:
            assert pool.require_agreement(probe(1)) == 0
        else:
            with pytest.raises(WrongWeightsError, match="also after another restart"):
                pool.require_agreement(probe(1))
        wanted = f"{server.server.url} m {tmp_path}/weights/update-000001"
        assert ran.read_text().splitlines() == [wanted, wanted]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("echo no such device >&2; exit 3", r"ended with status 3: no such device\. Run it by hand"),
        ("sleep 60", r"did not end in 0\.5 s and said nothing"),
        ('[ -z "$RANK" ] || exit 4; exit 5', "ended with status 5"),  # a server would take itself for a rank
    ],
    ids=["fails", "hangs", "rank"],
)
def test_a_reload_command_that_fails_is_an_error_with_what_it_said(
    source: WeightSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, said: str
) -> None:
    monkeypatch.setenv("RANK", "0")
    with ExitStack() as stack:
        pool = pool_of([Loaded(stack)], source, tmp_path, reload_command=command, server_wait_seconds=0.5)
        started = time.monotonic()
        with pytest.raises(DataError, match=rf"no inference server took the weights of update 1\..*{said}"):
            pool.update_weights(weights_of(source))
        assert time.monotonic() - started < 5


def test_servers_without_a_request_for_weights_are_refused(source: WeightSource, tmp_path: Path) -> None:
    with ExitStack() as stack:
        pool = pool_of([Loaded(stack, speaks="neither")], source, tmp_path)
        with pytest.raises(ConfigError, match=r"has no request that loads weights .*VLLM_SERVER_DEV_MODE=1"):
            pool.update_weights(weights_of(source))


def test_a_server_that_was_away_for_an_update_gets_the_weights_before_its_next_request(
    source: WeightSource, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        with ExitStack() as before:
            gone = Loaded(before)
            port = int(gone.server.url.split(":")[2].removesuffix("/v1"))
        pool = pool_of([gone], source, tmp_path, server_wait_seconds=0.2)
        with pytest.raises(DataError, match="no inference server took the weights of update 1"):
            pool.update_weights(weights_of(source))
        there = Loaded(stack)
        pool = pool_of([there, gone], source, tmp_path)
        pool.update_weights(weights_of(source))
        assert pool.require_agreement(probe(1)) == 0
        controls: Controls = {"/collective_rpc": lambda body: gone.load(body["kwargs"]["weights_path"])}
        back = stack.enter_context(scripted_server(gone.script, port=port, controls=controls))
        time.sleep(0.05)
        pool.generate([[number] for number in range(20)], SAMPLED)
        assert back.bodies and gone.update == 1


def test_a_server_that_was_restarted_behind_a_proxy_gets_the_weights_before_its_next_request(
    source: WeightSource, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        server = BehindProxy(stack)
        pool = pool_of([server], source, tmp_path)
        pool.update_weights(weights_of(source))
        assert pool.require_agreement(probe(1)) == 0
        server.is_restarted = True
        pool.generate([[5]], replace(SAMPLED, samples=1))
        assert (server.answered_by, pool.servers.losses) == ([1], 1)
        loads = [path for path, _ in server.server.controls if path == "/collective_rpc"]
        assert len(loads) == 2
        assert pool.require_agreement(probe(1)) == 0


def test_answers_by_other_weights_are_asked_for_again(source: WeightSource, tmp_path: Path) -> None:
    with ExitStack() as stack:
        server = Loaded(stack)
        pool = pool_of([server], source, tmp_path, journal=stack.enter_context(Journal(tmp_path / "journal")))
        asked = []
        for update in (False, False, True):
            if update:
                pool.update_weights(weights_of(source))
            pool.generate([[5]], SAMPLED)
            asked.append(len(server.server.bodies))
    assert asked == [4, 4, 8]


def test_weights_are_read_to_their_end_where_they_cannot_be_written(
    source: WeightSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: Path, weights: Iterator[tuple[str, Tensor]], *__: object) -> None:
        next(weights)
        raise DiskFullError("full")

    monkeypatch.setattr(server_pool, "write_hf_folder", fails)
    left = iter([("a", torch.ones(1))] * 3)
    with ExitStack() as stack, pytest.raises(DiskFullError):
        pool_of([Loaded(stack)], source, tmp_path).update_weights(left)
    assert next(left, None) is None
