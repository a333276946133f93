"""Where the replicas of a fleet are put."""

import json
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from recovery.core.fleet_file import load_fleet_text
from recovery.core.fleet_plan import own_turn, plan, spare_ports
from recovery.errors import ConfigError


def entry(**changes):
    """A model that takes its port from the range."""
    return {
        "command": "vllm",
        "args": ["serve", "m", "--port", "{port}"],
        "endpoints": {"base_url": "http://{host}:{port}/v1"},
        **changes,
    }


def fleet(host="here", keys=None, **models):
    """A fleet of these models."""
    return load_fleet_text(json.dumps({**(keys or {}), "llmModels": models}), host)


def places(made):
    """Instance id to (host, port, gpus)."""
    return {p.id: (p.placement.host, p.placement.port, p.placement.gpus) for p in plan(made)}


def test_ids_hosts_ports_and_gpus_of_replicas():
    made = fleet(keys={"hosts": ["a", "b"], "port_range": [9000, 9009]}, m=entry(replicas=4, gpus=[0, 1], gpus_per_replica=1))

    assert places(made) == {
        "m-0": ("a", 9000, (0,)),
        "m-1": ("b", 9000, (0,)),
        "m-2": ("a", 9001, (1,)),
        "m-3": ("b", 9001, (1,)),
    }


def test_a_single_replica_gets_the_whole_pool_and_many_share_it():
    assert places(fleet(m=entry(gpus=[2, 3])))["m-0"][2] == (2, 3)
    assert [p[2] for p in places(fleet(m=entry(gpus=[0, 1, 2, 3], replicas=2))).values()] == [(0, 1), (2, 3)]
    assert [p[2] for p in places(fleet(m=entry(gpus=[5], replicas=2))).values()] == [(5,), (5,)]


def test_gpus_are_known_from_the_environment_of_an_old_file():
    made = fleet(m=entry(env={"CUDA_VISIBLE_DEVICES": "1,3"}), n=entry(env={"CUDA_VISIBLE_DEVICES": "GPU-abc"}))

    assert [p[2] for p in places(made).values()] == [(1, 3), ()]


def test_fixed_ports_are_kept_and_the_range_goes_round_them():
    made = fleet(
        keys={"port_range": [8000, 8010]},
        first=entry(),
        by_flag={"command": "vllm", "args": ["serve", "m", "--port", "8000"]},
        by_url={"command": "server", "endpoints": {"base_url": "http://localhost:8001/v1"}},
        silent={"command": "server"},
    )

    assert [p[1] for p in places(made).values()] == [8002, 8000, 8001, None]
    assert spare_ports(made, "first", "here")[:2] == (8003, 8004)


def test_instances_that_choose_at_once_do_not_choose_the_same_port():
    made = fleet(keys={"port_range": [8000, 8009]}, m=entry(replicas=3), n=entry())
    spare = spare_ports(made, "m", "here")

    offered = {p.id: own_turn(spare, p.id, made, "here") for p in plan(made)}

    assert len({ports[0] for ports in offered.values()}) == 4
    assert all(sorted(ports) == sorted(spare) for ports in offered.values())
    assert own_turn((), "m-0", made, "here") == ()
    assert own_turn((8005,), "m-2", made, "here") == own_turn((8005,), "unplanned", made, "here") == (8005,)


def test_a_file_without_hosts_belongs_to_the_machine_that_reads_it_over_loopback():
    placement = plan(fleet(host="gpu-7", m=entry()))[0].placement

    assert (placement.host, placement.address) == ("gpu-7", "127.0.0.1")
    named = plan(fleet(keys={"hosts": ["gpu-8"], "addresses": {"gpu-8": "10.0.0.8"}}, m=entry()))[0].placement
    assert (named.host, named.address) == ("gpu-8", "10.0.0.8")


MODELS = st.dictionaries(
    st.sampled_from("abcdef"),
    st.builds(
        lambda replicas, hosts, ports: entry(replicas=replicas, hosts=hosts, **({"port_range": ports} if ports else {})),
        st.integers(1, 6),
        st.lists(st.sampled_from(["x", "y", "z"]), min_size=1, unique=True),
        st.one_of(st.none(), st.tuples(st.integers(8000, 8010), st.integers(8011, 8020)).map(list)),
    ),
    min_size=1,
)


@given(MODELS)
def test_no_two_instances_of_a_host_share_a_port_and_the_plan_is_always_the_same(models):
    text = json.dumps({"port_range": [8000, 8012], "llmModels": models})
    try:
        made = load_fleet_text(text)
    except ConfigError as error:  # a range that is too small is told, never shared out twice
        assert all("no port left" in line for line in error.problems)
        return

    plans = plan(made)
    assert plans == plan(load_fleet_text(text))
    taken = sorted((p.placement.host, p.placement.port) for p in plans)
    assert all(one != other for one, other in pairwise(taken))
    assert len({p.id for p in plans}) == len(plans) == sum(m["replicas"] for m in models.values())
    for p in plans:
        first, last = models[p.model].get("port_range", [8000, 8012])
        assert first <= p.placement.port <= last
        assert p.placement.host in models[p.model]["hosts"]
