"""Settings: where they come from, which keys are known and what errors say."""

from __future__ import annotations

import base64
import re
import traceback
from operator import attrgetter
from pathlib import Path

import pytest
from msgspec.inspect import StructType

from app.errors import SettingsError
from app.settings import Loaded, Settings, check_exposure, load, unserved
from app.settings.loading import CHECKOUT, default_state_dir
from app.settings.table import fields_of

CANARY = "c4nary-Value"
KEY = base64.b64encode(bytes(range(32))).decode()


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """An environment whose home directory is empty."""
    directory = tmp_path / "home"
    directory.mkdir()
    return {"HOME": str(directory)}


@pytest.fixture
def toml(tmp_path: Path, home: dict[str, str]):
    """Load a text as the file named by `--config`, with variables."""

    def run(text: str, **environ: str) -> Loaded:
        path = tmp_path / "sandledger.toml"
        path.write_text(text)
        return load(path, home | environ)

    return run


def refusal(run, text: str, **environ: str) -> str:
    with pytest.raises(SettingsError) as caught:
        run(text, **environ)
    shown = "".join(traceback.format_exception(caught.value))
    assert CANARY not in shown
    return str(caught.value)


def served_paths(cls: type = Settings, prefix: str = "") -> set[str]:
    found: set[str] = set()
    for name, field in fields_of(cls).items():
        kind = field.type
        found |= served_paths(kind.cls, f"{prefix}{name}.") if isinstance(kind, StructType) else {prefix + name}
    return found


class TestFile:
    def test_defaults_work_without_any_file(self, home):
        loaded = load(None, home)
        assert loaded.source is None
        assert loaded.warnings == ()
        settings = loaded.settings
        assert (settings.server.host, settings.server.port) == ("127.0.0.1", 8080)
        assert settings.runtime.type == "docker"
        assert settings.store.postgresql.dsn is None
        assert (settings.docker.capabilities, settings.docker.drop_capabilities) == (None, ())
        assert settings.log.file_path == Path(home["HOME"], "logs/opensandbox/server.log")
        check_exposure(settings)

    def test_argument_then_variable_then_home(self, home, tmp_path):
        by_argument, by_variable = tmp_path / "a.toml", tmp_path / "v.toml"
        by_home = Path(home["HOME"], ".sandbox.toml")
        for number, path in enumerate((by_argument, by_variable, by_home), 1):
            path.write_text(f"server.port = {number}")
        variable = {"SANDBOX_CONFIG_PATH": str(by_variable)}
        for config, environ, source in (
            (by_argument, home | variable, by_argument),
            (None, home | variable, by_variable),
            (None, home | {"SANDBOX_CONFIG_PATH": ""}, by_home),
            (Path("~/.sandbox.toml"), home | variable, by_home),
        ):
            loaded = load(config, environ)
            assert loaded.source == source
            assert f"server.port = {loaded.settings.server.port}" == source.read_text()

    def test_a_named_file_has_to_exist(self, home, tmp_path):
        Path(home["HOME"], ".sandbox.toml").write_text("server.port = 1")
        missing = tmp_path / "missing.toml"
        with pytest.raises(SettingsError, match=r"missing\.toml: no such file, named by --config"):
            load(missing, home)
        with pytest.raises(SettingsError, match=r"missing\.toml: no such file, named by SANDBOX_CONFIG_PATH"):
            load(None, home | {"SANDBOX_CONFIG_PATH": str(missing)})

    def test_what_cannot_be_read_is_named(self, home, tmp_path):
        with pytest.raises(SettingsError, match="cannot be read: Is a directory"):
            load(tmp_path, home)
        (tmp_path / "latin.toml").write_bytes(b'server.host = "\xe9"')
        with pytest.raises(SettingsError, match=r"latin\.toml: is not UTF-8"):
            load(tmp_path / "latin.toml", home)

    @pytest.mark.parametrize(
        ("text", "line"),
        [
            ("[server]\nport = \n", 2),
            ("[server\n", 1),
            ('a = 1\nb = "open', 2),
            ("a = 1\na = 2\n", 2),
            ("x = [1,\n", 2),
        ],
    )
    def test_syntax_errors_name_file_and_line(self, toml, text, line):
        assert re.search(rf"sandledger\.toml: line {line}: not valid TOML: ", refusal(toml, text))

    def test_paths_become_absolute(self, toml, home):
        settings = toml(
            '[log]\nfile_path = "x/server.log"\n[sandledger]\nstate_dir = "~/state"\nmaster_key_file = "key"'
        ).settings
        assert settings.log.file_path == Path.cwd() / "x/server.log"
        assert settings.sandledger.state_dir == Path(home["HOME"], "state")
        assert settings.sandledger.master_key_file == Path.cwd() / "key"


class TestStateDirectory:
    def test_a_checkout_keeps_its_own(self, home):
        assert load(None, home).settings.sandledger.state_dir == CHECKOUT / ".state"

    def test_an_installation_follows_xdg(self, home, tmp_path):
        fallback = Path(home["HOME"], ".local/state/sandledger")
        assert default_state_dir(home, tmp_path) == fallback
        assert default_state_dir(home | {"XDG_STATE_HOME": "relative"}, tmp_path) == fallback
        assert default_state_dir(home | {"XDG_STATE_HOME": "/var/x"}, tmp_path) == Path("/var/x/sandledger")

    def test_variable_wins_over_file(self, toml):
        loaded = toml('sandledger.state_dir = "/file"', SANDLEDGER_STATE_DIR="/variable")
        assert loaded.settings.sandledger.state_dir == Path("/variable")


class TestEnvironment:
    def test_api_key_wins_even_when_empty(self, toml):
        text = 'server.api_key = "from-file"'
        assert toml(text).settings.server.api_key == "from-file"
        assert toml(text, OPENSANDBOX_SERVER_API_KEY="k\n").settings.server.api_key == "k"
        assert toml(text, OPENSANDBOX_SERVER_API_KEY="").settings.server.api_key is None
        assert toml('server.api_key = " "').settings.server.api_key is None

    def test_dsn_own_variable_then_file_then_shared_variable(self, toml):
        text = 'store.postgresql.dsn = "postgresql://file/db"'
        own, shared = "postgresql+asyncpg://own/db", "postgres://shared/db"

        def dsn(text: str, **environ: str) -> str | None:
            return toml(text, **environ).settings.store.postgresql.dsn

        assert dsn(text, OPENSANDBOX_STORE_POSTGRESQL_DSN=own, DATABASE_URL=shared) == own
        assert dsn(text, DATABASE_URL=shared) == "postgresql://file/db"
        assert dsn("", DATABASE_URL=shared) == shared
        assert dsn('store.postgresql.dsn = ""', DATABASE_URL=shared) == shared
        assert dsn("", OPENSANDBOX_STORE_POSTGRESQL_DSN="", DATABASE_URL="") is None

    def test_docker_host(self, toml):
        text = 'docker.host = "unix:///file.sock"'
        assert toml(text).settings.docker.host == "unix:///file.sock"
        assert toml(text, DOCKER_HOST="tcp://engine:2375").settings.docker.host == "tcp://engine:2375"
        assert toml(text, DOCKER_HOST="").settings.docker.host == "unix:///file.sock"

    def test_master_key_is_decoded_and_measured(self, toml):
        assert toml("", SANDLEDGER_MASTER_KEY=KEY).settings.sandledger.master_key == bytes(range(32))
        assert toml("", SANDLEDGER_MASTER_KEY_FILE="/k").settings.sandledger.master_key_file == Path("/k")
        for wrong in ("AAAA", "not base64!", KEY[:-1]):
            message = refusal(toml, "", SANDLEDGER_MASTER_KEY=wrong)
            assert message.startswith("environment variable SANDLEDGER_MASTER_KEY: sandledger.master_key = ***")
            assert "openssl rand" in message
            assert wrong not in message

    def test_two_master_keys_are_one_too_many(self, toml):
        assert "both set" in refusal(toml, "", SANDLEDGER_MASTER_KEY=KEY, SANDLEDGER_MASTER_KEY_FILE="/k")

    def test_insecure_takes_exactly_yes(self, toml):
        assert toml("", OPENSANDBOX_INSECURE_SERVER="YES").settings.server.insecure
        loaded = toml("", OPENSANDBOX_INSECURE_SERVER="true")
        assert not loaded.settings.server.insecure
        assert "only the exact value YES" in loaded.warnings[0]

    @pytest.mark.parametrize(
        ("text", "variable"),
        [
            ("server.insecure = true", "OPENSANDBOX_INSECURE_SERVER=YES"),
            (f'sandledger.master_key = "{CANARY}"', "SANDLEDGER_MASTER_KEY"),
        ],
    )
    def test_what_only_the_environment_sets_is_refused_in_a_file(self, toml, text, variable):
        assert refusal(toml, text).endswith(f"is read from the environment only, use {variable}")

    @pytest.mark.parametrize("variable", unserved.VARIABLES)
    def test_variables_that_are_not_served_are_named(self, toml, variable):
        warnings = toml("", **{variable: CANARY}).warnings
        assert warnings == (f"environment variable {variable} has no effect in this version",)


class TestKeys:
    def test_every_served_key_is_honoured(self, toml):
        """A file that sets each served key to something other than its default; the list is the structs' own."""
        loaded = toml(EVERY_KEY)
        assert [line.partition(": ")[2] for line in loaded.warnings] == [
            'store.type = "sqlite" is not served, the server of the dsn is used instead',
        ]
        same = {path for path in served_paths() if attrgetter(path)(loaded.settings) == attrgetter(path)(Settings())}
        # The first can only be docker, the others come from the environment.
        assert same == {"runtime.type", "server.insecure", "sandledger.master_key", "sandledger.previous_master_key"}

    @pytest.mark.parametrize("path", sorted(unserved.KEYS))
    def test_each_key_that_is_not_served_is_one_warning(self, toml, path):
        loaded = toml(f'{path} = "{CANARY}"')
        assert [line.partition(": ")[2] for line in loaded.warnings] == [f"{path} has no effect in this version"]
        assert loaded.warnings[0].startswith(f"{loaded.source}: ")

    def test_no_key_is_both_served_and_not(self):
        assert served_paths() & unserved.KEYS == set()

    def test_lists_and_tables_below_a_key_are_one_warning(self, toml):
        text = f"""
            [[ingress.secure_access.keys]]
            key_id = "a"
            key = "{CANARY}"
            [[ingress.secure_access.keys]]
            key_id = "b"
            key = "{CANARY}"
            [kubernetes.execd_init_resources.limits]
            cpu = "1"
        """
        lines = [line.partition(": ")[2].split()[0] for line in toml(text).warnings]
        assert lines == ["ingress.secure_access.keys", "kubernetes.execd_init_resources.limits"]

    @pytest.mark.parametrize(
        ("text", "path", "meant"),
        [
            ("server.prot = 1", "server.prot", "server.port"),
            ("[servr]\nport = 1", "servr", "server"),
            ("server.pids_limit = 1", "server.pids_limit", "docker.pids_limit"),
            ("port = 1", "port", "server.port"),
            ("sandledger.worker.lease_second = 1", "sandledger.worker.lease_second", "sandledger.worker.lease_seconds"),
            ("kubernetes.name_space = 1", "kubernetes.name_space", "kubernetes.namespace"),
        ],
    )
    def test_an_unknown_key_is_named_with_the_nearest(self, toml, text, path, meant):
        loaded = toml(text)
        assert loaded.warnings == (f"{loaded.source}: unknown key {path} is ignored; did you mean {meant}?",)

    def test_an_unknown_key_like_nothing_suggests_nothing(self, toml):
        loaded = toml(f'"qq zz" = "{CANARY}"')
        assert loaded.warnings == (f'{loaded.source}: unknown key "qq zz" is ignored',)

    @pytest.mark.parametrize(
        ("text", "start"),
        [
            (f'tenants.auth_token = "{CANARY}"', "tenants is refused"),
            ("[tenants]", "tenants is refused"),
            ('secure_runtime.type = "gvisor"', 'secure_runtime.type = "gvisor" is refused'),
            (
                'runtime.type = "kubernetes"',
                'runtime.type = "kubernetes" is refused: kubernetes is known but not served',
            ),
        ],
    )
    def test_what_would_weaken_isolation_stops_the_start(self, toml, text, start):
        assert refusal(toml, text).partition(": ")[2].startswith(start)

    def test_empty_texts_that_are_the_default_are_silent(self, toml):
        assert toml('secure_runtime.type = ""\nruntime.execd_image = ""').warnings == ()

    def test_sqlite_means_the_embedded_database(self, toml):
        loaded = toml('store.type = "sqlite"')
        assert loaded.warnings == (
            f'{loaded.source}: store.type = "sqlite" is not served, the embedded PostgreSQL is used instead',
        )


class TestBadValues:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("server.port = 70000", "server.port = 70000 is not allowed, expected a whole number from 0 up to 65535"),
            ('server.port = "80"', 'server.port = "80" is not allowed, expected a whole number from 0 up to 65535'),
            ('server.loop = "trio"', 'server.loop = "trio" is not allowed, expected one of asyncio, auto, uvloop'),
            ('server.host = ""', 'server.host = "" is not allowed, expected text that is not empty'),
            ("server.max_sandbox_timeout_seconds = 59", "= 59 is not allowed, expected a whole number from 60"),
            ('log.level = "loud"', '= "loud" is not allowed, expected one of DEBUG, INFO, WARNING, ERROR, CRITICAL'),
            ("log.file_enabled = 1", "log.file_enabled = 1 is not allowed, expected true or false"),
            ("log.file_path = 7", "log.file_path = 7 is not allowed, expected a path"),
            ('runtime.type = "podman"', 'runtime.type = "podman" is not allowed, expected docker'),
            ('docker.log_max_size = "10 MB"', "expected a size in bytes, or with k, m or g, such as 10m"),
            ("docker.drop_capabilities = [1]", "docker.drop_capabilities = [1] is not allowed, expected a list"),
            ('docker.host = "engine"', 'docker.host = "engine" is not allowed, expected a URL such as unix://'),
            ("sandledger.worker.sweep_seconds = 0", "expected a number above 0 up to 31622400"),
            ("sandledger.worker.lease_seconds = 0.001", "expected a number from 1 up to 31622400"),
            ("sandledger.worker.expiry_lease_seconds = 0.001", "expected a number from 1 up to 31622400"),
            ("sandledger.worker.lease_seconds = nan", "sandledger.worker.lease_seconds = NaN is not allowed"),
            ("docker.pull_timeout_seconds = inf", "docker.pull_timeout_seconds = Infinity is not allowed"),
            ("sandledger.worker = 3", "sandledger.worker = 3 is not allowed, expected a table"),
            (
                "[store.postgresql]\nmin_pool_size = 11",
                "store.postgresql: min_pool_size (11) exceeds max_pool_size (10)",
            ),
            ("[store.postgresql]\nmax_pool_size = 2", "store.postgresql: max_pool_size (2) must be at least 5: one"),
            ('proxy.auth = "none"', 'proxy.auth = "none" is not allowed, expected one of key, open'),
            ('docker.publish_host = "0.0.0.0:80/x"', "expected an IP address or a host name, without scheme and port"),
            ('docker.host_ip = "http://h"', "expected an IP address or a host name, without scheme and port"),
            ('server.eip = "a b"', "expected a host, with a port and a path if need be"),
            ('server.eip = "user@host"', "expected a host, with a port and a path if need be"),
            ('proxy.public_address = "h/x?y"', "expected a host, with a port and a path if need be"),
            ('proxy.wildcard = "sandboxes.test"', "expected *. and a domain, with a port if need be"),
            ('proxy.allowed_origins = ["ide.test"]', "a list, each item scheme and host, with a port if need be"),
            ('proxy.allowed_origins = ["https://ide.test/"]', "such as https://ide.example.com:8443"),
            ('proxy.wildcard = "*.a.*"', "expected *. and a domain, with a port if need be"),
            ("proxy.drain_seconds = 0", "expected a whole number from 1"),
            ("proxy.drain_announce_seconds = -1", "expected a number from 0"),
            ("proxy.idle_seconds = 0", "expected a number above 0"),
            (
                "docker.port_range_min = 80",
                "docker.port_range_min = 80 is not allowed, expected a whole number from 1024",
            ),
            ("docker.port_range_min = 40000", "docker: port_range_min and port_range_max belong together"),
            ("[docker]\nport_range_min = 2000\nport_range_max = 2000", "port_range_min (2000) must be below"),
            ("[docker]\nport_range_min = 2001\nport_range_max = 2000", "port_range_min (2001) must be below"),
            ("sandledger.agent.ready_seconds = 0", "expected a number above 0"),
            ("sandledger.worker.backoff_base_seconds = 301", "backoff_base_seconds (301) exceeds backoff_max_seconds"),
        ],
    )
    def test_file_key_value_and_what_is_allowed(self, toml, text, message):
        shown = refusal(toml, text)
        assert re.match(r"\S+sandledger\.toml: ", shown)
        assert message in shown

    @pytest.mark.parametrize(
        ("text", "path"),
        [
            (f'server.api_key = ["{CANARY}"]', "server.api_key"),
            (f'store.postgresql.dsn = "mysql://u:{CANARY}@h/db"', "store.postgresql.dsn"),
            (f'store.postgresql = "postgresql://u:{CANARY}@h/db"', "store.postgresql"),
            (f'store = "postgresql://u:{CANARY}@h/db"', "store"),
            (f'server = "{CANARY}"', "server"),
            (f'docker.sandbox_env = {{ A = "{CANARY}", PORT = ["{CANARY}"] }}', "docker.sandbox_env.PORT"),
            (f'docker.sandbox_env = "{CANARY}"', "docker.sandbox_env"),
        ],
    )
    def test_secret_values_are_not_repeated(self, toml, text, path):
        assert f": {path} = *** is not allowed, expected " in refusal(toml, text)

    def test_a_bad_variable_is_named_instead_of_the_file(self, toml):
        for variable in ("OPENSANDBOX_STORE_POSTGRESQL_DSN", "DATABASE_URL"):
            shown = refusal(toml, "", **{variable: f"mysql://u:{CANARY}@h"})
            assert shown.startswith(f"environment variable {variable}: store.postgresql.dsn = *** is not allowed")

    def test_a_variable_does_not_repair_a_table_that_is_none(self, toml):
        assert "store = *** is not allowed, expected a table" in refusal(toml, "store = 1", DATABASE_URL="postgres://h")

    def test_long_values_are_cut(self, toml):
        assert len(refusal(toml, f'runtime.type = "{"x" * 5000}"')) < 400

    def test_levels_in_any_case(self, toml):
        assert toml('log.level = "warning"').settings.log.level == "WARNING"


EVERY_KEY = """
[server]
host = "0.0.0.0"
port = 0
timeout_keep_alive = 31
limit_concurrency = 0
timeout_graceful_shutdown = 6
backlog = 99
loop = "asyncio"
http = "h11"
api_key = "k"
eip = "edge.example.com:8443/path"
max_sandbox_timeout_seconds = 60
[log]
level = "debug"
file_enabled = true
file_path = "/l/s.log"
access_file_path = "/l/a.log"
file_max_bytes = 1
file_backup_count = 0
[runtime]
type = "docker"
execd_image = "agent:1"
execd_run_as_init = true
[docker]
host = "unix:///e.sock"
network_mode = "host"
subnets = ["10.9.0.0/16"]
host_ip = "10.0.0.9"
publish_host = "0.0.0.0"
port_range_min = 1024
port_range_max = 65535
api_timeout = 1
pull_timeout_seconds = 1.5
capabilities = []
drop_capabilities = ["KILL"]
init = true
default_cpu = "1"
default_memory = "1Gi"
max_cpu = "2"
max_memory = "2Gi"
apparmor_profile = "p"
seccomp_profile = "{}"
no_new_privileges = false
pids_limit = 10
log_max_size = "1g"
log_max_files = 1
sandbox_env = { A = "b" }
[proxy]
resolve_internal = false
auth = "open"
public_address = "https://proxy.example.com"
wildcard = "*.sandboxes.example.com:8443"
same_origin_pages = true
allowed_origins = ["https://ide.example.com:8443"]
drain_seconds = 5
drain_announce_seconds = 3
idle_seconds = 60
[store]
type = "sqlite"
[store.postgresql]
dsn = "postgresql://h/db"
migrate_dsn = "host=h dbname=db user=owner"
min_pool_size = 0
max_pool_size = 5
connect_timeout_seconds = 1
pool_timeout_seconds = 1
[sandledger]
state_dir = "/s"
start_wait_seconds = 0
master_key_file = "/k"
worker.concurrency = 1
worker.lease_seconds = 1
worker.sweep_seconds = 1
worker.backoff_base_seconds = 0.1
worker.backoff_max_seconds = 1
worker.orphan_grace_seconds = 0
worker.missing_grace_seconds = 0
worker.expiry_lease_seconds = 1
worker.orphan_dry_run = true
deadlines = { pending_seconds = 1, pausing_seconds = 1, resuming_seconds = 1, stopping_seconds = 1 }
agent = { ready_seconds = 1 }
diagnostics = { keep_days = 0 }
metrics = { keep_days = 1 }
snapshots = { freeze_seconds = 1, commit_seconds = 1 }
api = { wait_seconds_max = 0, body_limit_bytes = 1024, metadata_max_entries = 0 }
"""
