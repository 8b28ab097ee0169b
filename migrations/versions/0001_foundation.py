"""The log, the head rows, the reconcile queue, deadlines, idempotency keys, the vault and refusals.

Hand-written SQL: partitions, triggers and grants are what makes the log trustworthy, and no generator knows them.
"""

from __future__ import annotations

from alembic import op

from app.errors import SettingsError
from app.store.database.migrate import run_script

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# The connection's search path has our schema first: what is created here without a schema goes there. Functions run on
# other connections, with other paths, an empty one in a restore: they name every object in full, and pin their path.

# Group role of every server process. Roles belong to the cluster, so each database has one of its own name.
# `:app_role` stands for it in all that follows.
APP_ROLE = """
SELECT 'sandledger_app_' || substr(md5(current_database()), 1, 8)
"""
ROLE = """
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = ':app_role') THEN
        CREATE ROLE :app_role NOLOGIN;
    END IF;
    GRANT :app_role TO CURRENT_USER;
EXCEPTION
    WHEN insufficient_privilege THEN
        -- Made and granted beforehand, by somebody who may.
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = ':app_role')
           OR NOT pg_has_role(CURRENT_USER, ':app_role', 'MEMBER') THEN
            RAISE EXCEPTION
                'the role :app_role cannot be made and granted (CREATE ROLE :app_role; GRANT :app_role TO %)',
                CURRENT_USER USING ERRCODE = 'insufficient_privilege';
        END IF;
END $$;
DO $$
BEGIN
    EXECUTE format('GRANT CONNECT ON DATABASE %I TO :app_role', current_database());
    -- Temporary tables and new objects are of no use to servers. PUBLIC loses them only where no other
    -- schema of the database has a table.
    IF NOT EXISTS (
        SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname NOT IN ('pg_catalog', 'information_schema', 'sandledger') AND n.nspname NOT LIKE 'pg\\_%'
    ) THEN
        EXECUTE format('REVOKE TEMPORARY ON DATABASE %I FROM PUBLIC', current_database());
        IF pg_has_role(CURRENT_USER, (SELECT nspowner FROM pg_namespace WHERE nspname = 'public'), 'MEMBER') THEN
            REVOKE CREATE ON SCHEMA public FROM PUBLIC;
        END IF;
    END IF;
END $$;
REVOKE ALL ON SCHEMA sandledger FROM PUBLIC;
GRANT USAGE ON SCHEMA sandledger TO :app_role;
"""

INSTALLATION = """
CREATE TABLE installation (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    master_key_id text,
    epoch integer NOT NULL DEFAULT 1,
    app_role text NOT NULL,
    owner_role text NOT NULL DEFAULT CURRENT_USER
);
COMMENT ON TABLE installation IS 'Who we are: the id that labels our objects on engines, and which master key seals.';
INSERT INTO installation (app_role) VALUES (':app_role');
GRANT SELECT, UPDATE (master_key_id) ON installation TO :app_role;
"""

EVENTS = """
CREATE SEQUENCE events_position AS bigint CACHE 1;
-- A pristine sequence says last_value = 1 before anything was drawn, and would announce position 1 as handed out.
SELECT nextval('events_position');

CREATE TABLE events (
    position bigint NOT NULL DEFAULT nextval('events_position'),
    stream_id uuid NOT NULL,
    kind text NOT NULL CHECK (kind <> ''),
    tenant text NOT NULL CHECK (tenant <> ''),
    version integer NOT NULL CHECK (version > 0),
    type text NOT NULL,
    schema smallint NOT NULL CHECK (schema > 0),
    data jsonb NOT NULL,
    meta jsonb NOT NULL CHECK (
        ((meta #>> '{actor,kind}') <> '') IS TRUE AND ((meta #>> '{actor,id}') <> '') IS TRUE
        AND ((meta #>> '{actor,name}') <> '') IS TRUE AND ((meta ->> 'app_version') <> '') IS TRUE),
    recorded_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (position)
) PARTITION BY RANGE (position);
CREATE INDEX events_recorded_at ON events USING brin (recorded_at);
COMMENT ON TABLE events IS 'The lifecycle log. Append-only for every role. Read in order only up to log_horizon().';
"""

# The announced horizon (see app/store/log/store.py for the protocol). 21324 = 0x534C, 'SL'.
HORIZON = """
CREATE FUNCTION log_announce() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, sandledger, pg_temp AS $$
DECLARE
    handed_out bigint;
BEGIN
    SELECT last_value INTO handed_out FROM sandledger.events_position;
    PERFORM pg_advisory_xact_lock_shared((21324::bigint << 48) | handed_out);
    RETURN NULL;
END $$;
CREATE TRIGGER announce BEFORE INSERT ON events FOR EACH STATEMENT EXECUTE FUNCTION log_announce();
-- Always: `session_replication_role = replica`, as restore and replication tools set it, switches off other triggers.
ALTER TABLE events ENABLE ALWAYS TRIGGER announce;

CREATE FUNCTION log_horizon() RETURNS bigint LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, sandledger, pg_temp AS $$
DECLARE
    handed_out bigint;
    announced bigint;
BEGIN
    -- A standby shows neither the announcements nor the sequence as they are: its WAL runs 32 positions ahead.
    IF pg_is_in_recovery() THEN
        RAISE EXCEPTION 'the horizon of the log exists on the primary server only; this one is a standby'
            USING ERRCODE = 'read_only_sql_transaction';
    END IF;
    -- First the sequence, then the announcements, each with a look of its own; never one statement for both.
    SELECT last_value INTO handed_out FROM sandledger.events_position;
    SELECT min(((classid::bigint & 65535) << 32) | objid::bigint) INTO announced
      FROM pg_locks
     WHERE locktype = 'advisory' AND objsubid = 1 AND (classid::bigint >> 16) = 21324
       AND database = (SELECT oid FROM pg_database WHERE datname = current_database());
    RETURN least(handed_out, announced);
END $$;
"""

IDENTITY = """
-- The owner asks for the servers, which need no right of their own. The name of the present WAL file begins with the
-- timeline; the control file would name that of the last checkpoint.
CREATE FUNCTION log_identity(OUT system_identifier bigint, OUT timeline_id integer, OUT last_position bigint)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, sandledger, pg_temp AS $$
    SELECT s.system_identifier, ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::integer,
           p.last_value
      FROM pg_control_system() s, sandledger.events_position p
$$;
REVOKE ALL ON FUNCTION log_identity FROM PUBLIC;
GRANT EXECUTE ON FUNCTION log_identity TO :app_role;
"""

APPEND_ONLY = """
CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, sandledger, pg_temp AS $$
BEGIN
    RAISE EXCEPTION '% is append-only: % refused', TG_TABLE_NAME, TG_OP USING ERRCODE = 'insufficient_privilege';
END $$;
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON events
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
ALTER TABLE events ENABLE ALWAYS TRIGGER append_only;
"""

# Statement triggers are not inherited by partitions, so each gets its own, and its own unique (stream_id, version):
# PostgreSQL cannot enforce that across partitions; the head row is the guard, this is the belt.
PARTITIONS = """
CREATE FUNCTION log_ensure_partitions() RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, sandledger, pg_temp AS $$
DECLARE
    size CONSTANT bigint := 25000000;
    ahead CONSTANT integer := 2;
    present bigint;
    slot bigint;
    part text;
    made integer := 0;
BEGIN
    SELECT last_value / size INTO present FROM sandledger.events_position;
    FOR slot IN present .. present + ahead LOOP
        part := format('events_p%s', lpad(slot::text, 6, '0'));
        CONTINUE WHEN to_regclass('sandledger.' || part) IS NOT NULL;
        -- Two servers may come here at once; one makes it, the other waits and finds it. Finds it by a query, since
        -- to_regclass would repeat from its cache that there is none.
        PERFORM pg_advisory_xact_lock(hashtextextended('sandledger.partitions', 0));
        CONTINUE WHEN EXISTS (SELECT FROM pg_class WHERE relname = part AND relnamespace = 'sandledger'::regnamespace);
        -- Made apart and attached: CREATE TABLE ... PARTITION OF would wait for every reader and writer of the log, be
        -- it a dump of hours, and every append would wait behind it. ATTACH conflicts with neither.
        EXECUTE format('CREATE TABLE sandledger.%I (LIKE sandledger.events INCLUDING ALL) WITH '
                       '(autovacuum_vacuum_insert_scale_factor = 0.02)', part);
        EXECUTE format('CREATE UNIQUE INDEX %I ON sandledger.%I (stream_id, version)', part || '_stream', part);
        EXECUTE format('CREATE TRIGGER announce BEFORE INSERT ON sandledger.%I '
                       'FOR EACH STATEMENT EXECUTE FUNCTION sandledger.log_announce()', part);
        EXECUTE format('CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON sandledger.%I '
                       'FOR EACH STATEMENT EXECUTE FUNCTION sandledger.refuse_change()', part);
        EXECUTE format('ALTER TABLE sandledger.%I ENABLE ALWAYS TRIGGER announce, '
                       'ENABLE ALWAYS TRIGGER append_only', part);
        EXECUTE format('ALTER TABLE sandledger.events ATTACH PARTITION sandledger.%I FOR VALUES FROM (%s) TO (%s)',
                       part, slot * size, (slot + 1) * size);
        made := made + 1;
    END LOOP;
    RETURN made;
END $$;
CREATE FUNCTION log_partitions_ahead() RETURNS integer LANGUAGE sql STABLE
SET search_path = pg_catalog, sandledger, pg_temp AS $$
    SELECT count(*)::integer FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
     WHERE i.inhparent = 'sandledger.events'::regclass
       AND substr(c.relname, 9)::bigint > (SELECT last_value / 25000000 FROM sandledger.events_position)
$$;
REVOKE ALL ON FUNCTION log_ensure_partitions FROM PUBLIC;
GRANT EXECUTE ON FUNCTION log_ensure_partitions TO :app_role;
SELECT log_ensure_partitions();
-- Not the position: a row below the horizon would never be seen.
GRANT SELECT, INSERT (stream_id, kind, tenant, version, type, schema, data, meta, recorded_at) ON events
    TO :app_role;
GRANT SELECT, USAGE ON SEQUENCE events_position TO :app_role;
"""

# After a restore, when objects on an engine bear positions of events that are gone (`sandledger engines trust`).
SKIP = """
CREATE FUNCTION log_skip_to(target bigint) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, sandledger, pg_temp AS $$
DECLARE
    handed_out bigint;
BEGIN
    IF target IS NULL OR target >= 140737488355328 THEN
        RAISE EXCEPTION 'position % is beyond what the log can hold', target USING ERRCODE = 'check_violation';
    END IF;
    -- No writer may draw a position between the comparison and the skip, or the log would go backwards.
    LOCK TABLE sandledger.events IN SHARE ROW EXCLUSIVE MODE;
    SELECT last_value INTO handed_out FROM sandledger.events_position;
    IF target > handed_out THEN
        PERFORM setval('sandledger.events_position', target);
        PERFORM sandledger.log_ensure_partitions();
        handed_out := target;
    END IF;
    RETURN handed_out;
END $$;
REVOKE ALL ON FUNCTION log_skip_to FROM PUBLIC;
GRANT EXECUTE ON FUNCTION log_skip_to TO :app_role;
"""

SANDBOXES = """
-- A trusted extension: no superuser is needed.
CREATE EXTENSION IF NOT EXISTS btree_gin;
CREATE TABLE phase_transitions (
    from_phase text NOT NULL,
    to_phase text NOT NULL,
    PRIMARY KEY (from_phase, to_phase)
);
COMMENT ON TABLE phase_transitions IS 'Which public state may follow which; enforced on sandboxes by trigger.';
INSERT INTO phase_transitions VALUES
    ('Pending', 'Running'), ('Pending', 'Resuming'), ('Pending', 'Pausing'), ('Pending', 'Paused'),
    ('Pending', 'Terminated'), ('Pending', 'Failed'),
    ('Pending', 'Stopping'),
    ('Running', 'Pending'), ('Pausing', 'Pending'), ('Paused', 'Pending'), ('Resuming', 'Pending'),
    ('Running', 'Pausing'), ('Running', 'Resuming'), ('Running', 'Paused'), ('Running', 'Terminated'),
    ('Running', 'Failed'), ('Running', 'Stopping'),
    ('Pausing', 'Running'), ('Pausing', 'Paused'), ('Pausing', 'Terminated'), ('Pausing', 'Failed'),
    ('Pausing', 'Stopping'),
    ('Paused', 'Resuming'), ('Paused', 'Pausing'), ('Paused', 'Terminated'), ('Paused', 'Failed'),
    ('Paused', 'Stopping'),
    ('Resuming', 'Running'), ('Resuming', 'Paused'), ('Resuming', 'Terminated'), ('Resuming', 'Failed'),
    ('Resuming', 'Stopping'),
    ('Terminated', 'Stopping'), ('Failed', 'Stopping'), ('Failed', 'Terminated'), ('Stopping', 'Terminated');
GRANT SELECT ON phase_transitions TO :app_role;

CREATE TABLE sandboxes (
    id uuid PRIMARY KEY,
    tenant text NOT NULL,
    version integer NOT NULL,
    position bigint NOT NULL,
    schema smallint NOT NULL,
    phase text NOT NULL,
    desired text NOT NULL,
    observed text NOT NULL,
    spec jsonb NOT NULL,
    metadata jsonb NOT NULL,
    engine text,
    epoch integer NOT NULL,
    place text NOT NULL,
    object_id uuid,
    generation integer NOT NULL,
    run integer NOT NULL,
    runtime jsonb,
    address jsonb,
    waiting jsonb,
    failure jsonb,
    frozen_by jsonb,
    freeze_at timestamptz,
    link_number integer NOT NULL DEFAULT 0,
    cpu_nanos bigint,
    memory_bytes bigint,
    gpus integer,
    key_id text NOT NULL,
    key_name text NOT NULL,
    fingerprint text NOT NULL,
    created_at timestamptz NOT NULL,
    changed_at timestamptz NOT NULL,
    begun_at timestamptz,
    ready_at timestamptz,
    expires_at timestamptz,
    ended_at timestamptz,
    end_cause text,
    ended_by text,
    closed_at timestamptz,
    since_position bigint NOT NULL
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02);
-- One object of an engine has one owner.
CREATE UNIQUE INDEX sandboxes_object ON sandboxes (object_id) WHERE closed_at IS NULL;
CREATE INDEX sandboxes_listing ON sandboxes (tenant, created_at DESC, id DESC) WHERE ended_at IS NULL;
CREATE INDEX sandboxes_all ON sandboxes (tenant, created_at DESC, id DESC);
CREATE INDEX sandboxes_by_phase ON sandboxes (tenant, phase, created_at DESC, id DESC) WHERE ended_at IS NULL;
CREATE INDEX sandboxes_all_by_phase ON sandboxes (tenant, phase, created_at DESC, id DESC);
CREATE INDEX sandboxes_open ON sandboxes (engine, id) WHERE closed_at IS NULL;
CREATE INDEX sandboxes_metadata ON sandboxes USING gin (tenant, metadata jsonb_path_ops);

CREATE FUNCTION check_phase() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, sandledger, pg_temp AS $$
BEGIN
    IF NEW.version <= OLD.version THEN
        RAISE EXCEPTION 'sandbox %: version must rise', NEW.id USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.phase <> OLD.phase AND NOT EXISTS (
        SELECT FROM sandledger.phase_transitions WHERE from_phase = OLD.phase AND to_phase = NEW.phase) THEN
        RAISE EXCEPTION 'sandbox %: % cannot become %', NEW.id, OLD.phase, NEW.phase USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER check_phase BEFORE UPDATE ON sandboxes FOR EACH ROW EXECUTE FUNCTION check_phase();
-- The first append brings one event, or two when an engine takes it at once.
ALTER TABLE sandboxes ADD CONSTRAINT born_pending
    CHECK (phase = 'Pending' OR version > CASE WHEN engine IS NULL THEN 1 ELSE 2 END);
GRANT SELECT, INSERT, UPDATE ON sandboxes TO :app_role;
"""

SNAPSHOTS = """
CREATE TABLE snapshots (
    id uuid PRIMARY KEY,
    tenant text NOT NULL,
    version integer NOT NULL,
    position bigint NOT NULL,
    schema smallint NOT NULL,
    sandbox_id uuid NOT NULL,
    name text,
    engine text NOT NULL,
    generation integer NOT NULL,
    run integer NOT NULL,
    state text NOT NULL,
    reason text NOT NULL,
    message text NOT NULL,
    raw_id text,
    image_id text,
    size_bytes bigint,
    frozen_ms bigint,
    created_at timestamptz NOT NULL,
    changed_at timestamptz NOT NULL,
    removed_at timestamptz,
    since_position bigint NOT NULL
);
CREATE INDEX snapshots_listing ON snapshots (tenant, created_at DESC, id DESC) WHERE removed_at IS NULL;
CREATE INDEX snapshots_by_source ON snapshots (sandbox_id) WHERE removed_at IS NULL;
CREATE INDEX snapshots_here ON snapshots (engine, id) WHERE removed_at IS NULL;
-- Which sandboxes still use a snapshot, and so keep it from being deleted.
CREATE INDEX sandboxes_by_snapshot ON sandboxes ((spec ->> 'snapshot_id'))
    WHERE closed_at IS NULL AND spec ->> 'snapshot_id' IS NOT NULL;
GRANT SELECT, INSERT, UPDATE ON snapshots TO :app_role;
"""

WORK = """
CREATE TABLE reconcile_queue (
    stream_id uuid PRIMARY KEY,
    kind text NOT NULL,
    tenant text NOT NULL,
    engine text NOT NULL,
    revision bigint NOT NULL,
    due_at timestamptz NOT NULL,
    priority smallint NOT NULL DEFAULT 0,
    attempts integer NOT NULL DEFAULT 0,
    first_failed_at timestamptz,
    lease_owner uuid,
    lease_until timestamptz,
    last_reason text,
    last_error text,
    progress text,
    cause bigint,
    missing_since timestamptz,
    trace text
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 200);
CREATE INDEX reconcile_queue_due ON reconcile_queue (engine, priority, tenant, due_at);

CREATE TABLE deadlines (
    stream_id uuid NOT NULL,
    name text NOT NULL,
    kind text NOT NULL,
    tenant text NOT NULL,
    fires_at timestamptz NOT NULL,
    next_run_time timestamptz NOT NULL,
    attempts integer NOT NULL DEFAULT 0,
    cause bigint,
    PRIMARY KEY (stream_id, name)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 200);
CREATE INDEX deadlines_due ON deadlines (next_run_time);

CREATE TABLE idempotency_keys (
    tenant text NOT NULL,
    digest text NOT NULL,
    kind text NOT NULL,
    stream_id uuid NOT NULL,
    fingerprint text NOT NULL,
    made_at timestamptz NOT NULL,
    PRIMARY KEY (tenant, digest)
);
GRANT SELECT, INSERT, UPDATE, DELETE ON reconcile_queue, deadlines TO :app_role;
GRANT SELECT, INSERT ON idempotency_keys TO :app_role;
"""

ENGINES = """
CREATE TABLE engines (
    id uuid PRIMARY KEY,
    tenant text NOT NULL,
    version integer NOT NULL,
    position bigint NOT NULL,
    schema smallint NOT NULL,
    name text NOT NULL UNIQUE,
    kind text NOT NULL,
    engine_id text NOT NULL,
    mark text NOT NULL,
    epoch integer NOT NULL,
    state text NOT NULL,
    state_since timestamptz NOT NULL,
    trouble text NOT NULL,
    trusted_position bigint NOT NULL,
    labels jsonb NOT NULL,
    capabilities jsonb NOT NULL,
    capacity jsonb NOT NULL,
    agents jsonb NOT NULL,
    network jsonb,
    server_version text NOT NULL,
    api_version text NOT NULL,
    last_seen_at timestamptz,
    swept_at timestamptz
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 200);

-- Which sandbox has which address of our own network (app/store/addresses.py).
CREATE TABLE addresses (
    engine text NOT NULL,
    ip inet NOT NULL,
    tenant text,
    stream_id uuid,
    object_id uuid,
    generation integer,
    leased_at timestamptz,
    freed_at timestamptz,
    PRIMARY KEY (engine, ip),
    CHECK (freed_at IS NOT NULL OR (stream_id IS NOT NULL AND tenant IS NOT NULL AND leased_at IS NOT NULL))
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 200);
CREATE UNIQUE INDEX addresses_leased ON addresses (stream_id) WHERE freed_at IS NULL;
CREATE INDEX addresses_free ON addresses (engine, freed_at, ip) WHERE freed_at IS NOT NULL;

CREATE TABLE operations (
    id uuid PRIMARY KEY,
    tenant text NOT NULL,
    version integer NOT NULL,
    position bigint NOT NULL,
    schema smallint NOT NULL
);
GRANT SELECT, INSERT, UPDATE ON engines, operations, addresses TO :app_role;
"""

VAULT = """
CREATE TABLE sealed_values (
    stream_id uuid PRIMARY KEY,
    kind text NOT NULL,
    tenant text NOT NULL,
    key_id text NOT NULL,
    wrapped_key bytea NOT NULL,
    sealed bytea NOT NULL,
    sealed_at timestamptz NOT NULL
);
COMMENT ON TABLE sealed_values IS 'Sealed values; a row is deleted when its sandbox can never run again.';

CREATE TABLE installation_keys (
    name text PRIMARY KEY,
    key_id text NOT NULL,
    wrapped bytea NOT NULL
);
COMMENT ON TABLE installation_keys IS 'Random keys of this installation, wrapped by the master key.';

-- A rotation ends with this lock, taken exclusively: what was sealed before it is seen by the last pass, what is sealed
-- after it is held against the keys that are in use then (app/store/vault/rotation.py). 21324 = 0x534C, 'SL'.
CREATE FUNCTION check_master_key() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, sandledger, pg_temp AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(21324, 1);
    IF NOT EXISTS (SELECT FROM sandledger.installation WHERE coalesce(master_key_id, NEW.key_id) = NEW.key_id)
       AND NOT EXISTS (SELECT FROM sandledger.installation_keys WHERE key_id = NEW.key_id) THEN
        RAISE EXCEPTION 'master key % is not in use any more', NEW.key_id
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER check_master_key BEFORE INSERT ON sealed_values FOR EACH ROW EXECUTE FUNCTION check_master_key();
GRANT SELECT, INSERT, DELETE, UPDATE (key_id, wrapped_key) ON sealed_values TO :app_role;
GRANT SELECT, INSERT, UPDATE ON installation_keys TO :app_role;
"""

REFUSALS = """
CREATE TABLE refusals (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    refused_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    tenant text NOT NULL CHECK (tenant <> ''),
    kind text,
    stream_id uuid,
    command text NOT NULL,
    status smallint NOT NULL,
    code text NOT NULL,
    message text NOT NULL,
    meta jsonb NOT NULL CHECK (
        ((meta #>> '{actor,kind}') <> '') IS TRUE AND ((meta #>> '{actor,id}') <> '') IS TRUE
        AND ((meta #>> '{actor,name}') <> '') IS TRUE AND ((meta ->> 'app_version') <> '') IS TRUE)
);
COMMENT ON TABLE refusals IS 'Commands that were refused: who asked for what, when, and why not. Append-only.';
CREATE INDEX refusals_by_stream ON refusals (stream_id, id) WHERE stream_id IS NOT NULL;
CREATE INDEX refusals_by_tenant ON refusals (tenant, id);
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON refusals
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
ALTER TABLE refusals ENABLE ALWAYS TRIGGER append_only;
GRANT SELECT, INSERT ON refusals TO :app_role;
"""

DIAGNOSTICS = """
CREATE TABLE kept_ends (
    stream_id uuid NOT NULL,
    generation integer NOT NULL,
    run integer NOT NULL,
    tenant text NOT NULL,
    taken_at timestamptz NOT NULL,
    logs text,
    more boolean NOT NULL,
    inspect jsonb,
    error text,
    keep_until timestamptz NOT NULL,
    PRIMARY KEY (stream_id, generation, run)
);
COMMENT ON TABLE kept_ends IS
    'Log and inspection of each object that was removed, read before; deleted when keep_until has passed.';
CREATE INDEX kept_ends_old ON kept_ends (keep_until);

CREATE TABLE engine_requests (
    id uuid PRIMARY KEY,
    tenant text NOT NULL,
    engine text NOT NULL,
    stream_id uuid NOT NULL,
    what text NOT NULL,
    arguments jsonb NOT NULL,
    asked_at timestamptz NOT NULL,
    lease_until timestamptz,
    answered_at timestamptz,
    answer text,
    error text
) WITH (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 200);
COMMENT ON TABLE engine_requests IS
    'Questions of processes without an engine to the workers beside it. A row lives for a minute at most.';

CREATE INDEX engine_requests_open ON engine_requests (engine, asked_at) WHERE answered_at IS NULL;

CREATE TABLE client_metrics (
    tenant text NOT NULL,
    day date NOT NULL,
    event text NOT NULL,
    sdk text NOT NULL,
    success boolean NOT NULL,
    count bigint NOT NULL,
    duration_ms_sum bigint NOT NULL,
    PRIMARY KEY (tenant, day, event, sdk, success)
) WITH (fillfactor = 70);
COMMENT ON TABLE client_metrics IS 'What the SDKs report about their own calls, counted by day.';

CREATE TABLE stations (
    worker_id text NOT NULL,
    engine text NOT NULL,
    name text NOT NULL,
    trouble text NOT NULL,
    since timestamptz NOT NULL,
    said_at timestamptz NOT NULL,
    PRIMARY KEY (worker_id, engine)
);
COMMENT ON TABLE stations IS 'Workers that cannot use their engines. A row counts for half a minute.';
GRANT SELECT, INSERT, UPDATE, DELETE ON kept_ends, engine_requests, client_metrics, stations TO :app_role;
"""

TRAFFIC = """
CREATE TABLE activity (
    sandbox_id uuid PRIMARY KEY,
    tenant text NOT NULL,
    last_at timestamptz NOT NULL,
    requests bigint NOT NULL,
    bytes_in bigint NOT NULL,
    bytes_out bigint NOT NULL
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 200);
COMMENT ON TABLE activity IS
    'Traffic through the proxy; a row stays as long as its sandbox''s. It is seconds late, and no event.';
GRANT SELECT, INSERT, UPDATE ON activity TO :app_role;
"""

# For people who read the tables with other tools.
COMMENTS = """
COMMENT ON TABLE sandboxes IS
    'Each sandbox as it is now, the fold of its events; rows stay when they have ended (ended_at, closed_at).';
COMMENT ON TABLE engines IS 'Each engine as it is now, the fold of its events.';
COMMENT ON TABLE operations IS 'Head of the one stream of administrators'' acts.';
COMMENT ON TABLE reconcile_queue IS 'Streams that want attention; a row goes when its stream is as wanted.';
COMMENT ON TABLE deadlines IS 'One row for each deadline of a stream.';
COMMENT ON TABLE idempotency_keys IS 'Which stream the first request with an Idempotency-Key made.';
COMMENT ON COLUMN activity.tenant IS 'Whose sandbox.';
COMMENT ON COLUMN activity.last_at IS 'Not folded: when bytes moved last.';
COMMENT ON COLUMN activity.requests IS 'Not folded: requests and WebSockets that reached it.';
COMMENT ON COLUMN activity.bytes_in IS 'Not folded: bytes to it, without heads.';
COMMENT ON COLUMN activity.bytes_out IS 'Not folded: bytes from it, without heads.';
COMMENT ON TABLE addresses IS
    'Addresses of our own network on each engine: which sandbox has one, or had it last. One sandbox has one at most.';
COMMENT ON COLUMN addresses.engine IS 'On whose network of ours.';
COMMENT ON COLUMN addresses.tenant IS 'Of the sandbox that has it, or had it last; none = nobody yet.';
COMMENT ON COLUMN addresses.stream_id IS 'The sandbox that has it, or had it last.';
COMMENT ON COLUMN addresses.object_id IS 'Its object on the engine.';
COMMENT ON COLUMN addresses.generation IS 'Of the object that the address was last leased for.';
COMMENT ON COLUMN addresses.freed_at IS
    'When the removal of its sandbox was recorded; none = leased, -infinity = never leased.';
COMMENT ON COLUMN client_metrics.day IS 'UTC, by the database''s clock.';
COMMENT ON COLUMN client_metrics.event IS 'sandbox.create.';
COMMENT ON COLUMN client_metrics.sdk IS 'Language and version, e.g. python/1.1.1.';
COMMENT ON COLUMN client_metrics.duration_ms_sum IS 'A report counts with one day at most.';
COMMENT ON COLUMN stations.engine IS 'As the worker''s settings name it; it may never have answered.';
COMMENT ON COLUMN stations.name IS 'Of the worker, for people: its host.';
COMMENT ON COLUMN stations.trouble IS 'Why it cannot use the engine.';
COMMENT ON COLUMN stations.said_at IS 'Rows that are not written again are deleted.';
COMMENT ON COLUMN engine_requests.engine IS 'Whose workers answer.';
COMMENT ON COLUMN engine_requests.what IS 'logs, inspect.';
COMMENT ON COLUMN engine_requests.lease_until IS 'Until then a worker is at it.';
COMMENT ON COLUMN engine_requests.answer IS 'JSON, without sealed values.';
COMMENT ON COLUMN engine_requests.error IS 'Why there is no answer.';
COMMENT ON COLUMN kept_ends.generation IS 'Of the object that ended.';
COMMENT ON COLUMN kept_ends.run IS 'Which of its starts.';
COMMENT ON COLUMN kept_ends.logs IS 'The end of the log, without sealed values; none = it could not be read.';
COMMENT ON COLUMN kept_ends.more IS 'There were older lines.';
COMMENT ON COLUMN kept_ends.inspect IS 'What the engine said of it, without sealed values.';
COMMENT ON COLUMN kept_ends.error IS 'Why something is missing.';
COMMENT ON COLUMN deadlines.name IS 'expiry, transition, ready, freeze, commit.';
COMMENT ON COLUMN deadlines.next_run_time IS 'fires_at, or the end of a claim''s lease.';
COMMENT ON COLUMN deadlines.cause IS 'Position of the event that set it.';
COMMENT ON COLUMN engines.tenant IS 'Always _platform.';
COMMENT ON COLUMN engines.version IS 'Version of the last event; the append''s guard.';
COMMENT ON COLUMN engines.position IS 'Position of the last event.';
COMMENT ON COLUMN engines.schema IS 'Highest schema number in the stream.';
COMMENT ON COLUMN engines.name IS 'As settings name it.';
COMMENT ON COLUMN engines.kind IS 'docker, fake.';
COMMENT ON COLUMN engines.engine_id IS 'What the engine calls itself.';
COMMENT ON COLUMN engines.mark IS 'Random word that we left on the engine.';
COMMENT ON COLUMN engines.epoch IS 'Rises when the engine is replaced.';
COMMENT ON COLUMN engines.state IS 'up, dark, mismatch.';
COMMENT ON COLUMN engines.trouble IS 'Why it is dark or mismatched.';
COMMENT ON COLUMN engines.trusted_position IS
    'Objects up to this position are no sign that the log went back.';
COMMENT ON COLUMN engines.agents IS 'Image id -> id of the container that copied the agent''s files.';
COMMENT ON COLUMN engines.network IS 'Our own network there; none = there was none yet.';
COMMENT ON COLUMN engines.last_seen_at IS 'Not folded: when a worker last reached it.';
COMMENT ON COLUMN engines.swept_at IS 'Not folded: when a worker last compared all of it.';
COMMENT ON COLUMN events.position IS 'Place in the one total order. Gaps are normal.';
COMMENT ON COLUMN events.stream_id IS 'The aggregate: a sandbox, a snapshot, an engine, or the installation.';
COMMENT ON COLUMN events.kind IS 'Which aggregate: sandbox, snapshot, engine, operations.';
COMMENT ON COLUMN events.tenant IS 'Whose stream.';
COMMENT ON COLUMN events.version IS '1..n within the stream.';
COMMENT ON COLUMN events.type IS 'Stable wire name, e.g. sandbox.requested.';
COMMENT ON COLUMN events.schema IS 'Schema number of data.';
COMMENT ON COLUMN events.data IS 'What happened. Never a secret.';
COMMENT ON COLUMN events.meta IS 'actor, request_id, cause, client, app_version.';
COMMENT ON COLUMN events.recorded_at IS 'The database''s clock at the append.';
COMMENT ON COLUMN idempotency_keys.digest IS 'SHA-256 of the Idempotency-Key.';
COMMENT ON COLUMN idempotency_keys.stream_id IS 'What the first request with this key made.';
COMMENT ON COLUMN idempotency_keys.fingerprint IS 'Keyed digest of that request.';
COMMENT ON COLUMN installation.id IS 'Label of every object of ours on an engine.';
COMMENT ON COLUMN installation.master_key_id IS 'Digest of the master key that seals here.';
COMMENT ON COLUMN installation.app_role IS 'The role that servers work as; their logins are members of it.';
COMMENT ON COLUMN installation.owner_role IS 'Who made the schema.';
COMMENT ON COLUMN installation.epoch IS 'Of the log; rises when an operator restores it.';
COMMENT ON COLUMN installation_keys.name IS 'digest, token, link, audit.';
COMMENT ON COLUMN installation_keys.key_id IS 'Which master key wraps it.';
COMMENT ON COLUMN installation_keys.wrapped IS 'A random key, wrapped by the master key.';
COMMENT ON COLUMN operations.id IS 'The installation''s id.';
COMMENT ON COLUMN operations.tenant IS 'Always _platform.';
COMMENT ON COLUMN operations.version IS 'Version of the last event; the append''s guard.';
COMMENT ON COLUMN operations.position IS 'Position of the last event.';
COMMENT ON COLUMN operations.schema IS 'Highest schema number in the stream.';
COMMENT ON COLUMN reconcile_queue.engine IS 'Whose workers take it; empty = not placed, any worker.';
COMMENT ON COLUMN reconcile_queue.revision IS 'Rises with every touch and every hint.';
COMMENT ON COLUMN reconcile_queue.due_at IS 'Also the visibility timeout of a claim.';
COMMENT ON COLUMN reconcile_queue.priority IS '0 user, 1 background.';
COMMENT ON COLUMN reconcile_queue.attempts IS 'Counted failures in a row.';
COMMENT ON COLUMN reconcile_queue.lease_owner IS 'A new value for each claim.';
COMMENT ON COLUMN reconcile_queue.progress IS 'How far the attempt under way is, for people.';
COMMENT ON COLUMN reconcile_queue.cause IS 'Position of the event that asked for attention.';
COMMENT ON COLUMN reconcile_queue.missing_since IS 'Since when the engine says there is none.';
COMMENT ON COLUMN reconcile_queue.trace IS 'Reserved: trace of the request.';
COMMENT ON COLUMN refusals.kind IS 'Of the stream; none when there was none.';
COMMENT ON COLUMN refusals.stream_id IS 'None: the id was not known, or there was none yet.';
COMMENT ON COLUMN refusals.command IS 'Method and route, e.g. POST /sandboxes/{id}/pause.';
COMMENT ON COLUMN refusals.status IS 'HTTP status of the answer.';
COMMENT ON COLUMN refusals.meta IS 'As on events.';
COMMENT ON COLUMN sandboxes.version IS 'Version of the last event; the append''s guard.';
COMMENT ON COLUMN sandboxes.position IS 'Position of the last event.';
COMMENT ON COLUMN sandboxes.schema IS 'Highest schema number in the stream.';
COMMENT ON COLUMN sandboxes.phase IS 'Public state, derived.';
COMMENT ON COLUMN sandboxes.desired IS 'What its owner wants: running, paused, terminated.';
COMMENT ON COLUMN sandboxes.observed IS
    'What the log knows of the object: none, created, running, paused, exited, lost, removed.';
COMMENT ON COLUMN sandboxes.spec IS 'As accepted; env is names with keyed digests.';
COMMENT ON COLUMN sandboxes.engine IS 'Name of the engine; none = no engine had room yet.';
COMMENT ON COLUMN sandboxes.epoch IS 'Of the engine when it was placed.';
COMMENT ON COLUMN sandboxes.place IS 'Namespace on the engine; empty on Docker.';
COMMENT ON COLUMN sandboxes.object_id IS 'The engine''s object belongs to this id; names derive from it.';
COMMENT ON COLUMN sandboxes.generation IS 'Objects made for it so far.';
COMMENT ON COLUMN sandboxes.run IS 'Starts so far.';
COMMENT ON COLUMN sandboxes.runtime IS 'The engine''s object: parts, image, start, exit.';
COMMENT ON COLUMN sandboxes.address IS 'Network, address and published ports.';
COMMENT ON COLUMN sandboxes.waiting IS 'Step and reason that a Pending sandbox waits for.';
COMMENT ON COLUMN sandboxes.failure IS 'Step, reason and message when it could not be provided.';
COMMENT ON COLUMN sandboxes.frozen_by IS 'The snapshot for which it stands still.';
COMMENT ON COLUMN sandboxes.freeze_at IS 'When it was asked to stand still, then since when it does.';
COMMENT ON COLUMN sandboxes.link_number IS 'Signed links that carry another number do not hold.';
COMMENT ON COLUMN sandboxes.cpu_nanos IS 'CPU limit in billionths of a CPU.';
COMMENT ON COLUMN sandboxes.memory_bytes IS 'Memory limit in bytes.';
COMMENT ON COLUMN sandboxes.gpus IS 'Number of GPUs.';
COMMENT ON COLUMN sandboxes.key_id IS 'Id of the key that asked for it.';
COMMENT ON COLUMN sandboxes.key_name IS 'Name of the key that asked for it.';
COMMENT ON COLUMN sandboxes.fingerprint IS 'Keyed digest of the request.';
COMMENT ON COLUMN sandboxes.created_at IS 'When it was accepted.';
COMMENT ON COLUMN sandboxes.changed_at IS 'When the phase last changed.';
COMMENT ON COLUMN sandboxes.begun_at IS 'When the start of its present run was recorded.';
COMMENT ON COLUMN sandboxes.ready_at IS 'Since when its present run can be used.';
COMMENT ON COLUMN sandboxes.expires_at IS 'When it expires; none = never by itself.';
COMMENT ON COLUMN sandboxes.ended_at IS 'Since when clients get 404.';
COMMENT ON COLUMN sandboxes.end_cause IS 'user_delete, expired, expired_while_pending.';
COMMENT ON COLUMN sandboxes.ended_by IS 'Kind and name of the actor.';
COMMENT ON COLUMN sandboxes.closed_at IS 'When nothing of it was left on the engine.';
COMMENT ON COLUMN sandboxes.since_position IS 'No event of it lies below; lets history prune partitions.';
COMMENT ON TABLE snapshots IS 'Each snapshot as it is now, the fold of its events; rows stay when it was removed.';
COMMENT ON COLUMN snapshots.version IS 'Version of the last event; the append''s guard.';
COMMENT ON COLUMN snapshots.position IS 'Position of the last event.';
COMMENT ON COLUMN snapshots.schema IS 'Highest schema number in the stream.';
COMMENT ON COLUMN snapshots.sandbox_id IS 'Whose files it has.';
COMMENT ON COLUMN snapshots.name IS 'As its owner calls it; need not be unique.';
COMMENT ON COLUMN snapshots.engine IS 'Where its image is.';
COMMENT ON COLUMN snapshots.generation IS 'Of the source, when it was asked for.';
COMMENT ON COLUMN snapshots.run IS 'Of the source, when it was asked for.';
COMMENT ON COLUMN snapshots.state IS 'Creating, Ready, Failed, Deleting, Removed.';
COMMENT ON COLUMN snapshots.reason IS 'Why it is in this state, in the contract''s words.';
COMMENT ON COLUMN snapshots.raw_id IS 'Image of the commit; none = there is no whole one yet.';
COMMENT ON COLUMN snapshots.image_id IS 'Image that sandboxes are made from.';
COMMENT ON COLUMN snapshots.size_bytes IS 'Of that image, with the layers that it shares.';
COMMENT ON COLUMN snapshots.frozen_ms IS 'How long the source stood still for it.';
COMMENT ON COLUMN snapshots.created_at IS 'When it was accepted.';
COMMENT ON COLUMN snapshots.changed_at IS 'When the state last changed.';
COMMENT ON COLUMN snapshots.removed_at IS 'When nothing of it was left on the engine.';
COMMENT ON COLUMN snapshots.since_position IS 'No event of it lies below.';
COMMENT ON COLUMN sealed_values.key_id IS 'Which master key wraps the data key.';
COMMENT ON COLUMN sealed_values.wrapped_key IS 'The stream''s own data key, wrapped.';
COMMENT ON COLUMN sealed_values.sealed IS 'AES-256-GCM of the values, under the data key.';
"""


def upgrade() -> None:
    """Make everything, in one transaction."""
    app_role = op.get_bind().exec_driver_sql(APP_ROLE).scalar_one()
    for block in (
        ROLE,
        INSTALLATION,
        EVENTS,
        HORIZON,
        IDENTITY,
        APPEND_ONLY,
        PARTITIONS,
        SKIP,
        SANDBOXES,
        SNAPSHOTS,
        WORK,
        ENGINES,
        VAULT,
        REFUSALS,
        DIAGNOSTICS,
        TRAFFIC,
        COMMENTS,
        "GRANT SELECT ON alembic_version TO :app_role;",
    ):
        run_script(block.replace(":app_role", app_role))


def downgrade() -> None:
    """The log is append-only; going back is restoring a backup."""
    raise SettingsError("the log is append-only, and no migration is undone: restore a backup of that version instead")
