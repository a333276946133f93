"""The environment of an installation, and the reading of the fleet file from disk."""

import re
from pathlib import Path

import pytest

from recovery.errors import ConfigError
from recovery.settings import Settings, is_loopback, load_fleet, load_settings, port_clashes, settings_table, unknown_names

EXAMPLES = Path(__file__).parents[2] / "examples"


def refused(environ):
    """The faults of this environment."""
    with pytest.raises(ConfigError) as caught:
        load_settings(environ)
    return caught.value.problems


def test_the_defaults_are_the_documented_ones():
    settings = load_settings({"HOME": "/home/me"})

    assert (settings.api_port, settings.front_port, settings.flower_port) == (8099, 8000, 5555)
    assert (settings.api_host, settings.redis_url, settings.fleet) == ("127.0.0.1", None, None)
    assert settings.home == Path("/home/me/.local/state/recovery")
    assert settings.host and not settings.secure
    assert load_settings({"HOME": "/home/me", "XDG_STATE_HOME": "/var/s"}).home == Path("/var/s/recovery")


def test_every_variable_is_read():
    settings = load_settings(
        {
            "REDIS_URL": "redis://:pw@h:1/0",
            "RECOVERY_HOME": "/r",
            "RECOVERY_HOST": "gpu-1",
            "RECOVERY_FLEET": "/f.json",
            "RECOVERY_API_PORT": " 9099 ",
            "FMCP_SECURE_MODE": "True",
            "FMCP_BEARER_TOKEN": "abc",
            "RECOVERY_READ_TOKENS": "r1, r2,",
        }
    )

    assert settings.redis_url and settings.redis_url.get_secret_value() == "redis://:pw@h:1/0"
    assert (settings.home, settings.host, settings.fleet) == (Path("/r"), "gpu-1", Path("/f.json"))
    assert (settings.api_port, settings.front_metrics_port) == (9099, 9098)
    assert settings.secure
    assert [token.get_secret_value() for token in settings.read_tokens] == ["r1", "r2"]


@pytest.mark.parametrize("word", ["maybe", "ture", "", " ", "2", "disabled", "nein"])
def test_an_unknown_word_in_a_safety_setting_is_an_error_never_off(word):
    assert refused({"FMCP_SECURE_MODE": word, "FMCP_BEARER_TOKEN": "t"})[0].startswith("FMCP_SECURE_MODE: must be true or false")


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({"FMCP_SECURE_MODE": "true"}, "FMCP_SECURE_MODE"),
        ({"FMCP_SECURE_MODE": "true", "FMCP_BEARER_TOKEN": ""}, "FMCP_SECURE_MODE"),
        ({"RECOVERY_API_HOST": "0.0.0.0"}, "RECOVERY_API_HOST"),
        ({"RECOVERY_API_HOST": "::"}, "RECOVERY_API_HOST"),
        ({"RECOVERY_API_HOST": "0.0.0.0", "FMCP_BEARER_TOKEN": "t", "FMCP_SECURE_MODE": "false"}, "RECOVERY_API_HOST"),
        ({"FMCP_BEARER_TOKEN": "two words"}, "FMCP_BEARER_TOKEN"),
        ({"RECOVERY_ADMIN_TOKENS": "a\nb"}, "FMCP_BEARER_TOKEN"),
        ({"RECOVERY_API_PORT": "80a"}, "RECOVERY_API_PORT"),
        ({"RECOVERY_API_PORT": "0"}, "RECOVERY_API_PORT"),
        ({"RECOVERY_FRONT_PORT": "65536"}, "RECOVERY_FRONT_PORT"),
        ({"RECOVERY_FRONT_PORT": "8099"}, "RECOVERY_FRONT_PORT"),
        ({"RECOVERY_HOST": "a b"}, "RECOVERY_HOST"),
        ({"RECOVERY_KEY_PREFIX": "a:b"}, "RECOVERY_KEY_PREFIX"),
        ({"RECOVERY_RUN_DIR": "/" + "x" * 90}, "RECOVERY_RUN_DIR"),
    ],
)
def test_a_faulty_variable_is_named(environ, name):
    found = refused(environ)

    assert len(found) == 1 and found[0].startswith(name), found


def test_all_faulty_variables_are_named_at_once():
    assert len(refused({"FMCP_SECURE_MODE": "x", "RECOVERY_API_PORT": "x", "RECOVERY_FRONT_PORT": "0"})) == 3


def test_an_open_address_with_a_token_is_secure():
    assert load_settings({"RECOVERY_API_HOST": "0.0.0.0", "FMCP_BEARER_TOKEN": "t"}).secure
    assert not load_settings({"FMCP_BEARER_TOKEN": "t", "FMCP_SECURE_MODE": "off"}).secure


def test_no_secret_in_reprs_and_errors():
    secrets = {"REDIS_URL": "redis://:s3cret@h", "FMCP_BEARER_TOKEN": "s3cret", "RECOVERY_READ_TOKENS": "s3cret"}

    assert "s3cret" not in repr(load_settings(secrets)) + load_settings(secrets).model_dump_json()
    with pytest.raises(ConfigError) as caught:
        load_settings({**secrets, "FMCP_BEARER_TOKEN": "s3cret s3cret"})
    assert "s3cret" not in str(caught.value)


def test_two_installations_have_folders_of_their_own_short_enough_for_sockets():
    one, two = (load_settings({"RECOVERY_HOME": f"/{'x' * 200}/{n}"}) for n in "ab")

    assert one.run_dir != two.run_dir
    assert load_settings({"RECOVERY_API_PORT": "8001"}).front_metrics_port == 7999  # 8000 is the front door's
    assert len(str(one.run_dir / "redis.sock")) < 107


def test_loopback_is_only_what_no_other_machine_reaches():
    assert all(map(is_loopback, ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "example", "localhost.evil.example", ""]))


def test_misspelt_variables_are_found():
    assert unknown_names({"RECOVERY_API_PROT": "1", "RECOVERY_API_PORT": "1", "RECOVERY_RUN": "x", "HOME": "/"}) == ("RECOVERY_API_PROT",)


def test_every_variable_of_the_code_is_known():
    """
    Or its user would be warned of a name that works, by `recovery up` and by the doctor.
    """
    root = EXAMPLES.parent
    sources = [
        path
        for folder in ("recovery", "workers")
        for path in (root / folder).rglob("*")
        if path.suffix in (".py", ".service", ".lua", ".html", ".js") or path.name == "redis.acl"
    ]
    named = {
        name: str(path.relative_to(root))
        for path in (*sources, root / "beat_schedule.py", root / "docker-compose.yml", root / "Dockerfile")
        for name in re.findall(r"\bRECOVERY_[A-Z_]*[A-Z]\b", path.read_text())
    }

    assert {"RECOVERY_HOME", "RECOVERY_PART", "RECOVERY_LOG_LEVEL"} <= set(named)
    assert {name: named[name] for name in unknown_names(named)} == {}


def test_an_unknown_log_level_is_refused_before_any_part_starts():
    assert "RECOVERY_LOG_LEVEL" in refused({"RECOVERY_LOG_LEVEL": "loud"})[0]
    assert load_settings({"RECOVERY_LOG_LEVEL": "debug"}).log_level == "debug"


def test_the_fleet_file_is_read_for_this_host(monkeypatch):
    monkeypatch.setenv("RECOVERY_HOST", "gpu-5")
    fleet = load_fleet(EXAMPLES / "fleet.json")

    assert fleet.host == "gpu-5"
    assert load_fleet(EXAMPLES / "fleet.json", "gpu-6").host == "gpu-6"


def test_a_file_that_cannot_be_read_says_what_to_do(tmp_path):
    (tmp_path / "latin").write_bytes(b'{"x": "\xe4"}')
    (tmp_path / "bad.json").write_text('{"llmModels": {"a": {"command": 3}}}')
    for name, says in {
        "none.json": "RECOVERY_FLEET",
        ".": "it is a folder",
        "latin": "not UTF-8 at byte 7",
        "bad.json": "llmModels.a.command",
    }.items():
        with pytest.raises(ConfigError) as caught:
            load_fleet(tmp_path / name)
        assert says in str(caught.value) and str(tmp_path) in str(caught.value)
    assert caught.value.problems


def test_a_server_on_a_port_of_ours_is_told(tmp_path):
    file = tmp_path / "fleet.json"
    file.write_text('{"llmModels": {"a": {"command": "vllm", "args": ["serve", "m", "--port", "8000"]}}}')
    settings = load_settings({"RECOVERY_HOST": "here"})

    assert "a-0 and RECOVERY_FRONT_PORT both want port 8000" in port_clashes(load_fleet(file, "here"), settings)[0]
    assert port_clashes(load_fleet(file, "other"), settings) == ()
    assert port_clashes(load_fleet(EXAMPLES / "fleet.json", "here"), settings) == ()


def test_the_table_names_every_setting_with_its_meaning():
    rows = {row.name: row for row in settings_table()}

    assert {field.alias for field in Settings.model_fields.values()} <= rows.keys()
    assert all(row.meaning for row in rows.values())
    assert (rows["stop_grace_s"].default, rows["stop_grace_s"].unit) == ("30", "s")
    assert rows["restart_policy"].default == "no" and rows["FMCP_BEARER_TOKEN"].default == ""
    assert "mcpServers" not in rows and "endpoints.base_url" in rows
