"""The log, the current view, the reconcile queue, expiry jobs, the vault and refusals.

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
    -- Temporary tables and new objects are of no use to servers. PUBLIC loses them only where nobody else lives.
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
    -- First the sequence, then the announcements, each with a look of its own; never one statement for both.
    SELECT last_value INTO handed_out FROM sandledger.events_position;
    SELECT min(((classid::bigint & 65535) << 32) | objid::bigint) INTO announced
      FROM pg_locks
     WHERE locktype = 'advisory' AND objsubid = 1 AND (classid::bigint >> 16) = 21324
       AND database = (SELECT oid FROM pg_database WHERE datname = current_database());
    RETURN least(handed_out, announced);
END $$;
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
        -- Made apart and attached: CREATE TABLE ... PARTITION OF would wait for whoever reads or writes the log, be it
        -- a dump of hours, and every append would wait behind it. ATTACH conflicts with neither.
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
REVOKE ALL ON FUNCTION log_ensure_partitions FROM PUBLIC;
GRANT EXECUTE ON FUNCTION log_ensure_partitions TO :app_role;
SELECT log_ensure_partitions();
-- Not the position: a row below the horizon would never be seen.
GRANT SELECT, INSERT (stream_id, tenant, version, type, schema, data, meta, recorded_at) ON events TO :app_role;
GRANT SELECT, USAGE ON SEQUENCE events_position TO :app_role;
"""

SANDBOXES = """
CREATE TABLE phase_transitions (
    from_phase text NOT NULL,
    to_phase text NOT NULL,
    PRIMARY KEY (from_phase, to_phase)
);
COMMENT ON TABLE phase_transitions IS 'Which public state may follow which; enforced on sandboxes by trigger.';
INSERT INTO phase_transitions VALUES
    ('Pending', 'Running'), ('Pending', 'Resuming'), ('Pending', 'Terminated'), ('Pending', 'Failed'),
    ('Pending', 'Stopping'),
    ('Running', 'Pausing'), ('Running', 'Resuming'), ('Running', 'Terminated'), ('Running', 'Failed'),
    ('Running', 'Stopping'),
    ('Pausing', 'Paused'), ('Pausing', 'Terminated'), ('Pausing', 'Failed'), ('Pausing', 'Stopping'),
    ('Paused', 'Resuming'), ('Paused', 'Pausing'), ('Paused', 'Terminated'), ('Paused', 'Failed'),
    ('Paused', 'Stopping'),
    ('Resuming', 'Running'), ('Resuming', 'Terminated'), ('Resuming', 'Failed'), ('Resuming', 'Stopping'),
    ('Terminated', 'Stopping'), ('Failed', 'Stopping'), ('Failed', 'Terminated'), ('Stopping', 'Terminated');
GRANT SELECT ON phase_transitions TO :app_role;

CREATE TABLE sandboxes (
    id uuid PRIMARY KEY,
    tenant text NOT NULL,
    version integer NOT NULL,
    phase text NOT NULL,
    driver text NOT NULL,
    desired text NOT NULL,
    observed text NOT NULL,
    spec jsonb NOT NULL,
    metadata jsonb NOT NULL,
    runtime jsonb,
    failure_reason text,
    failure_message text,
    fingerprint text NOT NULL,
    created_at timestamptz NOT NULL,
    changed_at timestamptz NOT NULL,
    expires_at timestamptz,
    ended_at timestamptz,
    end_cause text,
    ended_by text,
    closed_at timestamptz,
    since_position bigint NOT NULL
) WITH (fillfactor = 80);
CREATE INDEX sandboxes_listing ON sandboxes (tenant, created_at DESC, id DESC) WHERE ended_at IS NULL;
CREATE INDEX sandboxes_all ON sandboxes (tenant, created_at DESC, id DESC);
CREATE INDEX sandboxes_by_phase ON sandboxes (tenant, phase, created_at DESC, id DESC) WHERE ended_at IS NULL;
CREATE INDEX sandboxes_open ON sandboxes (driver, id) WHERE closed_at IS NULL;
CREATE INDEX sandboxes_metadata ON sandboxes USING gin (metadata jsonb_path_ops) WHERE ended_at IS NULL;

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
ALTER TABLE sandboxes ADD CONSTRAINT born_pending CHECK (version > 1 OR phase = 'Pending');
GRANT SELECT, INSERT, UPDATE ON sandboxes TO :app_role;
"""

WORK = """
CREATE TABLE reconcile_queue (
    sandbox_id uuid PRIMARY KEY,
    tenant text NOT NULL,
    driver text NOT NULL,
    generation bigint NOT NULL,
    due_at timestamptz NOT NULL,
    priority smallint NOT NULL DEFAULT 0,
    attempts integer NOT NULL DEFAULT 0,
    first_failed_at timestamptz,
    lease_owner uuid,
    lease_until timestamptz,
    last_error text,
    last_code text,
    cause bigint,
    missing_since timestamptz
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 200);
CREATE INDEX reconcile_queue_due ON reconcile_queue (driver, priority, due_at);

CREATE TABLE expiry_jobs (
    sandbox_id uuid PRIMARY KEY,
    expires_at timestamptz NOT NULL,
    next_run_time timestamptz NOT NULL,
    attempts integer NOT NULL DEFAULT 0,
    cause bigint
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 200);
CREATE INDEX expiry_jobs_due ON expiry_jobs (next_run_time);
GRANT SELECT, INSERT, UPDATE, DELETE ON reconcile_queue, expiry_jobs TO :app_role;
"""

VAULT = """
CREATE TABLE sandbox_secrets (
    sandbox_id uuid PRIMARY KEY,
    tenant text NOT NULL,
    key_id text NOT NULL,
    wrapped_key bytea NOT NULL,
    sealed bytea NOT NULL,
    sealed_at timestamptz NOT NULL
);
COMMENT ON TABLE sandbox_secrets IS 'Sealed values; a row is deleted when its sandbox ends.';
GRANT SELECT, INSERT, DELETE ON sandbox_secrets TO :app_role;
"""

REFUSALS = """
CREATE TABLE refusals (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    refused_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    tenant text NOT NULL CHECK (tenant <> ''),
    sandbox_id uuid,
    command text NOT NULL,
    status smallint NOT NULL,
    code text NOT NULL,
    message text NOT NULL,
    meta jsonb NOT NULL CHECK (
        ((meta #>> '{actor,kind}') <> '') IS TRUE AND ((meta #>> '{actor,id}') <> '') IS TRUE
        AND ((meta #>> '{actor,name}') <> '') IS TRUE AND ((meta ->> 'app_version') <> '') IS TRUE)
);
COMMENT ON TABLE refusals IS 'Commands that were refused: who asked for what, when, and why not. Append-only.';
CREATE INDEX refusals_by_sandbox ON refusals (sandbox_id, id) WHERE sandbox_id IS NOT NULL;
CREATE INDEX refusals_by_tenant ON refusals (tenant, id);
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON refusals
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
ALTER TABLE refusals ENABLE ALWAYS TRIGGER append_only;
GRANT SELECT, INSERT ON refusals TO :app_role;
"""

# For whoever reads the tables with tools of their own.
COMMENTS = """
COMMENT ON TABLE sandboxes IS
    'Each sandbox as it is now, the fold of its events; rows stay when they have ended (ended_at, closed_at).';
COMMENT ON TABLE reconcile_queue IS 'Sandboxes that want attention; a row goes when its sandbox is as wanted.';
COMMENT ON TABLE expiry_jobs IS 'One row for every sandbox that has a deadline and has not ended.';
COMMENT ON COLUMN events.position IS 'Place in the one total order. Gaps are normal.';
COMMENT ON COLUMN events.stream_id IS 'The sandbox.';
COMMENT ON COLUMN events.tenant IS 'Whose sandbox.';
COMMENT ON COLUMN events.recorded_at IS 'The database''s clock at the append.';
COMMENT ON COLUMN events.version IS '1..n within the stream.';
COMMENT ON COLUMN events.type IS 'Stable wire name, e.g. sandbox.requested.';
COMMENT ON COLUMN events.schema IS 'Schema number of data.';
COMMENT ON COLUMN events.data IS 'What happened. Never a secret.';
COMMENT ON COLUMN events.meta IS 'actor, request_id, cause, client, app_version.';
COMMENT ON COLUMN refusals.sandbox_id IS 'None: the id was not known, or there was none yet.';
COMMENT ON COLUMN refusals.status IS 'HTTP status of the answer.';
COMMENT ON COLUMN refusals.command IS 'Method and route, e.g. POST /sandboxes/{id}/pause.';
COMMENT ON COLUMN refusals.meta IS 'As on events.';
COMMENT ON COLUMN sandboxes.desired IS 'What its owner wants: running, paused, terminated.';
COMMENT ON COLUMN sandboxes.observed IS
    'What the log knows of the runtime: none, created, running, paused, exited, lost, removed.';
COMMENT ON COLUMN sandboxes.fingerprint IS 'Keyed digest of the request.';
COMMENT ON COLUMN sandboxes.failure_reason IS 'Why it could not be provided.';
COMMENT ON COLUMN sandboxes.created_at IS 'When it was accepted.';
COMMENT ON COLUMN sandboxes.expires_at IS 'Its deadline; none = no end by itself.';
COMMENT ON COLUMN sandboxes.end_cause IS 'user_delete, expired, expired_while_pending.';
COMMENT ON COLUMN sandboxes.ended_by IS 'Kind and name of the actor.';
COMMENT ON COLUMN sandboxes.version IS 'Version of the last event; the append''s guard.';
COMMENT ON COLUMN sandboxes.phase IS 'Public state, derived.';
COMMENT ON COLUMN sandboxes.spec IS 'As accepted; env is names with keyed digests.';
COMMENT ON COLUMN sandboxes.runtime IS 'The engine''s object: id, name, image_digest, started_at, exit.';
COMMENT ON COLUMN sandboxes.changed_at IS 'When the phase last changed.';
COMMENT ON COLUMN sandboxes.ended_at IS 'Since when clients get 404.';
COMMENT ON COLUMN sandboxes.closed_at IS 'When nothing of it was left on the engine.';
COMMENT ON COLUMN sandboxes.since_position IS 'No event of it lies below; lets history prune partitions.';
COMMENT ON COLUMN expiry_jobs.next_run_time IS 'Deadline, or the end of a claim''s lease.';
COMMENT ON COLUMN expiry_jobs.cause IS 'Position of the event that set the deadline.';
COMMENT ON COLUMN reconcile_queue.generation IS 'Rises with every touch.';
COMMENT ON COLUMN reconcile_queue.due_at IS 'Also the visibility timeout of a claim.';
COMMENT ON COLUMN reconcile_queue.priority IS '0 user, 1 background.';
COMMENT ON COLUMN reconcile_queue.attempts IS 'Counted failures in a row.';
COMMENT ON COLUMN reconcile_queue.lease_owner IS 'One value a claim.';
COMMENT ON COLUMN reconcile_queue.cause IS 'Position of the event that asked for attention.';
COMMENT ON COLUMN reconcile_queue.missing_since IS 'Since when the engine says there is none.';
COMMENT ON COLUMN sandbox_secrets.key_id IS 'Which master key wraps the data key.';
COMMENT ON COLUMN sandbox_secrets.wrapped_key IS 'The sandbox''s own data key, wrapped.';
COMMENT ON COLUMN sandbox_secrets.sealed IS 'AES-256-GCM of the values, under the data key.';
COMMENT ON COLUMN installation.id IS 'Label of every object of ours on an engine.';
COMMENT ON COLUMN installation.master_key_id IS 'Digest of the master key that seals here.';
COMMENT ON COLUMN installation.app_role IS 'The role that servers work as; their logins are members of it.';
COMMENT ON COLUMN installation.owner_role IS 'Who made the schema.';
"""


def upgrade() -> None:
    """Make everything, in one transaction."""
    app_role = op.get_bind().exec_driver_sql(APP_ROLE).scalar_one()
    for block in (
        ROLE,
        INSTALLATION,
        EVENTS,
        HORIZON,
        APPEND_ONLY,
        PARTITIONS,
        SANDBOXES,
        WORK,
        VAULT,
        REFUSALS,
        COMMENTS,
        "GRANT SELECT ON alembic_version TO :app_role;",
    ):
        run_script(block.replace(":app_role", app_role))


def downgrade() -> None:
    """The log is append-only; going back is restoring a backup."""
    raise SettingsError("the log is append-only, and no migration is undone: restore a backup of that version instead")
