"""Settings that protect: no secret is ever shown, nobody is exposed by accident."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.pretty import pretty_repr

from app.errors import SettingsError
from app.settings import (
    DockerSettings,
    PostgresqlSettings,
    SandledgerSettings,
    ServerSettings,
    Settings,
    StoreSettings,
    check_exposure,
    load,
    publish_host,
    redacted_dsn,
)

CANARY = "c4nary-Value"


class TestExposure:
    @pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost", "LocalHost.", "::ffff:127.0.0.1"])
    def test_loopback_needs_no_key(self, host):
        check_exposure(Settings(server=ServerSettings(host=host)))

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "::ffff:10.0.0.1", "a" * 70])
    def test_beyond_loopback_needs_a_key_or_a_word(self, host):
        with pytest.raises(SettingsError) as caught:
            check_exposure(Settings(server=ServerSettings(host=host)))
        for way_out in ("server.api_key", "OPENSANDBOX_SERVER_API_KEY", "OPENSANDBOX_INSECURE_SERVER=YES", "127.0.0.1"):
            assert way_out in str(caught.value)
        check_exposure(Settings(server=ServerSettings(host=host, api_key="k")))
        check_exposure(Settings(server=ServerSettings(host=host, insecure=True)))

    def test_an_empty_key_in_the_environment_takes_the_protection_away(self, tmp_path):
        path = tmp_path / "sandledger.toml"
        path.write_text('server.host = "0.0.0.0"\nserver.api_key = "k"')
        environ = {"HOME": str(tmp_path)}
        check_exposure(load(path, environ).settings)
        with pytest.raises(SettingsError):
            check_exposure(load(path, environ | {"OPENSANDBOX_SERVER_API_KEY": " "}).settings)


class TestPublishing:
    """Ports of sandboxes are published on the loopback unless the server itself listens wider, or the operator says so."""

    @pytest.mark.parametrize(
        ("server", "asked", "published"),
        [
            ("127.0.0.1", "", "127.0.0.1"),
            ("localhost", "", "127.0.0.1"),
            ("::1", "", "127.0.0.1"),
            ("0.0.0.0", "", "0.0.0.0"),
            ("::", "", "0.0.0.0"),
            ("10.1.2.3", "", "10.1.2.3"),
            ("0.0.0.0", "127.0.0.1", "127.0.0.1"),
            ("127.0.0.1", "10.0.0.9", "10.0.0.9"),
            ("127.0.0.1", "localhost", "127.0.0.1"),
            ("127.0.0.1", "fd00::1", "fd00::1"),
        ],
    )
    def test_where(self, server, asked, published):
        settings = Settings(server=ServerSettings(host=server), docker=DockerSettings(publish_host=asked))
        assert publish_host(settings) == published

    def test_a_name_that_does_not_resolve_is_refused_with_what_to_set(self):
        settings = Settings(docker=DockerSettings(publish_host="a" * 70))
        with pytest.raises(
            SettingsError, match=r"docker\.publish_host = .* does not resolve .* set docker\.publish_host"
        ):
            publish_host(settings)


class TestSecrecy:
    def test_no_repr_shows_a_secret(self, tmp_path):
        path = tmp_path / "sandledger.toml"
        path.write_text(f'server.api_key = "{CANARY}1"\ndocker.sandbox_env = {{ TOKEN = "{CANARY}2" }}')
        environ = {
            "HOME": str(tmp_path),
            "OPENSANDBOX_STORE_POSTGRESQL_DSN": f"postgresql://user:{CANARY}3@host/db",
            "SANDLEDGER_MASTER_KEY": base64.b64encode(CANARY.ljust(32).encode()).decode(),
        }
        loaded = load(path, environ)
        settings = loaded.settings
        console = Console(record=True, width=10_000)
        console.print(settings)
        for shown in (
            repr(loaded),
            str(settings),
            repr(settings.server),
            repr(settings.store.postgresql),
            repr(settings.sandledger),
            repr(settings.docker),
            pretty_repr(settings),
            console.export_text(),
        ):
            assert CANARY not in shown
            assert "***" in shown
        assert settings.server.api_key == f"{CANARY}1"

    def test_rich_tracebacks_with_locals_show_none_either(self):
        settings = Settings(
            server=ServerSettings(api_key=CANARY),
            store=StoreSettings(postgresql=PostgresqlSettings(dsn=f"postgresql://u:{CANARY}@h/d")),
            sandledger=SandledgerSettings(master_key=CANARY.ljust(32).encode()),
        )
        assert CANARY not in pretty_repr({"settings": settings, "parts": [settings.server, settings.sandledger]})

    def test_unset_secrets_look_unset(self):
        assert "api_key=None" in repr(Settings())

    def test_settings_are_frozen(self):
        settings = Settings()
        with pytest.raises(AttributeError):
            settings.server.api_key = "x"  # pyright: ignore[reportAttributeAccessIssue] - that it fails is tested


class TestRedactedDsn:
    @pytest.mark.parametrize(
        ("dsn", "shown"),
        [
            ("postgresql://user:pw@host:5432/db", "postgresql://user:***@host:5432/db"),
            ("postgresql+asyncpg://user:p@w@host/db?ssl=on", "postgresql+asyncpg://user:***@host/db?ssl=on"),
            ("postgres://u:pw@a:1,b:2/db", "postgres://u:***@a:1,b:2/db"),
            ("postgresql://user@host/db", "postgresql://user@host/db"),
            ("postgresql://host/db", "postgresql://host/db"),
            ("postgresql:///db?host=/run&user=u&password=pw", "postgresql:///db?host=/run&user=u&password=***"),
            ("postgresql://h/db?sslpassword=pw&x=1", "postgresql://h/db?sslpassword=***&x=***"),
            ("postgresql://u:p/w@host/db", "postgresql://***"),
            ("postgresql://u:p?w@host/db", "postgresql://***"),
            ("postgresql://u:p#w@host/db", "postgresql://***"),
            ("host=h user=u password=pw", "host=h user=u password=***"),
            ("host=h user=u password=p w", "***"),
            ("", "***"),
        ],
    )
    def test_forms(self, dsn, shown):
        assert redacted_dsn(dsn) == shown

    @given(st.text(st.characters(codec="utf-8"), max_size=30))
    def test_no_password_survives(self, tail):
        assert CANARY not in redacted_dsn(f"postgresql://user:{tail}{CANARY}{tail}@host/db")
