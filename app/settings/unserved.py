"""Keys and variables of the public server that this version knows and does not serve. Data only.

Most are accepted with a warning. The few whose silent loss would weaken isolation stop the start.
"""

from __future__ import annotations

from msgspec import Struct


class Stop(Struct, frozen=True):
    """A key that is refused: always, unless its value is one of `harmless`."""

    key: str
    reason: str
    harmless: tuple[str, ...] = ()


STOPS = (
    Stop(
        "tenants",
        "tenants are not served by this version, and without them every caller would see every sandbox;"
        " remove the table and use server.api_key",
    ),
    Stop(
        "secure_runtime.type",
        "secure runtimes are not served by this version, and sandboxes would run with less isolation than asked for;"
        " remove the key or set it to an empty text",
        harmless=("",),
    ),
)

KUBERNETES = "kubernetes is known but not served by this version; set it to docker"
"""Why `runtime.type = "kubernetes"` stops the start."""

_BY_TABLE: dict[str, tuple[str, ...]] = {
    "server": ("thread_pool_size",),
    "renew_intent": ("enabled", "min_interval_seconds"),
    "renew_intent.redis": ("enabled", "dsn", "queue_key", "consumer_concurrency"),
    "otel": ("enabled", "endpoint", "service_name", "export_interval_millis"),
    "docker": ("sandbox_binds",),
    "kubernetes": (
        "kubeconfig_path",
        "insecure_skip_tls_verify",
        "namespace",
        "workload_provider",
        "batchsandbox_template_file",
        "informer_resync_seconds",
        "informer_watch_timeout_seconds",
        "read_qps",
        "read_burst",
        "write_qps",
        "write_burst",
        "sandbox_create_timeout_seconds",
        "pool_acquisition_timeout_seconds",
        "sandbox_create_poll_interval_seconds",
        "image_pull_policy",
        "fastpath_endpoint",
        "fastpath_timeout_seconds",
        "fastpath_wait_ready_seconds",
        "fastpath_resource_pool",
        "template_s3_publish_secret",
    ),
    "kubernetes.execd_init_resources": ("limits", "requests"),
    "agent_sandbox": ("template_file", "shutdown_policy", "ingress_enabled"),
    "ingress": ("mode",),
    "ingress.gateway": ("address",),
    "ingress.gateway.route": ("mode",),
    "ingress.secure_access": ("active_key", "keys"),
    "storage": ("allowed_host_paths", "volume_default_size", "ossfs_mount_root"),
    "store": ("path",),
    "store.postgresql": ("snapshot_recovery_interval_seconds",),
    "egress": ("image", "mode", "disable_ipv6", "otlp_endpoint", "readiness_timeout_seconds", "requests", "limits"),
    "egress.upstream_proxy": ("url", "authorization", "ca_cert_path", "ca_secret_name"),
    "secure_runtime": ("docker_runtime", "k8s_runtime_class"),
}

KEYS = frozenset(f"{table}.{key}" for table, keys in _BY_TABLE.items() for key in keys)
"""Full paths of the keys that are accepted with a warning."""

TABLES = frozenset(
    ".".join(parts[:end]) for table in _BY_TABLE for parts in (table.split("."),) for end in range(1, len(parts) + 1)
)
"""Full paths of the tables that hold such keys."""

VARIABLES = (
    "SANDBOX_TENANTS_CONFIG_PATH",
    "OPENSANDBOX_SECURE_ACCESS_KEYS",
    "OPENSANDBOX_SECURE_ACCESS_ACTIVE_KEY",
)
"""Environment variables that are accepted with a warning."""
